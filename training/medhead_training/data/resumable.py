"""A JSON-lines file whose writer may be killed and resumes with the options it was started with.

Beside `data.jsonl`, a file `data.jsonl.meta.json` records which command writes it with which options.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medhead.errors import MedheadError


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is never incomplete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class ResumableFile:
    """Lines with an `index` each, written by one command with one set of options."""

    path: Path
    writer: str  # name and version of the command

    @property
    def meta(self) -> Path:
        """The file that records the options."""
        return self.path.with_name(self.path.name + ".meta.json")

    def is_started(self, options: dict[str, Any]) -> bool:
        """Return whether the file was started before with (at least) these options."""
        path = str(self.path)
        if not self.meta.exists():
            if self.path.exists() or self.path.is_symlink():
                raise MedheadError(f"{path!r} exists and was not written by this command; choose another --output")
            return False
        try:
            meta = json.loads(self.meta.read_text(encoding="utf-8"))
            known, before = meta["written_by"] == self.writer, dict(meta["options"])
        except (OSError, ValueError, KeyError, TypeError):
            known, before = False, {}
        if not known:
            raise MedheadError(f"{str(self.meta)!r} is not from this version of the command; choose another --output")
        for name, value in options.items():
            if before.get(name) != value:
                was, now = (json.dumps(v)[:60] for v in (before.get(name), value))
                was_started = f"{path!r} was started with {name} {was}, now it is {now}"
                raise MedheadError(f"{was_started}; use the same, or another --output")
        return True

    def start(self, options: dict[str, Any]) -> None:
        """Record the options atomically, before the first line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        meta = {"written_by": self.writer, "options": options}
        write_atomically(self.meta, json.dumps(meta, indent=2) + "\n")

    def open(self) -> IO[bytes]:
        """Open the file for appending, locked against a second process where the system has locks."""
        file = self.path.open("a+b")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise MedheadError(f"another process is writing to {str(self.path)!r}") from None
        except (ImportError, OSError):
            pass
        return file

    def read_indices(self, file: IO[bytes], count: int) -> list[int]:
        """Return the indices of the lines, each below `count`, in order; an incomplete last line is removed from the file."""
        found: dict[int, None] = {}
        complete = 0
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(complete)
                break
            try:
                index = json.loads(line)["index"]
            except (ValueError, KeyError, TypeError):
                raise self.changed(number) from None
            if not isinstance(index, int) or not 0 <= index < count or index in found:
                raise self.changed(number)
            found[index] = None
            complete += len(line)
        return list(found)

    def sort(self) -> None:
        """Sort the lines by index. They are written to a file beside this one, which then takes its place."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with self.path.open("rb") as file, temporary.open("wb") as target:
            starts: list[tuple[int, int]] = []
            while line := file.readline():
                starts.append((json.loads(line)["index"], file.tell() - len(line)))
            for _, start in sorted(starts):
                file.seek(start)
                target.write(file.readline())
        temporary.replace(self.path)

    def changed(self, line: int) -> MedheadError:
        """Return the error for a file that another program has written to."""
        return MedheadError(
            f"{str(self.path)!r}, near line {line}, is not what this command wrote; choose another --output"
        )
