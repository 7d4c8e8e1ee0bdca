"""Draft heads: their kinds, their configuration, and the PEFT checkpoint they are stored in."""

from medhead.heads import attention, block, medusa, recurrent, sequential  # noqa: F401  (each registers its kind)
from medhead.heads.adapter import heads_of, load_adapted
from medhead.heads.base import KINDS, Heads, HeadsConfig, build_heads, register_kind
from medhead.heads.checkpoint import load_heads, save_heads

__all__ = [
    "KINDS",
    "Heads",
    "HeadsConfig",
    "build_heads",
    "heads_of",
    "load_adapted",
    "load_heads",
    "register_kind",
    "save_heads",
]
