"""medhead: exact multi-token decoding for any Hugging Face causal language model."""

__version__ = "0.1.0"

from medhead.core.acceptance import TypicalAcceptance
from medhead.core.tree import TokenTree
from medhead.decoder import Decoder, Statistics
from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.proposers import Proposer, register_proposer

__all__ = [
    "Decoder",
    "MedheadError",
    "Proposer",
    "Statistics",
    "TokenTree",
    "TypicalAcceptance",
    "UnsupportedTargetError",
    "register_proposer",
]
