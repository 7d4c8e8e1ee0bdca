"""Compare medhead with what a user would run instead, interleaved, task by task of Spec-Bench.

The systems: transformers' `generate` (plain, prompt lookup, compiled with a static cache), llama.cpp (files given by --gguf),
medhead's plain decoding, its hybrid without heads, and its hybrid with heads, the latter also with the weights of the files.
medhead uses passes that `--step compiled` compiled before. All start from the same token ids.
Results are written after every task; a run that was stopped goes on with the next task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_cpp import LlamaCppMethod, install

from medhead.bench import harness
from medhead.bench.harness import BLUE, GREY, ORANGE, Row
from medhead.bench.measure import Method, measure, warm_up
from medhead.bench.task_prompts import Truncation, encode_task, read_tasks
from medhead.cli.common import run_command
from medhead.decoder import Decoder
from medhead.model.loading import load_model, load_tokenizer
from medhead.model.target import Target
from medhead.proposers import build_proposer

PLAIN = "medhead plain"
EXAMPLES = """\
example, with files that make_gguf.py wrote:
  python benchmarks/peers/run.py --model smollm2 --heads my-heads --prompts spec_bench.jsonl --prompts-per-task 5 \\
      --gguf smollm2.F16.gguf smollm2.Q8_0.gguf smollm2.Q4_1.gguf --output benchmarks/peers/smollm2
"""
COUNTS = ("prompts", "new_tokens", "passes", "seconds", "mismatches")


def parser() -> Any:
    """Return the parser of the program."""
    options = harness.bench_parser("peers", __doc__ or "", EXAMPLES, repeats=1)
    harness.add_decoding_options(options, max_new_tokens=128)
    options.add_argument("--heads", help="folder of a heads checkpoint (default: none)")
    options.add_argument("--prompts-per-task", type=int, default=5, help="prompts of each task (default: 5)")
    options.add_argument("--truncate", type=int, help="shorten longer questions to so many tokens")
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0], help="0 is greedy (default: 0)")
    options.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1], help="prompts decoded together (default: 1)"
    )
    options.add_argument("--dtype", default="float32", help="data type of the model (default: float32)")
    options.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    options.add_argument("--compiled", action="store_true", help="add transformers compiled with a static cache")
    options.add_argument("--gguf", type=Path, nargs="*", default=[], help="files for llama.cpp, named MODEL.TYPE.gguf")
    options.add_argument("--stored", type=Path, nargs="*", default=[], help="files for medhead with --weights stored")
    options.add_argument("--npm-folder", type=Path, default=Path.home() / ".cache" / "medhead" / "node-llama-cpp",
                         help="where node-llama-cpp is, or will be installed")  # fmt: skip
    return options


def methods_of(
    args: argparse.Namespace, target: Target, of_files: dict[Path, Target], temperature: float, rows: int
) -> list[Method]:
    """Return all systems for one temperature and batch size; medhead's plain decoding is the first."""
    arguments, seed = harness.generate_arguments(args, target.model, temperature), args.seed

    def medhead(name: str, proposer: str, of: Target = target, **options: Any) -> Method:
        return Method(name, arguments, Decoder(of, build_proposer(proposer, of, **options)), seed=seed)

    def transformers(name: str, **more: Any) -> Method:
        return Method(f"transformers {name}".rstrip(), arguments | more, model=target.model, seed=seed)

    heads: dict[str, Any] = {"heads": args.heads} if args.heads else {}
    found = [medhead(PLAIN, "none"), medhead("medhead hybrid, no heads", "hybrid")]
    if heads:
        found.append(medhead("medhead hybrid", "hybrid", **heads))
    for file, of in of_files.items():
        kind = file.stem.rpartition(".")[2]
        found += [
            medhead(f"medhead plain {kind}", "none", of),
            medhead(f"medhead hybrid {kind}", "hybrid", of, **heads),
        ]
    found.append(transformers(""))
    if rows == 1:
        found.append(transformers("prompt lookup", prompt_lookup_num_tokens=10))
    if args.compiled:
        found.append(transformers("compiled", cache_implementation="static"))
    threads = harness.machine()["threads"]
    for file in args.gguf:
        name = f"llama.cpp {file.stem.rpartition('.')[2]}"
        columns = rows * 4096
        found.append(LlamaCppMethod(name, file, arguments, seed, args.npm_folder, threads, rows, columns))
    return found


def rows_of(args: argparse.Namespace, target: Target, done: set[tuple[Any, ...]]) -> Iterator[Row]:
    """Yield the result of every system for every task, temperature and batch size that is not done."""
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    longest = harness.room_for_prompt(args, target.context)
    tasks = [
        encode_task(tokenizer, name, chats, args.prompts_per_task, longest, Truncation(args.truncate, "ends"))
        for name, chats in read_tasks(args.prompts).items()
    ]
    of_files = {file: Target(load_model(file, "cpu", args.dtype, weights="stored")) for file in args.stored}
    for temperature in args.temperatures:
        for size in args.batch_sizes:
            left = [task for task in tasks if (task.name, temperature, size) not in done]
            methods = methods_of(args, target, of_files, temperature, size) if left else []
            if methods:
                warm_up(methods, left[0].prompts[:size], size, max_new_tokens=8)
            for task in left:
                harness.say(f"{task.name}, temperature {temperature:g}, batch {size}")
                for result in measure(methods, task.prompts, args.repeats, batch_size=size, warm=False):
                    yield {
                        "task": task.name, "system": result.name, "dtype": result.dtype, "temperature": temperature,
                        "batch_size": size, "prompts": len(task.prompts), "new_tokens": sum(result.new_tokens),
                        "passes": sum(result.passes), "seconds": round(sum(result.seconds), 3),
                        "mismatches": result.mismatches,
                    }  # fmt: skip
            for method in methods:
                if isinstance(method, LlamaCppMethod):
                    method.close()


def summed(rows: list[Row]) -> list[Row]:
    """Return the rows with the sums over all tasks added, and tokens per second."""
    totals: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["system"], row["temperature"], row["batch_size"]
        total = totals.setdefault(key, row | {"task": "all"} | dict.fromkeys(COUNTS, 0))
        for name in COUNTS:
            total[name] += row[name]
    return [row | {"tokens_per_second": row["new_tokens"] / row["seconds"]} for row in [*rows, *totals.values()]]


def conditions(rows: list[Row]) -> list[tuple[float, int]]:
    """Return the pairs of temperature and batch size."""
    return list(dict.fromkeys((row["temperature"], row["batch_size"]) for row in rows))


def table(rows: list[Row]) -> str:
    """Return a Markdown table for every condition: tokens per second by task, accepted length, ratio, other texts."""
    lines = []
    for condition in conditions(rows):
        here = [row for row in summed(rows) if (row["temperature"], row["batch_size"]) == condition]
        tasks, systems = (list(dict.fromkeys(row[name] for row in here)) for name in ("task", "system"))
        by = {(row["system"], row["task"]): row for row in here}
        cells = []
        for system in systems:
            total = by[system, "all"]
            accepted = f"{total['new_tokens'] / total['passes']:.2f}" if total["passes"] else "-"
            ratio = total["tokens_per_second"] / by[PLAIN, "all"]["tokens_per_second"]
            speeds = [f"{by[system, task]['tokens_per_second']:.1f}" for task in tasks]
            cells.append([system, *speeds, f"{ratio:.2f}", accepted, f"{total['mismatches']}/{total['prompts']}"])
        what = f"temperature {condition[0]:g}" if condition[0] else "greedy"
        header = ["tokens/s", *tasks, "x plain", "accepted length", "other texts than plain"]
        lines += [f"**{what}, batch {condition[1]}**", "", harness.markdown_table(header, cells), ""]
    return "\n".join(lines).rstrip()


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw tokens per second of every system over all tasks, one panel for each condition."""
    found = conditions(rows)
    with harness.figure(path, title, (7.5, 2.6 * len(found) + 0.8), len(found), 1) as axes:
        for axis, condition in zip(axes[:, 0], found, strict=True):
            here = [r for r in summed(rows) if r["task"] == "all" and (r["temperature"], r["batch_size"]) == condition]
            here.sort(key=lambda row: row["tokens_per_second"])
            kinds = {"medhead": BLUE, "llama.cpp": ORANGE}
            colours = [kinds.get(row["system"].split()[0], GREY) for row in here]
            bars = axis.barh([row["system"] for row in here], [row["tokens_per_second"] for row in here], color=colours)
            axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
            axis.tick_params(labelsize=7)
            what = f"temperature {condition[0]:g}" if condition[0] else "greedy"
            axis.set_xlabel(f"tokens per second, {what}, batch {condition[1]}", fontsize=8)


def run(args: argparse.Namespace) -> None:
    """Measure what is not in --output yet, and report."""
    harness.check_options(args, prompts_per_task=(1, 10**6))
    rows: list[Row] = []
    file = args.output / "results.json" if args.output else None
    if file is not None and file.exists():
        rows = json.loads(file.read_text())["results"]
    if args.gguf:
        install(args.npm_folder)
    target = harness.load_target(args, args.dtype)
    limit = f"at most {args.max_new_tokens} tokens"
    title = harness.heading(args, harness.label(args.model), Path(args.prompts).name, limit, args.dtype)
    done = {(row["task"], row["temperature"], row["batch_size"]) for row in rows}
    waiting: list[Row] = []
    for row in rows_of(args, target, done):
        if waiting and any(row[name] != waiting[0][name] for name in ("task", "temperature", "batch_size")):
            rows, waiting = rows + waiting, []
            harness.report(args, "peers", title, table(rows), rows, plot, show=False)
        waiting.append(row)
    rows += waiting
    harness.report(args, "peers", title, table(rows), rows, plot)


if __name__ == "__main__":
    sys.exit(run_command(parser(), run, None))
