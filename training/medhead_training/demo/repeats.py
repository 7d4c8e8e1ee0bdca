"""Requests whose answer repeats the prompt, made of stories: the demo model does not copy until it is taught to.

`python -m medhead_training.demo.pretrain --init-from MODEL --mix repeats=3 ...` teaches it, and
`python -m medhead_training.demo.repeats --stories FILE --output FILE` writes such requests from held-out stories, by task, for
`medhead.bench.tasks`. The tasks: `repeat` says a text again, `edit` with another name in it, `retrieval` from the words on that
are asked for, `summary` only its first sentences.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead_training.demo.jsonl import read_jsonl

NAMES = (
    "Anna",
    "Max",
    "Sara",
    "Jack",
    "Emma",
    "Leo",
    "Nina",
    "Paul",
    "Rosa",
    "Tim",
    "Ella",
    "Ben",
    "Lucy",
    "Sam",
    "Mia",
)
_LONGEST = 620  # characters of a text, about 150 tokens
_NAME = re.compile(r"(?<=[a-z] )[A-Z][a-z]{2,}\b")


def excerpt(text: str, rng: random.Random) -> str:
    """Whole sentences in a row from a random one on, at most `_LONGEST` characters (but one sentence at least)."""
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
    """The words of a text in another order: nothing but the prompt says what comes next."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words[:60])


def repeat(text: str, rng: random.Random) -> tuple[str, str]:
    """Prompt and answer of `repeat`."""
    return f"Repeat this text: {text}", text


def repeat_words(text: str, rng: random.Random) -> tuple[str, str]:
    """The same with words in no order; only for learning."""
    return repeat(shuffled(text, rng), rng)


def edit(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Prompt and answer of `edit`; None where the text names nobody twice."""
    names = _NAME.findall(text)
    known = sorted({name for name in names if names.count(name) > 1})
    if not known:
        return None
    old, new = rng.choice(known), rng.choice(NAMES)
    answer = re.sub(rf"\b{old}\b", new, text)
    return f"Write this again, but call {old} {new}: {text}", answer


def retrieval(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Prompt and answer of `retrieval`; None where the text has fewer than three sentences."""
    sentences = re.split(r"(?<=[.!?]) +", text)
    if len(sentences) < 3:
        return None
    start = rng.randrange(1, len(sentences) - 1)
    answer = " ".join(sentences[start:])
    words = " ".join(answer.split()[:3])
    return f"{text} Say it again, from the words '{words}' on.", answer


def summary(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Prompt and answer of `summary`; None where the text has fewer than four sentences."""
    sentences = re.split(r"(?<=[.!?]) +", text)
    if len(sentences) < 4:
        return None
    return f"Make this half as long: {text}", " ".join(sentences[: len(sentences) // 2])


TASKS: dict[str, Callable[[str, random.Random], tuple[str, str] | None]] = {
    "repeat": repeat,
    "edit": edit,
    "retrieval": retrieval,
    "summary": summary,
}


def request(story: str, rng: random.Random, tasks: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """A task of `tasks` (or, for learning, any and words in no order), its prompt and its answer."""
    text = excerpt(story, rng)
    name = rng.choice(tasks or (*TASKS, "words", "words"))
    made = repeat_words(text, rng) if name == "words" else TASKS[name](text, rng)
    return (name, *made) if made else ("repeat", *repeat(text, rng))


def chat(story: str, rng: random.Random) -> list[dict[str, str]]:
    """A story as a request of a random task with its answer."""
    _, prompt, answer = request(story, rng)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead_training.demo.repeats",
        description="Requests whose answer repeats the prompt, made of the stories of a file, by task.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m medhead_training.demo.repeats --stories eval/tinystories.jsonl --output repeats.jsonl",
    )
    options.add_argument("--stories", type=Path, required=True, help="JSON lines with `text`")
    options.add_argument("--output", type=Path, required=True, help="file to write; it must not exist")
    options.add_argument("--count", type=int, default=64, help="requests in all, by turns of every task (default: 64)")
    options.add_argument("--seed", type=int, default=0)
    return options


def run(args: argparse.Namespace) -> None:
    """Write the requests.

    Raises:
        MedheadError: the stories cannot be read, the file is there already, or the count makes no sense.
    """
    if args.count < 1:
        raise MedheadError(f"--count {args.count} is no number of requests; give 1 or more")
    if args.output.exists():
        raise MedheadError(f"--output {str(args.output)!r} is there already; nothing is overwritten")
    if not args.stories.is_file():
        raise MedheadError(f"--stories {str(args.stories)!r} is no file; give JSON lines with `text`")
    rng = random.Random(args.seed)
    records = [record for record in read_jsonl(args.stories) if isinstance(record, dict)]
    texts = [record["text"] for record in records if isinstance(record.get("text"), str) and record["text"].strip()]
    if not texts:
        raise MedheadError(f"no line of {str(args.stories)!r} has a `text`")
    lines: list[str] = []
    for number in range(args.count):
        wanted = tuple(TASKS)[number % len(TASKS)]
        tries = (request(rng.choice(texts), rng, (wanted,)) for _ in range(1000))
        prompt = next((prompt for name, prompt, _ in tries if name == wanted), None)
        if prompt is None:
            raise MedheadError(f"no text of {str(args.stories)!r} suits the task {wanted!r}")
        lines.append(json.dumps({"category": wanted, "prompt": prompt}) + "\n")
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} requests are in {args.output}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.demo.repeats", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
