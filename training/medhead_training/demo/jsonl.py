"""Read the training files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medhead.errors import MedheadError
from medhead_training.data.records import parse_json, read_lines


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the records of a JSON-lines file; raise a `MedheadError` that names a line that is not JSON."""
    if not path.is_file():
        raise MedheadError(f"{path} does not exist: --data must be the folder with the five training files")
    return (parse_json(line, where) for where, line in read_lines(path))
