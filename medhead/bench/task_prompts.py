"""Prompts by task: the task of a record, the truncation of long questions, and the prompts that fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from medhead.bench.prompts import encode_prompts, read_records
from medhead.errors import MedheadError

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
KEEP = ("ends", "first", "last")
Chat = list[dict[str, str]]


@dataclass
class Task:
    """Token ids of a task's prompts, how many of them were truncated, and how many others were left out as too long."""

    name: str
    prompts: list[list[int]] = field(default_factory=list)
    truncated: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Truncation:
    """How long questions are shortened.

    Attributes:
        tokens: tokens that stay of a longer question; None keeps all.
        keep: the tokens that stay: the `first`, the `last`, or half at both `ends`.
    """

    tokens: int | None = None
    keep: str = "ends"

    def __call__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[Chat, bool]:
        """Return the chat with its last message truncated, and whether it was."""
        ids = tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"] if self.tokens else []
        if self.tokens is None or len(ids) <= self.tokens:
            return chat, False
        first = {"ends": self.tokens // 2, "first": self.tokens, "last": 0}[self.keep]
        parts = [ids[:first], ids[len(ids) - (self.tokens - first) :]]
        text = "".join(tokenizer.decode(part, skip_special_tokens=True).strip("\ufffd") for part in parts if part)
        return [*chat[:-1], {"role": "user", "content": text}], True


def task_of(record: dict[str, object]) -> str:
    """Return the task of a record: its `category` (those of MT-bench are one task), else `text` or `chat`.

    Raises:
        MedheadError: the category is not a string.
    """
    name = record.get("category", "text" if "text" in record else "chat")
    if not isinstance(name, str) or not name.strip():
        raise MedheadError(f"a prompt's category must be a string, got {name!r}")
    return "mt-bench" if name in MT_BENCH else name


def read_tasks(path: str | Path, only: list[str] | None = None) -> dict[str, list[Chat]]:
    """Read all chats of a prompts file by task, in the order of the file; MT-bench takes turns over its categories.

    Args:
        path: JSON lines as for `read_prompts`, with `category`.
        only: names of the tasks to read; None for all.

    Raises:
        MedheadError: the file cannot be read or holds something else, or a task of `only` is not in it.
    """
    found: dict[str, dict[str, list[Chat]]] = {}
    for record, chat in read_records(path):
        parts = found.setdefault(task_of(record), {})
        parts.setdefault(str(record.get("category")), []).append(chat)
    missing = sorted(set(only or ()) - found.keys())
    if missing:
        raise MedheadError(f"no prompt of {', '.join(missing)} in {str(path)!r}; its tasks: {', '.join(found)}")
    return {name: _by_turns(list(parts.values())) for name, parts in found.items() if not only or name in only}


def _by_turns(parts: list[list[Chat]]) -> list[Chat]:
    longest = max(map(len, parts))
    return [part[place] for place in range(longest) for part in parts if place < len(part)]


def encode_task(
    tokenizer: PreTrainedTokenizerBase, name: str, chats: list[Chat], count: int, longest: int, truncation: Truncation
) -> Task:
    """Return the first `count` prompts that, truncated, fit into `longest` tokens."""
    task = Task(name)
    for chat in chats:
        if len(task.prompts) == count:
            break
        chat, shorter = truncation(tokenizer, chat)
        ids = encode_prompts(tokenizer, [chat], 10**9)[0]
        if 0 < len(ids) <= longest:
            task.prompts.append(ids)
            task.truncated += shorter
        else:
            task.left_out += 1
    return task
