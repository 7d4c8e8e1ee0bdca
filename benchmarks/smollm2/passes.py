"""Count what the verify passes of decoding emit, task by task of Spec-Bench: accepted length, passes that accept a drafted
token, passes saved, and the accepted length by position in the output.

None of these numbers depends on the machine in float32. Results are written after every task; a run that was stopped goes on
with the next task.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medhead.bench import harness
from medhead.bench.harness import COLOURS, Row
from medhead.bench.measure import Prompts, padded
from medhead.bench.task_prompts import Truncation, encode_task, read_tasks
from medhead.cli.common import run_command
from medhead.decoder import Decoder
from medhead.model.loading import load_tokenizer
from medhead.model.target import Target
from medhead.proposers import build_proposer

BIN = 100  # tokens of output that share a point of the curve
EXAMPLES = """\
examples:
  python benchmarks/smollm2/passes.py --model smollm2 --heads my-heads --prompts spec_bench.jsonl --output passes
  python benchmarks/smollm2/passes.py --model smollm2 --heads my-heads --prompts spec_bench.jsonl --output passes-long \\
      --max-new-tokens 1000 --prompts-per-task 4 --ignore-eos
"""


def parser() -> Any:
    """Return the parser of the program."""
    options = harness.bench_parser("passes", __doc__ or "", EXAMPLES, repeats=1)
    harness.add_decoding_options(options, max_new_tokens=128)
    harness.add_text_options(options)
    options.add_argument("--heads", nargs="+", default=[], help="folders of heads checkpoints")
    options.add_argument("--proposers", nargs="*", default=["heads", "hybrid"], metavar="NAME",
                         help="proposers; those that take heads are run with each (default: heads hybrid)")  # fmt: skip
    options.add_argument("--prompts-per-task", type=int, default=80, help="prompts of each task (default: 80)")
    options.add_argument("--batch-size", type=int, default=8, help="prompts decoded together (default: 8)")
    options.add_argument("--tree-size", type=int, default=32, help="nodes of a tree (default: 32)")
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0], help="0 is greedy (default: 0)")
    options.add_argument("--dtype", default="float32", help="data type of the model (default: float32)")
    return options


def count_passes(decoder: Decoder, prompts: Prompts, batch_size: int, seed: int, arguments: Row) -> Row:
    """Decode prompts and return the counts of their passes, in all and by position (in units of BIN tokens) of the output."""
    tokens, passes, accepting = 0, 0, 0
    bins: dict[int, list[int]] = {}

    def count(sequence: Any, new: list[int]) -> None:
        nonlocal tokens, passes, accepting
        place = bins.setdefault((len(sequence.output_ids) - len(new)) // BIN, [0, 0])
        tokens, passes, accepting = tokens + len(new), passes + 1, accepting + (len(new) > 1)
        place[0], place[1] = place[0] + len(new), place[1] + 1

    decoder.on_pass = count
    for first in range(0, len(prompts), batch_size):
        ids, mask = padded(prompts[first : first + batch_size], decoder.target.device)
        decoder.generate(ids, attention_mask=mask, seed=seed, **arguments)
    return {"prompts": len(prompts), "new_tokens": tokens, "passes": passes, "accepting": accepting, "bins": bins}


def decoders(args: argparse.Namespace, target: Target) -> Iterator[tuple[str, Callable[[], Decoder]]]:
    """Yield the name of every way to draft, and what makes its decoder."""
    for name in args.proposers:
        for folder in args.heads if name in ("heads", "hybrid") else [None]:
            more = {"heads": folder} if folder else {}
            label = f"{name}, {Path(folder).name}" if folder and len(args.heads) > 1 else name
            yield label, partial(_decoder, target, name, args.tree_size, more)


def _decoder(target: Target, name: str, tree_size: int, more: Row) -> Decoder:
    return Decoder(target, build_proposer(name, target, tree_size=tree_size, **more))


def rows_of(args: argparse.Namespace, target: Target, done: set[tuple[Any, ...]]) -> Iterator[Row]:
    """Yield the counts of every task, temperature and way to draft that are not done."""
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    longest = harness.room_for_prompt(args, target.context)
    chats_by_task = read_tasks(args.prompts)
    for temperature in args.temperatures:
        arguments = harness.generate_arguments(args, target.model, temperature)
        for task, chats in chats_by_task.items():
            prompts = encode_task(tokenizer, task, chats, args.prompts_per_task, longest, Truncation()).prompts
            for name, make in decoders(args, target):
                if (task, temperature, name) not in done:
                    found = count_passes(make(), prompts, args.batch_size, args.seed, arguments)
                    harness.say(
                        f"{task}, temperature {temperature:g}, {name}: {found['new_tokens'] / found['passes']:.2f}"
                    )
                    yield {"task": task, "temperature": temperature, "proposer": name} | found


def summed(rows: list[Row]) -> list[Row]:
    """Return the rows, and a row of the sums over all tasks for every temperature and proposer."""
    totals: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        blank = {"prompts": 0, "new_tokens": 0, "passes": 0, "accepting": 0, "bins": {}}
        total = totals.setdefault((row["temperature"], row["proposer"]), row | {"task": "all"} | blank)
        for name in ("prompts", "new_tokens", "passes", "accepting"):
            total[name] += row[name]
        for place, (tokens, passes) in row["bins"].items():
            before = total["bins"].get(int(place), [0, 0])
            total["bins"][int(place)] = [before[0] + tokens, before[1] + passes]
    return [*rows, *totals.values()]


def table(rows: list[Row]) -> str:
    """Return a Markdown table of the counts."""
    header = ["task", "drafted by", "temperature", "prompts", "accepted length", "passes that accept", "passes saved"]
    cells = [
        [
            row["task"], row["proposer"], f"{row['temperature']:g}", str(row["prompts"]),
            f"{row['new_tokens'] / row['passes']:.2f}", f"{row['accepting'] / row['passes']:.0%}",
            f"{1 - row['passes'] / row['new_tokens']:.0%}",
        ]
        for row in summed(rows)
    ]  # fmt: skip
    return harness.markdown_table(header, cells, left=2)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw the accepted length by position in the output, over all tasks."""
    with harness.figure(path, title, (7, 3.5)) as axes:
        axis, lines = axes[0, 0], [row for row in summed(rows) if row["task"] == "all"]
        for row, colour in zip(lines, COLOURS, strict=False):
            places = sorted(row["bins"].items())
            at = [(place + 0.5) * BIN for place, _ in places]
            lengths = [tokens / passes for _, (tokens, passes) in places]
            name = f"{row['proposer']}, temperature {row['temperature']:g}"
            axis.plot(at, lengths, marker="o", color=colour, label=name)
        axis.set(xlabel="position in the output, tokens", ylabel="accepted length", ylim=(1, None))
        axis.legend(frameon=False, fontsize=8)


def run(args: argparse.Namespace) -> None:
    """Count what is not in --output yet, and report."""
    harness.check_options(args, prompts_per_task=(1, 10**6), batch_size=(1, 4096), temperatures=(0, math.inf))
    file = args.output / "results.json" if args.output else None
    rows: list[Row] = json.loads(file.read_text())["results"] if file is not None and file.exists() else []
    target = harness.load_target(args, args.dtype, args.ignore_eos)
    limit = f"at most {args.max_new_tokens} tokens"
    title = harness.heading(args, harness.label(args.model), Path(args.prompts).name, limit, f"{args.tree_size} nodes")
    done = {(row["task"], row["temperature"], row["proposer"]) for row in rows}
    for row in rows_of(args, target, done):
        rows.append(row)
        harness.report(args, "passes", title, table(rows), rows, plot, show=False)
    harness.report(args, "passes", title, table(rows), rows, plot)


if __name__ == "__main__":
    sys.exit(run_command(parser(), run, None))
