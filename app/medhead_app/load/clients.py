"""Clients of the load test: they send requests, read the streams and measure the times."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from medhead.bench.prompts import BUILT_IN

TEMPERATURES = (0.0, 0.7, 1.0)
MAX_TOKENS = 120  # largest max_tokens of a request
CLIENT_TIMEOUT = 600.0  # seconds


@dataclass
class ClientResult:
    """One request as its client saw it; `tokens` and `passes` are counted by the server."""

    body: dict[str, Any]
    text: str = ""
    first: float | None = None  # seconds to the first text
    seconds: float = 0.0  # to the end
    tokens: int = 0
    passes: int = 0
    error: str | None = None


@dataclass
class LoadGenerator:
    """Concurrent clients of a server, each of which sends one random request after another."""

    url: str
    model: str
    clients: int
    key: str = "none"
    seed: int = 0
    results: list[ClientResult] = field(default_factory=list)

    async def run(self, seconds: float) -> float:
        """Send requests for this time and read the last answers to their end; return the seconds that took."""
        start = time.perf_counter()
        async with self.http() as http:
            await asyncio.gather(*(self._client(http, number, start + seconds) for number in range(self.clients)))
        return time.perf_counter() - start

    async def replay(self, bodies: list[dict[str, Any]]) -> list[ClientResult]:
        """Send these requests one after another."""
        async with self.http() as http:
            return [await send(http, body) for body in bodies]

    def http(self) -> httpx.AsyncClient:
        """Return an HTTP client for the server."""
        headers, limits = {"Authorization": f"Bearer {self.key}"}, httpx.Limits(max_connections=None)
        options: dict[str, Any] = {"timeout": CLIENT_TIMEOUT, "limits": limits, "trust_env": False}
        return httpx.AsyncClient(base_url=self.url, headers=headers, **options)

    async def _client(self, http: httpx.AsyncClient, number: int, deadline: float) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while time.perf_counter() < deadline:
            result = await send(http, self._body(rng))
            self.results.append(result)
            if result.error is not None:
                await asyncio.sleep(0.5)

    def _body(self, rng: random.Random) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": rng.choice(BUILT_IN)}],
            "temperature": rng.choice(TEMPERATURES),
            "seed": rng.getrandbits(63),
            "max_tokens": rng.randint(MAX_TOKENS // 4, MAX_TOKENS),
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def send(http: httpx.AsyncClient, body: dict[str, Any]) -> ClientResult:
    """Send one request and read its stream."""
    result, start = ClientResult(body), time.perf_counter()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
            done = False
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    _add_chunk(json.loads(line[6:]), result, start)
            if not done:
                raise ValueError("the stream ended too early")
    except Exception as error:  # every error is counted
        result.error = f"{type(error).__name__}: {error}"
    result.seconds = time.perf_counter() - start
    return result


def _add_chunk(chunk: dict[str, Any], result: ClientResult, start: float) -> None:
    if "error" in chunk:
        raise ValueError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        text = choice["delta"].get("content", "")
        if text and result.first is None:
            result.first = time.perf_counter() - start
        result.text += text
    if chunk.get("usage"):
        result.tokens = chunk["usage"]["completion_tokens"]
    if "medhead" in chunk:
        result.passes = chunk["medhead"]["passes"]
