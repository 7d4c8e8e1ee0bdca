"""The decode step with shapes that never change and a host that never has to answer: one CUDA graph, or one compiled function.

`buffers` is all that such a step reads and writes, `step` is the step, `ways` are the ways to run it, `plans` keeps what
was captured for the next generation, `loop` is the decode loop around it. `compiled_target` is for proposers that work on the
host: of their steps, the target's pass is compiled.
"""

from medhead.compile.backends import WAYS
from medhead.compile.compiled_target import CompiledTarget
from medhead.compile.graph_cache import Plans
from medhead.compile.loop import CapturedLoop

__all__ = ["WAYS", "CapturedLoop", "CompiledTarget", "Plans"]
