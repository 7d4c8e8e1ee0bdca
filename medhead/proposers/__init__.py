"""Proposers: what fills a token tree."""

from medhead.proposers import heads, hybrid, lookahead, ngram, recycling  # noqa: F401  (each registers its proposer)
from medhead.proposers.base import PROPOSERS, DecodeState, Proposer, VerifyOutput, build_proposer, register_proposer
from medhead.proposers.candidates import Candidates

__all__ = ["PROPOSERS", "Candidates", "DecodeState", "Proposer", "VerifyOutput", "build_proposer", "register_proposer"]
