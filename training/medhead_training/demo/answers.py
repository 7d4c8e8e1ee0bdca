"""The target's answers, sorted: what heads learn from, and what they are measured with.

So small a model sometimes goes round in circles when it decodes greedily: it says the same few words for ever. Heads that have
hardly seen such a loop do not follow it, and there a text of 200 tokens costs as many passes as seven others together. Loops are
one or two answers in a hundred, so the recipe asks more chats, and heads see the answers that loop several times.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError
from medhead_training.demo.jsonl import read_jsonl

WINDOW, LONGEST = 48, 16  # tokens at the end that must repeat, and the longest turn of a loop
TIMES = 4  # how often heads see an answer that loops
SHARE = 3  # of the other answers to the chats that were asked for loops, one in so many is taken

Record = dict[str, Any]


def period(ids: Sequence[int]) -> int:
    """After how many tokens the end of an answer repeats itself, 0 if it does not."""
    end = ids[-WINDOW:]
    if len(end) < WINDOW:
        return 0
    return next((turn for turn in range(1, LONGEST + 1) if end[turn:] == end[:-turn]), 0)


def with_loops(answers: Path, chats: Path, output: Path, seed: int) -> tuple[int, int]:
    """Write the text that heads learn from: all answers, part of those to the chats, loops several times; shuffled.

    Args:
        answers: what the model answered (`generate_data`).
        chats: its greedy answers to more chats.
        output: the same JSON lines.
        seed: of the order.

    Returns:
        How many answers there are, and how many different ones of them loop.
    """
    loops: dict[Any, Record] = {}
    others: list[Record] = []
    more: list[Record] = []
    for source, kept in ((answers, others), (chats, more)):
        for record in read_jsonl(source):
            if period(record["answer_ids"]):
                loops[_said(record)] = record
            else:
                kept.append(record)
    rng = random.Random(seed)
    rng.shuffle(more)
    chosen = others + more[: len(more) // SHARE] + list(loops.values()) * TIMES
    rng.shuffle(chosen)
    write_whole(output, _lines(chosen))
    return len(chosen), len(loops)


def unseen(answers: Path, learnt: Path, output: Path, seed: int) -> int:
    """Write what heads are measured with: the different ones among these answers that heads do not learn; shuffled.

    Returns:
        How many there are.

    Raises:
        MedheadError: there is none.
    """
    known = {_said(record) for record in read_jsonl(learnt)}
    fresh = {_said(record): record for record in read_jsonl(answers) if _said(record) not in known}
    if not fresh:
        raise MedheadError(f"all answers in {answers} are learnt: nothing is left to measure heads with; ask for more")
    chosen = list(fresh.values())
    random.Random(seed).shuffle(chosen)
    write_whole(output, _lines(chosen))
    return len(chosen)


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a file that is either there as a whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(path)


def _said(record: Record) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(record["prompt_ids"]), tuple(record["answer_ids"])


def _lines(records: list[Record]) -> Iterator[str]:
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
