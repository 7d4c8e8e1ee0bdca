"""Does the budget keep its promise? `python -m medhead.bench.budget`: never slower than plain, close to the best fixed tree.

Ordinary prompts and hostile ones (random tokens at temperature 2, heads of noise) are decoded plainly, with the budget,
and with trees of fixed sizes, interleaved in one process.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medhead.bench.command import Progress
from medhead.bench.contestants import PLAIN, Contestant
from medhead.bench.measure import Measured, measure
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.bench.report import label, machine, write_results
from medhead.cli.common import Parser, guarded
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.target import Target

BUDGET = "budget"
EXAMPLES = """\
examples:
  python -m medhead.bench.budget --output results/budget
  python -m medhead.bench.budget --model my/model --heads my/heads --prompts mine.jsonl --count 8

"of plain" is the time against plain decoding (at most 1.05 is the promise), "of best fixed" the time against the fastest
tree of a fixed size, which nobody can know in advance (at most 1.05 where guessing pays).
"""


@dataclass
class Situation:
    """What is decoded, and how."""

    name: str
    prompts: list[Tensor]
    heads: Heads | None
    temperature: float = 0.0
    hostile: bool = False


def situations(target: Target, ordinary: list[Tensor], heads: Heads | None, seed: int = 0) -> list[Situation]:
    """Ordinary prompts, greedy and sampled; random tokens; heads of noise."""
    source = torch.Generator().manual_seed(seed)
    rubbish = [torch.randint(target.vocab_size, ids.shape, generator=source).to(ids.device) for ids in ordinary]
    found = [
        Situation("prompts, greedy", ordinary, heads),
        Situation("prompts, temperature 1", ordinary, heads, temperature=1.0),
        Situation("random tokens, temperature 2", rubbish, heads, temperature=2.0, hostile=True),
    ]
    if heads is not None:
        found.append(Situation("heads of noise, greedy", ordinary, noise_like(heads, seed), hostile=True))
    return found


def noise_like(heads: Heads, seed: int) -> Heads:
    """Heads of the same shape that know nothing."""
    generator = torch.Generator().manual_seed(seed)
    noise = copy.deepcopy(heads)
    for parameter in noise.parameters():
        fresh = torch.randn(parameter.shape, generator=generator) * max(parameter.shape[-1], 1) ** -0.5
        parameter.data.copy_(fresh)
    return noise


def contestants(target: Target, situation: Situation, sizes: list[int], new_tokens: int) -> list[Contestant]:
    """Plain decoding, the budget, and trees of fixed sizes."""
    sampling: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": situation.temperature > 0}
    if situation.temperature:
        sampling |= {"temperature": situation.temperature, "top_k": 0, "top_p": 1.0}
    dtype = str(target.dtype).removeprefix("torch.")

    def ours(name: str, proposer: str, **options: Any) -> Contestant:
        decoder = Decoder(target, proposer, **options)

        def run(ids: Tensor) -> Tensor:
            return decoder.generate(ids, attention_mask=torch.ones_like(ids), seed=0, **sampling)

        return Contestant(name, dtype, run, lambda: decoder.statistics, decoder.proposer.tree_size)

    found = [ours(PLAIN, "none"), ours(BUDGET, "hybrid", heads=situation.heads)]
    return found + [ours(f"{size} nodes", "hybrid", heads=situation.heads, tree_size=size) for size in sizes]


def summary(situation: Situation, results: list[Measured]) -> dict[str, Any]:
    """Times of one situation against plain decoding and against the best fixed tree."""
    seconds = {result.name: sum(result.seconds) for result in results}
    fixed = {name: value for name, value in seconds.items() if name != BUDGET}
    best = min(fixed, key=lambda name: fixed[name])
    same = min(result.identical for result in results)
    return {
        "situation": situation.name,
        "hostile": situation.hostile,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens": sum(results[0].tokens),
        "tokens_per_pass": {result.name: round(result.accepted_length, 3) for result in results},
        "of_plain": round(seconds[BUDGET] / seconds[PLAIN], 3),
        "best_fixed": best,
        "of_best_fixed": round(seconds[BUDGET] / fixed[best], 3),
        "identical": f"{same}/{len(situation.prompts)}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a situation."""
    lines = [
        "| situation | of plain | best fixed | of best fixed | tokens/pass | same text |",
        "|---|--:|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row['situation']} | {row['of_plain']:.2f} | {row['best_fixed']} | {row['of_best_fixed']:.2f} "
        f"| {row['tokens_per_pass'][BUDGET]:.2f} | {row['identical']} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time against plain decoding: fixed sizes as a line, the budget as a level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(max(row["seconds"].values()) / row["seconds"][PLAIN] for row in rows)
    figure, axes = plt.subplots(1, len(rows), figsize=(3.4 * len(rows), 3.2), sharey=True, squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        plain = row["seconds"][PLAIN]
        fixed = {int(name.split()[0]): s / plain for name, s in row["seconds"].items() if name.endswith("nodes")}
        axis.axhline(1.0, color="#999999", linewidth=1, label="plain")
        axis.plot(list(fixed), list(fixed.values()), "o-", color="#0072B2", label="fixed tree")
        axis.axhline(row["of_plain"], color="#D55E00", linestyle="--", label="budget")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(fixed), [str(nodes) for nodes in fixed])
        axis.set_ylim(0, 1.08 * max(1.0, most))
        axis.set_title(row["situation"], fontsize=9)
        axis.set_xlabel("nodes")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time / time of plain decoding")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.bench.budget",
        description="Is it ever slower than plain decoding? The tree budget against fixed trees, on easy and hostile text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--model", help="model folder or hub id (default: the demo model)")
    options.add_argument("--heads", help="heads folder (default: the demo model's own, else none)")
    options.add_argument("--prompts", help="JSON lines as for medhead.bench (default: built-in)")
    options.add_argument("--count", type=int, default=6, help="prompts taken (default: 6)")
    options.add_argument("--new-tokens", type=int, default=200, help="tokens of every answer (default: 200)")
    options.add_argument("--repeats", type=int, default=3, help="runs of each prompt (default: 3)")
    options.add_argument(
        "--sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="fixed trees (default: 4 8 16 32)"
    )
    options.add_argument("--dtype", default="float32", help="type of the model (default: float32)")
    options.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and budget.png")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def run(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """The command after its options were read."""
    for option in ("count", "new_tokens", "repeats"):
        if getattr(args, option) < 1:
            raise MedheadError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")
    device = pick_device(args.device)
    name: Any = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    model = load_model(name, device, pick_dtype(args.dtype, device), args.trust_remote_code)
    model.generation_config.eos_token_id = None  # full answers
    target = Target(model)
    folder = args.heads or (None if args.model else DEMO_HEADS)
    heads = None if folder is None else load_heads(folder, target)
    chats = read_prompts(args.prompts, args.count)
    longest = max(1, target.context - args.new_tokens)
    ordinary = [torch.tensor([ids], device=device) for ids in encode_prompts(tokenizer, chats, longest)]
    found = situations(target, ordinary, heads)
    progress = Progress(len(found) * len(ordinary) * args.repeats * (len(args.sizes) + 2))
    rows = []
    for situation in found:
        runners = contestants(target, situation, args.sizes, args.new_tokens)
        plain = {runners[0].dtype: runners[0]}
        rows.append(summary(situation, measure(runners, plain, situation.prompts, args.repeats, progress)))
    where = machine()
    place = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    heading = f"{label(args.model)}, {len(ordinary)} prompts, batch 1, {args.dtype}, {place}, {where['date']}"
    text = table(rows)
    print(f"{heading}\n\n{text}")
    if args.output is None:
        return
    content = {"machine": where, "options": vars(args), "results": rows}
    say(write_results(args.output, heading, text, content, "budget.png", lambda path: plot(rows, heading, path)))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.bench.budget", lambda: run(args, lambda line: print(line, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
