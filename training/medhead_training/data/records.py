"""Training records, streamed from JSON-lines files or from a Hugging Face dataset."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError

Message = dict[str, Any]
Sources = str | Path | Sequence[str | Path]

FIELDS = "`messages`, `prompt` + `answer`, `question` + `answer`, `text`, or `prompt_ids` + `answer_ids`"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz", ".zst")
_KINDS = {type(None): "nothing", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Record:
    """One training record; exactly one of `messages`, `text` and `ids` is set."""

    where: str  # file and line, or dataset and row, for error messages
    messages: list[Message] | None = None
    text: str | None = None
    ids: tuple[list[int], list[int]] | None = None  # of a prompt and of its answer


def read_records(sources: Sources, on_bytes: Callable[[int], None] | None = None) -> Iterator[Record]:
    """Yield the records of files, folders of *.jsonl files and Hugging Face datasets (owner/name, split `train`).

    `on_bytes` is called with the size of every line, for progress bars.
    """
    for source in source_list(sources):
        empty = True
        for where, fields in _rows(source, on_bytes):
            empty = False
            yield parse_record(fields, where)
        if empty:
            raise MedheadError(f"{str(source)!r} holds no record; a record has {FIELDS}")


def source_list(sources: Sources) -> list[str | Path]:
    """Return the sources as a list; raise a `MedheadError` if it is empty."""
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    if not listed:
        raise MedheadError("no training data was given: name files, folders of *.jsonl files or a Hugging Face dataset")
    return listed


def source_files(source: str | Path) -> list[Path] | None:
    """Return the files of a source, or None for a Hugging Face dataset."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*.jsonl") if file.is_file())
        if not files:
            raise MedheadError(f"the folder {str(source)!r} holds no *.jsonl file")
        return files
    if not path.exists() and _HUB_NAME.fullmatch(str(source)) and not str(source).endswith(_FILE_ENDINGS):
        return None
    raise MedheadError(f"{str(source)!r} {'is not a regular file' if path.exists() else 'does not exist'}")


def read_lines(path: Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield place and content of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if on_bytes is not None:
                    on_bytes(len(line))
                if line.strip():
                    yield f"{path}, line {number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except OSError as error:
        raise MedheadError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None


def parse_json(line: bytes, where: str) -> Any:
    """Return the JSON value of one line."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise MedheadError(f"{where} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise MedheadError(f"{where} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise MedheadError(f"{where} is not JSON: it nests too deep or holds too long a number") from None


def parse_record(fields: Any, where: str) -> Record:
    """Return the record of these fields; token ids take precedence over `messages`, and these over question and answer."""
    has = present_fields(fields, where, FIELDS)
    if {"prompt_ids", "answer_ids"} <= has:
        return Record(where, ids=(_token_ids(fields, "prompt_ids", where), _token_ids(fields, "answer_ids", where)))
    if "messages" in has:
        return Record(where, messages=parse_messages(fields["messages"], where))
    for question in ("prompt", "question"):
        if {question, "answer"} <= has:
            roles = {"user": question, "assistant": "answer"}
            chat = [{"role": role, "content": parse_text(fields[name], name, where)} for role, name in roles.items()]
            return Record(where, messages=chat)
    if "text" in has:
        return Record(where, text=parse_text(fields["text"], "text", where))
    raise unknown_fields(fields, where, FIELDS)


def present_fields(fields: Any, where: str, expected: str) -> set[str]:
    """Return the names of the fields that are not null; raise a `MedheadError` if `fields` is no object."""
    if not isinstance(fields, Mapping):
        raise MedheadError(f"{where}: expected an object with {expected}, got {_kind(fields)}")
    return {name for name, value in fields.items() if value is not None}


def unknown_fields(fields: Mapping[str, Any], where: str, expected: str) -> MedheadError:
    """Return the error for an object without any of the expected fields."""
    given = ", ".join(sorted(map(str, fields))) or "no field"
    return MedheadError(f"{where}: expected {expected}; it has {given}"[:400])


def parse_messages(value: Any, where: str) -> list[Message]:
    """Return the messages without null fields; raise a `MedheadError` if they are no chat."""
    expected = "with `role` and `content`"
    if not isinstance(value, list) or not value:
        raise MedheadError(f"{where}: `messages` must be a list of objects {expected}, got {_kind(value)}")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MedheadError(f"{where}: message {number} must be an object {expected}")
        kept = {name: part for name, part in message.items() if part is not None}  # datasets fill absent fields so
        if not (kept.get("tool_calls") and "content" not in kept):
            kept["content"] = parse_text(kept.get("content"), f"content of message {number}", where)
        messages.append(kept)
    return messages


def parse_text(value: Any, name: str, where: str) -> str:
    """Return the value if it is text that UTF-8 can encode; raise a `MedheadError` otherwise."""
    if not isinstance(value, str):
        raise MedheadError(f"{where}: `{name}` must be text, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MedheadError(f"{where}: `{name}` holds half a character (a lone surrogate)") from None
    return value


def _token_ids(fields: Mapping[str, Any], name: str, where: str) -> list[int]:
    value = fields[name]
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise MedheadError(f"{where}: `{name}` must be a list of whole numbers from 0 up")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    return _KINDS.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def _rows(source: str | Path, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[str, Any]]:
    files = source_files(source)
    if files is None:
        for number, row in enumerate(_dataset_rows(str(source)), 1):
            yield f"{source}, row {number}", row
        return
    for path in files:
        for where, line in read_lines(path, on_bytes):
            yield where, parse_json(line, where)


def _dataset_rows(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MedheadError(
            f"{name!r} is no file here; Hugging Face datasets need `pip install 'medhead[train]'`"
        ) from None
    try:
        return load_dataset(name, split="train", streaming=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise MedheadError(f"{name!r} is no file here and no Hugging Face dataset that can be read: {reason}") from None
