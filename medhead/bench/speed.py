"""`medhead bench speed`: tokens per second of proposers, plain decoding, and transformers with and without prompt lookup."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from medhead.bench import harness
from medhead.bench.harness import Row
from medhead.bench.measure import PARTS, Method, MethodResult, Prompts, measure
from medhead.cli.common import Parser, run_command
from medhead.compile import BACKENDS
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import load_heads
from medhead.model.loading import pick_device
from medhead.model.named_models import shipped_heads
from medhead.model.target import Target
from medhead.proposers import PROPOSERS

TRANSFORMERS, PLAIN = "transformers generate", "medhead plain"
PROFILED_PROMPTS = 4  # answered once more, so that the parts of a step are known
EXAMPLES = """\
examples:
  medhead bench speed                                   demo model, built-in prompts
  medhead bench speed --prompts held_out.jsonl --num-prompts 24 --output results
  medhead bench speed --temperature 1                   sampling; heads with and without ranking by the noise
  medhead bench speed --tree-sizes 4 8 16 32 64         which tree size is the fastest here?
  medhead bench speed --steps compiled                  compiled steps too (compiling takes minutes)
  medhead bench speed --model Qwen/Qwen3-8B --heads my/heads --dtypes bfloat16

method: all methods answer every prompt, interleaved, in an order that rotates, each in its fastest data type. Times are
medians of the repeats and include the prefill. Every text is compared with plain decoding's in the same data type. The
parts of a step are timed in a further run. Accepted length is tokens emitted per verify pass, bonus token included.
"""


def parser() -> Parser:
    """Return the parser of the command."""
    what = "Measure tokens per second against plain decoding and transformers."
    options = harness.bench_parser("speed", what, EXAMPLES, repeats=3)
    harness.add_decoding_options(options, max_new_tokens=200, num_prompts=8)
    harness.add_text_options(options)
    options.add_argument("--heads", nargs="+", metavar="FOLDER",
                         help="heads; hybrid, --steps and --tree-sizes use the first (default: the demo model's)")  # fmt: skip
    options.add_argument("--proposers", nargs="*", choices=sorted(PROPOSERS), metavar="NAME",
                         default=["ngram", "lookahead", "recycling", "hybrid"],
                         help="further proposers (default: ngram lookahead recycling hybrid)")  # fmt: skip
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    options.add_argument("--tree-size", type=int, help="nodes of every proposer's tree, 2 to 256 (default: its own)")
    options.add_argument("--tree-sizes", type=int, nargs="+", default=[], help="further tree sizes of the first heads")
    options.add_argument("--steps", nargs="+", choices=sorted(BACKENDS), default=[], metavar="BACKEND",
                         help="compiled or captured steps too (compiled, graph), in the first data type")  # fmt: skip
    options.add_argument("--dtypes", nargs="+", metavar="DTYPE",
                         help="data types to choose from (default: float32 bfloat16 on a CPU, else bfloat16)")  # fmt: skip
    return options


def methods_of(args: argparse.Namespace, target: Target, steps: list[str]) -> list[Method]:
    """Return all methods for one model; `steps` are the backends of compiled and captured steps."""
    arguments = harness.generate_arguments(args, target.model, args.temperature)
    folders = args.heads or shipped_heads(args.model)
    first: dict[str, Any] = {"heads": folders[0]} if folders else {}
    found: list[Method] = []

    def transformers(name: str, **more: Any) -> None:
        found.append(Method(name, arguments | more, model=target.model, seed=args.seed))

    def medhead(name: str, proposer: str, **options: Any) -> None:
        found.append(Method(name, arguments, Decoder(target, proposer, **options), seed=args.seed))

    transformers(TRANSFORMERS)
    transformers("transformers prompt lookup", prompt_lookup_num_tokens=10)
    medhead(PLAIN, "none")
    for name in args.proposers:
        medhead(f"medhead {name}", name, tree_size=args.tree_size, **(first if name == "hybrid" else {}))
    for place, folder in enumerate(folders):
        heads = load_heads(folder, target)
        name = f"medhead heads ({heads.config.label})" if place else "medhead heads"
        medhead(name, "heads", heads=heads, tree_size=args.tree_size)
        if args.temperature > 0:
            medhead(f"{name}, noise ignored", "heads", heads=folder, tree_size=args.tree_size, rank_by_noise=False)
    if steps and target.device.type == "cuda":  # on a CPU `generate` does not compile
        transformers(f"{TRANSFORMERS}, static cache", cache_implementation="static")
    for step in steps:
        medhead(f"{PLAIN}, {step}", "none", step=step)
        if folders:
            medhead(f"medhead heads, {step}", "heads", tree_size=args.tree_size, step=step, **first)
        if step == "compiled" and "hybrid" in args.proposers:
            medhead(f"medhead hybrid, {step}", "hybrid", tree_size=args.tree_size, step=step, **first)
    for size in args.tree_sizes:
        medhead(f"medhead heads, {size} nodes", "heads", tree_size=size, **first)
    return found


def fastest_dtypes(methods: list[list[Method]], prompts: Prompts) -> list[Method]:
    """Return every method in the data type in which it is the fastest; `methods` has one list for each type."""
    if len(methods) == 1:
        return methods[0]
    by_name: dict[str, list[Method]] = {}
    for method in (method for group in methods for method in group):
        by_name.setdefault(method.name, []).append(method)
    chosen = []
    for name, group in by_name.items():
        rates = [result.rate for result in measure(group, prompts, repeats=3)] if len(group) > 1 else [0.0]
        if len(group) > 1:
            found = (f"{method.dtype} {rate:.0f} tokens/s" for method, rate in zip(group, rates, strict=True))
            harness.say(f"{name}: {', '.join(found)}")
        chosen.append(group[rates.index(max(rates))])
    return chosen


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    harness.check_options(args, temperature=(0, 100), tree_size=(2, 256), tree_sizes=(2, 256))
    if args.tree_sizes and not args.heads and not shipped_heads(args.model):
        raise MedheadError("--tree-sizes needs --heads FOLDER: the trees are those of the first heads")
    dtypes = args.dtypes or (["float32", "bfloat16"] if pick_device(args.device).type == "cpu" else ["bfloat16"])
    targets = [harness.load_target(args, dtype, args.ignore_eos) for dtype in dtypes]
    methods = [methods_of(args, target, [] if place else args.steps) for place, target in enumerate(targets)]
    prompts = harness.load_prompts(args, targets[0].context)
    plain = {method.dtype: method for group in methods for method in group if method.name == PLAIN}
    chosen = fastest_dtypes(methods, prompts[:2])
    with harness.progress_bar(len(chosen) * len(prompts) * args.repeats) as bar:
        results = measure(
            chosen, prompts, args.repeats, references=plain, profile=PROFILED_PROMPTS, memory=True, progress=bar.update
        )
    rows = summary(results)
    mode = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    title = harness.heading(args, harness.label(args.model), f"{len(prompts)} prompts", mode, "batch 1")
    text = table(rows, compares_texts=args.temperature == 0)
    harness.report(args, "speed", title, text, rows, plot)


def summary(results: list[MethodResult]) -> list[Row]:
    """Return the numbers of every method, with speedups over transformers and over plain decoding."""
    rates = {result.name: result.rate for result in results}
    return [
        {
            "name": result.name,
            "dtype": result.dtype,
            "tree_size": result.tree_size,
            "tokens_per_second": round(result.rate, 1),
            "speedup_vs_transformers": round(result.rate / rates[TRANSFORMERS], 3) if TRANSFORMERS in rates else None,
            "speedup_vs_plain": round(result.rate / rates[PLAIN], 3) if PLAIN in rates else None,
            "accepted_length": round(result.accepted_length, 3),
            "by_prompt": result.accepted_length_by_prompt,
            "parts_ms": {part: round(ms, 3) for part, ms in result.parts_ms().items()},
            "overhead": round(result.overhead, 4),
            "identical": len(result.new_tokens) - result.mismatches,
            "prompts": len(result.new_tokens),
            "new_tokens": sum(result.new_tokens) // result.repeats,
            "seconds": round(sum(result.seconds), 3),
            "peak_mib": round(result.peak_bytes / 2**20, 2),
            "cache_mib": round(result.cache_bytes / 2**20, 2),
            "packed_mib": round(result.packed_bytes / 2**20, 2),
        }
        for result in results
    ]


def table(rows: list[Row], compares_texts: bool = True) -> str:
    """Return two Markdown tables: speed, and the parts of a step.

    Without `compares_texts` only medhead's texts are compared: when sampling, transformers draws other random numbers.
    """
    speed, parts = [], []
    for row in rows:
        ours = row["tree_size"] > 0
        length = f"{row['accepted_length']:.2f}" if ours else "-"
        identical = f"{row['identical']}/{row['prompts']}" if ours or compares_texts else "-"
        speed.append([
            row["name"], row["dtype"], str(row["tree_size"] or "-"), f"{row['tokens_per_second']:.1f}",
            _times(row["speedup_vs_transformers"]), _times(row["speedup_vs_plain"]), length, identical,
            f"{row['peak_mib']:.1f} ({row['cache_mib']:.1f}, {row['packed_mib']:.1f})",
        ])  # fmt: skip
        if ours:
            overhead = "-" if row["parts_ms"]["whole"] else f"{row['overhead']:.0%}"
            parts.append([row["name"], *(f"{row['parts_ms'][part]:.2f}" for part in PARTS), overhead])
    header = ["method", "dtype", "nodes", "tokens/s", "× transformers", "× plain", "accepted length", "identical texts",
              "peak MiB (cache, packed weights)"]  # fmt: skip
    first = harness.markdown_table(header, speed, left=2)
    second = harness.markdown_table(["ms per step", *PARTS, "overhead"], parts)
    return f"{first}\n\n{second}\n\nOverhead: time of a step outside the forward pass / forward pass."


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw tokens per second as bars; where several tree sizes were measured, also speedup and accepted length by size."""
    bars = [row for row in rows if not row["name"].endswith("nodes")]
    sweep = sorted((row for row in rows if row["name"].endswith("nodes")), key=lambda row: row["tree_size"])
    size = (12 if sweep else 8, 0.55 * len(bars) + 1.6)
    with harness.figure(path, title, size, columns=2 if sweep else 1) as axes:
        left = axes[0][0]
        names = [f"{row['name']} ({row['dtype']})" for row in bars]
        colours = [harness.BLUE if row["name"].startswith("medhead") else harness.GREY for row in bars]
        drawn = left.barh(names, [row["tokens_per_second"] for row in bars], color=colours)
        left.bar_label(drawn, [f" {_times(row['speedup_vs_transformers'])}" for row in bars])
        left.invert_yaxis()
        left.set_xlabel("tokens per second (label: × transformers generate)")
        left.margins(x=0.15)
        if sweep:
            right, nodes = axes[0][1], [row["tree_size"] for row in sweep]
            speedups, lengths = ([row[key] for row in sweep] for key in ("speedup_vs_plain", "accepted_length"))
            right.plot(nodes, speedups, "o-", color=harness.BLUE, label="× plain decoding")
            right.plot(nodes, lengths, "s--", color=harness.ORANGE, label="accepted length")
            right.set_xlabel("nodes of the tree")
            right.set_ylim(bottom=0)
            right.legend(frameon=False)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)
