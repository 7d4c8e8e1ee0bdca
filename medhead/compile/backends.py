"""The ways to run a captured step.

`graph` is what a GPU wants: all kernels of a step launched at once (a CUDA graph). `compiled` lets PyTorch's compiler fuse
them first, on a GPU inside a graph as well. Both need a step that never asks the host; `recorded`, which writes down a step's
operations without running them and plays them back, proves that on any machine. `eager` just calls the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from medhead.compile.buffers import Buffers
from medhead.compile.step import FixedStep
from medhead.compile.trace import compile_tape, write_down
from medhead.errors import MedheadError

Run = Callable[[], object]
_WARM = 3  # runs before a capture: kernels are compiled and tuned, tables are made
_pools: dict[torch.device, Any] = {}  # graphs of a device share memory


def eager(step: FixedStep, buffers: Buffers) -> Run:
    """Call it."""
    return lambda: step(buffers)


def recorded(step: FixedStep, buffers: Buffers) -> Run:
    """Write its operations down once, without running them, and play them back."""
    tape, tensors = record(step, buffers), buffers.tensors()
    return lambda: tape(*tensors)


def compiled(step: FixedStep, buffers: Buffers) -> Run:
    """Let PyTorch's compiler fuse what was recorded; on CUDA the result is captured."""
    apart = step.target.device.type == "cpu"  # on CUDA a kernel moves the rows of all layers at once
    tensors = buffers.tensors(apart)
    compiles = compile_tape(record(step, buffers, apart), tensors, dynamic=False)

    def run() -> None:
        compiles(*tensors)

    return _captured(run, step.target.device) if step.target.device.type == "cuda" else run


def graph(step: FixedStep, buffers: Buffers) -> Run:
    """A CUDA graph of the step as it is."""
    return _captured(lambda: step(buffers), step.target.device)


WAYS: dict[str, Callable[[FixedStep, Buffers], Run]] = {
    "eager": eager,
    "recorded": recorded,
    "compiled": compiled,
    "graph": graph,
}


def check_device(way: str, device: torch.device) -> None:
    """Refuse a way that the device does not know.

    Raises:
        MedheadError: names both.
    """
    if way == "graph" and device.type != "cuda":
        raise MedheadError(f"step 'graph' needs a CUDA device, the model is on {device}; see 'compiled'")


def make(way: str, step: FixedStep, buffers: Buffers) -> Run:
    """A step made ready to run that way; the buffers' contents are lost.

    Raises:
        MedheadError: the step cannot be captured, with the reason.
    """
    check_device(way, step.target.device)
    try:
        step(buffers)  # what a first pass makes and keeps (tables, kernels) is made outside the capture
        return WAYS[way](step, buffers)
    except Exception as error:  # whatever a model, the compiler or CUDA throws
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MedheadError(
            f"a step of {step.target.name} cannot be {'captured' if way == 'graph' else way} ({reason}); "
            "decode with step='loop'"
        ) from error


def record(step: FixedStep, buffers: Buffers, apart: bool = False) -> GraphModule:
    """The step's operations over `buffers.tensors()`, written down with tensors that hold nothing: who reads one fails."""

    def run(*tensors: Tensor) -> None:
        step(buffers.over(list(tensors), apart))

    return write_down(run, buffers.tensors(apart), "fake")


def _captured(run: Run, device: torch.device) -> Run:
    """What `run` launches, as a CUDA graph."""
    if device not in _pools:
        _pools[device] = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken, pool=_pools[device]):
        run()
    return taken.replay
