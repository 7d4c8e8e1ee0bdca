"""The user's own text: files and folders, read as documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError

PIECE = 1 << 16  # characters that are tokenized at a time; pieces end with a line where they can


def text_files(sources: list[Path]) -> list[Path]:
    """All files of the sources in order; folders are walked, what is hidden is left out.

    Raises:
        MedheadError: a source does not exist, or there is no file at all.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file())
            found += [path for path in inside if not any(p.startswith(".") for p in path.relative_to(source).parts)]
        elif source.is_file():
            found.append(source)
        else:
            raise MedheadError(f"the text {str(source)!r} {_not_a_file(source)}")
    if not found:
        raise MedheadError(f"there is no file in {', '.join(map(repr, map(str, sources)))}")
    return found


def read_documents(path: Path) -> list[str] | None:
    """The documents of a file: every text in the records of a *.jsonl file, else the whole file; None if it is no text.

    Raises:
        MedheadError: the file cannot be read, or a line of a *.jsonl file is not JSON.
    """
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
                found += _texts(json.loads(line))
            except (ValueError, RecursionError):
                raise MedheadError(f"{path}, line {number} is not JSON") from None
    return found


def pieces(text: str) -> list[str]:
    """The text cut behind lines into pieces of about `PIECE` characters."""
    found, start = [], 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            line = text.rfind("\n", start, end)
            end = line + 1 if line >= start else end
        found.append(text[start:end])
        start = end
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a document, without special tokens."""
    cut = pieces(text)
    if not cut:
        return []
    rows = tokenizer(cut, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for row in rows for token in row]


def _texts(value: Any) -> Iterator[str]:
    """All strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            if name != "role":
                yield from _texts(part)


def _not_a_file(path: Path) -> str:
    return "is not a regular file" if path.exists() else "does not exist"
