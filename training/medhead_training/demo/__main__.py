"""The recipe of the demo model, from text to package: `python -m medhead_training.demo --data DIR --output DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medhead.cli.common import Parser, check_range, run_command
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL
from medhead_training import finetune, generate_data
from medhead_training.data.resumable import write_atomically
from medhead_training.demo import pretrain
from medhead_training.demo.answers import write_held_out_answers, write_training_answers
from medhead_training.demo.card import finish_heads, write_model_card
from medhead_training.demo.corpus import Chat, opening_prompts

DESCRIPTION = """\
Train the demo target from scratch, let it write answers, train heads of every kind on them, and write the model cards.

If the command is killed, start it again: every stage resumes from its last checkpoint, and finished stages are skipped.
The defaults are the recipe of the shipped target. Its recurrent and block heads were trained in several runs (training.json
gives their times), the last one on answers like these; its attention and medusa heads are of earlier recipes with fewer
answers and hardly any loops.
"""
KINDS: dict[str, list[str]] = {  # name of the heads: their options; the first is the default of the demo model
    "recurrent": ["--kind", "recurrent", "--inner-size", "512", "--epochs", "2"],
    "block": ["--kind", "block", "--inner-size", "512", "--correction-size", "384", "--epochs", "3"],
    "attention": ["--kind", "attention", "--inner-size", "704", "--epochs", "2"],
    "sequential": ["--kind", "sequential", "--inner-size", "512", "--epochs", "2"],
    "medusa-parent": ["--kind", "medusa", "--inner-size", "256", "--epochs", "2"],
    "medusa": ["--kind", "medusa", "--correction", "none", "--epochs", "1"],
}
COMMON = ["--draft-vocab", "2560", "--seq-len", "512", "--batch-size", "6", "--save-steps", "100"]


def parser() -> Parser:
    """Return the command's parser."""
    example = "example:\n  python -m medhead_training.demo --data data/train --eval data/eval --output runs/demo"
    options = Parser(prog="python -m medhead_training.demo", description=DESCRIPTION, epilog=example)
    add = options.add_argument
    add("--data", type=Path, required=True, help="folder with the training files (jsonl)")
    add("--eval", type=Path, help="folder with held-out files, for the validation loss")
    add("--output", type=Path, required=True, help="folder for checkpoints and results")
    add("--minutes", type=float, default=94.0, help="time to train the target (default: 94)")
    add("--answers", type=int, default=17664, help="answers to train heads on (default: 17664)")
    add("--chats", type=int, default=7400, help="additional chats, whose looping answers are used (default: 7400)")
    add("--held-out", type=int, default=320, help="answers to evaluate heads on (default: 320)")
    add("--heads", nargs="+", choices=KINDS, default=list(KINDS), help="heads to train (default: all)")
    add("--heads-steps", type=int, default=0, help="maximum updates of heads (default: 0, no maximum)")
    add("--tree", type=int, nargs=2, default=[16, 6], metavar=("NODES", "DEPTH"),
        help="default tree stored with the heads (default: 16 6)")  # fmt: skip
    add("--hidden", type=int, default=256, help="hidden size of the target (default: 256)")
    add("--layers", type=int, default=6, help="layers of the target (default: 6)")
    add("--vocab-size", type=int, default=4096, help="vocabulary of the target (default: 4096)")
    add("--install", action="store_true", help="replace the demo model inside this checkout of medhead")
    return options


def run_stage(name: str, done: Path, command: Callable[[list[str]], int], *options: Any) -> None:
    """Run one stage unless its last file exists."""
    if done.exists():
        print(f"{name}: done ({done})", file=sys.stderr)
        return
    print(f"{name} ...", file=sys.stderr)
    code = command([str(option) for option in options])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise MedheadError(f"{name} ended with code {code}; the line above says why")


def run(args: argparse.Namespace) -> None:
    """Run all stages in order."""
    if not args.data.is_dir():
        raise MedheadError(f"--data {str(args.data)!r} is no folder; it must hold the training files (jsonl)")
    for name in ("answers", "chats", "held_out"):
        check_range(args, name, 1)
    check_same_recipe(args)
    out, model = args.output, args.output / "model"
    run_stage(
        "target", out / "training.json", pretrain.main, "--data", args.data, *(["--eval", args.eval] if args.eval else []),
        "--output", out, "--minutes", args.minutes, "--steps", 10**6, "--hidden", args.hidden, "--layers", args.layers,
        "--vocab-size", args.vocab_size, "--muon-lr", 0.008,
    )  # fmt: skip
    training, held_out = write_answers(args, model)
    for name in args.heads:
        folder = out / "heads" / name
        run_stage(
            f"heads {name}", folder / "training.json", finetune.main, *KINDS[name], *COMMON, "--model", model,
            "--data", training, "--eval-data", held_out, "--output", folder, "--max-steps", args.heads_steps,
        )  # fmt: skip
        finish_heads(folder, args.tree[0], args.tree[1], packaged_name(name, args.heads))
    write_model_card(model, json.loads((out / "training.json").read_text(encoding="utf-8")))
    print((model / "README.md").read_text(encoding="utf-8"))
    if args.install:
        install(out, DEMO_MODEL.parent, args.heads)


def write_answers(args: argparse.Namespace, model: Path) -> tuple[Path, Path]:
    """Let the target answer prompts; return the files that heads are trained and evaluated on."""
    out, training, held_out = args.output, args.output / "train.jsonl", args.output / "held-out.jsonl"
    ask(args, model, "answers", opening_prompts(args.data, pretrain.MIX, args.answers, seed=11), [0, 1, 0, 1, 1])
    ask(args, model, "chats", opening_prompts(args.data, {"general_chat": 1.0}, args.chats, seed=11), [0])
    ask(args, model, "eval", opening_prompts(args.eval or args.data, pretrain.MIX, args.held_out, seed=12), [0, 1])
    if not training.exists():
        count, loops = write_training_answers(out / "answers.jsonl", out / "chats.jsonl", training, seed=11)
        print(f"{training}: {count} answers, {loops} distinct ones loop", file=sys.stderr)
    if not held_out.exists():
        count = write_held_out_answers(out / "eval.jsonl", training, held_out, seed=11)
        print(f"{held_out}: {count} answers", file=sys.stderr)
    return training, held_out


def ask(args: argparse.Namespace, model: Path, name: str, chats: list[Chat], temperatures: list[float]) -> None:
    """Run stage `name`, which writes the target's answers to these chats into `name`.jsonl."""
    prompts, done = args.output / f"{name}-prompts.jsonl", args.output / f"{name}.done"
    if not prompts.exists():
        write_atomically(prompts, "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    run_stage(
        name, done, generate_data.main, "--model", model, "--prompts", prompts, "--output", args.output / f"{name}.jsonl",
        "--batch-size", 96, "--temperatures", *temperatures, "--max-new-tokens", 208, "--max-prompt-tokens", 600,
        "--seed", 11,
    )  # fmt: skip
    done.touch()


def check_same_recipe(args: argparse.Namespace) -> None:
    """Refuse to resume a run with other options."""
    path = args.output / "recipe.json"
    names = ("answers", "chats", "held_out", "heads_steps", "hidden", "layers", "vocab_size")
    wanted = {name: getattr(args, name) for name in names} | {"data": str(args.data), "eval": str(args.eval or "")}
    if not path.exists():
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if found.get(name) != value:
            run_with = f"{args.output} holds a run with --{name.replace('_', '-')} {found.get(name)}"
            raise MedheadError(f"{run_with}, not {value}; give another --output")


def packaged_name(name: str, names: list[str]) -> str:
    """Return the folder of these heads in the package; the first of all are the default."""
    return "heads" if name == names[0] else f"heads-{name}"


def install(source: Path, package: Path, names: list[str]) -> None:
    """Copy target and heads into the package; the first heads become the default."""
    folders = {"model": "model"} | {f"heads/{name}": packaged_name(name, names) for name in names}
    for origin, destination in folders.items():
        temporary = package / f".{destination}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source / origin, temporary, ignore=shutil.ignore_patterns("run"))
        shutil.rmtree(package / destination, ignore_errors=True)
        temporary.rename(package / destination)
    print(f"installed in {package}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
