"""The engine: one thread that decodes the requests of everybody together.

Requests wait in order in a bounded queue. Between two steps those that ended or were given up leave, and those that wait
join. Requests that ask for the same proposer share a lane, that is a decode loop with a batch; several lanes take turns, the
one that has used the least time first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from medhead.decoder import Decoder
from medhead.serving.requests import Request, Result
from medhead.serving.ticket import Ticket


@dataclass
class EngineStatistics:
    """Totals since the engine was started, and how things are now.

    Attributes:
        running: rows being decoded.
        waiting: requests in the queue.
        ended: requests that ended, by reason.
        prompt_tokens: of requests that ended.
        new_tokens: emitted so far.
        passes: verify passes, summed over rows.
        busy: seconds spent in prefill and passes.
    """

    running: int = 0
    waiting: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    busy: float = 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens a pass and row."""
        return self.new_tokens / self.passes if self.passes else 0.0


class Engine:
    """Serves requests in batches, each with exactly the text it would get alone.

    Args:
        decoder: what decodes; its proposer serves requests that name none. The engine's thread alone may use it.
        tokenizer: for stop texts and for the pieces' text.
        heads: for requests that name the proposers `heads` or `hybrid`: heads or their folder.
        max_rows: most rows decoded at a time, all lanes together.
        max_queue: most requests that wait.
        time_limit: seconds after which a request ends, if it does not say so itself.

    Example:
        >>> with Engine(decoder, tokenizer) as engine:
        ...     print(engine.submit(Request(prompt=ids)).wait())
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        *,
        heads: Any = None,
        max_rows: int = 8,
        max_queue: int = 64,
        time_limit: float = 300.0,
    ) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.listeners: list[Callable[[Request, Result], None]] = []  # called in the engine's thread as each request ends
        raise NotImplementedError("being written")

    def start(self) -> Engine:
        """Start the thread; measures the costs of passes first where they are not known yet (a second or two)."""
        raise NotImplementedError

    def submit(self, request: Request) -> Ticket:
        """Put a request into the queue; returns at once. May be called from any thread.

        Raises:
            QueueFullError: too many wait already.
            Stopped: the engine is not running.
            MedheadError: what was asked for cannot be: an empty or too long prompt, numbers out of range, an unknown
                proposer, token ids outside of the vocabulary.
        """
        raise NotImplementedError

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        raise NotImplementedError

    def close(self) -> None:
        """End all requests (`cancelled`) and the thread."""
        raise NotImplementedError

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()
