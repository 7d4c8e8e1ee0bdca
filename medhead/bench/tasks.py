"""Which proposer helps with what? `python -m medhead.bench.tasks`: accepted length and speed by task of a prompts file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from medhead.bench.report import label, machine, write_results
from medhead.bench.task_prompts import KEEP, Cut, Task, encode_task, read_tasks
from medhead.bench.task_report import findings, plot, rows_of, sameness, table, totals
from medhead.bench.task_runs import PLAIN, Field, Setting
from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead.heads import load_heads
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.target import Target
from medhead.proposers import PROPOSERS

SHOWN = ("heads", "ngram", "recycling", "lookahead", "hybrid")
EXAMPLES = """\
examples:
  python -m medhead.bench.tasks --prompts spec_bench.jsonl --tree-size 32 --batches 1 --output results/tasks
  python -m medhead.bench.tasks --model my/model --heads my/heads --prompts mine.jsonl --per-task 16 --cut 800
  python -m medhead.bench.tasks --prompts spec_bench.jsonl --tasks qa rag --proposers ngram hybrid --temperatures 0

The prompts file holds JSON lines with `turns`, `prompt`, `question`, `messages` or `text`, and `category`, the task;
Spec-Bench's question file is one, and its eight categories of MT-bench count as one task. Every proposer starts every task
without memory of the others. All answer every prompt in turn, interleaved with plain decoding, in an order that rotates; the
times include reading the prompt. Every text is compared with plain decoding's in the same batch.
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.bench.tasks",
        description="Which proposer helps with what? Accepted length and speed by task, against plain decoding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--prompts", required=True, help="JSON lines with a category each, such as Spec-Bench's questions"
    )
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument("--heads", help="heads folder (default: the demo model's own, else none)")
    options.add_argument("--proposers", nargs="+", choices=sorted(PROPOSERS.keys() - {PLAIN}), metavar="NAME",
                         help="who takes part beside plain decoding (default: all there are)")  # fmt: skip
    options.add_argument("--tree-size", type=int, help="nodes of every tree, 2 to 256 (default: each proposer's own)")
    options.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all in the file)")
    options.add_argument("--per-task", type=int, default=16, help="prompts of each task that fit (default: 16)")
    options.add_argument(
        "--cut", type=int, metavar="TOKENS", help="keep so many tokens of a longer question (default: all)"
    )
    options.add_argument("--keep", choices=KEEP, default="ends",
                         help="which tokens --cut keeps: the first, the last, or half at both ends (default)")  # fmt: skip
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="0 is greedy (default: 0 1)")
    options.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], help="prompts at a time (default: 1 4 16)"
    )
    options.add_argument("--new-tokens", type=int, default=120, help="most tokens of an answer (default: 120)")
    options.add_argument(
        "--ignore-end", action="store_true", help="go on behind the end token, so that all answers are full"
    )
    options.add_argument("--repeats", type=int, default=1, help="runs of everything; median times (default: 1)")
    options.add_argument("--seed", type=int, default=0, help="of the sampling")
    options.add_argument(
        "--dtype", default="float32", help="type of the model (default: float32, where texts are equal)"
    )
    options.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and tasks.png")
    options.add_argument("--title", default="", help="what the results are about, above table and picture")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be.

    Raises:
        MedheadError: names the option.
    """
    for name in ("per_task", "new_tokens", "repeats", "cut"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MedheadError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.tree_size is not None and not 2 <= args.tree_size <= 256:
        raise MedheadError(f"--tree-size must be from 2 to 256, got {args.tree_size}")
    if not all(0 <= temperature <= 100 for temperature in args.temperatures):
        raise MedheadError(f"--temperatures must be from 0 to 100, got {' '.join(map(str, args.temperatures))}")
    if not all(1 <= batch <= args.per_task for batch in args.batches):
        raise MedheadError(
            f"--batches must be from 1 to --per-task {args.per_task}, got {' '.join(map(str, args.batches))}"
        )
    if not 0 <= args.seed < 2**64:
        raise MedheadError(f"--seed must be from 0 to 2**64 - 1, got {args.seed}")
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")


def field_of(args: argparse.Namespace, target: Target) -> Field:
    """Who takes part.

    Raises:
        MedheadError: heads that were asked for cannot be loaded, or there are none.
    """
    folder = args.heads or (None if args.model else DEMO_HEADS)
    names = args.proposers or [name for name in SHOWN if folder or name != "heads"]
    heads = None if folder is None else load_heads(folder, target)
    if heads is None and "heads" in names:
        raise MedheadError("the proposer 'heads' needs heads: give the folder of a heads checkpoint (--heads)")
    return Field(target, list(dict.fromkeys(names)), heads, args.tree_size)


def tasks_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, context: int) -> list[Task]:
    """The prompts of every task, as tokens; what was cut or left out is said.

    Raises:
        MedheadError: no prompt fits.
    """
    longest = context - args.new_tokens
    if longest < 1:
        raise MedheadError(f"--new-tokens {args.new_tokens} leaves no room for a prompt in the model's {context}")
    tokenizer.model_max_length = 10**9  # longer prompts are counted here, not warned about
    cut = Cut(args.cut, args.keep)
    tasks = [
        encode_task(tokenizer, name, chats, args.per_task, longest, cut)
        for name, chats in read_tasks(args.prompts, args.tasks).items()
    ]
    if not any(task.prompts for task in tasks):
        raise MedheadError(f"no prompt fits into {longest} tokens; shorten the questions with --cut")
    return tasks


def prompts_said(tasks: list[Task], args: argparse.Namespace) -> str:
    """How many prompts there are, were cut, and were left out."""
    parts = []
    for task in tasks:
        cut = f", {task.cut} cut to {args.cut} tokens ({args.keep})" if task.cut else ""
        left_out = f", {task.left_out} longer ones left out" if task.left_out else ""
        parts.append(f"{task.name} {len(task.prompts)}{cut}{left_out}")
    return "prompts: " + "; ".join(parts)


def measure(args: argparse.Namespace, field: Field, tasks: list[Task]) -> Iterator[list[dict[str, Any]]]:
    """Run everybody on everything; for every setting the rows of all tasks and the totals."""
    settings = [
        Setting(temperature, batch, args.new_tokens, args.repeats, args.seed)
        for temperature in dict.fromkeys(args.temperatures)
        for batch in dict.fromkeys(args.batches)
    ]
    answers = len(settings) * len(field.names) * args.repeats * sum(len(task.prompts) for task in tasks)
    wait = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=answers, unit="answer", mininterval=wait, leave=False) as bar:
        for setting in settings:
            here: list[dict[str, Any]] = []
            field.warm_up(tasks[0].prompts[: setting.batch], setting)
            for task in tasks:
                bar.set_postfix_str(f"{task.name}, T={setting.temperature:g}, batch {setting.batch}", refresh=False)
                here += rows_of(task.name, field.run(task.prompts, setting, lambda done: bar.update(done)), setting)
            yield here + totals(here)


def heading_of(args: argparse.Namespace, where: dict[str, Any]) -> str:
    """What was measured, on what, how."""
    place = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    size = (
        f"every tree {args.tree_size} nodes (compare the tokens a pass; such trees are not each proposer's fastest)"
        if args.tree_size
        else "trees of each proposer's own size"
    )
    parts = [args.title, label(args.model), Path(args.prompts).name, f"at most {args.new_tokens} tokens"]
    return ", ".join(part for part in [*parts, size, args.dtype, place, where["date"]] if part)


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    check_options(args)
    device = pick_device(args.device)
    name: Any = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    model = load_model(name, device, pick_dtype(args.dtype, device), args.trust_remote_code)
    if args.ignore_end:
        model.generation_config.eos_token_id = None
    target = Target(model)
    all_tasks = tasks_of(args, tokenizer, target.context)
    said = prompts_said(all_tasks, args)
    print(said, file=sys.stderr, flush=True)
    field = field_of(args, target)
    rows: list[dict[str, Any]] = []
    for found in measure(args, field, [task for task in all_tasks if task.prompts]):
        rows += found
        text, line = report(args, said, rows)  # after every setting: what is measured is not lost
    print(text)
    if line:
        print(line, file=sys.stderr, flush=True)


def report(args: argparse.Namespace, said: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Text of everything so far; also into the folder, if there is one, with a line that says so."""
    where = machine()
    heading = heading_of(args, where)
    notes = [said, *findings(rows), sameness(rows)]
    text = "\n".join([table(rows), "", *(f"- {note}" for note in notes)])
    line = ""
    if args.output is not None:
        content = {"machine": where, "options": vars(args), "notes": notes, "results": rows}
        line = write_results(args.output, heading, text, content, "tasks.png", lambda path: plot(rows, heading, path))
    return f"{heading}\n\n{text}", line


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.bench.tasks", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
