"""An answer as it comes: from a conversation and settings to updates, without anything of the page."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from medhead.errors import MedheadError
from medhead.serving.handle import RequestHandle
from medhead.serving.request import Request, Result, StepOutput
from medhead_app.chat.conversation import Conversation, Message, prompt_messages, with_answer
from medhead_app.chat.numbers import ENDS, facts
from medhead_app.chat.picture import Tree, tree_of
from medhead_app.service import Service

EVERY = 0.05  # seconds between updates; faster passes are shown together
AUTOMATIC = "automatic"
PROPOSERS = (AUTOMATIC, "heads", "ngram", "recycling", "lookahead", "none")
TREE_SIZES = (AUTOMATIC, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Settings:
    """What the person chose.

    Attributes:
        system: system prompt; empty for none.
        temperature: 0 is greedy decoding.
        top_p: most probable tokens up to this mass.
        max_new_tokens: longest answer.
        seed: None draws one.
        proposer: one of `PROPOSERS`.
        tree_size: one of `TREE_SIZES`.
    """

    system: str = ""
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int | None = None
    proposer: str = AUTOMATIC
    tree_size: int | str = AUTOMATIC

    @classmethod
    def of(cls, raw: dict[str, Any], most_tokens: int) -> Settings:
        """Settings from what the page's fields hold.

        Raises:
            MedheadError: a field holds something that is no number.
        """
        seed = str(raw.get("seed") or "").strip()
        try:
            return cls(
                system=str(raw.get("system") or ""),
                temperature=float(raw.get("temperature", cls.temperature)),
                top_p=float(raw.get("top_p", cls.top_p)),
                max_new_tokens=max(1, min(int(raw.get("max_new_tokens", cls.max_new_tokens)), most_tokens)),
                seed=int(seed) if seed else None,
                proposer=str(raw.get("proposer") or AUTOMATIC),
                tree_size=_tree_size(raw.get("tree_size")),
            )
        except (TypeError, ValueError):
            raise MedheadError("a setting is not a number; see temperature, top-p, longest answer and seed") from None

    def request(self, service: Service, prompt: list[int], **changes: Any) -> Request:
        """A request for an answer to a prompt.

        Raises:
            MedheadError: the service's limits.
        """
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p if self.top_p < 1 else None,
            "seed": draw_seed() if self.seed is None else self.seed,
            "proposer": None if self.proposer == AUTOMATIC else self.proposer,
            "tree_size": self.tree_size if isinstance(self.tree_size, int) else None,
            "trace": True,
        }
        return service.request(prompt, self.max_new_tokens, **(fields | changes))

    def kept(self) -> dict[str, Any]:
        """As it is kept with a conversation."""
        return asdict(self)


def draw_seed() -> int:
    """A seed that a person can type again."""
    return secrets.randbelow(1_000_000)


def _tree_size(raw: Any) -> int | str:
    return AUTOMATIC if raw in (None, "", AUTOMATIC) else int(raw)


@dataclass
class StreamState:
    """What a ticket has given so far."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    last: StepOutput | None = None  # the last one with guesses; passes without have nothing to draw

    def take(self, piece: StepOutput) -> None:
        """Add a piece."""
        self.text += piece.text
        self.ids += piece.tokens
        self.tokens += [[text, source] for text, source in zip(piece.texts, piece.sources, strict=True)]
        if piece.tree is not None and len(piece.tree.tokens) > 1:
            self.last = piece

    def tree(self, tokenizer: Any) -> Tree | None:
        """The last tree with guesses, to be drawn."""
        if self.last is None or self.last.tree is None:
            return None
        texts = [tokenizer.decode([token]) for token in self.last.tree.tokens]
        own = self.last.sources[-1:] == ["bonus"]
        return tree_of(self.last.tree, texts, self.last.texts[-1] if own else "")


@dataclass(frozen=True)
class Update:
    """How far an answer is.

    Attributes:
        conversation: with the answer so far as its last message.
        result: of the request.
        state: a word or two for the live line.
        done: whether it has ended.
        failed: for the person, if something went wrong.
    """

    conversation: Conversation
    result: Result
    state: str
    done: bool = False
    failed: str = ""


async def answer(
    service: Service,
    conversation: Conversation,
    settings: Settings,
    hold: Callable[[RequestHandle], None] = lambda ticket: None,
    every: float = EVERY,
) -> AsyncGenerator[Update, None]:
    """Let the model answer the last message.

    Closing the generator cancels the request.

    Args:
        service: what answers.
        conversation: ends with a message of the user's.
        settings: for this answer.
        hold: is given the ticket, so that others can cancel it.
        every: least seconds between two updates.

    Raises:
        MedheadError: the request cannot be served, or the queue is full.
    """
    encoded = service.chat(prompt_messages(conversation, settings.system), settings.max_new_tokens)
    ticket = service.engine.submit(settings.request(service, encoded.ids))
    hold(ticket)
    conversation = {**conversation, "settings": settings.kept()}
    written, shown = StreamState(), 0.0

    def update(state: str, **fields: Any) -> Update:
        message = _message(written, ticket.result, encoded.dropped, fields.get("done", False))
        return Update(
            with_answer(conversation, message, written.tree(service.tokenizer)), ticket.result, state, **fields
        )

    try:
        yield update("in the queue")
        async for piece in ticket.stream():
            written.take(piece)
            if (now := time.perf_counter()) - shown >= every:
                shown = now
                yield update("writing")
        yield update(ENDS.get(ticket.result.reason, "done"), done=True)
    except MedheadError as error:
        yield update("failed", done=True, failed=str(error))
    finally:
        ticket.cancel()


def _message(written: StreamState, result: Result, dropped: int, done: bool) -> Message:
    reason = result.reason if done else "stop"
    return {
        "role": "assistant",
        "content": written.text,
        "tokens": list(written.tokens),
        "lengths": list(result.lengths),
        "dropped": dropped,
        "facts": facts(result),
        "note": ENDS.get(reason, ""),
    }
