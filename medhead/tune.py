"""Find the tree that decodes fastest here, and keep it with the heads: `python -m medhead.tune --heads FOLDER`.

Measures what a pass costs by number of nodes (kept in the user's cache, where every later generation finds it); with heads
also which size, width, branching and depth of the tree give most tokens a second on real prompts, one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medhead.bench.command import Progress
from medhead.bench.contestants import Contestant
from medhead.bench.measure import measure
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.costs import PassCosts, measure_costs, store_costs
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.generate import Parser, guarded
from medhead.heads import Heads, load_heads
from medhead.heads.config import CONFIG_FILE
from medhead.load import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.target import Target

EXAMPLES = """\
examples:
  python -m medhead.tune --model my/model --heads my/heads --prompts mine.jsonl
  python -m medhead.tune --model my/model --batch 1 4 16              # only the costs of a pass
  python -m medhead.tune --dry-run                                    # demo model; nothing is written
"""
SIZES = (4, 6, 8, 12, 16, 24, 32, 48)
FRONTIERS = ((1, 2), (2, 3), (4, 4), (8, 8))  # width and branching


@dataclass(frozen=True)
class Tree:
    """How trees are grown; names as in `HeadsConfig`."""

    tree_size: int
    tree_width: int
    tree_branching: int
    tree_depth: int

    def options(self) -> dict[str, Any]:
        """For `HeadsProposer`."""
        names = ("tree_size", "width", "branching", "max_depth")
        return dict(zip(names, (self.tree_size, self.tree_width, self.tree_branching, self.tree_depth), strict=True))

    def __str__(self) -> str:
        return (
            f"{self.tree_size} nodes, width {self.tree_width}, branching {self.tree_branching}, depth {self.tree_depth}"
        )


def neighbours(tree: Tree, deepest: int) -> Iterator[list[Callable[[Tree], Tree]]]:
    """What is tried, one dimension after the other: changes to the best tree so far."""
    yield [lambda t, n=n: replace(t, tree_size=n) for n in SIZES]  # type: ignore[misc]
    yield [lambda t, w=w, b=b: replace(t, tree_width=w, tree_branching=b) for w, b in FRONTIERS]  # type: ignore[misc]
    depths = sorted({d for d in (3, 4, 6, 8, 12, deepest) if d <= deepest})
    yield [lambda t, d=d: replace(t, tree_depth=d) for d in depths]  # type: ignore[misc]


def search(start: Tree, deepest: int, rate: Callable[[list[Tree]], list[float]], say: Callable[[str], None]) -> Tree:
    """The fastest tree by coordinates.

    Args:
        start: where to begin.
        deepest: depth of the heads.
        rate: tokens a second of several trees, measured side by side.
        say: told every result.
    """
    best = start
    for changes in neighbours(start, deepest):
        trees = list(dict.fromkeys([best, *(change(best) for change in changes)]))
        rates = rate(trees)
        for tree, value in zip(trees, rates, strict=True):
            say(f"  {tree}: {value:.1f} tokens/s")
        best = trees[max(range(len(trees)), key=lambda place: rates[place])]
    return best


def rates_of(target: Target, heads: Heads, prompts: list[Tensor], new_tokens: int, repeats: int) -> Callable[..., Any]:
    """A function that measures trees, interleaved, greedily."""

    def rate(trees: list[Tree]) -> list[float]:
        runners = []
        for tree in trees:
            decoder = Decoder(target, "heads", heads=heads, **tree.options())

            def run(ids: Tensor, decoder: Decoder = decoder) -> Tensor:
                return decoder.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
                )

            runners.append(Contestant(str(tree), "", run, lambda decoder=decoder: decoder.statistics, tree.tree_size))  # type: ignore[misc]
        progress = Progress(len(runners) * len(prompts) * repeats)
        return [found.rate for found in measure(runners, {"": runners[0]}, prompts, repeats, progress)]

    return rate


def keep(folder: Path, tree: Tree) -> None:
    """Write the tree into the heads' configuration."""
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {name: getattr(tree, name) for name in ("tree_size", "tree_width", "tree_branching", "tree_depth")}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def cost_table(costs: PassCosts) -> str:
    """Milliseconds of a pass by number of nodes, and against one node."""
    return ", ".join(f"{n}: {1000 * costs(n):.2f} ms ({costs(n) / costs(1):.2f}x)" for n in costs.nodes)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.tune",
        description="Measure what passes cost on this machine, and find the tree that decodes fastest with some heads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument("--heads", help="heads folder; the tree is written into its configuration")
    options.add_argument("--prompts", help="JSON lines as for medhead.bench (default: built-in)")
    options.add_argument("--count", type=int, default=4, help="prompts taken (default: 4)")
    options.add_argument("--new-tokens", type=int, default=128, help="most tokens of an answer (default: 128)")
    options.add_argument("--repeats", type=int, default=2, help="runs of each prompt (default: 2)")
    options.add_argument("--batch", type=int, nargs="+", default=[1], help="rows to measure passes for (default: 1)")
    options.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    options.add_argument("--dtype", default="auto", help="type of the model (default: as stored; float32 on a CPU)")
    options.add_argument("--dry-run", action="store_true", help="measure and say, write nothing")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    for option in ("count", "new_tokens", "repeats"):
        if getattr(args, option) < 1:
            raise MedheadError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    if min(args.batch) < 1:
        raise MedheadError(f"--batch must be at least 1, got {min(args.batch)}")
    device = pick_device(args.device)
    name: Any = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    model = load_model(name, device, pick_dtype(args.dtype, device), args.trust_remote_code)
    target = Target(model)
    for batch in args.batch:
        with torch.inference_mode(), target.active():
            costs = measure_costs(target, batch)
        print(f"a pass over {batch} row{'s' * (batch > 1)}, by nodes: {cost_table(costs)}")
        if not args.dry_run:
            store_costs(target, batch, costs)
    folder = args.heads or (None if args.model else DEMO_HEADS)
    if folder is None:
        return
    heads = load_heads(folder, target)
    chats = read_prompts(args.prompts, args.count)
    rows = encode_prompts(tokenizer, chats, max(1, target.context - args.new_tokens))
    prompts = [torch.tensor([ids], device=device) for ids in rows]
    config = heads.config
    start = Tree(config.tree_size, config.tree_width, config.tree_branching, config.tree_depth or config.depth)
    best = search(start, config.depth, rates_of(target, heads, prompts, args.new_tokens, args.repeats), print)
    print(f"fastest: {best}")
    if args.dry_run:
        return
    if not (Path(folder) / CONFIG_FILE).is_file():
        print(
            f"not written: {str(folder)!r} is in another project's layout and holds no {CONFIG_FILE}", file=sys.stderr
        )
        return
    keep(Path(folder), best)
    print(f"written into {Path(folder) / CONFIG_FILE}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.tune", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
