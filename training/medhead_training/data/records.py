"""Training records: JSON lines of one or many files, or a data set of the hub, read as a stream."""

from __future__ import annotations

import codecs
import hashlib
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
PROMPT_FIELDS = "`messages`, `prompt`, `question`, `turns` or `text`"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Record:
    """One training record: a chat, plain text, or exact token ids; one of the three is set.

    Attributes:
        where: file and line (or data set and row), for messages.
        messages: a chat, roles and contents.
        text: plain text.
        ids: token ids of a prompt and of the answer to it.
    """

    where: str
    messages: list[Message] | None = None
    text: str | None = None
    ids: tuple[list[int], list[int]] | None = None


def read_records(sources: Sources, on_bytes: Callable[[int], None] | None = None) -> Iterator[Record]:
    """Records of all sources in order, one at a time.

    Args:
        sources: files, folders of *.jsonl files, or names of data sets of the hub (owner/name, their split `train`).
        on_bytes: called with the size of every line that was read, for progress bars.

    Raises:
        MedheadError: a source is missing or empty, a line is no JSON, or a record has none of the accepted fields.
    """
    for source in source_list(sources):
        found = False
        for where, fields in _rows(source, on_bytes):
            found = True
            yield parse_record(fields, where)
        if not found:
            raise MedheadError(f"{str(source)!r} holds no record; a record has {FIELDS}")


def source_list(sources: Sources) -> list[str | Path]:
    """The sources as a list, never empty."""
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    if not listed:
        raise MedheadError("no training data was given: name files, folders of *.jsonl files, or a data set of the hub")
    return listed


def source_files(source: str | Path) -> list[Path] | None:
    """The files of a source; None for a data set of the hub.

    Raises:
        MedheadError: it is missing, or a folder without *.jsonl files.
    """
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
    """Place and content of every line of a file that is not blank.

    Raises:
        MedheadError: the file cannot be read.
    """
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
    """The JSON value of one line.

    Raises:
        MedheadError: it is not UTF-8 text, or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise MedheadError(f"{where} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        reason = (
            error.msg if isinstance(error, json.JSONDecodeError) else "it nests too deep or holds too long a number"
        )
        raise MedheadError(f"{where} is not JSON: {reason}") from None


def parse_record(fields: Any, where: str) -> Record:
    """A record from its fields; token ids win over text, a chat over its parts.

    Raises:
        MedheadError: none of the accepted fields is there, or one has the wrong type.
    """
    if not isinstance(fields, Mapping):
        raise MedheadError(f"{where}: expected an object with {FIELDS}, got {_kind(fields)}")
    has = {name for name, value in fields.items() if value is not None}
    if {"prompt_ids", "answer_ids"} <= has:
        prompt, answer = (_token_ids(fields[name], name, where) for name in ("prompt_ids", "answer_ids"))
        return Record(where, ids=(prompt, answer))
    if "messages" in has:
        return Record(where, messages=_messages(fields["messages"], where))
    for question in ("prompt", "question"):
        if {question, "answer"} <= has:
            asked, said = _text(fields[question], question, where), _text(fields["answer"], "answer", where)
            return Record(where, [{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    if "text" in has:
        return Record(where, text=_text(fields["text"], "text", where))
    given = ", ".join(sorted(map(str, fields))) or "no field"
    raise MedheadError(f"{where}: expected {FIELDS}; it has {given}"[:400])


def parse_prompt(fields: Any, where: str) -> list[Message]:
    """A chat that waits for an answer: answers at its end are taken off.

    Raises:
        MedheadError: none of the accepted fields is there, one has the wrong type, or nobody asks anything.
    """
    if not isinstance(fields, Mapping):
        raise MedheadError(f"{where}: expected an object with {PROMPT_FIELDS}, got {_kind(fields)}")
    if fields.get("messages") is not None:
        messages = _messages(fields["messages"], where)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] not in ("system", "developer") for message in messages):
            raise MedheadError(f"{where}: `messages` has no turn before the assistant's that could be answered")
        return messages
    name = next((name for name in ("prompt", "question", "turns", "text") if fields.get(name) is not None), None)
    if name is None:
        given = ", ".join(sorted(map(str, fields))) or "no field"
        raise MedheadError(f"{where}: expected {PROMPT_FIELDS}; it has {given}"[:400])
    value = fields[name]
    text = _text(value[0] if name == "turns" and isinstance(value, list) and value else value, name, where)
    if not text.strip():
        raise MedheadError(f"{where}: `{name}` is empty")
    return [{"role": "user", "content": text}]


def scan_prompts(path: Path) -> tuple[str, int]:
    """Hash of a file of prompts and how many it holds, without keeping them in memory.

    Raises:
        MedheadError: the file cannot be read or holds nothing.
    """
    if not path.is_file() and not path.is_dir():
        raise MedheadError(f"prompts file {str(path)!r} {'is no regular file' if path.exists() else 'does not exist'}")
    digest, number = hashlib.sha256(), 0
    for _, line in read_lines(path):
        digest.update(line.strip() + b"\n")
        number += 1
    if not number:
        raise MedheadError(f"prompts file {str(path)!r} holds no prompt; a prompt has {PROMPT_FIELDS}")
    return digest.hexdigest(), number


def prompts_from(path: Path, start: int, number: int, system: str | None) -> Iterator[tuple[int, str, list[Message]]]:
    """Index, place and chat of every prompt from index `start` on; after the last of the file the first comes again.

    Args:
        path: file of prompts.
        start: index to begin with.
        number: how many prompts the file holds.
        system: system prompt for chats that have none.
    """
    index = start - start % number
    while True:
        for where, line in read_lines(path):
            if index >= start:
                messages = parse_prompt(parse_json(line, where), where)
                if system is not None and messages[0]["role"] not in ("system", "developer"):
                    messages.insert(0, {"role": "system", "content": system})
                yield index, where, messages
            index += 1


def _rows(source: str | Path, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[str, Any]]:
    files = source_files(source)
    if files is None:
        for number, row in enumerate(_hub_rows(str(source)), 1):
            yield f"{source}, row {number}", row
        return
    for path in files:
        for where, line in read_lines(path, on_bytes):
            yield where, parse_json(line, where)


def _hub_rows(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MedheadError(
            f"{name!r} is no file here; data sets of the hub need `pip install 'medhead[train]'`"
        ) from None
    try:
        return load_dataset(name, split="train", streaming=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise MedheadError(f"{name!r} is no file here and no data set of the hub that can be read: {reason}") from None


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise MedheadError(
            f"{where}: `messages` must be a list of objects with `role` and `content`, got {_kind(value)}"
        )
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MedheadError(f"{where}: message {number} must be an object with `role` and `content`")
        kept = {name: part for name, part in message.items() if part is not None}  # data sets fill absent fields so
        if not (kept.get("tool_calls") and "content" not in kept):
            kept["content"] = _text(kept.get("content"), f"content of message {number}", where)
        messages.append(kept)
    return messages


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise MedheadError(f"{where}: `{name}` must be text, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MedheadError(f"{where}: `{name}` holds half a character (a lone surrogate)") from None
    return value


def _token_ids(value: Any, name: str, where: str) -> list[int]:
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise MedheadError(f"{where}: `{name}` must be a list of whole numbers from 0 up")
    return value


def _kind(value: Any) -> str:
    names = {
        type(None): "nothing",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
