"""The threads that use one model: they take turns by a lock, and each knows whose pass it is running."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

# The target whose pass this thread runs. While a target is active, another thread may call the same modules; hooks and
# replaced functions leave such a call as it is.
running_target: ContextVar[Any] = ContextVar("medhead_running_target", default=None)


class ModelLock:
    """A re-entrant lock that serves waiting threads in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None  # identifier of the thread that holds it
        self._depth = 0
        self._generating = False

    @property
    def contended(self) -> bool:
        """Whether threads wait."""
        return bool(self._waiting)

    def __enter__(self) -> ModelLock:
        thread = threading.get_ident()
        if self._owner != thread:
            ticket = object()
            with self._changed:
                self._waiting.append(ticket)
                try:
                    while self._owner is not None or self._waiting[0] is not ticket:
                        self._changed.wait()
                    self._owner = thread
                finally:  # an interrupted thread takes its ticket back
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            with self._changed:
                self._owner = None
                self._changed.notify_all()

    @contextmanager
    def generation(self) -> Iterator[bool]:
        """Hold the lock for one generation; yield whether it is nested, so that another one of this thread goes on later."""
        with self:
            nested, self._generating = self._generating, True
            try:
                yield nested
            finally:
                self._generating = nested


_locks: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def model_lock(model: nn.Module) -> ModelLock:
    """Return the lock of a model, one for all decoders and engines."""
    with _locks_lock:
        return _locks.setdefault(model, ModelLock())
