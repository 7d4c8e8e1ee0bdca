"""`medhead evaluate`: accepted length in real decoding, by proposer and tree size."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medhead.bench import harness
from medhead.bench.measure import Method, MethodResult, measure
from medhead.cli.common import Parser, run_command
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.heads.adapter import adapts_target, heads_of, load_adapted
from medhead.model.loading import load_model
from medhead.model.named_models import shipped_heads
from medhead.model.target import Target
from medhead.proposers import PROPOSERS, Proposer, build_proposer
from medhead.proposers.static_tree import best_static_tree

EXAMPLES = """\
examples:
  medhead evaluate                               the demo model, its heads, built-in prompts
  medhead evaluate --model my/model --heads my/heads --prompts held_out.jsonl --output results
  medhead evaluate --model my/model --heads a b --tree-sizes 8 16 32 64 --static --temperatures 0

The accepted length (tokens emitted per verify pass, 1 is plain decoding) does not depend on the machine in float32;
milliseconds do. `medhead bench` measures tokens per second.
"""
PROFILED_BATCHES = 2  # answered once more to time the parts of a step


@dataclass
class Candidate:
    """A proposer to evaluate."""

    name: str  # of the proposer, or folder of its heads
    proposer: Proposer
    target: Target
    heads: Heads | None = None
    static: bool = False  # whether its tree is a static one

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        name = self.name if self.heads is None else f"{Path(self.name).name} ({self.heads.config.kind})"
        return f"{name}, static" if self.static else name

    def results(self, temperature: float, found: MethodResult) -> dict[str, Any]:
        """Return the numbers for table and JSON."""
        lengths = [tokens / passes for tokens, passes in zip(found.new_tokens, found.passes, strict=True)]
        milliseconds = found.parts_ms()
        return {
            "name": self.name, "label": self.label,
            "kind": "" if self.heads is None else self.heads.config.kind,
            "parameters": 0 if self.heads is None else sum(p.numel() for p in self.heads.parameters()),
            "tree_size": self.proposer.tree_size, "static": self.static, "temperature": temperature,
            "prompts": len(lengths), "new_tokens": sum(found.new_tokens), "passes": sum(found.passes),
            "accepted_length": round(sum(found.new_tokens) / sum(found.passes), 4),
            "mean_over_prompts": round(sum(lengths) / len(lengths), 4),
            "accepted_length_by_prompt": [round(length, 3) for length in lengths],
            "propose_ms": round(milliseconds["propose"], 4), "forward_ms": round(milliseconds["forward"], 4),
            "identical": len(lengths) - found.mismatches,
        }  # fmt: skip


def parser() -> Parser:
    """Return the command's parser."""
    description = "Measure the accepted length of heads and other proposers in real decoding, by tree size."
    options = Parser(prog="medhead evaluate", description=description, epilog=EXAMPLES)
    names = sorted(PROPOSERS.keys() - {"heads"})
    harness.add_decoding_options(options, max_new_tokens=200, num_prompts=24)
    add = options.add_argument
    add("--heads", nargs="+", metavar="FOLDER", help="heads (default: the demo heads with the demo model)")
    add("--proposers", nargs="*", choices=names, default=["none", "ngram", "recycling"], metavar="NAME",
        help="other proposers; hybrid is run with all heads (default: none ngram recycling)")  # fmt: skip
    add("--tree-sizes", type=int, nargs="+", default=[16, 32, 64], help="nodes of the trees (default: 16 32 64)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="0 is greedy decoding (default: 0 1)")
    add("--batch-size", type=int, default=1, help="prompts decoded together (default: 1)")
    add("--max-depth", type=int, help="maximum depth of the heads' trees (default: the heads')")
    add("--width", type=int, help="nodes per level that are expanded (default: the heads')")
    add("--branching", type=int, help="children drafted for each such node (default: the heads')")
    add("--static", action="store_true", help="evaluate static trees of the heads too")
    add("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    add("--output", type=Path, help="folder for results.json, table.md and accepted_length.png")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", default="auto", help="dtype of the target (default: float32 on a CPU, else bfloat16)")
    options.set_defaults(title="")
    return options


def load_all_heads(args: argparse.Namespace, target: Target) -> Iterator[tuple[str, Heads, Target]]:
    """Yield name, heads and target of every heads folder; heads with an adapter come with a target of their own."""
    folders = args.heads or shipped_heads(args.model)
    for folder in folders:
        try:
            if adapts_target(folder):
                model = load_model(args.model, target.device, target.dtype, args.trust_remote_code, args.weights)
                harness.prepare_texts(args, model)
                adapted = load_adapted(model, folder)
                yield str(folder), heads_of(adapted), Target(adapted)
            else:
                yield str(folder), load_heads(folder, target), target
        except MedheadError as error:
            if args.heads:
                raise
            harness.say(f"left out: {error}")


def static_shape(heads: Heads, nodes: int, max_depth: int | None) -> list[list[int]] | None:
    """Return the heads' stored static tree, else one made of their accuracies; None if they have neither."""
    config = heads.config
    tree = config.trees.get(str(nodes))
    if tree is None and config.accuracies:
        tree = best_static_tree(config.accuracies[:max_depth], nodes)
    return None if tree is None else [path for path in tree if max_depth is None or len(path) <= max_depth]


def build_candidates(args: argparse.Namespace, target: Target) -> Iterator[Candidate]:
    """Yield a candidate for each proposer, heads and tree size."""
    for name in args.proposers:
        for nodes in args.tree_sizes if name != "none" else [None]:
            yield Candidate(name, build_proposer(name, target, tree_size=nodes), target)
    for name, heads, of in load_all_heads(args, target):
        dtype = None  # the faster one is measured once
        for nodes in args.tree_sizes:
            size = {"tree_size": nodes, "width": args.width, "branching": args.branching}
            dynamic = build_proposer("heads", of, heads=heads, max_depth=args.max_depth, dtype=dtype, **size)
            dtype = dynamic.output_head.dtype  # type: ignore[attr-defined]
            yield Candidate(name, dynamic, of, heads)
            if "hybrid" in args.proposers:
                yield Candidate(f"{name} in a hybrid", build_proposer("hybrid", of, heads=heads, **size), of, heads)
            shape = static_shape(heads, nodes, args.max_depth) if args.static else None
            if shape:
                static = build_proposer("heads", of, heads=heads, shape=shape, dtype=dtype)
                yield Candidate(name, static, of, heads, static=True)
            elif args.static:
                harness.say(f"no static tree of {nodes} nodes for {name}: its configuration holds no accuracies")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    at_least_1 = dict.fromkeys(("batch_size", "max_depth", "width", "branching"), (1, math.inf))
    harness.check_options(args, **at_least_1, tree_sizes=(2, 256), temperatures=(0, 100))
    target = harness.load_target(args, args.dtype)
    prompts = harness.load_prompts(args, target.context)
    groups: dict[int, list[Candidate]] = {}  # by target: all must give the same text
    for candidate in build_candidates(args, target):
        groups.setdefault(id(candidate.target), []).append(candidate)
    if not groups:
        raise MedheadError("there is nothing to evaluate: give --heads or --proposers")
    rows: list[dict[str, Any]] = []
    total = len(prompts) * len(args.temperatures) * sum(map(len, groups.values()))
    with harness.progress_bar(total) as bar:
        for temperature in args.temperatures:
            for group in groups.values():
                arguments = harness.generate_arguments(args, group[0].target.model, temperature)
                methods = [Method(c.label, arguments, Decoder(c.target, c.proposer), seed=args.seed) for c in group]
                given = {"batch_size": args.batch_size, "profile": PROFILED_BATCHES, "progress": bar.update}
                found = measure(methods, prompts, **given)
                rows += [c.results(temperature, result) for c, result in zip(group, found, strict=True)]
    dtype = str(target.dtype).removeprefix("torch.")
    limits = f"at most {args.max_new_tokens} tokens", dtype, f"batch size {args.batch_size}"
    title = harness.heading(args, harness.label(args.model), f"{len(prompts)} prompts", *limits)
    text = results_table(rows)
    print(f"{title}\n\n{text}")
    if args.output is not None:
        content = {"machine": harness.machine(), "dtype": dtype, "options": vars(args), "results": rows}
        draw = partial(plot_results, rows, title)
        harness.say(harness.write_results(args.output, title, text, content, "accepted_length.png", draw))


def results_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results."""
    header = ("proposer", "parameters", "nodes", "temperature", "accepted length", "mean over prompts", "propose ms",
              "forward ms", "same text")  # fmt: skip
    cells = [
        (row["label"], f"{row['parameters']:,}" if row["parameters"] else "-", str(row["tree_size"]),
         f"{row['temperature']:g}", f"{row['accepted_length']:.2f}", f"{row['mean_over_prompts']:.2f}",
         f"{row['propose_ms']:.2f}", f"{row['forward_ms']:.2f}", f"{row['identical']}/{row['prompts']}")
        for row in rows
    ]  # fmt: skip
    note = "Same text: as the first proposer of the same target and temperature. Milliseconds are per step."
    return f"{harness.markdown_table(header, cells)}\n\n{note}"


def plot_results(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot accepted length by tree size, one panel per temperature."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    size = 6.0 * len(temperatures), 4.2
    with harness.figure(path, title, size, columns=len(temperatures), sharey=True) as panels:
        for axes, temperature in zip(panels[0], temperatures, strict=True):
            here = [row for row in rows if row["temperature"] == temperature and row["tree_size"] > 1]
            lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for row in sorted(here, key=lambda row: row["tree_size"]):
                lines.setdefault((row["name"], row["label"]), []).append(row)
            for (_, name), points in lines.items():
                style = "s--" if points[0]["static"] else "o-" if points[0]["kind"] else "^:"
                axes.plot([p["tree_size"] for p in points], [p["accepted_length"] for p in points], style, label=name)
            axes.set(xlabel="nodes of the tree", title=f"temperature {temperature:g}" if temperature else "greedy")
            axes.set_ylim(bottom=1)
            axes.set_xticks(sorted({row["tree_size"] for row in here}))
            axes.grid(alpha=0.25)
        panels[0][0].set_ylabel("accepted length")
        if any(row["tree_size"] > 1 for row in rows):
            panels[0][0].legend(frameon=False, fontsize=8)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
