"""The demo's data set `repeats`: chats whose answer repeats the prompt, made of stories."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

NAMES = ("Anna", "Max", "Sara", "Jack", "Emma", "Leo", "Nina", "Paul", "Rosa", "Tim", "Ella", "Ben", "Lucy", "Sam",
         "Mia")  # fmt: skip
_LONGEST = 620  # characters of a text, about 150 tokens
_NAME = re.compile(r"(?<=[a-z] )[A-Z][a-z]{2,}\b")


def excerpt(text: str, rng: random.Random) -> str:
    """Return consecutive sentences from a random one on: one, or as many as fit into `_LONGEST` characters."""
    sentences = re.split(r"(?<=[.!?]) +", " ".join(text.split()))
    start = rng.randrange(max(1, len(sentences) - 4))
    longest = rng.randint(_LONGEST // 4, _LONGEST)
    taken = sentences[start][:_LONGEST]
    for sentence in sentences[start + 1 :]:
        if len(taken) + len(sentence) > longest:
            break
        taken += " " + sentence
    return taken


def shuffled(text: str, rng: random.Random) -> str:
    """Return the words of a text in random order, which can be copied but not predicted."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words[:60])


def repeat(text: str, rng: random.Random) -> tuple[str, str]:
    """Return prompt and answer of the task `repeat`."""
    return f"Repeat this text: {text}", text


def edit(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Return prompt and answer of the task `edit`; None if no name occurs twice."""
    names = _NAME.findall(text)
    known = sorted({name for name in names if names.count(name) > 1})
    if not known:
        return None
    old, new = rng.choice(known), rng.choice(NAMES)
    answer = re.sub(rf"\b{old}\b", new, text)
    return f"Write this again, but call {old} {new}: {text}", answer


def retrieval(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Return prompt and answer of the task `retrieval`; None for fewer than three sentences."""
    sentences = re.split(r"(?<=[.!?]) +", text)
    if len(sentences) < 3:
        return None
    start = rng.randrange(1, len(sentences) - 1)
    answer = " ".join(sentences[start:])
    words = " ".join(answer.split()[:3])
    return f"{text} Say it again, from the words '{words}' on.", answer


def summary(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Return prompt and answer of the task `summary`; None for fewer than four sentences."""
    sentences = re.split(r"(?<=[.!?]) +", text)
    if len(sentences) < 4:
        return None
    return f"Make this half as long: {text}", " ".join(sentences[: len(sentences) // 2])


TASKS: dict[str, Callable[[str, random.Random], tuple[str, str] | None]] = {
    "repeat": repeat, "edit": edit, "retrieval": retrieval, "summary": summary
}  # fmt: skip


def request(story: str, rng: random.Random, tasks: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """Return a random task with its prompt and answer: one of `tasks`, or for training any of them and shuffled words."""
    text = excerpt(story, rng)
    name = rng.choice(tasks or (*TASKS, "words", "words"))
    made = repeat(shuffled(text, rng), rng) if name == "words" else TASKS[name](text, rng)
    return (name, *made) if made else ("repeat", *repeat(text, rng))


def chat(story: str, rng: random.Random) -> list[dict[str, str]]:
    """Return a story as a chat of a random task."""
    _, prompt, answer = request(story, rng)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
