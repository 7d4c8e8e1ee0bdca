"""The demo model from text to package in one command: `python -m medhead.training.demo --data DIR --output DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from medhead.errors import MedheadError
from medhead.generate import Parser, guarded
from medhead.load import DEMO_MODEL

from . import answers, heads, pretrain
from .card import set_tree, write_heads_card, write_model_card

DESCRIPTION = """\
Train the demo target from scratch, let it write answers, train heads of both kinds on them, write the model cards.

Kill it at any time and start it again: every stage goes on from its last checkpoint, finished stages are skipped.
The defaults are the recipe of the shipped model (about two hours on 2 CPU cores).
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="python -m medhead.training.demo",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m medhead.training.demo --data data/train --eval data/eval --output runs/demo",
    )
    options.add_argument("--data", type=Path, required=True, help="folder with the training files (jsonl)")
    options.add_argument("--eval", type=Path, help="folder with held-out files, for the validation loss")
    options.add_argument("--output", type=Path, required=True, help="folder for checkpoints and results")
    options.add_argument("--minutes", type=float, default=94.0, help="of training the target (default: 94)")
    options.add_argument("--answers", type=int, default=6144, help="answers to train heads on (default: 6144)")
    options.add_argument("--heads-minutes", type=float, default=20.0, help="of training the heads (default: 20)")
    options.add_argument("--tree", type=int, nargs=2, default=[16, 6], metavar=("NODES", "DEPTH"),
                         help="default tree stored with the heads (default: 16 6)")  # fmt: skip
    options.add_argument("--hidden", type=int, default=256, help="hidden size of the target (default: 256)")
    options.add_argument("--layers", type=int, default=6, help="layers of the target (default: 6)")
    options.add_argument("--vocab-size", type=int, default=4096, help="vocabulary of the target (default: 4096)")
    options.add_argument(
        "--install", action="store_true", help="replace the demo model inside this checkout of medhead"
    )
    return options


def stage(name: str, done: Path, main: Callable[[list[str]], int], options: list[str]) -> None:
    """Run one stage unless its last file is there.

    Raises:
        MedheadError: the stage ended with an error, which it has printed.
        KeyboardInterrupt: the stage was interrupted.
    """
    if done.exists():
        print(f"{name}: done ({done})", file=sys.stderr)
        return
    print(f"{name} ...", file=sys.stderr)
    code = main(options)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise MedheadError(f"{name} ended with code {code}; the line above says why")


def run(args: argparse.Namespace) -> None:
    """All stages in order."""
    if not args.data.is_dir():
        raise MedheadError(f"--data {str(args.data)!r} is no folder; it must hold the training files (jsonl)")
    out, model = args.output, args.output / "model"
    shape = ["--hidden", args.hidden, "--layers", args.layers, "--vocab-size", args.vocab_size]
    held_out = ["--eval", args.eval] if args.eval else []
    given = ["--data", args.data, *held_out, "--output", out, "--minutes", args.minutes, "--steps", 10**6, *shape]
    stage("target", out / "training.json", pretrain.main, [*map(str, given), "--muon-lr", "0.008"])
    given = ["--model", model, "--data", args.data, "--output", out / "answers.jsonl", "--count", args.answers]
    stage("answers", out / "answers.done", answers.main, [*map(str, given), "--max-new-tokens", "208"])
    (out / "answers.done").touch()
    given = [
        "--model",
        model,
        "--answers",
        out / "answers.jsonl",
        "--output",
        out / "heads",
        "--minutes",
        args.heads_minutes,
    ]
    stage("heads", out / "heads" / "heads_training.json", heads.main, [*map(str, given)])
    training = json.loads((out / "heads" / "heads_training.json").read_text())
    for kind in ("recurrent", "medusa"):
        set_tree(out / "heads" / kind, *args.tree)
        write_heads_card(out / "heads" / kind, training)
    write_model_card(model, json.loads((out / "training.json").read_text()))
    print((model / "README.md").read_text())
    if args.install:
        install(out, DEMO_MODEL.parent)


def install(source: Path, package: Path) -> None:
    """Copy target and heads into the package; the recurrent heads, which decode faster, become the default."""
    for origin, goal in (("model", "model"), ("heads/recurrent", "heads"), ("heads/medusa", "heads-medusa")):
        temporary = package / f".{goal}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source / origin, temporary)
        shutil.rmtree(package / goal, ignore_errors=True)
        temporary.rename(package / goal)
    print(f"installed in {package}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.training.demo", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
