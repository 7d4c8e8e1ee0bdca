"""Prompts of benchmarks: the built-in ones, or a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from medhead.errors import MedheadError
from medhead.model.loading import apply_template

BUILT_IN = (
    "Tell me a short story about a brave little dog.",
    "Write a story about a girl who finds a magic stone.",
    "Can you tell me a bedtime story about a dragon?",
    "Tell me a story about two friends who share a cake.",
    "I would like to book a table for four people at an Italian restaurant tonight.",
    "I need to find a bus from Fresno to Los Angeles on the 5th of March.",
    "Please write a story with a boat and a storm in it.",
    "Write a short poem about the sea.",
)
Chat = list[dict[str, str]]  # messages with role and content
_FIELDS = "`messages`, `prompt`, `question`, `turns` or `text`"


def read_prompts(path: str | Path | None, count: int) -> list[Chat]:
    """Return the first `count` chats of a prompts file, or of the built-in prompts; each ends with the user's turn."""
    if path is None:
        return [[{"role": "user", "content": text}] for text in BUILT_IN[:count]]
    return [chat for _, chat in read_records(path, count)]


def read_records(path: str | Path, count: int | None = None) -> list[tuple[dict[str, Any], Chat]]:
    """Return the first `count` records (None for all) of a file of JSON lines with one of `_FIELDS`, each with its chat."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise MedheadError(f"prompts file {str(path)!r} cannot be read: {reason}") from None
    found: list[tuple[dict[str, Any], Chat]] = []
    for number, line in enumerate(lines, 1):
        if len(found) == count:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found.append((record, _chat(record)))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError, StopIteration):
            raise MedheadError(f"{path}, line {number}: expected a JSON object with {_FIELDS}") from None
    if not found:
        raise MedheadError(f"prompts file {str(path)!r} holds no prompt")
    return found


def _chat(record: dict[str, Any]) -> Chat:
    if "messages" in record:
        messages = list(record["messages"])
        while messages[-1]["role"] != "user":
            messages.pop()
        return messages
    text = next(record[name] for name in ("prompt", "question", "turns", "text") if name in record)
    return [{"role": "user", "content": text[0] if isinstance(text, list) else str(text)}]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, chats: list[Chat], longest: int) -> list[list[int]]:
    """Return the newest `longest` token ids of every chat; without a chat template, of its last message."""
    if getattr(tokenizer, "chat_template", None):
        rows = [apply_template(tokenizer, chat) for chat in chats]
    else:
        rows = [tokenizer(chat[-1]["content"])["input_ids"] for chat in chats]
    return [list(row[-longest:]) for row in rows]


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask `[batch, longest]`, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    return ids, mask
