"""Answers that end in a loop: so small a model sometimes says the same few words for ever when it decodes greedily.

Heads that have hardly seen a loop do not follow it, and there a text of 200 tokens costs as many passes as seven others
together. Loops are one or two answers in a hundred, so the recipe lets the model answer more chats, and heads see those
that loop several times.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .jsonl import read_jsonl

WINDOW, LONGEST = 48, 16  # tokens at the end that must repeat, and the longest turn of a loop
TIMES = 4  # how often heads see an answer that loops
SHARE = 3  # of the other answers to the chats that were asked for loops, one in so many is taken


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
    loops, others, more = [], [], []
    for source, kept in ((answers, others), (chats, more)):
        for record in read_jsonl(source):
            (loops if period(record["answer_ids"]) else kept).append(record)
    rng = random.Random(seed)
    rng.shuffle(more)
    chosen = others + more[: len(more) // SHARE] + loops * TIMES
    rng.shuffle(chosen)
    partial = output.with_name(output.name + ".part")
    partial.write_text("".join(_lines(chosen)), encoding="utf-8")
    partial.rename(output)
    return len(chosen), len(loops)


def _lines(records: list[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
