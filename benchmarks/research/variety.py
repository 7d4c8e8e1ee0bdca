"""How much of a model's text has it written before, by temperature?

Greedy answers of a small model come from a small repertoire, which heads can memorise; sampled answers do not. For every
temperature this counts which share of the 4-grams of some answers differ, and which share of other answers' 4-grams are new.
Every prompt counts once.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medhead.bench.harness import markdown_table
from medhead.cli.common import Parser, check_range, run_command
from medhead.errors import MedheadError
from medhead_training.demo.jsonl import read_jsonl

GRAM = 4


def grams(ids: list[int]) -> list[tuple[int, ...]]:
    """Return all 4-grams of an answer."""
    return list(zip(*(ids[start:] for start in range(GRAM)), strict=False))


def read_answers(path: Path, *more: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of answers, which have the fields `more` too.

    Raises:
        MedheadError: `medhead generate-data` did not write it.
    """
    for record in read_jsonl(path):
        if not isinstance(record, dict) or not {"prompt_ids", "answer_ids", *more} <= record.keys():
            raise MedheadError(f"{str(path)!r} was not written by medhead generate-data; give a file that was")
        yield record


def variety(answers: list[list[int]], known: int, test: int) -> dict[str, float | int]:
    """Return the share of distinct 4-grams in the first `known` tokens, and of new ones in the next `test` tokens.

    Raises:
        MedheadError: there are not so many tokens.
    """
    seen: set[tuple[int, ...]] = set()
    tokens, counted, unseen, later = 0, 0, 0, 0
    for ids in answers:
        found = grams(ids)
        if tokens < known:
            seen.update(found)
            counted += len(found)
        else:
            unseen += sum(gram not in seen for gram in found)
            later += len(found)
        tokens += len(ids)
        if tokens >= known + test and later and counted:
            return {"known_tokens": known, "distinct": len(seen) / counted, "test_tokens": test, "new": unseen / later}
    raise MedheadError(
        f"one temperature has {tokens} tokens, but --known-tokens and --test-tokens need {known + test}; lower them"
    )


def run(args: argparse.Namespace) -> None:
    """Count, print and write."""
    check_range(args, "known_tokens", 1)
    check_range(args, "test_tokens", 1)
    if not args.answers.is_file():
        raise MedheadError(f"--answers {str(args.answers)!r} is not a file; give one that medhead generate-data wrote")
    if args.output and (args.output.exists() or not args.output.parent.is_dir()):
        wrong = "exists already" if args.output.exists() else "is in a folder that does not exist"
        raise MedheadError(f"--output {str(args.output)!r} {wrong}; give a new file in an existing folder")
    answers: dict[float, dict[tuple[int, ...], list[int]]] = defaultdict(dict)
    for record in read_answers(args.answers, "temperature"):
        answers[record["temperature"]][tuple(record["prompt_ids"])] = record["answer_ids"]
    found = {}
    for temperature, by_prompt in sorted(answers.items()):
        texts = list(by_prompt.values())
        random.Random(0).shuffle(texts)
        found[f"{temperature:g}"] = {"answers": len(texts), **variety(texts, args.known_tokens, args.test_tokens)}
    rows = [[name, f"{of['answers']:,}", f"{of['distinct']:.1%}", f"{of['new']:.1%}"] for name, of in found.items()]
    print(markdown_table(["temperature", "answers", "distinct 4-grams", "new 4-grams"], rows, left=0))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="variety.py", description=__doc__,
        epilog="example:\n  python benchmarks/research/variety.py --answers answers.jsonl --output variety.json",
    )  # fmt: skip
    options.add_argument("--answers", type=Path, required=True, help="answers that medhead generate-data wrote")
    options.add_argument("--known-tokens", type=int, default=200_000,
                         help="tokens of each temperature that count as known (default: 200000)")  # fmt: skip
    options.add_argument("--test-tokens", type=int, default=50_000,
                         help="further tokens in which new 4-grams are counted (default: 50000)")  # fmt: skip
    options.add_argument("--output", type=Path, help="JSON file for the numbers")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
