"""How many tokens a pass yields in real decoding, by proposer and tree: `python -m medhead_training.evaluate`."""

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
from medhead.cli.common import Parser, guarded
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.heads.adapter import adapts_target, heads_of, load_adapted
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.target import Target
from medhead.proposers import PROPOSERS, Proposer, build_proposer
from medhead.proposers.static_tree import best_static_tree
from medhead_training.trainer.report import evaluation_table, plot_evaluation

EXAMPLES = """\
examples:
  python -m medhead_training.evaluate                                       demo model, its own heads, built-in prompts
  python -m medhead_training.evaluate --model my/model --heads my/heads --prompts held_out.jsonl --output results
  python -m medhead_training.evaluate --model my/model --heads a b --nodes 8 16 32 64 --static --temperatures 0

Accepted length (tokens per pass, 1 is plain decoding) does not depend on the machine in float32; milliseconds do. How much faster
it is in the end, `python -m medhead.bench` measures.
"""
WARM_UP = 4  # tokens


@dataclass
class Way:
    """One way to decode, and what came of it.

    Attributes:
        name: of the proposer, or of the heads.
        kind: of the heads; empty without.
        parameters: of the heads.
        nodes: of the tree, root included.
        static: whether the tree is a static one.
        temperature: 0 is greedy.
        decoder: holds target and proposer.
        tokens: emitted for every prompt.
        passes: verify passes of every prompt.
        texts: token ids of every answer.
        steps: passes of batches.
        propose: seconds.
        forward: seconds.
    """

    name: str
    kind: str
    parameters: int
    nodes: int
    static: bool
    temperature: float
    decoder: Decoder
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    steps: int = 0
    propose: float = 0.0
    forward: float = 0.0

    def run(self, prompts: list[list[int]], batch: int, new_tokens: int, seed: int) -> Iterator[int]:
        """Answer all prompts, `batch` at a time; yields how many are done."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0, "seed": seed}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        decoder, device = self.decoder, self.decoder.target.device
        decoder.on_pass = None
        ids, mask = padded(prompts[:1], device)
        decoder.generate(ids, attention_mask=mask, max_new_tokens=WARM_UP, **options)
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            ids, mask = padded(part, device)
            passes = [0] * len(part)
            texts: list[list[int]] = [[] for _ in part]

            def count(row: Any, new: list[int], passes: list[int] = passes, texts: list[list[int]] = texts) -> None:
                passes[row.index] += 1
                texts[row.index] += new

            decoder.on_pass = count
            decoder.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
            self.tokens += map(len, texts)
            self.passes += passes
            self.texts += texts
            found = decoder.statistics
            self.steps += found.steps
            self.propose += found.times.propose
            self.forward += found.times.forward
            yield len(part)

    def summary(self, reference: Way) -> dict[str, Any]:
        """Numbers for table and JSON.

        Args:
            reference: the way whose texts these are compared with.
        """
        by_prompt = [tokens / passes for tokens, passes in zip(self.tokens, self.passes, strict=True)]
        same = sum(mine == other for mine, other in zip(self.texts, reference.texts, strict=True))
        return {
            "name": self.name,
            "kind": self.kind,
            "parameters": self.parameters,
            "nodes": self.nodes,
            "static": self.static,
            "temperature": self.temperature,
            "prompts": len(self.tokens),
            "new_tokens": sum(self.tokens),
            "passes": sum(self.passes),
            "tokens_per_pass": round(sum(self.tokens) / sum(self.passes), 4),
            "mean_over_prompts": round(sum(by_prompt) / len(by_prompt), 4),
            "by_prompt": [round(length, 3) for length in by_prompt],
            "propose_ms": round(1000 * self.propose / self.steps, 4),
            "forward_ms": round(1000 * self.forward / self.steps, 4),
            "identical": same,
        }


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead_training.evaluate",
        description="How many tokens does a pass yield? Heads and other proposers, by size of the tree, in real decoding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted(PROPOSERS.keys() - {"heads"})
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument("--heads", nargs="+", metavar="FOLDER", help="heads (demo model: its own)")
    options.add_argument("--proposers", nargs="*", choices=names, default=["none", "ngram", "recycling"],
                         metavar="NAME", help="further proposers; hybrid with all heads too (none ngram recycling)")  # fmt: skip
    options.add_argument(
        "--prompts", help="JSON lines with messages, prompt, question, turns or text (default: built-in)"
    )
    options.add_argument("--count", type=int, default=24, help="prompts taken (default: 24)")
    options.add_argument("--new-tokens", type=int, default=200, help="most tokens of an answer (default: 200)")
    options.add_argument(
        "--nodes", type=int, nargs="+", default=[16, 32, 64], help="sizes of trees (default: 16 32 64)"
    )
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="(default: 0 1)")
    options.add_argument("--batch", type=int, default=1, help="prompts decoded together (default: 1)")
    options.add_argument("--max-depth", type=int, help="deepest tree of the heads (default: what they say)")
    options.add_argument("--width", type=int, help="nodes of a frontier of the heads' trees (default: what they say)")
    options.add_argument(
        "--branching", type=int, help="children that heads name of every frontier node (default: what they say)"
    )
    options.add_argument("--static", action="store_true", help="static trees of the heads as well")
    options.add_argument("--seed", type=int, default=0, help="of the sampling")
    options.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    options.add_argument(
        "--dtype", default="auto", help="type of the target (default: float32 on a CPU, else bfloat16)"
    )
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and accepted.png")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be.

    Raises:
        MedheadError: names the option.
    """
    for name in ("count", "new_tokens", "batch", "max_depth", "width", "branching"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MedheadError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not all(2 <= nodes <= 256 for nodes in args.nodes):
        raise MedheadError(f"--nodes must be from 2 to 256, got {' '.join(map(str, args.nodes))}")
    if not all(0 <= temperature <= 100 for temperature in args.temperatures):
        raise MedheadError(f"--temperatures must be from 0 to 100, got {' '.join(map(str, args.temperatures))}")
    if not 0 <= args.seed < 2**64:
        raise MedheadError(f"--seed must be from 0 to 2**64 - 1, got {args.seed}")
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")


def heads_by_target(args: argparse.Namespace, target: Target) -> Iterator[tuple[str, Heads, Target]]:
    """Name, heads and target of every heads folder. Heads that come with an adapter have a target of their own.

    Raises:
        MedheadError: heads that were asked for cannot be loaded; of the demo model's own, one line is said.
    """
    asked = args.heads is not None
    folders = args.heads if asked else [] if args.model else sorted(DEMO_HEADS.parent.glob("heads*"))
    for folder in folders:
        try:
            if adapts_target(folder):
                name = args.model or DEMO_MODEL
                model = load_model(name, target.device, target.dtype, args.trust_remote_code)
                adapted = load_adapted(model, folder)
                yield str(folder), heads_of(adapted), Target(adapted)
            else:
                yield str(folder), load_heads(folder, target), target
        except MedheadError as error:
            if asked:
                raise
            _say(f"left out: {error}")


def static_shape(heads: Heads, nodes: int, max_depth: int | None) -> list[list[int]] | None:
    """The static tree that the heads bring, else the one that follows from their accuracies; None if they have neither."""
    config = heads.config
    tree = config.trees.get(str(nodes))
    if tree is None and config.accuracies:
        tree = best_static_tree(config.accuracies[:max_depth], nodes)
    return None if tree is None else [path for path in tree if max_depth is None or len(path) <= max_depth]


def ways_of(args: argparse.Namespace, target: Target) -> list[list[Way]]:
    """All ways to decode, in groups that must give the same text: one for each target and temperature."""
    made: dict[int, list[tuple[str, str, int, bool, Proposer, Target]]] = {id(target): []}

    def add(name: str, proposer: Proposer, of: Target, heads: Heads | None = None, static: bool = False) -> None:
        parameters = 0 if heads is None else sum(p.numel() for p in heads.parameters())
        kind = "" if heads is None else heads.config.kind
        made.setdefault(id(of), []).append((name, kind, parameters, static, proposer, of))

    for name in args.proposers:
        for nodes in args.nodes if name != "none" else [None]:
            add(name, build_proposer(name, target, tree_size=nodes), target)
    for name, heads, of in heads_by_target(args, target):
        dtype = None  # the faster one is measured once
        for nodes in args.nodes:
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
                _say(f"no static tree of {nodes} nodes for {name}: its configuration holds no accuracies")
    return [
        [Way(name, kind, parameters, proposer.tree_size, static, temperature, Decoder(of, proposer))
         for name, kind, parameters, static, proposer, of in ways]
        for temperature in args.temperatures for ways in made.values() if ways
    ]  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    check_options(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    name = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    chats = read_prompts(args.prompts, args.count)
    target = Target(load_model(name, device, dtype, args.trust_remote_code))
    longest = target.context - args.new_tokens
    if longest < 1:
        raise MedheadError(
            f"--new-tokens {args.new_tokens} leaves no room for a prompt in the model's {target.context}"
        )
    prompts = encode_prompts(tokenizer, chats, longest)
    groups = ways_of(args, target)
    if not groups:
        raise MedheadError("there is nothing to evaluate: give --heads or --proposers")
    rows: list[dict[str, Any]] = []
    wait = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=len(prompts) * sum(map(len, groups)), unit="answer", mininterval=wait, leave=False) as bar:
        for ways in groups:
            for way in ways:
                bar.set_postfix_str(f"{Path(way.name).name}, {way.nodes} nodes, T={way.temperature:g}", refresh=False)
                for done in way.run(prompts, args.batch, args.new_tokens, args.seed):
                    bar.update(done)
                rows.append(way.summary(ways[0]))
    where = machine()
    place = where["gpu"] if device.type == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    kind = str(dtype).removeprefix("torch.")
    heading = (
        f"{label(args.model)}, {len(prompts)} prompts, at most {args.new_tokens} tokens, {kind}, "
        f"batch {args.batch}, {place}, {where['date']}"
    )
    text = evaluation_table(rows)
    print(f"{heading}\n\n{text}")
    if args.output is not None:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        write(args.output, heading, text, {"machine": where, "dtype": kind, "options": options, "results": rows})


def write(folder: Path, heading: str, text: str, content: dict[str, Any]) -> None:
    """Write results.json, table.md and accepted.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(f"{heading}\n\n{text}\n", encoding="utf-8")
    files = ["results.json", "table.md"]
    if plot_evaluation(folder / "accepted.png", content["results"], heading):
        files.append("accepted.png")
    _say(f"wrote {folder}/{', '.join(files)}")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.evaluate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
