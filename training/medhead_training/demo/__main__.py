"""The demo model from text to package in one command: `python -m medhead_training.demo --data DIR --output DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL
from medhead_training import finetune, generate_data
from medhead_training.demo import pretrain
from medhead_training.demo.answers import unseen, with_loops, write_whole
from medhead_training.demo.card import finish_heads, write_model_card
from medhead_training.demo.corpus import Chat, opening_prompts

DESCRIPTION = """\
Train the demo target from scratch, let it write answers, train heads of every kind on them, write the model cards.

Kill it at any time and start it again: every stage goes on from its last checkpoint, finished stages are skipped.
The defaults are the recipe of the shipped target. Its heads took several runs (their training.json says how long): the last run
of the recurrent and the block heads was on answers like these; the attention and medusa heads are of earlier recipes (fewer
answers, hardly a loop among them).
"""
KINDS: dict[str, list[str]] = {  # name of the heads: how they are trained; the first is the default of the demo model
    "recurrent": ["--kind", "recurrent", "--inner-size", "512", "--epochs", "2"],
    "block": ["--kind", "block", "--inner-size", "512", "--correction-size", "384", "--epochs", "3"],
    "attention": ["--kind", "attention", "--inner-size", "704", "--epochs", "2"],
    "sequential": ["--kind", "sequential", "--inner-size", "512", "--epochs", "2"],
    "medusa-parent": ["--kind", "medusa", "--inner-size", "256", "--epochs", "2"],
    "medusa": ["--kind", "medusa", "--correction", "none", "--epochs", "1"],
}
COMMON = ["--draft-vocab", "2560", "--length", "512", "--batch-size", "6", "--save-steps", "100"]


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="python -m medhead_training.demo",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m medhead_training.demo --data data/train --eval data/eval --output runs/demo",
    )
    options.add_argument("--data", type=Path, required=True, help="folder with the training files (jsonl)")
    options.add_argument("--eval", type=Path, help="folder with held-out files, for the validation loss")
    options.add_argument("--output", type=Path, required=True, help="folder for checkpoints and results")
    options.add_argument("--minutes", type=float, default=94.0, help="of training the target (default: 94)")
    options.add_argument("--answers", type=int, default=17664, help="answers to train heads on (default: 17664)")
    options.add_argument("--chats", type=int, default=7400,
                         help="chats that are asked for answers that go round in circles (default: 7400)")  # fmt: skip
    options.add_argument("--held-out", type=int, default=320, help="answers to measure heads with (default: 320)")
    options.add_argument("--heads", nargs="+", choices=KINDS, default=list(KINDS), help="heads to train (default: all)")
    options.add_argument("--heads-steps", type=int, default=0, help="end the training of heads early (default: 0, no)")
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
    for name in ("answers", "chats", "held_out"):
        if getattr(args, name) < 1:
            raise MedheadError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    same_recipe(args)
    out, model = args.output, args.output / "model"
    shape = ["--hidden", args.hidden, "--layers", args.layers, "--vocab-size", args.vocab_size]
    held_out = ["--eval", args.eval] if args.eval else []
    given = ["--data", args.data, *held_out, "--output", out, "--minutes", args.minutes, "--steps", 10**6, *shape]
    stage("target", out / "training.json", pretrain.main, [*map(str, given), "--muon-lr", "0.008"])
    learnt, fresh = answer(args, model)
    nodes, depth = args.tree
    for name in args.heads:
        folder = out / "heads" / name
        texts = ["--data", learnt, "--eval-data", fresh]
        given = ["--model", model, *texts, "--output", folder, "--max-steps", args.heads_steps]
        stage(f"heads {name}", folder / "training.json", finetune.main, [*KINDS[name], *COMMON, *map(str, given)])
        finish_heads(folder, nodes, depth, installed(name, args.heads))
    write_model_card(model, json.loads((out / "training.json").read_text(encoding="utf-8")))
    print((model / "README.md").read_text(encoding="utf-8"))
    if args.install:
        install(out, DEMO_MODEL.parent, args.heads)


def answer(args: argparse.Namespace, model: Path) -> tuple[Path, Path]:
    """Let the target answer prompts; the files that heads learn from, and are measured with."""
    out, learnt, fresh = args.output, args.output / "learnt.jsonl", args.output / "held-out.jsonl"
    ask(args, model, "answers", opening_prompts(args.data, pretrain.MIX, args.answers, seed=11), [0, 1, 0, 1, 1])
    ask(args, model, "chats", opening_prompts(args.data, {"general_chat": 1.0}, args.chats, seed=11), [0])
    ask(args, model, "asked", opening_prompts(args.eval or args.data, pretrain.MIX, args.held_out, seed=12), [0, 1])
    if not learnt.exists():
        count, loops = with_loops(out / "answers.jsonl", out / "chats.jsonl", learnt, seed=11)
        print(f"{learnt}: {count} answers, {loops} different ones go round in circles", file=sys.stderr)
    if not fresh.exists():
        print(f"{fresh}: {unseen(out / 'asked.jsonl', learnt, fresh, seed=11)} answers", file=sys.stderr)
    return learnt, fresh


def ask(args: argparse.Namespace, model: Path, name: str, chats: list[Chat], temperatures: list[float]) -> None:
    """Stage `name`: the target's answers to these chats, in `name`.jsonl."""
    prompts, done = args.output / f"{name}-prompts.jsonl", args.output / f"{name}.done"
    if not prompts.exists():
        write_whole(prompts, (json.dumps({"messages": chat}) + "\n" for chat in chats))
    given = ["--model", model, "--prompts", prompts, "--output", args.output / f"{name}.jsonl", "--batch", 96]
    sampling = ["--temperatures", *temperatures, "--max-new-tokens", 208, "--max-prompt-tokens", 600, "--seed", 11]
    stage(name, done, generate_data.main, [*map(str, given), *map(str, sampling)])
    done.touch()


def same_recipe(args: argparse.Namespace) -> None:
    """Refuse to go on with a run that was begun otherwise.

    Raises:
        MedheadError: the output folder holds a run with other options.
    """
    path = args.output / "recipe.json"
    names = ("answers", "chats", "held_out", "heads_steps", "hidden", "layers", "vocab_size")
    wanted = {name: getattr(args, name) for name in names} | {"data": str(args.data), "eval": str(args.eval or "")}
    if not path.exists():
        args.output.mkdir(parents=True, exist_ok=True)
        return write_whole(path, [json.dumps(wanted, indent=1) + "\n"])
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if found.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise MedheadError(
                f"{args.output} holds a run with {option} {found.get(name)}, not {value}; give another --output"
            )
    return None


def installed(name: str, names: list[str]) -> str:
    """The folder of these heads in the package; the first of all are the default."""
    return "heads" if name == names[0] else f"heads-{name}"


def install(source: Path, package: Path, names: list[str]) -> None:
    """Copy target and heads into the package; the first heads become the default."""
    goals = {"model": "model"} | {f"heads/{name}": installed(name, names) for name in names}
    for origin, goal in goals.items():
        temporary = package / f".{goal}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source / origin, temporary, ignore=shutil.ignore_patterns("run"))
        shutil.rmtree(package / goal, ignore_errors=True)
        temporary.rename(package / goal)
    print(f"installed in {package}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.demo", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
