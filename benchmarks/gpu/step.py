"""Whole steps at the shape of a real model, random weights: time beside that of reading the weights, launches, top kernels.

python step.py graph        plain, 16 and 64 nodes, 2,048 and 32,768 tokens, loop and CUDA graph, and with heads; 8B, then 1B
python step.py compiled     the same steps through PyTorch's compiler, with 64 nodes
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import measure
import torch
from measure import CONTEXT, DEVICE, ON_GPU, TINY, attempt, kernels, milliseconds, say

from medhead.bench.captured_steps import captured_steps, eager_steps
from medhead.bench.step import weight_bytes
from medhead.model.target import Target
from medhead_kernels.timing import copy_bandwidth

NODES = [4, 8] if TINY else [16, 64]
KINDS = ["recurrent"] if TINY else ["recurrent", "block"]


def timed(step: Callable[[], object], reading_ms: float) -> dict[str, float]:
    """Return the time of a step, also as a multiple of the time to read the weights."""
    ms = milliseconds(step)
    return {"ms": ms, "x_reading_the_weights": round(ms / reading_ms, 2)}


def report(target: Target, context: int, backend: str, reading_ms: float, detailed: bool) -> None:
    """Print the captured steps at one context, and what the most interesting ones launch."""
    kinds = KINDS if detailed and backend != "compiled" else []
    for name, step in captured_steps(target, 1, context, NODES[1:] if backend == "compiled" else NODES, backend, kinds):
        attempt(name, partial(timed, step, reading_ms), shape=measure.SHAPE, context=context)
        if detailed and "forward only" not in name and str(NODES[0]) not in name:
            kernels(step, name)


def loop(target: Target, context: int, reading_ms: float) -> None:
    """Print the steps of the ordinary loop."""
    ids = torch.randint(target.vocab_size, (1, context), device=DEVICE)
    for name, step in eager_steps(target, ids, NODES):
        attempt(f"loop, {name}", partial(timed, step, reading_ms), shape=measure.SHAPE, context=context)
        if name != f"{NODES[0]} nodes":
            kernels(step, f"loop, {name}", 4)


def main(backend: str) -> None:
    """Measure one shape, or with `graph` on a GPU both."""
    bandwidth = copy_bandwidth(DEVICE.type)
    for shape in dict.fromkeys([measure.SHAPE, *(["1b"] if backend == "graph" and not TINY else [])]):
        measure.SHAPE = shape
        target = measure.target()
        reading = 1e3 * weight_bytes(target.model) / bandwidth
        say(shape=shape, weights_gb=round(weight_bytes(target.model) / 1e9, 2), reading_ms=round(reading, 3))
        way = backend if ON_GPU else "eager"
        report(target, CONTEXT, way, reading, True)
        if backend == "graph":
            report(target, 16 * CONTEXT, way, reading, False)
            loop(target, CONTEXT, reading)
        del target
        if ON_GPU:
            torch.cuda.empty_cache()


main(sys.argv[1])
