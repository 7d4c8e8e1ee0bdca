"""`medhead bench tasks`: accepted length and speed of every proposer by task of a prompts file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medhead.bench import harness
from medhead.bench.harness import Row
from medhead.bench.measure import Method, measure, warm_up
from medhead.bench.task_prompts import KEEP, Task, Truncation, encode_task, read_tasks
from medhead.bench.task_report import PLAIN, compare_hybrid, compare_texts, plot, rows_of, table, totals
from medhead.cli.common import Parser, check_range, run_command
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.model.loading import load_tokenizer
from medhead.model.named_models import default_heads
from medhead.model.target import Target
from medhead.proposers import PROPOSERS, build_proposer

SHOWN = ("heads", "ngram", "recycling", "lookahead", "hybrid")
WARM_UP_TOKENS = 4
EXAMPLES = """\
examples:
  medhead bench tasks --prompts spec_bench.jsonl --tree-size 32 --batch-sizes 1 --output results/tasks
  medhead bench tasks --model my/model --heads my/heads --prompts mine.jsonl --prompts-per-task 16 --truncate 800
  medhead bench tasks --prompts spec_bench.jsonl --tasks qa rag --proposers ngram hybrid --temperatures 0

prompts: Spec-Bench's question file is one; its eight categories of MT-bench count as one task.
method: all proposers answer every prompt, interleaved with plain decoding, in an order that rotates. Times include the
prefill. Every proposer starts every task without history. Every text is compared with plain decoding's in the same batch.
Accepted length is tokens emitted per verify pass, bonus token included.
"""


def parser() -> Parser:
    """Return the parser of the command."""
    options = harness.bench_parser("tasks", "Measure which proposer helps with which task.", EXAMPLES, repeats=1)
    harness.add_decoding_options(options, max_new_tokens=120)
    harness.add_text_options(options)
    options.add_argument("--heads", metavar="FOLDER", help="heads (default: the demo model's own, else none)")
    options.add_argument("--proposers", nargs="+", choices=sorted(PROPOSERS.keys() - {PLAIN}), metavar="NAME",
                         help="proposers beside plain decoding (default: all there are)")  # fmt: skip
    options.add_argument("--tree-size", type=int, help="nodes of every tree, 2 to 256 (default: each proposer's own)")
    options.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all in the file)")
    options.add_argument("--prompts-per-task", type=int, default=16, help="prompts of each task that fit (default: 16)")
    options.add_argument("--truncate", type=int, metavar="TOKENS", help="shorten longer questions to so many tokens")
    options.add_argument("--keep", choices=KEEP, default="ends",
                         help="tokens that --truncate keeps: the first, the last, or half at both ends (default)")  # fmt: skip
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="0 is greedy (default: 0 1)")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16],
                         help="prompts decoded together (default: 1 4 16)")  # fmt: skip
    options.add_argument("--dtype", default="float32",
                         help="data type of the model (default: float32, where texts are identical)")  # fmt: skip
    return options


def tasks_of(args: argparse.Namespace, context: int) -> list[Task]:
    """Read and encode the prompts of every task."""
    longest = harness.room_for_prompt(args, context)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    tokenizer.model_max_length = 10**9  # longer prompts are counted here, without the tokenizer's warning
    truncation = Truncation(args.truncate, args.keep)
    tasks = [
        encode_task(tokenizer, name, chats, args.prompts_per_task, longest, truncation)
        for name, chats in read_tasks(args.prompts, args.tasks).items()
    ]
    if not any(task.prompts for task in tasks):
        raise MedheadError(f"no prompt fits into {longest} tokens; shorten the questions with --truncate")
    return tasks


def describe(tasks: list[Task], args: argparse.Namespace) -> str:
    """Return one line that says how many prompts there are, were truncated, and were left out."""
    parts = []
    for task in tasks:
        shorter = f", {task.truncated} truncated to {args.truncate} tokens ({args.keep})" if task.truncated else ""
        left_out = f", {task.left_out} too long and left out" if task.left_out else ""
        parts.append(f"{task.name} {len(task.prompts)}{shorter}{left_out}")
    return "prompts: " + "; ".join(parts)


def load_decoding(args: argparse.Namespace, target: Target) -> tuple[list[str], Heads | None]:
    """Return the names of the proposers, and the heads."""
    folder: Any = args.heads or default_heads(args.model)
    names = args.proposers or [name for name in SHOWN if folder or name != "heads"]
    heads = None if folder is None else load_heads(folder, target)
    if heads is None and "heads" in names:
        raise MedheadError("the proposer 'heads' needs heads: give the folder of a heads checkpoint (--heads)")
    return list(dict.fromkeys(names)), heads


def methods_of(
    target: Target, proposers: list[str], arguments: dict[str, Any], heads: Heads | None = None,
    tree_size: int | None = None, seed: int = 0,
) -> list[Method]:  # fmt: skip
    """Return plain decoding and the proposers; each forgets earlier answers before every repeat.

    `arguments` are those of `generate`, `heads` are for the proposers `heads` and `hybrid`.
    """
    shared: dict[str, Any] = {}
    if heads is not None:
        made: Any = build_proposer("heads", target, heads=heads)
        shared = {"heads": heads, "dtype": made.output_head.dtype}  # the faster data type is measured once

    def make(name: str) -> Decoder:
        options = shared if name in ("heads", "hybrid") else {}
        size = None if name == PLAIN else tree_size
        return Decoder(target, build_proposer(name, target, tree_size=size, **options))

    return [Method(name, arguments, seed=seed, make=partial(make, name)) for name in (PLAIN, *proposers)]


def measure_tasks(args: argparse.Namespace, target: Target, tasks: list[Task]) -> Iterator[list[Row]]:
    """Yield the rows of all tasks and their totals for every temperature and batch size."""
    proposers, heads = load_decoding(args, target)
    temperatures, batch_sizes = dict.fromkeys(args.temperatures), dict.fromkeys(args.batch_sizes)
    answers = args.repeats * (len(proposers) + 1) * sum(len(task.prompts) for task in tasks)
    with harness.progress_bar(answers * len(temperatures) * len(batch_sizes)) as bar:
        for temperature in temperatures:
            arguments = harness.generate_arguments(args, target.model, temperature)
            for size in batch_sizes:
                methods = methods_of(target, proposers, arguments, heads, args.tree_size, args.seed)
                warm_up(methods, tasks[0].prompts[:size], size, max_new_tokens=WARM_UP_TOKENS)
                rows: list[Row] = []
                for task in tasks:
                    bar.set_postfix_str(f"{task.name}, T={temperature:g}, batch {size}", refresh=False)
                    options: Any = {"batch_size": size, "warm": False, "profile": 1, "progress": bar.update}
                    results = measure(methods, task.prompts, args.repeats, **options)
                    rows += rows_of(task.name, results, temperature, size)
                yield rows + totals(rows)


def run(args: argparse.Namespace) -> None:
    """Measure and report; results are written after every temperature and batch size."""
    least_one = dict.fromkeys(("prompts_per_task", "truncate"), (1, math.inf))
    harness.check_options(args, temperatures=(0, 100), tree_size=(2, 256), **least_one)
    most = args.prompts_per_task
    check_range(args, "batch_sizes", 1, most, f"from 1 to --prompts-per-task {most}")
    target = harness.load_target(args, args.dtype, args.ignore_eos)
    tasks = tasks_of(args, target.context)
    described = describe(tasks, args)
    harness.say(described)
    trees = f"trees of {args.tree_size} nodes" if args.tree_size else "trees of each proposer's own size"
    limit = f"at most {args.max_new_tokens} tokens"
    title = harness.heading(args, harness.label(args.model), Path(args.prompts).name, limit, trees, args.dtype)
    rows: list[Row] = []

    def write(show: bool) -> None:
        notes = [described, *compare_hybrid(rows), compare_texts(rows)]
        text = "\n".join([table(rows), "", *(f"- {note}" for note in notes)])
        harness.report(args, "tasks", title, text, rows, plot, show, notes=notes)

    for found in measure_tasks(args, target, [task for task in tasks if task.prompts]):
        rows += found
        write(show=False)
    write(show=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)
