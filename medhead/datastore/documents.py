"""Read the user's files and folders as documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError

CHUNK_SIZE = 1 << 16  # characters that are tokenized at a time


def text_files(sources: list[Path]) -> list[Path]:
    """Return all files of the sources in order, without the hidden files of folders; at least one is required."""
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file())
            found += [path for path in inside if not any(p.startswith(".") for p in path.relative_to(source).parts)]
        elif source.is_file():
            found.append(source)
        else:
            problem = "is not a regular file" if source.exists() else "does not exist"
            raise MedheadError(f"the text {str(source)!r} {problem}")
    if not found:
        raise MedheadError(f"there is no file in {', '.join(map(repr, map(str, sources)))}")
    return found


def read_documents(path: Path) -> list[str] | None:
    """Return every string in the records of a *.jsonl file, or the whole of another file; None if it is not UTF-8 text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise MedheadError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    if "\0" in text:
        return None
    if path.suffix != ".jsonl":
        return [text]
    found: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found += _strings(json.loads(line))
            except (ValueError, RecursionError):
                raise MedheadError(f"{path}, line {number} is not JSON") from None
    return found


def chunks(text: str) -> list[str]:
    """Split the text into chunks of at most `CHUNK_SIZE` characters, at line ends where possible."""
    found, start = [], 0
    while start < len(text):
        end = start + CHUNK_SIZE
        if end < len(text):
            line_end = text.rfind("\n", start, end)
            end = line_end + 1 if line_end >= start else end
        found.append(text[start:end])
        start = end
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a document, without special tokens."""
    if not text:
        return []
    rows = tokenizer(chunks(text), add_special_tokens=False, verbose=False)["input_ids"]
    return [token for row in rows for token in row]


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings of a JSON value except roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        parts = value if isinstance(value, list) else [part for name, part in value.items() if name != "role"]
        for part in parts:
            yield from _strings(part)
