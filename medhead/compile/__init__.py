"""Captured and compiled steps: the decode step with fixed shapes and without host reads, as a CUDA graph or a compiled function.

`backends` are the ways to make a step fast, `graph_cache` keeps what was made, `captured` runs such steps for a batch.
`compiled_target` is for proposers that work on the host: there the target's pass alone is compiled.
"""

from medhead.compile.backends import BACKENDS
from medhead.compile.compiled_target import CompiledTarget, may_use_kept_passes
from medhead.compile.graph_cache import GraphCache, automatic_graphs

__all__ = ["BACKENDS", "CompiledTarget", "GraphCache", "automatic_graphs", "may_use_kept_passes"]
