"""`medhead bench budget`: automatic tree size against plain decoding and against trees of fixed size."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medhead.bench import harness
from medhead.bench.harness import Row
from medhead.bench.measure import Method, MethodResult, Prompts, measure
from medhead.cli.common import Parser, run_command
from medhead.decoder import Decoder
from medhead.heads import Heads, load_heads
from medhead.model.named_models import default_heads
from medhead.model.target import Target

PLAIN, AUTO = "plain", "automatic"
EXAMPLES = """\
examples:
  medhead bench budget --output results/budget
  medhead bench budget --model my/model --heads my/heads --prompts mine.jsonl --num-prompts 8

method: the same prompts are decoded plainly, with the automatic tree size, and with trees of fixed sizes, interleaved; once
greedily and once sampled, and in two adversarial scenarios where draft tokens are hardly ever accepted: random tokens as
prompts, and heads with random weights. All answers have full length.
time / plain: at most 1.05 is the promise. time / best fixed: against the fixed size (or plain decoding) that turned out to
be the fastest, which is not known in advance.
"""


@dataclass
class Scenario:
    """Prompts, heads and temperature; `adversarial` where draft tokens are hardly ever accepted."""

    name: str
    prompts: Prompts
    heads: Heads | None
    temperature: float = 0.0
    adversarial: bool = False


def scenarios(target: Target, prompts: Prompts, heads: Heads | None, seed: int = 0) -> list[Scenario]:
    """Return prompts decoded greedily and sampled, random tokens sampled, and prompts with random heads."""
    source = torch.Generator().manual_seed(seed)
    noise = [torch.randint(target.vocab_size, (len(ids),), generator=source).tolist() for ids in prompts]
    found = [
        Scenario("prompts, greedy", prompts, heads),
        Scenario("prompts, temperature 1", prompts, heads, temperature=1.0),
        Scenario("random tokens, temperature 2", noise, heads, temperature=2.0, adversarial=True),
    ]
    if heads is not None:
        found.append(Scenario("random heads, greedy", prompts, random_heads(heads, seed), adversarial=True))
    return found


def random_heads(heads: Heads, seed: int) -> Heads:
    """Return a copy of the heads with random weights."""
    generator = torch.Generator().manual_seed(seed)
    noise = copy.deepcopy(heads)
    for parameter in noise.parameters():
        values = torch.randn(parameter.shape, generator=generator) * max(parameter.shape[-1], 1) ** -0.5
        parameter.data.copy_(values)
    return noise


def methods_of(args: argparse.Namespace, target: Target, scenario: Scenario) -> list[Method]:
    """Return plain decoding, the automatic tree size, and trees of fixed sizes."""
    arguments = harness.generate_arguments(args, target.model, scenario.temperature)

    def hybrid(name: str, tree_size: int | None) -> Method:
        return Method(name, arguments, Decoder(target, "hybrid", heads=scenario.heads, tree_size=tree_size))

    fixed = [hybrid(f"{size} nodes", size) for size in args.tree_sizes]
    return [Method(PLAIN, arguments, Decoder(target, "none")), hybrid(AUTO, None), *fixed]


def summary(scenario: Scenario, results: list[MethodResult]) -> Row:
    """Return the times of one scenario against plain decoding and against the best fixed tree size."""
    seconds = {result.name: sum(result.seconds) for result in results}
    best = min((name for name in seconds if name != AUTO), key=lambda name: seconds[name])
    identical = len(scenario.prompts) - max(result.mismatches for result in results)
    return {
        "scenario": scenario.name,
        "adversarial": scenario.adversarial,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "new_tokens": sum(results[0].new_tokens) // results[0].repeats,
        "accepted_length": {result.name: round(result.accepted_length, 3) for result in results},
        "time_vs_plain": round(seconds[AUTO] / seconds[PLAIN], 3),
        "best_fixed_size": best,
        "time_vs_best_fixed_size": round(seconds[AUTO] / seconds[best], 3),
        "identical": f"{identical}/{len(scenario.prompts)}",
    }


def table(rows: list[Row]) -> str:
    """Return a Markdown table with one line for each scenario."""
    header = ["scenario", "best fixed size", "time / plain", "time / best fixed", "accepted length", "identical texts"]
    cells = [
        [row["scenario"], row["best_fixed_size"], f"{row['time_vs_plain']:.2f}", f"{row['time_vs_best_fixed_size']:.2f}",
         f"{row['accepted_length'][AUTO]:.2f}", row["identical"]]
        for row in rows
    ]  # fmt: skip
    return harness.markdown_table(header, cells, left=2)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw time against plain decoding: fixed tree sizes as a curve, the automatic size as a horizontal line."""
    longest = max(max(row["seconds"].values()) / row["seconds"][PLAIN] for row in rows)
    with harness.figure(path, title, (3.4 * len(rows), 3.4), columns=len(rows), sharey=True) as axes:
        for axis, row in zip(axes[0], rows, strict=True):
            plain = row["seconds"][PLAIN]
            fixed = {int(name.split()[0]): s / plain for name, s in row["seconds"].items() if name.endswith("nodes")}
            axis.axhline(1.0, color=harness.GREY, linewidth=1, label="plain decoding")
            axis.plot(list(fixed), list(fixed.values()), "o-", color=harness.BLUE, label="fixed tree size")
            axis.axhline(row["time_vs_plain"], color=harness.ORANGE, linestyle="--", label="automatic tree size")
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(fixed), [str(nodes) for nodes in fixed])
            axis.set_ylim(0, 1.08 * max(1.0, longest))
            axis.set_title(row["scenario"], fontsize=9)
            axis.set_xlabel("nodes of the tree")
        axes[0][0].set_ylabel("time / time of plain decoding")
        axes[0][0].legend(frameon=False, fontsize=8)


def parser() -> Parser:
    """Return the parser of the command."""
    what = "Check that the automatic tree size is never slower than plain decoding."
    options = harness.bench_parser("budget", what, EXAMPLES, repeats=3)
    harness.add_decoding_options(options, max_new_tokens=200, num_prompts=6)
    options.add_argument("--heads", metavar="FOLDER", help="heads (default: the demo model's own, else none)")
    options.add_argument("--tree-sizes", type=int, nargs="+", default=[4, 8, 16, 32],
                         help="fixed tree sizes, 2 to 256 (default: 4 8 16 32)")  # fmt: skip
    options.add_argument("--dtype", default="float32", help="data type of the model (default: float32)")
    return options


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    harness.check_options(args, tree_sizes=(2, 256))
    target = harness.load_target(args, args.dtype, ignore_eos=True)
    folder: Any = args.heads or default_heads(args.model)
    heads = None if folder is None else load_heads(folder, target)
    prompts = harness.load_prompts(args, target.context)
    found, rows = scenarios(target, prompts, heads), []
    with harness.progress_bar(len(found) * len(prompts) * args.repeats * (len(args.tree_sizes) + 2)) as bar:
        for scenario in found:
            methods = methods_of(args, target, scenario)
            rows.append(summary(scenario, measure(methods, scenario.prompts, args.repeats, progress=bar.update)))
    title = harness.heading(args, harness.label(args.model), f"{len(prompts)} prompts", "batch 1", args.dtype)
    harness.report(args, "budget", title, table(rows), rows, plot)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)
