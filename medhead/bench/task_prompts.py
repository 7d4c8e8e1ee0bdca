"""Prompts by task: which record belongs to which, how long ones are cut, and which do not fit."""

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
    """Prompts of one kind.

    Attributes:
        name: of the task.
        prompts: token ids.
        cut: how many of them were cut.
        left_out: prompts that were passed over because they do not fit.
    """

    name: str
    prompts: list[list[int]] = field(default_factory=list)
    cut: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Cut:
    """How long questions are cut.

    Attributes:
        tokens: that stay of a longer question; None leaves all as they are.
        keep: which: the `first`, the `last`, or both `ends`, so that the middle is lost.
    """

    tokens: int | None = None
    keep: str = "ends"

    def __call__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[Chat, bool]:
        """The chat with its last message cut, and whether it was."""
        ids = tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"] if self.tokens else []
        if self.tokens is None or len(ids) <= self.tokens:
            return chat, False
        first = {"ends": self.tokens // 2, "first": self.tokens, "last": 0}[self.keep]
        parts = [ids[:first], ids[len(ids) - (self.tokens - first) :]]
        text = "".join(tokenizer.decode(part, skip_special_tokens=True).strip("\ufffd") for part in parts if part)
        return [*chat[:-1], {"role": "user", "content": text}], True


def task_of(record: dict[str, object]) -> str:
    """Name of a record's task: its `category` (those of MT-bench are one), else `text` or `chat`.

    Raises:
        MedheadError: the category is no text.
    """
    name = record.get("category", "text" if "text" in record else "chat")
    if not isinstance(name, str) or not name.strip():
        raise MedheadError(f"a prompt's category must be a text, got {name!r}")
    return "mt-bench" if name in MT_BENCH else name


def read_tasks(path: str | Path, only: list[str] | None = None) -> dict[str, list[Chat]]:
    """All chats of a prompts file by task, in the order of the file; those of MT-bench by turns from its categories.

    Args:
        path: JSON lines as for `read_prompts`, with `category`.
        only: names of tasks that are wanted; None for all.

    Raises:
        MedheadError: the file cannot be read or holds something else, or a task that is wanted is not in it.
    """
    found: dict[str, dict[str, list[Chat]]] = {}
    for record, chat in read_records(path):
        parts = found.setdefault(task_of(record), {})
        parts.setdefault(str(record.get("category")), []).append(chat)
    lost = sorted(set(only or ()) - found.keys())
    if lost:
        raise MedheadError(f"no prompt of {', '.join(lost)} in {str(path)!r}; its tasks: {', '.join(found)}")
    return {name: _by_turns(list(parts.values())) for name, parts in found.items() if not only or name in only}


def _by_turns(parts: list[list[Chat]]) -> list[Chat]:
    """One of each part, then the next of each."""
    longest = max(map(len, parts))
    return [part[place] for place in range(longest) for part in parts if place < len(part)]


def encode_task(
    tokenizer: PreTrainedTokenizerBase, name: str, chats: list[Chat], count: int, longest: int, cut: Cut
) -> Task:
    """The first `count` prompts that fit into `longest` tokens; none is shortened but by `cut`."""
    task = Task(name)
    for chat in chats:
        if len(task.prompts) == count:
            break
        chat, shorter = cut(tokenizer, chat)
        ids = encode_prompts(tokenizer, [chat], 10**9)[0]
        if 0 < len(ids) <= longest:
            task.prompts.append(ids)
            task.cut += shorter
        else:
            task.left_out += 1
    return task
