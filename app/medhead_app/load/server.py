"""The server of the load test: it runs in a process of its own, and its memory is monitored."""

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

SAMPLE_INTERVAL = 0.5  # seconds between two samples of the memory
STOP_TIMEOUT = 30  # seconds


class MemoryMonitor:
    """Record the resident memory of a process in `samples`, as pairs of seconds since the start and bytes."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[tuple[float, int]] = []
        self._stopped = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record samples in a thread while the block runs."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def growth(self, after: float) -> float | None:
        """Return max / min - 1 of the samples after so many seconds; None if there are none."""
        sizes = [size for at, size in self.samples if at >= after]
        return max(sizes) / min(sizes) - 1 if sizes else None

    def _run(self) -> None:
        import psutil

        process, start = psutil.Process(self.pid), time.perf_counter()
        with contextlib.suppress(psutil.NoSuchProcess):
            while True:
                self.samples.append((time.perf_counter() - start, process.memory_info().rss))
                if self._stopped.wait(SAMPLE_INTERVAL):
                    return


@contextlib.contextmanager
def start_server(options: list[str]) -> Iterator[tuple[str, int]]:
    """Run `medhead serve` with these options on a free port; yield its URL and process id."""
    command = [sys.executable, "-m", "medhead_app", "--no-page", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield read_url(process), process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_url(process: subprocess.Popen[str]) -> str:
    """Return the URL that a starting server prints; its later lines go to standard error."""
    assert process.stderr is not None
    lines: deque[str] = deque(maxlen=200)
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"API at (http://\S+)/v1", line):
            threading.Thread(target=_forward, args=(process,), daemon=True).start()
            return found.group(1)
    reason = next((line for line in reversed(lines) if line.strip()), "it printed nothing").strip()
    raise MedheadError(f"the server did not start: {reason}")


def _forward(process: subprocess.Popen[str]) -> None:
    """Print what the server prints; an unread pipe would block it."""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
