"""Read the training files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from medhead.errors import MedheadError


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the records of a JSON-lines file; raise a `MedheadError` that names a line that is not JSON."""
    if not path.is_file():
        raise MedheadError(f"{path} does not exist: --data must be the folder with the five training files")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise MedheadError(f"{path}, line {number} is not JSON: {error.msg}") from None
