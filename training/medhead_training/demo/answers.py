"""The target's answers, divided into what heads are trained on and what they are evaluated on.

The demo model sometimes repeats the same few words until the token limit when it decodes greedily. Heads that have hardly
seen such a loop do not draft it, and a looping answer of 200 tokens then costs as many passes as seven other answers. One or
two answers in a hundred loop, so the recipe asks more chats and repeats the looping answers in the training text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError
from medhead_training.data.resumable import write_atomically
from medhead_training.demo.jsonl import read_jsonl

LOOP_WINDOW, MAX_PERIOD = 48, 16  # tokens at the end that must repeat, and the longest period
LOOP_COPIES = 4  # copies of a looping answer in the training text
CHAT_FRACTION = 3  # one in so many of the other answers to the additional chats is used

Record = dict[str, Any]


def loop_period(ids: Sequence[int]) -> int:
    """Return the period in tokens with which the end of an answer repeats itself, or 0 if it does not."""
    end = ids[-LOOP_WINDOW:]
    if len(end) < LOOP_WINDOW:
        return 0
    return next((period for period in range(1, MAX_PERIOD + 1) if end[period:] == end[:-period]), 0)


def write_training_answers(answers: Path, chats: Path, output: Path, seed: int) -> tuple[int, int]:
    """Write all answers, a part of the greedy ones to additional chats, and copies of looping answers, shuffled.

    Return the number of answers written, and of distinct ones that loop.
    """
    loops: dict[Any, Record] = {}
    others: list[Record] = []
    additional: list[Record] = []
    for source, kept in ((answers, others), (chats, additional)):
        for record in read_jsonl(source):
            if loop_period(record["answer_ids"]):
                loops[_token_ids(record)] = record
            else:
                kept.append(record)
    rng = random.Random(seed)
    rng.shuffle(additional)
    chosen = others + additional[: len(additional) // CHAT_FRACTION] + list(loops.values()) * LOOP_COPIES
    rng.shuffle(chosen)
    write_atomically(output, _lines(chosen))
    return len(chosen), len(loops)


def write_held_out_answers(answers: Path, training: Path, output: Path, seed: int) -> int:
    """Write the distinct answers that are not in the training text, shuffled, and return their number."""
    known = {_token_ids(record) for record in read_jsonl(training)}
    new = {_token_ids(record): record for record in read_jsonl(answers) if _token_ids(record) not in known}
    if not new:
        raise MedheadError(f"all answers in {answers} are in the training text, so none can be held out; ask for more")
    chosen = list(new.values())
    random.Random(seed).shuffle(chosen)
    write_atomically(output, _lines(chosen))
    return len(chosen)


def _token_ids(record: Record) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(record["prompt_ids"]), tuple(record["answer_ids"])


def _lines(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
