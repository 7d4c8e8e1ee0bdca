"""What the parts of gpu.sh share: the device, the sizes, times of calls, and lines of JSON."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from medhead.bench.measure import synchronize
from medhead.bench.step import build
from medhead.model.target import Target

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SHAPE = os.environ.get("SHAPE", "8b" if ON_GPU else "tiny")
TINY = SHAPE == "tiny"
CONTEXT = 32 if TINY else 2048
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def say(**values: Any) -> None:
    """Print a line of results at once."""
    print(json.dumps(values), flush=True)


def attempt(name: str, measured: Callable[[], dict[str, Any]], **values: Any) -> None:
    """Print what a measurement returns, or its error in one line: the other measurements go on."""
    try:
        say(**values, what=name, **measured())
    except Exception as error:  # whatever a kernel or the driver throws
        say(**values, what=name, error=" ".join(f"{type(error).__name__}: {error}".split())[:200])


def milliseconds(call: Callable[[], object], runs: int = 10, warmup: int = 3) -> float:
    """Return the median time of a call by the clock of the host."""
    runs, warmup = (1, 0) if TINY else (runs, warmup)
    times = []
    for _ in range(warmup + runs):
        synchronize(DEVICE)
        began = time.perf_counter()
        call()
        synchronize(DEVICE)
        times.append(time.perf_counter() - began)
    return round(1e3 * sorted(times[warmup:])[runs // 2], 3)


def graph_microseconds(calls: list[Callable[[], object]], rounds: int = 5) -> float:
    """Return the microseconds of one of several calls over different inputs, launched as one CUDA graph."""
    if not ON_GPU:
        return 1e3 * sum(map(milliseconds, calls)) / len(calls)
    for call in calls:
        call()
    synchronize(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return round(1e3 * sorted(times)[6] / (rounds * len(calls)), 2)


def kernels(call: Callable[[], object], name: str, lines: int = 12) -> None:
    """Print how many kernels a call launches, their time, and those that take longest."""
    call()
    synchronize(DEVICE)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ON_GPU else [])
    with profile(activities=activities) as trace:
        call()
        synchronize(DEVICE)
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in trace.events() or []:
        if (event.device_type == torch.autograd.DeviceType.CUDA) == ON_GPU:
            total[event.name[:60]][0] += 1
            total[event.name[:60]][1] += event.self_device_time_total if ON_GPU else event.self_cpu_time_total
    count, time_ms = sum(n for n, _ in total.values()), sum(us for _, us in total.values()) / 1e3
    say(kernels_of=name, launches=count, ms=round(time_ms, 3))
    for kernel, (n, us) in sorted(total.items(), key=lambda item: -item[1][1])[:lines]:
        say(kernel=kernel, launches=n, us=round(us, 1))


def target() -> Target:
    """Return a target of the shape with random weights."""
    began = time.perf_counter()
    found = Target(build(SHAPE, DEVICE, DTYPE))
    say(target=SHAPE, attention=found.backend.name, dtype=str(DTYPE), seconds=round(time.perf_counter() - began, 1))
    return found
