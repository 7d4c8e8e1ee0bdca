"""Prompts to answer: read from JSON lines and encoded with the model's chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from medhead.errors import MedheadError
from medhead.model.loading import apply_template
from medhead_training.data import records
from medhead_training.data.records import Message

FIELDS = "`messages`, `prompt`, `question`, `turns` or `text`"


def parse_prompt(fields: Any, where: str) -> list[Message]:
    """Return a chat that waits for an answer; answers at its end are removed."""
    has = records.present_fields(fields, where, FIELDS)
    if "messages" in has:
        messages = records.parse_messages(fields["messages"], where)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] not in ("system", "developer") for message in messages):
            raise MedheadError(f"{where}: `messages` has no turn before the assistant's that could be answered")
        return messages
    name = next((name for name in ("prompt", "question", "turns", "text") if name in has), None)
    if name is None:
        raise records.unknown_fields(fields, where, FIELDS)
    value = fields[name]
    text = records.parse_text(value[0] if name == "turns" and isinstance(value, list) and value else value, name, where)
    if not text.strip():
        raise MedheadError(f"{where}: `{name}` is empty")
    return [{"role": "user", "content": text}]


def scan_prompts(path: Path) -> tuple[str, int]:
    """Return a hash of a prompts file and its number of prompts, without keeping them in memory."""
    if not path.is_file() and not path.is_dir():
        raise MedheadError(f"prompts file {str(path)!r} {'is no regular file' if path.exists() else 'does not exist'}")
    digest, number = hashlib.sha256(), 0
    for _, line in records.read_lines(path):
        digest.update(line.strip() + b"\n")
        number += 1
    if not number:
        raise MedheadError(f"prompts file {str(path)!r} holds no prompt; a prompt has {FIELDS}")
    return digest.hexdigest(), number


def cycle_prompts(path: Path, start: int, number: int, system: str | None) -> Iterator[tuple[int, str, list[Message]]]:
    """Yield index, place and chat from index `start` on, repeating the file of `number` prompts without end."""
    index = start - start % number
    while True:
        for where, line in records.read_lines(path):
            if index >= start:
                messages = parse_prompt(records.parse_json(line, where), where)
                if system is not None and messages[0]["role"] not in ("system", "developer"):
                    messages.insert(0, {"role": "system", "content": system})
                yield index, where, messages
            index += 1


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, max_tokens: int
) -> list[int]:
    """Return the token ids of a chat with the generation prompt, or of its last message without a chat template.

    A prompt of more than `max_tokens` keeps its newest tokens, and a BOS token at its start.
    """
    try:
        if tokenizer.chat_template:
            ids = apply_template(tokenizer, messages)
        else:
            ids = list(tokenizer(str(messages[-1].get("content", "")), verbose=False)["input_ids"])
    except MedheadError as error:
        raise MedheadError(f"{where}: {error}") from None
    if not ids:
        raise MedheadError(f"{where}: the prompt has no token")
    if len(ids) <= max_tokens:
        return ids
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id and max_tokens > 1 else []
    return bos + ids[len(ids) - max_tokens + len(bos) :]
