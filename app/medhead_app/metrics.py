"""Numbers for Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from medhead.serving.engine import Engine
from medhead.serving.request import Request, Result

WINDOW = 10.0  # seconds that tokens/s looks back
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Rate:
    """Increase of a total over the last seconds.

    Args:
        window: seconds to look back.
    """

    def __init__(self, window: float = WINDOW) -> None:
        self.window = window
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, total: float, now: float | None = None) -> None:
        """The total as it is now."""
        at = time.monotonic() if now is None else now
        self._seen.append((at, total))
        while len(self._seen) > 2 and self._seen[1][0] <= at - self.window:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """0 until two totals are known."""
        if len(self._seen) < 2:
            return 0.0
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began else 0.0


class Metrics:
    """Counts requests as they end and reads the engine's totals when asked. May be used from any thread.

    Args:
        engine: whose requests are counted, from whichever side they came.

    Attributes:
        registry: of Prometheus; nothing is put into the global one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._rate = engine, Rate()
        self._endpoints: dict[int, str] = {}
        self.registry = CollectorRegistry()
        given: Any = {"namespace": "medhead", "registry": self.registry}
        self._requests = Counter(
            "requests", "Requests by where they came from and how they ended", ["endpoint", "reason"], **given
        )
        self._first = Histogram("time_to_first_token_seconds", "Submission to first token", buckets=LONG, **given)
        self._token = Histogram("time_per_token_seconds", "Of every token after the first", buckets=SHORT, **given)
        self._seconds = Histogram("request_seconds", "Submission to end", buckets=LONG, **given)
        self._queued = Histogram("queue_seconds", "Waiting before the first pass", buckets=LONG, **given)
        self.registry.register(self)
        engine.listeners.append(self._ended)

    def expect(self, request: Request, endpoint: str) -> None:
        """A request that is about to be submitted came from this endpoint; others count as the page's."""
        self._endpoints[id(request)] = endpoint

    def refused(self, endpoint: str, reason: str, request: Request | None = None) -> None:
        """A request did not get into the engine."""
        if request is not None:
            self._endpoints.pop(id(request), None)
        self._requests.labels(endpoint, reason).inc()

    def sample(self) -> None:
        """Remember the total of tokens, for tokens/s; call it every second or so."""
        self._rate.add(self._engine.statistics().new_tokens)

    def collect(self) -> Iterator[Metric]:
        """The engine's totals; called by Prometheus."""
        now = self._engine.statistics()
        self._rate.add(now.new_tokens)
        for name, text, total in (
            ("medhead_prompt_tokens", "Prompt tokens of requests that ended", now.prompt_tokens),
            ("medhead_new_tokens", "Tokens produced", now.new_tokens),
            ("medhead_passes", "Verify passes, summed over rows", now.passes),
            ("medhead_busy_seconds", "Seconds spent in prefill and passes", now.busy),
        ):
            yield CounterMetricFamily(name, text, total)
        for name, text, value in (
            ("medhead_running", "Requests being decoded", now.running),
            ("medhead_waiting", "Requests in the queue", now.waiting),
            (
                "medhead_accepted_length",
                "Tokens a verify pass since the start; 1 is plain decoding",
                now.accepted_length,
            ),
            ("medhead_tokens_per_second", f"Over the last {WINDOW:.0f} seconds, all requests", self._rate.per_second),
        ):
            yield GaugeMetricFamily(name, text, value)

    def _ended(self, request: Request, result: Result) -> None:
        self._requests.labels(self._endpoints.pop(id(request), "page"), result.reason).inc()
        self._seconds.observe(result.seconds)
        self._queued.observe(result.queued)
        if result.first_token is None:
            return
        self._first.observe(result.first_token)
        if result.new_tokens > 1:
            self._token.observe(max(0.0, result.seconds - result.first_token) / (result.new_tokens - 1))
