"""Extra decoding heads: kinds, their configuration, and the PEFT checkpoint they are stored in."""

from medhead.heads import medusa, recurrent  # noqa: F401  (each registers its kind)
from medhead.heads.base import KINDS, Heads, HeadsConfig, build_heads, register_kind
from medhead.heads.checkpoint import load_heads, save_heads

__all__ = ["KINDS", "Heads", "HeadsConfig", "build_heads", "load_heads", "register_kind", "save_heads"]
