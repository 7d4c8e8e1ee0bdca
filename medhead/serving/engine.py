"""The engine: one thread that decodes the requests of everybody together.

Requests wait in order in a bounded queue. Between two steps those that ended or were given up leave, and those that wait
join. Requests that ask for the same proposer share a lane, that is a decode loop with a batch; several lanes take turns, the
one that has used the least time first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.generate_options import check_seed
from medhead.proposers.base import Proposer, build_proposer
from medhead.serving.decode_batch import DecodeBatch
from medhead.serving.handle import RequestHandle
from medhead.serving.request import QueueFullError, Reason, Request, Result, Stopped
from medhead.serving.request_state import RequestState
from medhead.serving.validation import check_request

LOG = logging.getLogger(__name__)
MOST_LANES = 8  # idle lanes beyond these are forgotten, with what their proposers learnt
Key = tuple[str | None, int | None]


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
        heads: for requests that name the proposers `heads` or `hybrid`: heads or their folder; the decoder's if None.
        max_rows: most rows decoded at a time, all lanes together.
        max_queue: most requests that wait.
        time_limit: seconds after which a request ends, if it does not say so itself.

    Attributes:
        listeners: called in the engine's thread with request and result as each request ends.

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
        if max_rows < 1 or max_queue < 0 or not time_limit > 0:
            raise MedheadError(
                f"max_rows must be at least 1, max_queue at least 0 and time_limit above 0, "
                f"got {max_rows}, {max_queue} and {time_limit}"
            )
        self.decoder, self.tokenizer, self.heads = decoder, tokenizer, decoder.heads if heads is None else heads
        self.target = decoder.target
        self.max_rows, self.max_queue, self.time_limit = max_rows, max_queue, time_limit
        self.listeners: list[Callable[[Request, Result], None]] = []
        self.end_tokens = _end_tokens(self.target.model, tokenizer)
        self._waiting: deque[RequestState] = deque()
        self._seats: dict[int, RequestState] = {}  # by the id of their row
        self._lanes: OrderedDict[Key, DecodeBatch] = OrderedDict()
        self._awake = threading.Condition()
        self._totals, self._ended = EngineStatistics(), Counter[str]()
        self._running = False
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._active, self._feature_layers = ExitStack(), None  # type: tuple[ExitStack, tuple[int, ...] | None]

    @property
    def has_heads(self) -> bool:
        """Whether requests may name the proposer `heads`."""
        return self.heads is not None

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self._running

    def start(self) -> Engine:
        """Start the thread; measures the costs of passes first where they are not known yet (a second or two).

        Raises:
            Stopped: it runs already.
        """
        if self._thread is not None:
            raise Stopped("the engine was started already")
        self._running, ready = True, threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="medhead-engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failed is not None:
            raise self._failed
        return self

    def submit(self, request: Request) -> RequestHandle:
        """Put a request into the queue; returns at once. May be called from any thread.

        Raises:
            QueueFullError: too many wait already.
            Stopped: the engine is not running.
            MedheadError: what was asked for cannot be: an empty or too long prompt, numbers out of range, an unknown
                proposer, token ids outside of the vocabulary.
        """
        check_request(request, self.target, self.has_heads)
        ticket = RequestHandle(request, self._notify)
        ticket.result.seed = check_seed(request.params.seed) if request.params.temperature > 0 else 0
        deadline = time.perf_counter() + (self.time_limit if request.time_limit is None else request.time_limit)
        seat = RequestState(ticket, self.target, self.tokenizer, self.end_tokens, deadline)
        with self._awake:
            if not self._running:
                raise Stopped("the engine is not running")
            # rows that are free but not yet taken count as room: a queue of 0 still serves
            if len(self._waiting) >= self.max_queue + max(0, self.max_rows - len(self._seats)):
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already, try again in a moment")
            self._waiting.append(seat)
            self._awake.notify()
        return ticket

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        with self._awake:
            now = replace(self._totals)
            now.running, now.waiting, now.ended = len(self._seats), len(self._waiting), dict(self._ended)
            return now

    def close(self) -> None:
        """End all requests (`cancelled`) and the thread."""
        with self._awake:
            self._running = False
            self._awake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---------------------------------------------------------------- the thread

    @torch.inference_mode()
    def _run(self, ready: threading.Event) -> None:
        try:
            self.decoder.warmup(self.max_rows)
        except Exception as error:
            self._failed, self._running = error, False
            return
        finally:
            ready.set()
        try:
            while self._turn():
                pass
        finally:
            self._shut()

    def _turn(self) -> bool:
        """Leave, join, step once; False when the engine is closed."""
        with self._awake:
            if self._running and not self._waiting and not self._seats:
                self._active.close()  # nobody is served: the model is left as it was
                self._feature_layers = None
                self._awake.wait()
            if not self._running:
                return False
        self._leave()
        self._join()
        lane = min((lane for lane in self._lanes.values() if lane.rows), key=lambda lane: lane.used, default=None)
        if lane is not None:
            self._guarded(lane, lambda: self._step(lane))
        return True

    def _leave(self) -> None:
        """Requests that were given up or took too long end, running or waiting."""
        for lane in self._lanes.values():
            kept = [place for place, row in enumerate(lane.rows) if self._goes_on(self._seats[id(row)])]
            if len(kept) < len(lane.rows):
                gone = [row for place, row in enumerate(lane.rows) if place not in set(kept)]
                self._guarded(lane, lambda lane=lane, kept=kept: lane.keep(kept))  # type: ignore[misc]
                for row in gone:
                    if id(row) in self._seats:
                        self._end(self._seats[id(row)], _why(self._seats[id(row)]))
        with self._awake:
            gone_seats = [seat for seat in self._waiting if not self._goes_on(seat)]
            for seat in gone_seats:
                self._waiting.remove(seat)
        for seat in gone_seats:
            self._end(seat, _why(seat))

    @staticmethod
    def _goes_on(seat: RequestState) -> bool:
        return not seat.ticket.cancelled and time.perf_counter() < seat.deadline

    def _join(self) -> None:
        """Those who wait take free rows, in order; those of one lane are read together."""
        with self._awake:
            free = self.max_rows - len(self._seats)
            seats = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._seats.update({id(seat.row): seat for seat in seats})
        groups: dict[Key, list[RequestState]] = {}
        for seat in seats:
            groups.setdefault(self._key(seat.ticket.request), []).append(seat)
        for key, group in groups.items():
            self._seat(key, group)

    def _seat(self, key: Key, seats: list[RequestState]) -> None:
        try:
            lane = self._lane(key)
        except Exception as error:
            if not isinstance(error, MedheadError):
                LOG.exception("no lane for %s", key)
            message = str(error) if isinstance(error, MedheadError) else "the proposer could not be made"
            for seat in seats:
                self._end(seat, "error", message)
            return
        others = [other.used for other in self._lanes.values() if other.rows and other is not lane]
        if not lane.rows and others:
            lane.used = max(lane.used, min(others))  # time it has not used is no credit
        self._guarded(lane, lambda: self._read(lane, seats), seats)

    def _read(self, lane: DecodeBatch, seats: list[RequestState]) -> None:
        began = time.perf_counter()
        for seat in seats:
            seat.ticket.result.queued = began - seat.submitted
            seat.ticket.result.proposer = lane.proposer.name
        self._activate(lane)
        lane.join([seat.row for seat in seats])
        spent = time.perf_counter() - began
        for seat in seats:
            seat.ticket.result.busy += spent
        self._spent(lane, spent)

    def _step(self, lane: DecodeBatch) -> None:
        rows, began = lane.rows, time.perf_counter()
        self._activate(lane)
        lane.step()
        spent = time.perf_counter() - began
        self._spent(lane, spent)
        for place, row in enumerate(rows):
            seat = self._seats[id(row)]
            with self._awake:
                self._totals.new_tokens += len(seat.fresh)
                self._totals.passes += 1
            seat.ticket.put(seat.piece(spent, lane, place))
            if seat.ended:
                self._end(seat, seat.reason)
        if not lane.rows:
            lane.verified = None  # an idle lane holds no logits

    def _spent(self, lane: DecodeBatch, seconds: float) -> None:
        lane.used += seconds
        with self._awake:
            self._totals.busy += seconds

    def _activate(self, lane: DecodeBatch) -> None:
        """The model reads the layers that the lane's proposer wants."""
        feature_layers = tuple(lane.proposer.feature_layers)
        if feature_layers != self._feature_layers:
            self._active.close()
            self._feature_layers = None
            self._active.enter_context(self.target.active(feature_layers))
            self._feature_layers = feature_layers

    def _guarded(
        self, lane: DecodeBatch, action: Callable[[], None], joining: list[RequestState] | None = None
    ) -> None:
        """What fails ends the requests of its lane, and no others."""
        rows = {id(row) for row in lane.rows} | {id(seat.row) for seat in joining or []}
        try:
            action()
        except Exception:
            LOG.exception("a lane failed (proposer %s)", lane.proposer.name)
            lane.rows = []  # and it is dropped: whatever state it is in is nobody's
            self._lanes = OrderedDict((key, other) for key, other in self._lanes.items() if other is not lane)
            for seat in [seat for row, seat in self._seats.items() if row in rows]:
                self._end(seat, "error", "something went wrong inside; the server's log says what")

    # ---------------------------------------------------------------- lanes

    def _key(self, request: Request) -> Key:
        if request.proposer in (None, self.decoder.proposer.name):
            return (None, request.tree_size)
        return (request.proposer, request.tree_size)

    def _lane(self, key: Key) -> DecodeBatch:
        if key not in self._lanes:
            self._lanes[key] = DecodeBatch(self.target, self._proposer(key), self.decoder.typical)
        self._lanes.move_to_end(key)
        for other in [k for k, lane in self._lanes.items() if not lane.rows and k != key]:
            if len(self._lanes) > MOST_LANES:
                del self._lanes[other]
        return self._lanes[key]

    def _proposer(self, key: Key) -> Proposer:
        name, size = key
        if name is None and size is None:
            return self.decoder.proposer
        name = name or self.decoder.proposer.name
        options = {"heads": self.heads} if name in ("heads", "hybrid") and self.heads is not None else {}
        if name == "none":
            size = None
        return build_proposer(name, self.target, tree_size=size, **options)

    # ---------------------------------------------------------------- ends

    def _end(self, seat: RequestState, reason: Reason, error: str | None = None) -> None:
        result = seat.ticket.result
        result.reason, result.seconds = reason, time.perf_counter() - seat.submitted
        with self._awake:
            self._seats.pop(id(seat.row), None)
            self._ended[reason] += 1
            self._totals.prompt_tokens += result.prompt_tokens
        for listener in self.listeners:
            try:
                listener(seat.ticket.request, result)
            except Exception:
                LOG.exception("a listener failed")
        seat.ticket.end(error)

    def _shut(self) -> None:
        self._active.close()
        with self._awake:
            self._running = False
            seats = [*self._seats.values(), *self._waiting]
            self._waiting.clear()
        for seat in seats:
            self._end(seat, "cancelled")

    def _notify(self) -> None:
        with self._awake:
            self._awake.notify()


def _why(seat: RequestState) -> Reason:
    return "cancelled" if seat.ticket.cancelled else "timeout"


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if found is None else frozenset(torch.as_tensor(found).flatten().tolist())
