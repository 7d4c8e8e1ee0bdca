"""What fills a token tree."""

from medhead.proposers import heads, hybrid, ngram, none, recycling  # noqa: F401  (each registers its proposer)
from medhead.proposers.base import PROPOSERS, DecodeState, Proposer, Verified, build_proposer, register_proposer

__all__ = ["PROPOSERS", "DecodeState", "Proposer", "Verified", "build_proposer", "register_proposer"]
