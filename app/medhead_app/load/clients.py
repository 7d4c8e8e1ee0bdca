"""Clients of the load program: they ask, read streams, and take the time."""

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
MOST_ANSWER = 120  # tokens
PATIENCE = 600.0  # seconds for one answer


@dataclass
class Answered:
    """One request as its client saw it.

    Attributes:
        asked: body of the request.
        text: what came.
        first: seconds to the first text; None if none came.
        seconds: to the end.
        tokens: new tokens, as the server counts them.
        passes: verify passes, as the server counts them.
        error: what went wrong, else None.
    """

    asked: dict[str, Any]
    text: str = ""
    first: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    error: str | None = None


@dataclass
class LoadGenerator:
    """Several clients who ask one thing after another.

    Args:
        url: of the server.
        model: its name there.
        clients: how many ask at the same time.
        key: API key.
        seed: of what they ask.
    """

    url: str
    model: str
    clients: int
    key: str = "none"
    seed: int = 0
    answers: list[Answered] = field(default_factory=list)

    async def ask_for(self, seconds: float) -> float:
        """Ask until that time is over, then read to the end what is under way; returns the seconds that took."""
        began = time.perf_counter()
        async with self.http() as http:
            await asyncio.gather(*(self._client(http, number, began + seconds) for number in range(self.clients)))
        return time.perf_counter() - began

    async def ask_alone(self, asked: list[dict[str, Any]]) -> list[Answered]:
        """The same requests once more, one after another."""
        async with self.http() as http:
            return [await ask(http, body) for body in asked]

    def http(self) -> httpx.AsyncClient:
        """A client of the server."""
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE, limits=limits, trust_env=False)

    async def _client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        choose = random.Random(f"{self.seed} {number}")
        while time.perf_counter() < until:
            answered = await ask(http, self._body(choose))
            self.answers.append(answered)
            if answered.error is not None:
                await asyncio.sleep(0.5)

    def _body(self, choose: random.Random) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": choose.choice(BUILT_IN)}],
            "temperature": choose.choice(TEMPERATURES),
            "seed": choose.getrandbits(63),
            "max_tokens": choose.randint(MOST_ANSWER // 4, MOST_ANSWER),
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Answered:
    """Send one request and read its stream."""
    answered, began = Answered(body), time.perf_counter()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
            ended = False
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    _read(json.loads(line[6:]), answered, began)
            if not ended:
                raise ValueError("the stream ended too early")
    except Exception as error:  # whatever it is, it is counted
        answered.error = f"{type(error).__name__}: {error}"
    answered.seconds = time.perf_counter() - began
    return answered


def _read(chunk: dict[str, Any], answered: Answered, began: float) -> None:
    if "error" in chunk:
        raise ValueError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        text = choice["delta"].get("content", "")
        if text and answered.first is None:
            answered.first = time.perf_counter() - began
        answered.text += text
    if chunk.get("usage"):
        answered.tokens = chunk["usage"]["completion_tokens"]
    if "medhead" in chunk:
        answered.passes = chunk["medhead"]["passes"]
