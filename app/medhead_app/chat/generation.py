"""Generate an answer: from a conversation and settings to updates, independent of the page."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from medhead.errors import MedheadError
from medhead.serving.handle import RequestHandle
from medhead.serving.request import Request, Result, StepOutput
from medhead_app.chat.conversation import Conversation, Message, cut_answer, prompt_messages, set_answer
from medhead_app.chat.stats import FINISH_NOTES, summary
from medhead_app.chat.svg import Tree, tree_json
from medhead_app.chat_encoder import EncodedChat
from medhead_app.service import Service

UPDATE_INTERVAL = 0.05  # shortest time between two updates, in seconds
AUTOMATIC = "automatic"
PROPOSERS = (AUTOMATIC, "heads", "ngram", "recycling", "lookahead", "none")
TREE_SIZES = (AUTOMATIC, 4, 8, 16, 32, 64)
OnSubmit = Callable[[RequestHandle], None]


@dataclass(frozen=True)
class ChatSettings:
    """Settings of an answer, see `SamplingParams`; without a seed, one is drawn."""

    system: str = ""  # system prompt; empty for none
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int | None = None
    proposer: str = AUTOMATIC  # one of PROPOSERS
    tree_size: int | str = AUTOMATIC  # one of TREE_SIZES

    @classmethod
    def from_fields(cls, raw: dict[str, Any], max_new_tokens: int) -> ChatSettings:
        """Return settings from the values of the page's fields."""
        seed, size = str(raw.get("seed") or "").strip(), raw.get("tree_size")
        try:
            return cls(
                system=str(raw.get("system") or ""),
                temperature=float(raw.get("temperature", cls.temperature)),
                top_p=float(raw.get("top_p", cls.top_p)),
                max_new_tokens=max(1, min(int(raw.get("max_new_tokens", cls.max_new_tokens)), max_new_tokens)),
                seed=int(seed) if seed else None,
                proposer=str(raw.get("proposer") or AUTOMATIC),
                tree_size=AUTOMATIC if size in (None, "", AUTOMATIC) else int(size),
            )
        except (TypeError, ValueError):
            raise MedheadError("temperature, top-p, max new tokens or seed is not a number") from None

    def request(self, service: Service, prompt: list[int], **changes: Any) -> Request:
        """Return a request for an answer to a prompt."""
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": draw_seed() if self.seed is None else self.seed,
            "proposer": None if self.proposer == AUTOMATIC else self.proposer,
            "tree_size": self.tree_size if isinstance(self.tree_size, int) else None,
            "trace": True,
        }
        return service.request(prompt, self.max_new_tokens, **(fields | changes))


def draw_seed() -> int:
    """Return a random seed that is short enough to type."""
    return secrets.randbelow(1_000_000)


@dataclass
class StreamState:
    """The output of a request so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)  # pairs of text and source
    last: StepOutput | None = None  # the newest one whose tree has draft tokens

    def add(self, output: StepOutput) -> None:
        """Add the output of a step."""
        self.text += output.text
        self.token_ids += output.tokens
        self.tokens += [[text, source] for text, source in zip(output.texts, output.sources, strict=True)]
        if output.tree is not None and len(output.tree.tokens) > 1:
            self.last = output

    def tree(self, tokenizer: Any) -> Tree | None:
        """Return the last tree with draft tokens as JSON."""
        if self.last is None or self.last.tree is None:
            return None
        texts = [tokenizer.decode([token]) for token in self.last.tree.tokens]
        has_bonus = self.last.sources[-1:] == ["bonus"]
        return tree_json(self.last.tree, texts, self.last.texts[-1] if has_bonus else "")


@dataclass(frozen=True)
class Update:
    """The state of an answer; `error` is a line for the user, empty if there was no error."""

    conversation: Conversation  # its last message is the answer so far
    status: str
    done: bool = False
    error: str = ""


async def generate_answer(
    service: Service,
    conversation: Conversation,
    settings: ChatSettings,
    on_submit: OnSubmit = lambda handle: None,
    interval: float = UPDATE_INTERVAL,
    go_on: bool = False,
) -> AsyncGenerator[Update, None]:
    """Answer the last message of a conversation; yield at most one update per `interval` seconds.

    With `go_on` the last answer, which was cut, is continued: with the same settings the text is that of a larger limit.
    Without a seed in the settings it is continued with its own.

    `on_submit` receives the handle of the request, so that others can cancel it. Closing the generator also cancels it.
    """
    cut = cut_answer(conversation) if go_on else {}
    if cut is None:
        raise MedheadError("the last answer is complete or empty: it cannot be continued")
    asked = {**conversation, "messages": conversation["messages"][:-1]} if cut else conversation
    begun: list[int] = cut.get("token_ids", [])

    def encode() -> EncodedChat:
        messages = prompt_messages(asked, settings.system)
        return service.encode_chat(messages, settings.max_new_tokens + len(begun)).followed_by(begun)

    encoded = await run_in_threadpool(encode)
    seed: dict[str, Any] = {"seed": cut["seed"]} if cut and settings.seed is None else {}
    request = settings.request(service, encoded.token_ids, model_inputs=encoded.model_inputs, **seed)
    handle, dropped = service.engine.submit(request), encoded.dropped
    del request, encoded  # the engine frees the images once it has read them
    on_submit(handle)
    conversation = {**conversation, "settings": asdict(settings)}
    stream, last_update = StreamState(), 0.0

    def update(status: str, **fields: Any) -> Update:
        result = join_results(cut, handle.result)
        if settings.proposer == AUTOMATIC:
            result.proposer = AUTOMATIC
        token_ids = begun + stream.token_ids
        message: Message = {
            "role": "assistant",
            "content": join_texts(cut["content"], stream.text, service.decode(token_ids)) if cut else stream.text,
            "tokens": [*cut.get("tokens", []), *stream.tokens],
            "token_ids": token_ids,
            "lengths": result.lengths,
            "seconds": result.seconds,
            "seed": result.seed,
            "tree": stream.tree(service.tokenizer) or cut.get("tree"),
            "dropped": dropped,
            "summary": summary(result),
            "note": FINISH_NOTES.get(result.reason, "") if fields.get("done") else "",
        }
        return Update(set_answer(conversation, message), status, **fields)

    try:
        yield update("waiting")
        async for output in handle.stream():
            stream.add(output)
            if (now := time.perf_counter()) - last_update >= interval:
                last_update = now
                yield update("generating")
        yield update(FINISH_NOTES.get(handle.result.reason, "done"), done=True)
    except MedheadError as error:
        yield update("failed", done=True, error=str(error))
    finally:
        handle.cancel()


def join_results(cut: Message, result: Result) -> Result:
    """Return the statistics of an answer that was cut (an empty one for none) and of the request that continues it."""
    lengths = [*cut.get("lengths", []), *result.lengths]
    seconds = cut.get("seconds", 0.0) + max(result.seconds - result.queued, 0.0)
    fields: dict[str, Any] = {"new_tokens": sum(lengths), "passes": len(lengths), "lengths": lengths}
    return replace(result, **fields, seconds=seconds, queued=0.0)


def join_texts(cut: str, text: str, whole: str) -> str:
    """Return the text of an answer that was cut, continued by `text`; `whole` is the text of all of its tokens together.

    The two texts alone may lack the space between them, or have halves of a character at their ends.
    """
    text = text.lstrip("\ufffd")
    place = whole.rfind(text) if text else -1
    return whole[: place + len(text)] if place >= 0 else cut + text
