"""Seconds of a call, and the bandwidth of a copy, on a GPU by events and on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CACHE_BYTES = 256 << 20  # more than the caches of today's devices hold


def seconds_of(call: Callable[[], object], device: str, seconds: float = 0.1, fewest: int = 5) -> float:
    """Time of one call: the median on a GPU, the least on a CPU, whose other work only ever makes a call slower.

    On CUDA the call is captured in a graph where that is possible, so that launching it from Python is not part of the
    time, and the second-level cache is overwritten before every run, as the rest of a model does between two layers.

    Args:
        call: what to time.
        device: `cuda` or `cpu`.
        seconds: about how long to measure.
        fewest: runs at least.
    """
    for _ in range(2):  # compiles, allocates
        call()
    if device == "cpu":
        return _by_clock(call, seconds, fewest)
    call = _captured(call)
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    times: list[float] = []
    while len(times) < fewest or (sum(times) < seconds and len(times) < 1000):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy on the device, read and written bytes together."""
    size = (1 << 30) if device == "cuda" else (64 << 20)
    source, goal = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / seconds_of(lambda: goal.copy_(source), device)


def _by_clock(call: Callable[[], object], seconds: float, fewest: int) -> float:
    times: list[float] = []
    while len(times) < fewest or sum(times) < seconds:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, or itself where it reads the host."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay
