"""A file of JSON lines that may be killed while it grows, and goes on with the options it was begun with.

Beside the file `data.jsonl` a small `data.jsonl.meta.json` says which command writes it, and with which options.
"""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medhead.errors import MedheadError


@dataclass(frozen=True, slots=True)
class ResumableFile:
    """Lines with an `index` each, written by one command with one set of options.

    Args:
        path: of the lines.
        writer: name and version of the command that writes them.
    """

    path: Path
    writer: str

    @property
    def meta(self) -> Path:
        """The file that keeps the options."""
        return self.path.with_name(self.path.name + ".meta.json")

    def begun(self, options: dict[str, Any]) -> bool:
        """Whether the file was begun before, with (at least) these options.

        Raises:
            MedheadError: it was not written by this command, or with other options.
        """
        if not self.meta.exists():
            if self.path.exists() or self.path.is_symlink():
                raise MedheadError(
                    f"{str(self.path)!r} exists and was not written by this command; choose another --output"
                )
            return False
        try:
            found = json.loads(self.meta.read_text(encoding="utf-8"))
            known = found["written_by"] == self.writer
            before = dict(found["options"])
        except (OSError, ValueError, KeyError, TypeError):
            known, before = False, {}
        if not known:
            raise MedheadError(f"{str(self.meta)!r} is not from this version of the command; choose another --output")
        for name, value in options.items():
            if before.get(name) != value:
                was, now = (json.dumps(v)[:60] for v in (before.get(name), value))
                raise MedheadError(
                    f"{str(self.path)!r} was begun with {name} {was}, now it is {now}; use the same, or another --output"
                )
        return True

    def begin(self, options: dict[str, Any]) -> None:
        """Keep the options; whole or not at all, and before the first line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.meta.with_name(f".{self.meta.name}.{os.getpid()}")
        said = {"written_by": self.writer, "options": options}
        temporary.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.meta)

    def open(self) -> IO[bytes]:
        """The file to add lines to; no second process gets it meanwhile, where the system has locks.

        Raises:
            MedheadError: another process is writing to it.
        """
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

    def indices(self, file: IO[bytes], count: int, window: int) -> array[int]:
        """Indices of the lines in the opened file, in their order; half a line at its end is cut off.

        Args:
            file: what `open` gave.
            count: the most lines there can be.
            window: every so many lines hold the next so many indices, in some order.

        Raises:
            MedheadError: a line is not from this command.
        """
        found: array[int] = array("q")
        whole = 0
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            try:
                found.append(json.loads(line)["index"])
            except (ValueError, KeyError, TypeError, OverflowError):
                raise self.changed(len(found) + 1) from None
            whole += len(line)
        if len(found) > count:
            raise self.changed(count + 1)
        for start in range(0, len(found) - window + 1, window):
            if sorted(found[start : start + window]) != list(range(start, start + window)):
                raise self.changed(start + 1)
        return found

    def changed(self, line: int) -> MedheadError:
        """The error for a file that something else has written to."""
        return MedheadError(
            f"{str(self.path)!r}, near line {line}, is not what this command wrote; choose another --output"
        )
