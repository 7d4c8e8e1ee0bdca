"""The command: who takes part on which prompts, what is printed and what is written."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medhead.bench.contestants import PLAIN, PROPOSERS_SHOWN, Contestant, Lineup, contestants
from medhead.bench.measure import Measured, faster_types, measure
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.bench.report import label, machine, plot, summary, table, write_results
from medhead.cli.common import Parser, guarded
from medhead.compile import WAYS
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.proposers import PROPOSERS

EXAMPLES = """\
examples:
  python -m medhead.bench                                  demo model, built-in prompts
  python -m medhead.bench --prompts held_out.jsonl --count 24 --output results
  python -m medhead.bench --temperature 1                  sampling, with and without a look at the noise
  python -m medhead.bench --tree-sizes 4 8 16 32 64        which tree is best here?
  python -m medhead.bench --steps compiled                 captured and compiled steps too (compiling takes minutes)
  python -m medhead.bench --model Qwen/Qwen3-8B --heads my/heads --dtypes bfloat16

Every prompt is answered by every contestant in turn (interleaved, order rotating), each in the faster of the types;
times are medians of the repeats. The text of every contestant is compared with plain decoding's in the same type.
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.bench",
        description="How much faster is it? Proposers against plain decoding, transformers generate and its prompt lookup.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument(
        "--heads", nargs="+", help="heads folders; the first is the default (demo model: all of its own)"
    )
    options.add_argument("--proposers", nargs="*", choices=sorted(PROPOSERS), default=list(PROPOSERS_SHOWN),
                         metavar="NAME", help="further proposers; hybrid gets the first heads (default: all)")  # fmt: skip
    options.add_argument(
        "--prompts", help="JSON lines with messages, prompt, question, turns or text (default: built-in)"
    )
    options.add_argument("--count", type=int, default=8, help="prompts taken (default: 8)")
    options.add_argument("--new-tokens", type=int, default=200, help="most tokens of an answer (default: 200)")
    options.add_argument(
        "--ignore-end", action="store_true", help="go on behind the end token, so that all answers are full"
    )
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--repeats", type=int, default=3, help="runs of each prompt (default: 3)")
    options.add_argument("--tree-size", type=int, help="nodes of every proposer's tree (default: each one's own)")
    options.add_argument("--tree-sizes", type=int, nargs="+", default=[], help="further trees of the first heads")
    options.add_argument("--steps", nargs="+", choices=sorted(WAYS), default=[], metavar="WAY",
                         help="captured steps too: compiled, graph; in the first type alone")  # fmt: skip
    options.add_argument("--dtypes", nargs="+", default=None, metavar="TYPE",
                         help="types to choose the faster from (default: float32 bfloat16 on a CPU, else bfloat16)")  # fmt: skip
    options.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and speed.png")
    options.add_argument("--title", default="", help="title of the picture")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be.

    Raises:
        MedheadError: names the option.
    """
    for name in ("count", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise MedheadError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.temperature <= 100:
        raise MedheadError(f"--temperature must be from 0 to 100, got {args.temperature}")
    if args.tree_sizes and not args.heads and args.model:
        raise MedheadError("--tree-sizes needs --heads")
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")


def lineup_of(args: argparse.Namespace) -> Lineup:
    """Who takes part."""
    heads = args.heads
    if heads is None:
        heads = [] if args.model else [DEMO_HEADS, *sorted(DEMO_HEADS.parent.glob("heads-*"))]
    return Lineup(
        new_tokens=args.new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        heads=tuple(heads),
        proposers=tuple(args.proposers),
        tree_sizes=tuple(args.tree_sizes),
        tree_size=args.tree_size,
        steps=tuple(args.steps),
    )


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    check_options(args)
    device = pick_device(args.device)
    names = args.dtypes or (["float32", "bfloat16"] if device.type == "cpu" else ["bfloat16"])
    dtypes = [pick_dtype(name, device) for name in names]
    model_name, lineup = args.model or DEMO_MODEL, lineup_of(args)
    tokenizer = load_tokenizer(model_name, args.trust_remote_code)
    chats = read_prompts(args.prompts, args.count)
    by_type: dict[str, list[Contestant]] = {}
    for dtype in dtypes:
        model = load_model(model_name, device, dtype, args.trust_remote_code)
        if args.ignore_end:
            model.generation_config.eos_token_id = None
        taking_part = lineup if dtype == dtypes[0] else replace(lineup, steps=())  # compiling takes minutes
        by_type[str(dtype).removeprefix("torch.")] = contestants(model, taking_part)
    longest = _context(model) - args.new_tokens
    if longest < 1:
        raise MedheadError(
            f"--new-tokens {args.new_tokens} leaves no room for a prompt in the model's {_context(model)}"
        )
    prompts = [torch.tensor([ids], device=device) for ids in encode_prompts(tokenizer, chats, longest)]
    chosen = faster_types(by_type, prompts[:2], _say)
    plain = {dtype: next(one for one in same if one.name == PLAIN) for dtype, same in by_type.items()}
    results = measure(chosen, plain, prompts, args.repeats, Progress(len(chosen) * len(prompts) * args.repeats))
    report(args, results)


def report(args: argparse.Namespace, results: list[Measured]) -> None:
    """Print the tables; write the folder if one was asked for."""
    rows, where = summary(results), machine()
    place = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    mode = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    heading = f"{label(args.model)}, {len(results[0].tokens)} prompts, {mode}, batch 1, {place}, {where['date']}"
    text = table(rows, compares_texts=args.temperature == 0)
    print(f"{heading}\n\n{text}")
    if args.output is None:
        return
    content = {"machine": where, "options": vars(args), "results": rows}
    title = args.title or heading
    _say(write_results(args.output, heading, text, content, "speed.png", lambda path: plot(rows, title, path)))


class Progress:
    """A counter on standard error, when somebody looks at it."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self) -> None:
        """One more run is done."""
        self.done += 1
        if sys.stderr.isatty():
            print(
                f"\r{self.done}/{self.total} runs",
                end="\n" if self.done == self.total else "",
                file=sys.stderr,
                flush=True,
            )


def _context(model: Any) -> int:
    from medhead.model.target import Target

    return Target(model, probe=False).context


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.bench", lambda: run(args))
