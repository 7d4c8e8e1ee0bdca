"""medhead: exact multi-token decoding for any Hugging Face causal language model."""

from pathlib import Path as _Path

# In a checkout the folders kernels/, training/ and app/ stand beside this package; in a wheel they are inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "training").is_dir():
    __path__.append(str(_root))

__version__ = "0.1.0"

from medhead.acceptance import TypicalAcceptance  # noqa: E402  (the path above must be complete first)
from medhead.decoder import Decoder, Statistics  # noqa: E402
from medhead.errors import MedheadError, UnsupportedTargetError  # noqa: E402
from medhead.proposers import Proposer, register_proposer  # noqa: E402
from medhead.tree import TokenTree  # noqa: E402

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
