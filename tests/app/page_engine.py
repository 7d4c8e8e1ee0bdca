"""A stand-in for the engine that emits a given text, with sources and trees, at a given pace."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable
from html import unescape
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from medhead.errors import MedheadError
from medhead.serving import QueueFullError, Request, RequestHandle, Result, StepOutput, TreeView
from medhead.serving.engine import EngineStatistics
from medhead_app.chat.conversation import Conversation, add_message, new_conversation, set_answer
from medhead_app.service import Service

STORY = "Once upon a time there was a little dog named Max. Max was brave, and he loved the big red ball. " * 6


class WordTokenizer:
    """A token is a word with the space before it; new words get new ids."""

    chat_template = "yes"

    def __init__(self) -> None:
        self.words: list[str] = ["<end>"]
        self.ids: dict[str, int] = {"<end>": 0}

    def __call__(self, text: str) -> dict[str, list[int]]:
        found = []
        for word in re.findall(r"\s?\S+|\s+", text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            found.append(self.ids[word])
        return {"input_ids": found}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return self(" ".join(f"<{message['role']}> {message['content']}" for message in messages) + " <answer>")

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[token] for token in ids)


class WordProcessor:
    """A processor that keeps the images it is given; each is a word of the prompt."""

    chat_template = "yes"

    def __init__(self, tokenizer: WordTokenizer) -> None:
        self.tokenizer, self.images = tokenizer, list[Any]()

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        texts = []
        for message in messages:
            parts = message["content"]
            parts = [{"text": parts}] if isinstance(parts, str) else parts
            texts.append(" ".join(part.get("text", "<image>") for part in parts))
        return " ".join(texts)

    def __call__(self, text: list[str], images: list[list[Any]], **_: Any) -> dict[str, Any]:
        self.images += images[0]
        return {"input_ids": torch.tensor([self.tokenizer(text[0])["input_ids"]])}


class ScriptedEngine:
    """The interface of `Engine`. Each request has a thread; `none` emits one token per pass, other proposers three.

    Args:
        script: text of every answer, or a function from the request to it.
        delay: seconds per pass.
        max_rows: largest batch.
        max_queue: largest number of waiting requests.
        fail: error that every request ends with after its first output.
    """

    def __init__(
        self,
        script: str | Callable[[Request], str] = STORY,
        delay: float = 0.0,
        context: int = 1024,
        max_rows: int = 8,
        max_queue: int = 8,
        fail: str | None = None,
        crash: bool = False,
    ) -> None:
        self.tokenizer = WordTokenizer()
        self.script, self.delay, self.fail, self.crash = script, delay, fail, crash
        model = SimpleNamespace(generation_config=GenerationConfig())
        target = SimpleNamespace(context=context, model=model, dtype=torch.float32)
        self.decoder = SimpleNamespace(target=target, proposer=SimpleNamespace(name="hybrid"))
        self.listeners: list[Callable[[Request, Result], None]] = []
        self.max_rows, self.max_queue, self.has_heads = max_rows, max_queue, True
        self.requests: list[Request] = []
        self.running = self.waiting = 0
        self._lock = threading.Lock()

    def start(self) -> ScriptedEngine:
        return self

    def close(self) -> None:
        pass

    def submit(self, request: Request) -> RequestHandle:
        if self.crash:
            raise RuntimeError("a secret inside")
        if not request.prompt:
            raise MedheadError("the prompt is empty: give at least one token")
        with self._lock:
            if self.running >= self.max_rows + self.max_queue:
                raise QueueFullError(f"{self.max_queue} requests are waiting already, try again in a moment")
            self.running += 1
        self.requests.append(request)
        handle = RequestHandle(request)
        threading.Thread(target=self._serve, args=(handle,), daemon=True).start()
        return handle

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(running=self.running, waiting=self.waiting)

    def _serve(self, handle: RequestHandle) -> None:
        result, request = handle.result, handle.request
        script = self.script if isinstance(self.script, str) else self.script(request)
        ids = self.tokenizer(script)["input_ids"][: request.params.max_new_tokens]
        result.proposer = request.proposer or "hybrid"
        result.seed = request.params.seed or (7 if request.params.temperature else 0)
        result.reason = "length" if len(ids) == request.params.max_new_tokens else "stop"
        size, start_time = (1 if request.proposer == "none" else 3), time.perf_counter()
        for start in range(0, len(ids), size):
            time.sleep(self.delay)
            if handle.cancelled:
                result.reason = "cancelled"
                break
            if self.fail and start:
                result.reason = "error"
                break
            self._emit(handle, ids[start : start + size])
            result.seconds = time.perf_counter() - start_time
        with self._lock:
            self.running -= 1
        handle.end(self.fail if result.reason == "error" else None)

    def _emit(self, handle: RequestHandle, ids: list[int]) -> None:
        result, source = handle.result, handle.request.proposer or "heads"
        result.new_tokens += len(ids)
        result.passes += 1
        result.lengths.append(len(ids))
        result.busy += self.delay or 0.001
        texts = [self.tokenizer.decode([token]) for token in ids]
        names = [f"heads {depth}" if source == "heads" else source for depth in range(1, len(ids))] + ["bonus"]
        path = list(range(len(ids)))
        tree = TreeView(
            tokens=[0, *ids[:-1], 0, 0],
            parents=[0, *path[:-1], 0, max(len(ids) - 2, 0)],
            sources=["root", *[source] * (len(ids) + 1)],
            accepted=path,
        )
        handle.put(StepOutput(ids, "".join(texts), texts, names, tree if source != "none" else None, self.delay))


def question(text: str = "Tell me a story.") -> Conversation:
    """Return a conversation with one message."""
    return add_message(new_conversation(), text)


def answered(*texts: str) -> Conversation:
    """Return a conversation of messages with an answer each."""
    conversation = new_conversation()
    for text in texts:
        reply = {"role": "assistant", "content": f"re {text}", "tokens": [["re", "heads 1"]], "lengths": [2, 1]}
        conversation = set_answer(add_message(conversation, text), reply)
    return conversation


def text_of(html: str) -> str:
    """Return the text of HTML without its tags."""
    return unescape(re.sub(r"<[^>]*>", "", html))


def service_of(**options: Any) -> Service:
    """Return the service of a `ScriptedEngine`."""
    engine = ScriptedEngine(**options)
    return Service(engine, engine.tokenizer, "scripted")  # type: ignore[arg-type]


def run_async(work: Awaitable[Any], seconds: float = 20) -> Any:
    """Run a coroutine, at most so many seconds."""

    async def run() -> Any:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run(run())


async def all_of(stream: Any) -> list[Any]:
    """Return what a stream yields."""
    return [item async for item in stream]


def wait_until_idle(service: Service, seconds: float) -> None:
    """Wait until no request runs."""
    end = time.perf_counter() + seconds
    while service.engine.statistics().running:
        assert time.perf_counter() < end, "the request is still running"
        time.sleep(0.01)
