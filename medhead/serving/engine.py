"""The engine: one thread that decodes all requests together (continuous batching).

Requests wait in order in a bounded queue. Between two steps those that ended or were cancelled leave, and those that wait
join. The scheduler says which batch goes next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from medhead.core.sequence import Sequence
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.generate_options import seed_or_draw
from medhead.model.target import PREFILL_CHUNK
from medhead.serving.handle import RequestHandle
from medhead.serving.prefix_store import PrefixStore
from medhead.serving.prepare import SequencePreparer
from medhead.serving.prompts import UnreadablePromptError
from medhead.serving.request import QueueFullError, Reason, Request, Result, Stopped, input_bytes
from medhead.serving.request_state import RequestState, check_request
from medhead.serving.scheduler import DecodeBatch, Scheduler
from medhead.serving.statistics import EngineStatistics

LOG = logging.getLogger(__name__)
MAX_WAITING_BYTES = 2 * 2**30  # of the model inputs of requests that wait


class Engine:
    """Serves requests in batches, each with exactly the text it would get alone.

    Args:
        decoder: what decodes; its proposer serves requests that name none. Of one engine alone.
        tokenizer: for stop strings and the text of outputs.
        heads: for requests that name the proposers `heads` or `hybrid`: heads or their folder; the decoder's if None.
        max_rows: most requests decoded at a time, all batches together.
        max_queue: most requests that wait.
        time_limit: seconds after which a request ends, if it does not say so itself.
        prefix_cache_bytes: most memory for the key/value rows of earlier requests, which prompts that begin like them do not
            read again; 0 for none, a tenth of the free memory if None.
        prefill_chunk: most prompt tokens that are read between two steps of other requests.

    Fields of the model's generation configuration (penalties, bans, end tokens, ...) hold where a request's sampling
    parameters are None. The tokenizer's EOS token ends a text too.

    Other threads may call decoders of the same model, this one too, and `model.generate`. A decoder's generation waits for the
    running step; until it ends, the requests wait.

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
        prefix_cache_bytes: int | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        if max_rows < 1 or max_queue < 0 or not time_limit > 0:
            given = f"{max_rows}, {max_queue} and {time_limit}"
            raise MedheadError(f"max_rows must be at least 1, max_queue at least 0 and time_limit above 0, got {given}")
        if prefill_chunk < 1 or (prefix_cache_bytes or 0) < 0:
            given = f"{prefill_chunk} and {prefix_cache_bytes}"
            raise MedheadError(f"prefill_chunk must be at least 1 and prefix_cache_bytes at least 0, got {given}")
        if decoder.target.shards is not None:
            raise MedheadError(
                f"an engine cannot serve {decoder.target.name}, which is split over processes: they would not batch the same "
                "requests; call generate in every process"
            )
        self.decoder, self.tokenizer, self.heads = decoder, tokenizer, decoder.heads if heads is None else heads
        self.target = decoder.target
        self.max_rows, self.max_queue, self.time_limit = max_rows, max_queue, time_limit
        self.prefill_chunk = prefill_chunk
        self.listeners: list[Callable[[Request, Result], None]] = []
        self._prefixes = PrefixStore(self.target, prefix_cache_bytes)
        self._preparer = SequencePreparer(decoder, tokenizer)
        self._waiting: deque[RequestState] = deque()
        self._states: dict[int, RequestState] = {}  # by the id of their sequence
        self._scheduler = Scheduler(decoder, self.heads, self._prefixes)
        self._awake = threading.Condition()
        self._totals, self._ended = EngineStatistics(), Counter[str]()
        self._running = False
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._active, self._reading = ExitStack(), None  # type: tuple[ExitStack, Any]

    @property
    def has_heads(self) -> bool:
        """Whether requests may name the proposer `heads`."""
        return self.heads is not None

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self._running

    def start(self) -> Engine:
        """Start the thread; first measure pass costs that are not cached (up to about 2 s per batch size).

        Raises:
            Stopped: it runs already.
            MedheadError: the decoder serves another engine.
        """
        if self._thread is not None:
            raise Stopped("the engine was started already")
        with self.target.lock:  # a generation with the decoder's own proposer ends first
            if self.decoder.is_serving:
                raise MedheadError("the decoder serves an engine already; make a Decoder for each engine")
            self.decoder.is_serving = True
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
            QueueFullError: too many wait already, or those that wait hold too many bytes of images.
            Stopped: the engine is not running.
            MedheadError: the request is invalid: an empty or too long prompt, numbers out of range, an unknown
                proposer, token ids outside of the vocabulary.
        """
        check_request(request, self.target, self.has_heads)
        handle = RequestHandle(request, self._notify)
        handle.result.seed = 0 if request.params.greedy else seed_or_draw(request.params.seed)
        deadline = time.perf_counter() + (self.time_limit if request.time_limit is None else request.time_limit)
        state = RequestState(handle, self._preparer, self.tokenizer, deadline)
        with self._awake:
            if not self._running:
                raise Stopped("the engine is not running")
            # free places that are not taken yet count as room: a queue of 0 still serves
            if len(self._waiting) >= self.max_queue + max(0, self.max_rows - len(self._states)):
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already, try again in a moment")
            others = [other.handle.request for other in self._waiting if request.model_inputs]
            if input_bytes(others) and input_bytes([*others, request]) > MAX_WAITING_BYTES:
                limit = f"may hold {MAX_WAITING_BYTES:,} bytes of images"
                raise QueueFullError(
                    f"the requests that wait {limit}, with this one they hold more: try again in a moment"
                )
            self._waiting.append(state)
            self._awake.notify()
        return handle

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        with self._awake:
            now = replace(self._totals)
            now.running, now.waiting, now.ended = len(self._states), len(self._waiting), dict(self._ended)
            now.prefix_bytes = self._prefixes.cache.nbytes
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

    @torch.no_grad()
    def _run(self, ready: threading.Event) -> None:
        try:
            self.decoder.warmup(self.max_rows)
        except Exception as error:
            self._failed, self._running, self.decoder.is_serving = error, False, False
            return
        finally:
            ready.set()
        try:
            while self._turn():
                pass
        finally:
            self._shut_down()

    def _turn(self) -> bool:
        """Let requests leave and join, then give a batch its turn; return False when the engine is closed."""
        if self.target.lock.contended:
            self._deactivate()  # threads that wait for the model go first
        with self._awake:
            if self._running and not self._waiting and not self._states:
                self._deactivate()  # no request is served: the model is left as it was
                self._awake.wait()
            if not self._running:
                return False
        self._leave()
        self._join()
        batch = self._scheduler.next_batch()
        if batch is not None:
            self._guarded(batch, lambda: self._take_turn(batch))
        return True

    def _leave(self) -> None:
        """End requests that were cancelled or took too long, running or waiting."""
        for batch in self._scheduler:
            gone = [one for one in batch.all_sequences if not self._goes_on(self._states[id(one)])]
            if gone:
                self._guarded(batch, lambda batch=batch, gone=gone: self._drop(batch, gone))  # type: ignore[misc]
        with self._awake:
            expired = [state for state in self._waiting if not self._goes_on(state)]
            for state in expired:
                self._waiting.remove(state)
        for state in expired:
            self._end(state, _why(state))

    def _drop(self, batch: DecodeBatch, gone: list[Sequence]) -> None:
        """End sequences of a batch; a prompt that is read with others is left until all are read."""
        running = batch.sequences
        dropped = [one for one in running if one in gone] + batch.prompts.drop(lambda one: one not in gone)
        batch.loop.keep([row for row, one in enumerate(running) if one not in gone])
        for one in dropped:
            self._end(self._states[id(one)], _why(self._states[id(one)]))

    @staticmethod
    def _goes_on(state: RequestState) -> bool:
        return not state.handle.cancelled and time.perf_counter() < state.deadline

    def _join(self) -> None:
        """Let waiting requests take free places, in order."""
        with self._awake:
            free = self.max_rows - len(self._states)
            states = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._states.update({id(state.sequence): state for state in states})
        groups: dict[int, tuple[DecodeBatch, list[RequestState]]] = {}
        for state in states:
            try:
                state.prepare()
                batch = self._scheduler.batch_for(state.handle.request)
            except Exception as error:
                if not isinstance(error, MedheadError):
                    LOG.exception("no batch for %s", state.handle.request)
                message = str(error) if isinstance(error, MedheadError) else "the request could not be prepared"
                self._end(state, "error", message)
                continue
            groups.setdefault(id(batch), (batch, []))[1].append(state)
        for batch, group in groups.values():
            self._scheduler.admit(batch)
            self._guarded(batch, lambda batch=batch, group=group: self._begin_reading(batch, group), group)  # type: ignore[misc]

    def _begin_reading(self, batch: DecodeBatch, states: list[RequestState]) -> None:
        began = time.perf_counter()
        self._activate(batch)
        known = batch.prompts.add([state.sequence for state in states], self.prefill_chunk)
        for state, tokens in zip(states, known, strict=True):
            result = state.handle.result
            result.queued, result.proposer = began - state.submitted, batch.loop.proposer.name
            result.cached_tokens = tokens
        with self._awake:
            self._totals.prefix_queries += sum(state.handle.result.prompt_tokens for state in states)
            self._totals.prefix_hits += sum(known)

    def _take_turn(self, batch: DecodeBatch) -> None:
        """Read a chunk of a prompt if there is one, then decode the sequences by one step."""
        if batch.prompts:
            self._read(batch)
        if batch.sequences:
            self._step(batch)

    def _read(self, batch: DecodeBatch) -> None:
        began, running = time.perf_counter(), list(batch.sequences)
        self._activate(batch)
        is_alone = not any(other.sequences for other in self._scheduler)
        try:
            reading = batch.prompts.read(PREFILL_CHUNK if is_alone else self.prefill_chunk)
        except UnreadablePromptError as error:
            self._charge(batch, time.perf_counter() - began)
            for one in error.sequences:
                self._end(self._states[id(one)], "error", str(error))
            return
        spent = time.perf_counter() - began
        for one in reading:
            self._states[id(one)].handle.result.busy += spent
        self._charge(batch, spent)
        self._deliver(batch, reading, 0.0)  # their first tokens
        batch.loop.output = None  # captured steps give none for the others
        self._deliver(batch, running, spent)

    def _step(self, batch: DecodeBatch) -> None:
        began, running = time.perf_counter(), list(batch.sequences)
        self._activate(batch)
        batch.loop.step()
        spent = time.perf_counter() - began
        self._charge(batch, spent)
        self._deliver(batch, running, spent)

    def _deliver(self, batch: DecodeBatch, sequences: list[Sequence], seconds: float) -> None:
        """Hand on what the last pass emitted for sequences, which were the rows of the batch before it."""
        for row, one in enumerate(sequences):
            state = self._states[id(one)]
            if not state.new_token_ids:
                continue  # a captured step is read later
            with self._awake:
                self._totals.new_tokens += len(state.new_token_ids)
                self._totals.passes += 1
            state.handle.put(state.take_output(seconds, batch.loop, row))
            if state.ended:
                self._end(state, state.reason)
        if not batch.sequences:
            batch.loop.output = None  # an idle batch holds no logits

    def _charge(self, batch: DecodeBatch, seconds: float) -> None:
        self._scheduler.charge(batch, seconds)
        with self._awake:
            self._totals.busy += seconds

    def _activate(self, batch: DecodeBatch) -> None:
        """Make passes keep the features that the batch's proposer reads."""
        reading = batch.loop.target, tuple(batch.loop.proposer.feature_layers)
        if reading != self._reading:
            if self._reading is None:  # others may have changed the model
                with self.target.lock:
                    self._prefixes.refresh()
            self._deactivate()
            self._active.enter_context(reading[0].active(reading[1]))
            self._reading = reading

    def _deactivate(self) -> None:
        self._active.close()
        self._reading = None

    def _guarded(
        self, batch: DecodeBatch, action: Callable[[], None], joining: list[RequestState] | None = None
    ) -> None:
        """Run an action; a failure ends the requests of its batch, and no others."""
        affected = {id(one) for one in [*batch.all_sequences, *(state.sequence for state in joining or [])]}
        try:
            action()
        except Exception:
            LOG.exception("a batch failed (proposer %s)", batch.loop.proposer.name)
            self._scheduler.drop(batch)
            for state in [state for one, state in self._states.items() if one in affected]:
                self._end(state, "error", "the engine failed; the server's log has the details")

    # ---------------------------------------------------------------- ends

    def _end(self, state: RequestState, reason: Reason, error: str | None = None) -> None:
        result = state.handle.result
        result.reason, result.seconds = reason, time.perf_counter() - state.submitted
        with self._awake:
            self._states.pop(id(state.sequence), None)
            self._ended[reason] += 1
            self._totals.prompt_tokens += result.prompt_tokens
        for listener in self.listeners:
            try:
                listener(state.handle.request, result)
            except Exception:
                LOG.exception("a listener failed")
        state.handle.end(error)

    def _shut_down(self) -> None:
        self._deactivate()
        self._prefixes.cache.clear()
        self.decoder.is_serving = False
        with self._awake:
            self._running = False
            states = [*self._states.values(), *self._waiting]
            self._waiting.clear()
        for state in states:
            self._end(state, "cancelled")

    def _notify(self) -> None:
        with self._awake:
            self._awake.notify()


def _why(state: RequestState) -> Reason:
    return "cancelled" if state.handle.cancelled else "timeout"
