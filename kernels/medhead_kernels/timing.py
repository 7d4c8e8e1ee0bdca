"""Time of a call and bandwidth of a copy, by CUDA events on a GPU and by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CACHE_BYTES = 256 << 20  # more than the L2 cache of any current GPU


def time_call(call: Callable[[], object], device: str, seconds: float = 0.1, min_runs: int = 5) -> float:
    """Return the seconds of one call: the median on a GPU, the minimum on a CPU.

    The measurement takes about `seconds`. On CUDA the call is captured in a graph where possible, which excludes the launch
    overhead of Python, and the L2 cache is overwritten before every run, as the rest of a model does between two layers.
    """
    for _ in range(2):  # compile and allocate
        call()
    times: list[float] = []
    if device == "cpu":
        while len(times) < min_runs or sum(times) < seconds:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return min(times)
    call = _as_graph(call)
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    while len(times) < min_runs or (sum(times) < seconds and len(times) < 1000):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second of a large copy on the device, bytes read plus bytes written."""
    size = (1 << 30) if device == "cuda" else (64 << 20)
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / time_call(lambda: target.copy_(source), device)


def _as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call as a CUDA graph, or the call itself where it synchronises with the host."""
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
