"""Find what decodes fastest here: `python -m medhead.tune --heads FOLDER`, `python -m medhead.tune --proposer lookahead`.

Measures what a pass costs by number of nodes; with heads also which size, width, branching and depth of the tree give most
tokens a second on real prompts, and for lookahead decoding which W, N and G do. Costs and W, N, G are kept in the user's
cache, where every later generation finds them; trees are kept with the heads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.generate import Parser, guarded
from medhead.heads import load_heads
from medhead.heads.config import CONFIG_FILE
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.target import Target
from medhead.proposers.lookahead_sizes import DEFAULTS, Sizes, store_sizes, tuned_sizes
from medhead.scheduling.cost_model import CostModel, costs_batch, measure_costs, store_costs
from medhead.tune import trees, windows
from medhead.tune.search import measured, search
from medhead.tune.trees import Tree

EXAMPLES = """\
examples:
  python -m medhead.tune --model my/model --heads my/heads --prompts mine.jsonl
  python -m medhead.tune --model my/model --proposer lookahead        # its W, N and G; later generations find them
  python -m medhead.tune --model my/model --batch 1 4 16              # only the costs of a pass
  python -m medhead.tune --dry-run                                    # demo model; nothing is written
"""


def cost_table(costs: CostModel) -> str:
    """Milliseconds of a pass by number of nodes, and against one node."""
    return ", ".join(f"{n}: {1000 * costs(n):.2f} ms ({costs(n) / costs(1):.2f}x)" for n in costs.nodes)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.tune",
        description="Measure what passes cost on this machine, and find the tree that decodes fastest with some heads, "
        "or the sizes of lookahead decoding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument("--heads", help="heads folder; the tree is written into its configuration")
    options.add_argument(
        "--proposer",
        choices=["heads", "lookahead"],
        help="what to tune (default: heads where there are some, else costs alone)",
    )
    options.add_argument("--prompts", help="JSON lines as for medhead.bench (default: built-in)")
    options.add_argument("--count", type=int, default=4, help="prompts taken (default: 4)")
    options.add_argument("--new-tokens", type=int, default=128, help="most tokens of an answer (default: 128)")
    options.add_argument("--repeats", type=int, default=2, help="runs of each prompt (default: 2)")
    options.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        help="rows to measure passes for, up to the next power of two (default: 1)",
    )
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
    if args.proposer == "heads" and args.model and not args.heads:
        raise MedheadError("--proposer heads needs --heads FOLDER")
    if args.proposer == "lookahead" and args.heads:
        raise MedheadError("--heads goes with --proposer heads; lookahead has none")
    if min(args.batch) < 1:
        raise MedheadError(f"--batch must be at least 1, got {min(args.batch)}")
    device = pick_device(args.device)
    name: Any = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    model = load_model(name, device, pick_dtype(args.dtype, device), args.trust_remote_code)
    target = Target(model)
    for batch in sorted({costs_batch(rows) for rows in args.batch}):
        with torch.inference_mode(), target.active():
            costs = measure_costs(target, batch)
        print(f"a pass over {batch} row{'s' * (batch > 1)}, by nodes: {cost_table(costs)}")
        if not args.dry_run:
            store_costs(target, batch, costs)
    folder = args.heads or (None if args.model else DEMO_HEADS)
    if args.proposer == "lookahead":
        tune_lookahead(target, _prompts(args, tokenizer, target), args)
    elif folder is not None:
        tune_heads(target, folder, _prompts(args, tokenizer, target), args)


def _prompts(args: argparse.Namespace, tokenizer: Any, target: Target) -> list[list[int]]:
    chats = read_prompts(args.prompts, args.count)
    return encode_prompts(tokenizer, chats, max(1, target.context - args.new_tokens))


def tune_heads(target: Target, folder: str | Path, prompts: list[list[int]], args: argparse.Namespace) -> None:
    """Find the tree, and write it into the heads' configuration."""
    heads = load_heads(folder, target)
    config = heads.config
    start = Tree(config.tree_size, config.tree_width, config.tree_branching, config.tree_depth or config.depth)

    def make(tree: Tree) -> Decoder:
        return Decoder(target, "heads", heads=heads, **tree.options())

    rate = measured(make, prompts, args.new_tokens, args.repeats)
    best = search(start, trees.neighbours(config.depth), rate, print)
    print(f"fastest: {best}")
    if args.dry_run:
        return
    if not (Path(folder) / CONFIG_FILE).is_file():
        print(
            f"not written: {str(folder)!r} is in another project's layout and holds no {CONFIG_FILE}", file=sys.stderr
        )
        return
    trees.keep(Path(folder), best)
    print(f"written into {Path(folder) / CONFIG_FILE}")


def tune_lookahead(target: Target, prompts: list[list[int]], args: argparse.Namespace) -> None:
    """Find W, N and G, and keep them in the user's cache."""

    def make(sizes: Sizes) -> Decoder:
        return Decoder(target, "lookahead", **sizes._asdict())

    rate = measured(make, prompts, args.new_tokens, args.repeats)
    best = search(tuned_sizes(target) or DEFAULTS, windows.neighbours(), rate, print)
    print(f"fastest: {best}")
    if args.dry_run:
        return
    file = store_sizes(target, best)
    print(f"written into {file}" if file else "not written: the cache folder cannot be written")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.tune", lambda: run(args))
