"""The decode step with shapes that never change and a host that never has to answer: one CUDA graph, or one compiled function.

`buffers` is all that such a step reads and writes, `step` is the step, `ways` are the ways to run it, `plans` keeps what
was captured for the next generation, `loop` is the decode loop around it. `compiled_target` is for proposers that work on the
host: of their steps, the target's pass is compiled.
"""

from medhead.captured.compiled_target import CompiledTarget
from medhead.captured.loop import CapturedLoop
from medhead.captured.plans import Plans
from medhead.captured.ways import WAYS

__all__ = ["WAYS", "CapturedLoop", "CompiledTarget", "Plans"]
