"""The ways to run a captured step.

`graph` launches all kernels of a step at once (a CUDA graph). `compiled` lets PyTorch's compiler fuse them first, on a GPU
inside a graph as well. Both need a step that never reads a tensor on the host; `recorded`, which traces a step's operations
without running them and plays them back, tests that on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from medhead.compile.trace import compile_graph, trace
from medhead.core.acceptance import Accepted, verify_greedy, verify_sampled
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise, LazyGumbel
from medhead.core.step import decode_step
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.model.target import Target
from medhead.proposers.base import Proposer

Run = Callable[[], object]
Step = Callable[[StepBuffers], None]
_WARMUP_RUNS = 3  # before a capture: kernels are compiled and tuned, tables are made
_pools: dict[torch.device, Any] = {}  # graphs of a device share memory


def fixed_step(target: Target, proposer: Proposer, generator: GumbelNoise) -> Step:
    """Return the decode step over fixed buffers, with trees as deep as the proposer's can be."""

    def step(buffers: StepBuffers) -> None:
        def accept(tree: TokenTree, logits: Tensor, noise: LazyGumbel | None) -> Accepted:
            scores = buffers.sampling.process(logits)
            if noise is None:
                return verify_greedy(tree, scores, fixed=True)
            return verify_sampled(tree, scores, noise, fixed=True)

        output = decode_step(target, proposer, buffers, generator, accept, proposer.steps - 1, [])
        proposer.update_captured(output)

    return step


def eager(step: Step, buffers: StepBuffers, device: torch.device) -> Run:
    """Run the step as it is."""
    return lambda: step(buffers)


def recorded(step: Step, buffers: StepBuffers, device: torch.device) -> Run:
    """Trace the step once, without running it, and play its operations back."""
    graph, tensors = trace_step(step, buffers), buffers.tensors()
    return lambda: graph(*tensors)


def compiled(step: Step, buffers: StepBuffers, device: torch.device) -> Run:
    """Let PyTorch's compiler fuse the traced step; on CUDA the result is captured."""
    tensors = buffers.tensors()
    function = compile_graph(trace_step(step, buffers), tensors, dynamic=False)

    def run() -> None:
        function(*tensors)

    return _capture(run, device) if device.type == "cuda" else run


def graph(step: Step, buffers: StepBuffers, device: torch.device) -> Run:
    """Capture the step as it is in a CUDA graph."""
    return _capture(lambda: step(buffers), device)


BACKENDS: dict[str, Callable[[Step, StepBuffers, torch.device], Run]] = {
    "eager": eager,
    "recorded": recorded,
    "compiled": compiled,
    "graph": graph,
}


def check_device(backend: str, device: torch.device) -> None:
    """Refuse a backend that the device does not have.

    Raises:
        MedheadError: names both.
    """
    if backend == "graph" and device.type != "cuda":
        raise MedheadError(f"step 'graph' needs a CUDA device, the model is on {device}; see 'compiled'")


def make(backend: str, target: Target, proposer: Proposer, buffers: StepBuffers, generator: GumbelNoise) -> Run:
    """Return a step made ready to run; the contents of the buffers are lost.

    Raises:
        MedheadError: the step cannot be captured, with the reason.
    """
    check_device(backend, target.device)
    step = fixed_step(target, proposer, generator)
    try:
        step(buffers)  # what a first pass makes and keeps (tables, kernels) is made outside the capture
        return BACKENDS[backend](step, buffers, target.device)
    except Exception as error:  # whatever a model, the compiler or CUDA throws
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MedheadError(
            f"a step of {target.name} cannot be {'captured' if backend == 'graph' else backend} ({reason}); "
            "decode with step='loop'"
        ) from error


def trace_step(step: Step, buffers: StepBuffers) -> GraphModule:
    """Return the step's operations over `buffers.tensors()`, traced with tensors that hold nothing: reading one fails."""

    def run(*tensors: Tensor) -> None:
        step(buffers.over(list(tensors)))

    return trace(run, buffers.tensors(), "fake")


def _capture(run: Run, device: torch.device) -> Run:
    """Return what `run` launches as a CUDA graph."""
    if device not in _pools:
        _pools[device] = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARMUP_RUNS):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, pool=_pools[device], capture_error_mode="thread_local"):  # others may use CUDA
        run()
    return captured.replay
