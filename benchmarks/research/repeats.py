"""Write requests whose answer repeats the prompt, made of stories, by task, as prompts of `medhead bench tasks`.

The tasks: `repeat` says a text again, `edit` says it with another name, `retrieval` continues it from given words, `summary`
keeps its first sentences. The demo model does not copy until it is taught to, by
`python -m medhead_training.demo.pretrain --init-from MODEL --mix repeats=3 ...`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from medhead.bench.harness import say
from medhead.cli.common import Parser, check_range, run_command
from medhead.errors import MedheadError
from medhead_training.demo.jsonl import read_jsonl
from medhead_training.demo.repeats import TASKS, request

TRIES = 1000  # random texts tried for one request


def read_stories(path: Path) -> list[str]:
    """Return the texts of a file of stories.

    Raises:
        MedheadError: it holds none.
    """
    if not path.is_file():
        raise MedheadError(f"--stories {str(path)!r} is not a file; give JSON lines with `text`")
    found = [record.get("text") for record in read_jsonl(path) if isinstance(record, dict)]
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        raise MedheadError(f"--stories {str(path)!r}: no line has a `text`")
    return texts


def run(args: argparse.Namespace) -> None:
    """Write the requests.

    Raises:
        MedheadError: an option is wrong, or no story suits a task.
    """
    check_range(args, "count", 1)
    if args.output.exists():
        raise MedheadError(f"--output {str(args.output)!r} exists already; give a new file")
    rng, texts, lines = random.Random(args.seed), read_stories(args.stories), list[str]()
    for number in range(args.count):
        wanted = tuple(TASKS)[number % len(TASKS)]
        tries = (request(rng.choice(texts), rng, (wanted,)) for _ in range(TRIES))
        prompt = next((prompt for name, prompt, _ in tries if name == wanted), None)
        if prompt is None:
            raise MedheadError(f"--stories {str(args.stories)!r}: no text suits the task {wanted!r}")
        lines.append(json.dumps({"category": wanted, "prompt": prompt}) + "\n")
    args.output.write_text("".join(lines), encoding="utf-8")
    say(f"wrote {len(lines)} requests to {args.output}")


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="repeats.py", description=__doc__,
        epilog="example:\n  python benchmarks/research/repeats.py --stories eval/tinystories.jsonl --output repeats.jsonl",
    )  # fmt: skip
    options.add_argument("--stories", type=Path, required=True, help="JSON lines with `text`")
    options.add_argument("--output", type=Path, required=True, help="file to write; it must not exist")
    options.add_argument("--count", type=int, default=64, help="requests, the tasks taking turns (default: 64)")
    options.add_argument("--seed", type=int, default=0, help="seed of the choices (default: 0)")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
