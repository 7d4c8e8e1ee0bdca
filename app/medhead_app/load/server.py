"""The server of the load program: in a process of its own, with an eye on its memory."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

from medhead.errors import MedheadError

EVERY = 0.5  # seconds between two looks at the memory
STOP_SECONDS = 30


class Memory:
    """Resident memory of a process over time.

    Args:
        pid: of the process.

    Attributes:
        seen: seconds since the start of watching, and bytes.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.seen = pid, []  # type: int, list[tuple[float, int]]
        self._end = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at it while the block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def spread(self, after: float) -> float | None:
        """How much the largest is above the smallest, as a share of it, after so many seconds; None if nothing was seen."""
        sizes = [size for at, size in self.seen if at >= after]
        return max(sizes) / min(sizes) - 1 if sizes else None

    def _watch(self) -> None:
        import psutil

        process, began = psutil.Process(self.pid), time.perf_counter()
        with contextlib.suppress(psutil.NoSuchProcess):
            while True:
                self.seen.append((time.perf_counter() - began, process.memory_info().rss))
                if self._end.wait(EVERY):
                    return


@contextlib.contextmanager
def server(options: list[str]) -> Iterator[tuple[str, int]]:
    """`python -m medhead_app --no-page` with these options; gives its address and its process id.

    Raises:
        MedheadError: it did not start.
    """
    command = [sys.executable, "-m", "medhead_app", "--no-page", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said: deque[str] = deque(maxlen=200)
    try:
        yield _address(process, said), process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], said: deque[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        found = re.search(r"API at (http://\S+)/v1", line)
        if found:
            threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
            return found.group(1)
    reason = next((line for line in reversed(said) if line.strip()), "it said nothing").strip()
    raise MedheadError(f"the server did not start: {reason}")


def _pass_on(process: subprocess.Popen[str]) -> None:
    """What it says later is for the person; nobody reading would stop it."""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
