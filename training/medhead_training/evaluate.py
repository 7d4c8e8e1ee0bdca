"""`medhead evaluate`: accepted length in real decoding, by proposer and tree size."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medhead.bench.prompts import encode_prompts, padded, read_prompts
from medhead.bench.report import label, machine
from medhead.cli.common import Parser, add_device_options, check_range, run_command
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.heads.adapter import adapts_target, heads_of, load_adapted
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.target import Target
from medhead.proposers import PROPOSERS, Proposer, build_proposer
from medhead.proposers.static_tree import best_static_tree
from medhead_training.trainer.report import import_pyplot

EXAMPLES = """\
examples:
  medhead evaluate                               the demo model, its heads, built-in prompts
  medhead evaluate --model my/model --heads my/heads --prompts held_out.jsonl --output results
  medhead evaluate --model my/model --heads a b --tree-sizes 8 16 32 64 --static --temperatures 0

The accepted length (tokens emitted per verify pass, 1 is plain decoding) does not depend on the machine in float32;
milliseconds do. `medhead bench` measures tokens per second.
"""
WARM_UP_TOKENS = 4


@dataclass
class Evaluation:
    """One proposer at one tree size and temperature, and its results.

    Attributes:
        name: of the proposer, or folder of the heads.
        kind: of the heads; empty without heads.
        parameters: of the heads.
        static: whether the tree is a static one.
        temperature: 0 is greedy decoding.
        decoder: holds target and proposer.
        passes: verify passes of every prompt.
        answers: token ids of every answer.
        steps: steps of all batches.
        propose: seconds in all steps.
        forward: seconds in all steps.
    """

    name: str
    kind: str
    parameters: int
    static: bool
    temperature: float
    decoder: Decoder
    passes: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    steps: int = 0
    propose: float = 0.0
    forward: float = 0.0

    @property
    def tree_size(self) -> int:
        """Nodes of the tree, root included."""
        return self.decoder.proposer.tree_size

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        name = f"{Path(self.name).name} ({self.kind})" if self.kind else self.name
        return f"{name}, static" if self.static else name

    def run(self, prompts: list[list[int]], batch_size: int, max_new_tokens: int, seed: int) -> Iterator[int]:
        """Answer all prompts in batches; yield the size of every batch when it is done."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0, "seed": seed}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        decoder, device = self.decoder, self.decoder.target.device
        decoder.on_pass = None
        ids, mask = padded(prompts[:1], device)
        decoder.generate(ids, attention_mask=mask, max_new_tokens=WARM_UP_TOKENS, **options)
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            self.passes += [0] * len(part)
            self.answers += [[] for _ in part]

            def count(sequence: Any, new_tokens: list[int], start: int = start) -> None:
                self.passes[start + sequence.index] += 1
                self.answers[start + sequence.index] += new_tokens

            decoder.on_pass = count
            ids, mask = padded(part, device)
            decoder.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)
            statistics = decoder.statistics
            self.steps += statistics.steps
            self.propose += statistics.times.propose
            self.forward += statistics.times.forward
            yield len(part)

    def results(self, reference: Evaluation) -> dict[str, Any]:
        """Return the numbers for table and JSON; `identical` counts the answers equal to those of `reference`."""
        tokens = [len(answer) for answer in self.answers]
        lengths = [count / passes for count, passes in zip(tokens, self.passes, strict=True)]
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            "parameters": self.parameters,
            "tree_size": self.tree_size,
            "static": self.static,
            "temperature": self.temperature,
            "prompts": len(tokens),
            "new_tokens": sum(tokens),
            "passes": sum(self.passes),
            "accepted_length": round(sum(tokens) / sum(self.passes), 4),
            "mean_over_prompts": round(sum(lengths) / len(lengths), 4),
            "by_prompt": [round(length, 3) for length in lengths],
            "propose_ms": round(1000 * self.propose / self.steps, 4),
            "forward_ms": round(1000 * self.forward / self.steps, 4),
            "identical": sum(a == b for a, b in zip(self.answers, reference.answers, strict=True)),
        }


def parser() -> Parser:
    """Return the command's parser."""
    options = Parser(
        prog="medhead evaluate",
        description="Measure the accepted length of heads and other proposers in real decoding, by tree size.",
        epilog=EXAMPLES,
    )
    names = sorted(PROPOSERS.keys() - {"heads"})
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument(
        "--heads", nargs="+", metavar="FOLDER", help="heads (default: the demo heads with the demo model)"
    )
    options.add_argument("--proposers", nargs="*", choices=names, default=["none", "ngram", "recycling"],
                         metavar="NAME", help="other proposers; hybrid is run with all heads (default: none ngram recycling)")  # fmt: skip
    options.add_argument(
        "--prompts", help="JSON lines with messages, prompt, question, turns or text (default: built-in prompts)"
    )
    options.add_argument("--num-prompts", type=int, default=24, help="prompts used (default: 24)")
    options.add_argument("--max-new-tokens", type=int, default=200, help="maximum tokens of an answer (default: 200)")
    options.add_argument(
        "--tree-sizes", type=int, nargs="+", default=[16, 32, 64], help="nodes of the trees (default: 16 32 64)"
    )
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0],
                         help="0 is greedy decoding (default: 0 1)")  # fmt: skip
    options.add_argument("--batch-size", type=int, default=1, help="prompts decoded together (default: 1)")
    options.add_argument("--max-depth", type=int, help="maximum depth of the heads' trees (default: the heads')")
    options.add_argument("--width", type=int, help="nodes per level that are expanded (default: the heads')")
    options.add_argument("--branching", type=int, help="children drafted for each such node (default: the heads')")
    options.add_argument("--static", action="store_true", help="evaluate static trees of the heads too")
    options.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and accepted_length.png")
    add_device_options(options)
    return options


def check_options(args: argparse.Namespace) -> None:
    """Raise a `MedheadError` that names the first option whose value is not allowed."""
    for name in ("num_prompts", "max_new_tokens", "batch_size", "max_depth", "width", "branching"):
        check_range(args, name, 1)
    check_range(args, "tree_sizes", 2, 256)
    check_range(args, "temperatures", 0, 100)
    check_range(args, "seed", 0, 2**64 - 1, "from 0 to 2**64 - 1")
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")


def load_all_heads(args: argparse.Namespace, target: Target) -> Iterator[tuple[str, Heads, Target]]:
    """Yield name, heads and target of every heads folder; heads with an adapter come with a target of their own.

    Raises:
        MedheadError: heads named by --heads cannot be loaded; demo heads that cannot are left out with one line.
    """
    folders = args.heads or ([] if args.model else sorted(DEMO_HEADS.parent.glob("heads*")))
    for folder in folders:
        try:
            if adapts_target(folder):
                model = load_model(args.model or DEMO_MODEL, target.device, target.dtype, args.trust_remote_code)
                adapted = load_adapted(model, folder)
                yield str(folder), heads_of(adapted), Target(adapted)
            else:
                yield str(folder), load_heads(folder, target), target
        except MedheadError as error:
            if args.heads:
                raise
            _log(f"left out: {error}")


def static_shape(heads: Heads, nodes: int, max_depth: int | None) -> list[list[int]] | None:
    """Return the heads' stored static tree, else one made of their accuracies; None if they have neither."""
    config = heads.config
    tree = config.trees.get(str(nodes))
    if tree is None and config.accuracies:
        tree = best_static_tree(config.accuracies[:max_depth], nodes)
    return None if tree is None else [path for path in tree if max_depth is None or len(path) <= max_depth]


def build_evaluations(args: argparse.Namespace, target: Target) -> list[list[Evaluation]]:
    """Return all evaluations, in groups of one target and temperature, whose answers must be identical."""
    made: dict[int, list[tuple[str, str, int, bool, Proposer, Target]]] = {id(target): []}

    def add(name: str, proposer: Proposer, of: Target, heads: Heads | None = None, static: bool = False) -> None:
        parameters = 0 if heads is None else sum(p.numel() for p in heads.parameters())
        kind = "" if heads is None else heads.config.kind
        made.setdefault(id(of), []).append((name, kind, parameters, static, proposer, of))

    for name in args.proposers:
        for nodes in args.tree_sizes if name != "none" else [None]:
            add(name, build_proposer(name, target, tree_size=nodes), target)
    for name, heads, of in load_all_heads(args, target):
        dtype = None  # the faster one is measured once
        for nodes in args.tree_sizes:
            size = {"tree_size": nodes, "width": args.width, "branching": args.branching}
            dynamic = build_proposer("heads", of, heads=heads, max_depth=args.max_depth, dtype=dtype, **size)
            dtype = dynamic.output_head.dtype  # type: ignore[attr-defined]
            add(name, dynamic, of, heads)
            if "hybrid" in args.proposers:
                add(f"{name} in a hybrid", build_proposer("hybrid", of, heads=heads, **size), of, heads)
            shape = static_shape(heads, nodes, args.max_depth) if args.static else None
            if shape:
                add(name, build_proposer("heads", of, heads=heads, shape=shape, dtype=dtype), of, heads, static=True)
            elif args.static:
                _log(f"no static tree of {nodes} nodes for {name}: its configuration holds no accuracies")
    return [
        [Evaluation(name, kind, parameters, static, temperature, Decoder(of, proposer))
         for name, kind, parameters, static, proposer, of in group]
        for temperature in args.temperatures for group in made.values() if group
    ]  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_options(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    name = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    chats = read_prompts(args.prompts, args.num_prompts)
    target = Target(load_model(name, device, dtype, args.trust_remote_code))
    room = target.context - args.max_new_tokens
    if room < 1:
        raise MedheadError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{target.context} tokens; lower it"
        )
    prompts = encode_prompts(tokenizer, chats, room)
    groups = build_evaluations(args, target)
    if not groups:
        raise MedheadError("there is nothing to evaluate: give --heads or --proposers")
    rows: list[dict[str, Any]] = []
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=len(prompts) * sum(map(len, groups)), unit="answer", mininterval=interval, leave=False) as bar:
        for group in groups:
            for one in group:
                bar.set_postfix_str(f"{one.label}, {one.tree_size} nodes, T={one.temperature:g}", refresh=False)
                for done in one.run(prompts, args.batch_size, args.max_new_tokens, args.seed):
                    bar.update(done)
                rows.append(one.results(group[0]))
    where, dtype_name = machine(), str(dtype).removeprefix("torch.")
    place = where["gpu"] if device.type == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    title = (
        f"{label(args.model)}, {len(prompts)} prompts, at most {args.max_new_tokens} tokens, {dtype_name}, "
        f"batch size {args.batch_size}, {place}, {where['date']}"
    )
    text = f"{title}\n\n{results_table(rows)}"
    print(text)
    if args.output is not None:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        content = {"machine": where, "dtype": dtype_name, "options": options, "results": rows}
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (args.output / "table.md").write_text(text + "\n", encoding="utf-8")
        plotted = plot_results(args.output / "accepted_length.png", rows, title)
        _log(f"wrote {args.output}/results.json, table.md{', accepted_length.png' if plotted else ''}")


def results_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results."""
    lines = [
        "| proposer | parameters | nodes | temperature | accepted length | mean over prompts | propose ms | forward ms | same text |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        lines.append(
            f"| {row['label']} | {parameters} | {row['tree_size']} | {row['temperature']:g} "
            f"| {row['accepted_length']:.2f} | {row['mean_over_prompts']:.2f} | {row['propose_ms']:.2f} "
            f"| {row['forward_ms']:.2f} | {row['identical']}/{row['prompts']} |"
        )
    lines += ["", "Same text: as the first proposer of the same target and temperature. Milliseconds are per step."]
    return "\n".join(lines)


def plot_results(path: Path, rows: list[dict[str, Any]], title: str) -> bool:
    """Plot accepted length by tree size, one panel per temperature; return whether there is a picture."""
    plt = import_pyplot()
    if plt is None:
        return False
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(6 * len(temperatures), 4.2), squeeze=False, sharey=True
    )
    for axes, temperature in zip(panels[0], temperatures, strict=True):
        here = [row for row in rows if row["temperature"] == temperature and row["tree_size"] > 1]
        lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in here:
            lines.setdefault((row["name"], row["label"]), []).append(row)
        for (_, name), points in lines.items():
            style = "s--" if points[0]["static"] else "o-" if points[0]["kind"] else "^:"
            points.sort(key=lambda row: row["tree_size"])
            axes.plot([p["tree_size"] for p in points], [p["accepted_length"] for p in points], style, label=name)
        axes.set(xlabel="nodes of the tree", title=f"temperature {temperature:g}" if temperature else "greedy")
        axes.set_ylim(bottom=1)
        axes.set_xticks(sorted({row["tree_size"] for row in here}))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("accepted length")
    if any(row["tree_size"] > 1 for row in rows):
        panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _log(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
