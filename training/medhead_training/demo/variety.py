"""How much of what a model says it has said before, by temperature: why heads guess greedy text so much better.

Greedy answers of a small model come from a small repertoire, which heads learn by heart; sampled ones do not. Of the 4-grams
of some answers this counts those that do not occur in many others. Every prompt counts once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead_training.demo.jsonl import read_jsonl

GRAM = 4


def grams(ids: list[int]) -> list[tuple[int, ...]]:
    """All 4-grams of an answer."""
    return list(zip(*(ids[start:] for start in range(GRAM)), strict=False))


def variety(answers: list[list[int]], known: int, asked: int) -> dict[str, float | int]:
    """How many 4-grams of the first `known` tokens differ, and how many of the next `asked` tokens are new after those.

    Raises:
        MedheadError: there are not so many tokens.
    """
    seen: set[tuple[int, ...]] = set()
    tokens, counted, new, of = 0, 0, 0, 0
    for ids in answers:
        if tokens < known:
            seen.update(grams(ids))
            counted += len(grams(ids))
        else:
            new += sum(gram not in seen for gram in grams(ids))
            of += len(grams(ids))
        tokens += len(ids)
        if tokens >= known + asked and of and counted:
            return {"known_tokens": known, "different": len(seen) / counted, "asked_tokens": asked, "new": new / of}
    raise MedheadError(
        f"there are {tokens} tokens of one temperature, --known and --asked need {known + asked}; lower them"
    )


def run(args: argparse.Namespace) -> None:
    """Count, print and write."""
    if args.known < 1 or args.asked < 1:
        raise MedheadError(f"--known and --asked must be at least 1, got {args.known} and {args.asked}")
    if not args.answers.is_file():
        raise MedheadError(
            f"--answers {str(args.answers)!r} is no file; give what medhead_training.generate_data wrote"
        )
    if args.output and args.output.exists():
        raise MedheadError(f"--output {str(args.output)!r} is there already; nothing is overwritten")
    if args.output and not args.output.parent.is_dir():
        raise MedheadError(f"--output {str(args.output)!r}: there is no folder {str(args.output.parent)!r}")
    by_temperature: dict[float, dict[tuple[int, ...], list[int]]] = defaultdict(dict)
    for record in read_jsonl(args.answers):
        if not isinstance(record, dict) or not {"prompt_ids", "answer_ids", "temperature"} <= record.keys():
            raise MedheadError(f"{args.answers} was not written by medhead_training.generate_data")
        by_temperature[record["temperature"]][tuple(record["prompt_ids"])] = record["answer_ids"]
    found = {}
    for temperature, of_prompts in sorted(by_temperature.items()):
        answers = list(of_prompts.values())
        random.Random(0).shuffle(answers)
        found[f"{temperature:g}"] = {"answers": len(answers), **variety(answers, args.known, args.asked)}
    print("| temperature | answers | different 4-grams | new 4-grams |\n|--:|--:|--:|--:|")
    for name, counts in found.items():
        print(f"| {name} | {counts['answers']:,} | {counts['different']:.1%} | {counts['new']:.1%} |")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(prog="python -m medhead_training.demo.variety", description=__doc__)
    options.add_argument("--answers", type=Path, required=True, help="what medhead_training.generate_data wrote")
    options.add_argument(
        "--known", type=int, default=200_000, help="tokens of each temperature that count as known (200000)"
    )
    options.add_argument(
        "--asked", type=int, default=50_000, help="tokens after these in which new 4-grams are counted (50000)"
    )
    options.add_argument("--output", type=Path, help="JSON file for the numbers")
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.demo.variety", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
