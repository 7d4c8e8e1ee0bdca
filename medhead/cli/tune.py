"""`medhead tune`: measure what a pass costs here, and find the fastest tree of some heads or sizes of lookahead decoding."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from medhead.bench.harness import add_decoding_options, generate_arguments, load_prompts, load_target
from medhead.cli.common import Parser, check_range, run_command
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import load_heads
from medhead.heads.config import CONFIG_FILE
from medhead.model.named_models import default_heads
from medhead.model.target import Target
from medhead.proposers.lookahead_sizes import DEFAULTS, store_sizes, tuned_sizes
from medhead.scheduling.cost_model import costs_batch, measure_costs, store_costs
from medhead.tune import trees, windows
from medhead.tune.search import Changes, T, coordinate_search, throughput
from medhead.tune.trees import Tree

EXAMPLES = """\
examples:
  medhead tune --model my/model --heads my/heads --prompts mine.jsonl   the fastest tree, written into the heads' folder
  medhead tune --model my/model --proposer lookahead                    W, N and G, kept in the cache folder
  medhead tune --model my/model --batch-sizes 1 4 16                    only the time of a pass, for three batch sizes
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
    add_decoding_options(options, max_new_tokens=128, num_prompts=4)
    options.add_argument("--heads", help="heads folder; the fastest tree is written into its configuration")
    options.add_argument("--proposer", choices=["heads", "lookahead"],
                         help="proposer to tune (default: heads if there are some, else only passes are timed)")  # fmt: skip
    how = options.add_argument_group("measurement")
    how.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    how.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU)")
    how.add_argument("--repeats", type=int, default=2, help="runs of each prompt (default: 2)")
    how.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N",
                     help="batch sizes to time passes for, rounded up to a power of two (default: 1)")  # fmt: skip
    how.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    return options


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for option in ("num_prompts", "max_new_tokens", "repeats", "batch_sizes"):
        check_range(args, option, 1)
    folder = args.heads or default_heads(args.model)
    if args.proposer == "heads" and folder is None:
        raise MedheadError("--proposer heads needs --heads FOLDER")
    if args.proposer == "lookahead" and args.heads:
        raise MedheadError("--heads goes with --proposer heads; lookahead has none")
    target = load_target(args, args.dtype)
    for batch in sorted({costs_batch(size) for size in args.batch_sizes}):
        with torch.inference_mode(), target.active():
            costs = measure_costs(target, batch)
        times = ", ".join(f"{n}: {1000 * costs(n):.2f} ms ({costs(n) / costs(1):.2f}x)" for n in costs.nodes)
        print(f"a pass over {batch} row{'s' * (batch > 1)}, by nodes: {times}")
        if not args.dry_run:
            store_costs(target, batch, costs)
    if args.proposer == "lookahead":
        tune_lookahead(target, args)
    elif folder is not None:
        tune_heads(target, Path(folder), args)


def fastest(
    target: Target, args: argparse.Namespace, make: Callable[[T], Decoder], start: T, dimensions: Iterable[Changes[T]]
) -> T:
    """Search for the setting whose decoder, made by `make`, gives most tokens per second; print and return it."""
    prompts, arguments = load_prompts(args, target.context), generate_arguments(args, target.model, 0.0)
    rate = throughput(make, prompts, arguments, args.repeats)
    best = coordinate_search(start, dimensions, rate, print)
    print(f"fastest: {best}")
    return best


def tune_heads(target: Target, folder: Path, args: argparse.Namespace) -> None:
    """Find the fastest tree and write it into the heads' configuration."""
    heads = load_heads(folder, target)
    config, file = heads.config, folder / CONFIG_FILE
    start = Tree(config.tree_size, config.tree_width, config.tree_branching, config.tree_depth or config.depth)
    changes = trees.dimensions(config.depth)
    best = fastest(target, args, lambda tree: Decoder(target, "heads", heads=heads, **tree.options()), start, changes)
    if args.dry_run:
        return
    if file.is_file():
        trees.save_tree(folder, best)
        print(f"written into {file}")
    else:
        print(f"not written: {str(folder)!r} has another project's format and no {CONFIG_FILE}", file=sys.stderr)


def tune_lookahead(target: Target, args: argparse.Namespace) -> None:
    """Find the fastest W, N and G and keep them in the user's cache."""
    start, changes = tuned_sizes(target) or DEFAULTS, windows.dimensions()
    best = fastest(target, args, lambda sizes: Decoder(target, "lookahead", **sizes._asdict()), start, changes)
    if not args.dry_run:
        file = store_sizes(target, best)
        print(f"written into {file}" if file else "not written: the cache folder cannot be written")


def main(argv: list[str] | None = None) -> int:
    """Run `medhead tune` and return its exit code."""
    return run_command(parser(), run, argv)
