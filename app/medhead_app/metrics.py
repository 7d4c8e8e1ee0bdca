"""Prometheus metrics of the engine and its requests."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from medhead.serving.engine import Engine
from medhead.serving.request import Request, Result

RATE_WINDOW = 10.0  # seconds over which tokens per second are averaged
TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # seconds
REQUEST_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds


class Rate:
    """Increase per second of a growing total, averaged over a window of so many seconds."""

    def __init__(self, window: float = RATE_WINDOW) -> None:
        self.window = window
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, total: float, now: float | None = None) -> None:
        """Record the total at time `now`, by default `time.monotonic()`."""
        at = time.monotonic() if now is None else now
        self._samples.append((at, total))
        while len(self._samples) > 2 and self._samples[1][0] <= at - self.window:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """Return the rate; 0 before the second sample."""
        if len(self._samples) < 2:
            return 0.0
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0


class Metrics:
    """Count requests as they end, and read the engine's totals at every scrape. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._rate = engine, Rate()
        self._endpoints: dict[int, str] = {}  # by the id of a request's `params`, which it shares with no other
        self.registry = CollectorRegistry()  # the global registry is not used
        common: Any = {"namespace": "medhead", "registry": self.registry}
        self._requests = Counter("requests", "Requests by endpoint and finish reason", ["endpoint", "reason"], **common)
        whole, each = {**common, "buckets": REQUEST_BUCKETS}, {**common, "buckets": TOKEN_BUCKETS}
        self._first_token = Histogram("time_to_first_token_seconds", "Time from submission to the first token", **whole)
        self._queue_time = Histogram("request_queue_time_seconds", "Time from submission to the first pass", **whole)
        self._latency = Histogram("request_latency_seconds", "Time from submission to the end", **whole)
        self._time_per_token = Histogram("time_per_output_token_seconds", "Mean time per token after the first", **each)
        self.registry.register(self)
        engine.listeners.append(self._on_end)

    def set_endpoint(self, request: Request, endpoint: str) -> None:
        """Count a request under this endpoint; a request without one is counted under `page`."""
        self._endpoints[id(request.params)] = endpoint

    def count_rejected(self, request: Request, endpoint: str, reason: str) -> None:
        """Count a request that the engine rejected."""
        self._endpoints.pop(id(request.params), None)
        self._requests.labels(endpoint, reason).inc()

    async def sample(self) -> None:
        """Record the number of new tokens once a second, for the tokens per second."""
        while True:
            self._rate.add(self._engine.statistics().new_tokens)
            await asyncio.sleep(1)

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's totals; Prometheus calls it at every scrape."""
        totals = self._engine.statistics()
        self._rate.add(totals.new_tokens)
        yield CounterMetricFamily("medhead_prompt_tokens", "Prompt tokens of ended requests", totals.prompt_tokens)
        yield CounterMetricFamily("medhead_new_tokens", "Tokens emitted", totals.new_tokens)
        yield CounterMetricFamily("medhead_verify_passes", "Verify passes, summed over sequences", totals.passes)
        yield CounterMetricFamily("medhead_service_time_seconds", "Time spent in prefill and passes", totals.busy)
        looked_up, found = "Prompt tokens looked up in the prefix cache", "Prompt tokens found there, not read again"
        yield CounterMetricFamily("medhead_prefix_cache_queries", looked_up, totals.prefix_queries)
        yield CounterMetricFamily("medhead_prefix_cache_hits", found, totals.prefix_hits)
        yield GaugeMetricFamily("medhead_prefix_cache_bytes", "Memory of the prefix cache", totals.prefix_bytes)
        yield GaugeMetricFamily("medhead_num_requests_running", "Requests being decoded", totals.running)
        yield GaugeMetricFamily("medhead_num_requests_waiting", "Requests in the queue", totals.waiting)
        yield GaugeMetricFamily("medhead_accepted_length", "Tokens emitted per verify pass", totals.accepted_length)
        rate = f"Tokens per second of all requests, averaged over {RATE_WINDOW:.0f} seconds"
        yield GaugeMetricFamily("medhead_tokens_per_second", rate, self._rate.per_second)

    def _on_end(self, request: Request, result: Result) -> None:
        self._requests.labels(self._endpoints.pop(id(request.params), "page"), result.reason).inc()
        self._latency.observe(result.seconds)
        self._queue_time.observe(result.queued)
        if result.first_token is None:
            return
        self._first_token.observe(result.first_token)
        if result.new_tokens > 1:
            self._time_per_token.observe(max(0.0, result.seconds - result.first_token) / (result.new_tokens - 1))
