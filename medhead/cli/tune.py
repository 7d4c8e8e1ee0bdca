"""`medhead tune`: measure what a pass costs here, and find the fastest tree of some heads or sizes of lookahead decoding."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.cli.common import Parser, add_device_options, check_range, run_command
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import load_heads
from medhead.heads.config import CONFIG_FILE
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.target import Target
from medhead.proposers.lookahead_sizes import DEFAULTS, Sizes, store_sizes, tuned_sizes
from medhead.scheduling.cost_model import CostModel, costs_batch, measure_costs, store_costs
from medhead.tune import trees, windows
from medhead.tune.search import Changes, T, coordinate_search, throughput
from medhead.tune.trees import Tree

EXAMPLES = """\
examples:
  medhead tune --model my/model --heads my/heads --prompts mine.jsonl   the fastest tree, written into the heads' folder
  medhead tune --model my/model --proposer lookahead                    W, N and G, kept in the cache folder
  medhead tune --model my/model --batch 1 4 16                          only the time of a pass, for three batch sizes
  medhead tune --dry-run                                                the demo model; nothing is written

Times and lookahead sizes are kept in ~/.cache/medhead (or $MEDHEAD_CACHE), where every later generation reads them.
exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="medhead tune",
        description="Measure the time of a pass by number of nodes on this machine. With heads, also find the tree that gives\n"
        "most tokens per second; with --proposer lookahead, the sizes W, N and G that do.",
        epilog=EXAMPLES,
    )
    what = options.add_argument_group("what to tune")
    what.add_argument("--model", help="model folder or hub id (default: the demo model)")
    what.add_argument("--heads", help="heads folder; the fastest tree is written into its configuration")
    what.add_argument(
        "--proposer",
        choices=["heads", "lookahead"],
        help="proposer to tune (default: heads if there are some, else only passes are timed)",
    )
    add_device_options(what)
    how = options.add_argument_group("measurement")
    how.add_argument("--prompts", help="JSON lines as for medhead bench (default: built-in)")
    how.add_argument("--count", type=int, default=4, help="number of prompts (default: 4)")
    how.add_argument("--new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)")
    how.add_argument("--repeats", type=int, default=2, help="runs of each prompt (default: 2)")
    how.add_argument(
        "--batch", type=int, nargs="+", default=[1],
        help="batch sizes to time passes for, rounded up to a power of two (default: 1)",
    )  # fmt: skip
    how.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    return options


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for option in ("count", "new_tokens", "repeats", "batch"):
        check_range(args, option, 1)
    if args.proposer == "heads" and args.model and not args.heads:
        raise MedheadError("--proposer heads needs --heads FOLDER")
    if args.proposer == "lookahead" and args.heads:
        raise MedheadError("--heads goes with --proposer heads; lookahead has none")
    device = pick_device(args.device)
    name: Any = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    target = Target(load_model(name, device, pick_dtype(args.dtype, device), args.trust_remote_code))
    for batch in sorted({costs_batch(rows) for rows in args.batch}):
        with torch.inference_mode(), target.active():
            costs = measure_costs(target, batch)
        print(f"a pass over {batch} row{'s' * (batch > 1)}, by nodes: {cost_table(costs)}")
        if not args.dry_run:
            store_costs(target, batch, costs)
    folder = args.heads or (None if args.model else DEMO_HEADS)
    if args.proposer == "lookahead":
        tune_lookahead(target, tokenizer, args)
    elif folder is not None:
        tune_heads(target, tokenizer, Path(folder), args)


def cost_table(costs: CostModel) -> str:
    """Return the milliseconds of a pass by number of nodes, and their ratio to one node."""
    return ", ".join(f"{n}: {1000 * costs(n):.2f} ms ({costs(n) / costs(1):.2f}x)" for n in costs.nodes)


def fastest(
    target: Target,
    tokenizer: Any,
    args: argparse.Namespace,
    make: Callable[[T], Decoder],
    start: T,
    dimensions: Iterable[Changes[T]],
) -> T:
    """Search for the setting whose decoder, made by `make`, gives most tokens per second; print and return it."""
    chats = read_prompts(args.prompts, args.count)
    rows = encode_prompts(tokenizer, chats, max(1, target.context - args.new_tokens))
    prompts = [torch.tensor([ids], device=target.device) for ids in rows]
    best = coordinate_search(start, dimensions, throughput(make, prompts, args.new_tokens, args.repeats), print)
    print(f"fastest: {best}")
    return best


def tune_heads(target: Target, tokenizer: Any, folder: Path, args: argparse.Namespace) -> None:
    """Find the fastest tree and write it into the heads' configuration."""
    heads = load_heads(folder, target)
    config, file = heads.config, folder / CONFIG_FILE
    start = Tree(config.tree_size, config.tree_width, config.tree_branching, config.tree_depth or config.depth)

    def make(tree: Tree) -> Decoder:
        return Decoder(target, "heads", heads=heads, **tree.options())

    best = fastest(target, tokenizer, args, make, start, trees.dimensions(config.depth))
    if args.dry_run:
        return
    if file.is_file():
        trees.save_tree(folder, best)
        print(f"written into {file}")
    else:
        print(f"not written: {str(folder)!r} has another project's format and no {CONFIG_FILE}", file=sys.stderr)


def tune_lookahead(target: Target, tokenizer: Any, args: argparse.Namespace) -> None:
    """Find the fastest W, N and G and keep them in the user's cache."""

    def make(sizes: Sizes) -> Decoder:
        return Decoder(target, "lookahead", **sizes._asdict())

    best = fastest(target, tokenizer, args, make, tuned_sizes(target) or DEFAULTS, windows.dimensions())
    if not args.dry_run:
        file = store_sizes(target, best)
        print(f"written into {file}" if file else "not written: the cache folder cannot be written")


def main(argv: list[str] | None = None) -> int:
    """Run `medhead tune` and return its exit code."""
    return run_command(parser(), run, argv)
