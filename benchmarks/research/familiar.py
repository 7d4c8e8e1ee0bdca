"""Are sampled texts harder to draft than greedy ones, or only less familiar to the heads?

At every position of answers to held-out prompts the heads propose a tree, and the accepted length along the answer is counted.
A position's familiarity is the smallest number of occurrences, in the heads' training text, of the four 4-grams that end with
the answer's next four tokens. Greedy text of a small model is familiar nearly everywhere, sampled text hardly anywhere; so
accepted lengths are compared at positions of equal familiarity, and on average with equal shares of each class.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from variety import GRAM, grams, read_answers

from medhead.bench import harness
from medhead.cli.common import Parser, check_range, run_command
from medhead.core.acceptance import accept_drawn
from medhead.core.gumbel import GumbelNoise, LazyGumbel, seed_halves
from medhead.core.lengths import Lengths
from medhead.core.tree import TokenTree
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL, load_model, load_tokenizer
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsProposer
from medhead_training.demo.jsonl import read_jsonl

CLASSES = (0, 1, 3, 10, 30, 100)  # fewest occurrences of each class
AHEAD = 4  # tokens after a position that decide its familiarity
Grams = Counter[tuple[int, ...]]


def familiarity(text: list[int], known: Grams, position: int) -> int:
    """Return the class of a root's position: that of the rarest 4-gram that ends with one of the next four tokens."""
    ends = range(position + 2, position + 2 + AHEAD)
    rarest = min(known[tuple(text[end - GRAM : end])] for end in ends)
    return max(place for place, fewest in enumerate(CLASSES) if rarest >= fewest)


def accepted_length(tree: TokenTree, text: list[int]) -> int:
    """Return how many tokens a pass over a tree of one sequence emits if the text after its root is `text`."""
    expected = torch.tensor(text[: tree.max_depth] + [-1] * (tree.max_depth + 1 - min(len(text), tree.max_depth)))
    return int(accept_drawn(tree, expected[tree.depth]).counts)


class Reader:
    """Measures accepted lengths of heads without a draft cache along given texts; `known` are 4-grams of their training text."""

    def __init__(self, target: Target, proposer: HeadsProposer, known: Grams) -> None:
        self.target, self.proposer, self.known = target, proposer, known
        if proposer.new_draft_cache(Lengths.of([0]), 1) is not None:
            raise MedheadError(f"--heads: heads of kind {proposer.heads.config.kind!r} have a draft cache; give others")

    @torch.inference_mode()
    def read(self, text: list[int], start: int, seed: int, temperature: float) -> Iterator[tuple[int, int]]:
        """Yield familiarity and accepted length of every position from `start` on that has enough text after it.

        The answer in `text` was drawn with `seed` at `temperature`, or greedily at 0.
        """
        depth, parts = self.proposer.max_depth, list[Tensor]()
        generator, seeds = GumbelNoise(self.target.vocab_size), torch.tensor([seed_halves(seed)])
        with self.target.active(self.proposer.feature_layers):
            self.target.prefill(self.target.new_cache(1, len(text)), [text], lambda found, _: parts.append(found))
            features = torch.cat(parts, 1)[0]
            self.proposer.begin(self.target, [text[:start]])
            for root in range(start, len(text) - max(depth, AHEAD)):
                positions = root + 1 + torch.arange(depth)[None]
                noise = generator.gumbel(seeds, torch.zeros(1, dtype=torch.long), positions) if temperature else None
                state = DecodeState(
                    self.target, [text[: root + 1]], torch.tensor([text[root]]), features[root - 1 : root],
                    None if noise is None else LazyGumbel.of(noise), temperature or 1.0,
                )  # fmt: skip
                tree = self.proposer.propose(state, depth)
                yield familiarity(text, self.known, root), accepted_length(tree, text[root + 1 :])


def summary(lengths: list[list[int]]) -> dict[str, Any]:
    """Return means by class; `lengths` holds the accepted lengths of every class."""
    positions = sum(map(len, lengths))
    classes = [
        {"fewest": fewest, "positions": len(of), "share": len(of) / positions,
         "accepted_length": sum(of) / len(of) if of else None}
        for fewest, of in zip(CLASSES, lengths, strict=True)
    ]  # fmt: skip
    return {"positions": positions, "accepted_length": sum(map(sum, lengths)) / positions, "classes": classes}


def ratios(greedy: dict[str, Any], sampled: dict[str, Any]) -> dict[str, float]:
    """Return accepted length sampled / greedy: as it is, and with equal shares of the classes that both have."""
    pairs = zip(greedy["classes"], sampled["classes"], strict=True)
    both = [(one, other) for one, other in pairs if one["positions"] and other["positions"]]

    def weighted(side: int) -> float:
        sums = [sum(pair[of]["accepted_length"] * pair[side]["share"] for pair in both) for of in (0, 1)]
        return sums[1] / sums[0] if both else float("nan")

    return {
        "ratio": sampled["accepted_length"] / greedy["accepted_length"],
        "ratio_with_shares_of_greedy": weighted(0),
        "ratio_with_shares_of_sampled": weighted(1),
    }


def table(found: dict[str, Any]) -> str:
    """Return a Markdown table by class, and a line of ratios."""
    header = ["occurrences", "greedy: share", "accepted length", "temperature 1: share", "accepted length"]
    rows = []
    for greedy, sampled in zip(found["greedy"]["classes"], found["sampled"]["classes"], strict=True):
        cells = [(f"{of['share']:.1%}", f"{of['accepted_length'] or float('nan'):.2f}") for of in (greedy, sampled)]
        rows.append([f"{greedy['fewest']}{'+' if greedy['fewest'] else ''}", *cells[0], *cells[1]])
    means = [f"{found[name]['accepted_length']:.2f}" for name in ("greedy", "sampled")]
    text = harness.markdown_table(header, [*rows, ["all", "", means[0], "", means[1]]], left=0)
    return (
        f"{text}\n\nAccepted length at temperature 1 / greedy: {found['ratio']:.2f}; with equal shares of every class "
        f"{found['ratio_with_shares_of_greedy']:.2f} (greedy's) and {found['ratio_with_shares_of_sampled']:.2f} (sampled's)"
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw accepted length and share of positions by class."""
    names = [f"{fewest}+" if fewest else "0" for fewest in CLASSES]
    panels = (("accepted_length", "accepted length"), ("share", "share of positions"))
    with harness.figure(path, "", (8, 3.2), columns=2) as axes:
        for axis, (key, label) in zip(axes[0], panels, strict=True):
            for offset, (name, legend) in zip(
                (-0.2, 0.2), (("greedy", "greedy"), ("sampled", "temperature 1")), strict=True
            ):
                places = [place + offset for place in range(len(CLASSES))]
                axis.bar(places, [of[key] or 0 for of in found[name]["classes"]], 0.38, label=legend)
            axis.set_ylabel(label)
            axis.set_xticks(range(len(CLASSES)), names)
            axis.set_xlabel("occurrences in the heads' training text")
            axis.legend(frameon=False)


def run(args: argparse.Namespace) -> None:
    """Answer, measure, print and write."""
    if args.output.exists():
        raise MedheadError(f"--output {str(args.output)!r} exists already; give a new folder")
    check_range(args, "max_new_tokens", 16)
    for name in ("training_text", "prompts"):
        if not getattr(args, name).is_file():
            raise MedheadError(
                f"--{name.replace('_', '-')} {str(getattr(args, name))!r} is not a file; give JSON lines"
            )
    prompts = [record.get("messages") for record in read_jsonl(args.prompts) if isinstance(record, dict)]
    if not prompts or not all(prompts):
        raise MedheadError(f"--prompts {str(args.prompts)!r}: every line must be an object with 'messages'")
    tokenizer = load_tokenizer(args.model, False)
    model = load_model(args.model, torch.device("cpu"), torch.float32)
    known: Grams = Counter()
    for record in read_answers(args.training_text):
        known.update(grams([*record["prompt_ids"][1 - GRAM :], *record["answer_ids"]]))
    size = {"tree_size": args.tree_size, "width": args.width, "branching": args.branching}
    lengths: dict[str, list[list[int]]] = {name: [[] for _ in CLASSES] for name in ("greedy", "sampled")}
    with Decoder(model, "none") as decoder:
        reader = Reader(decoder.target, HeadsProposer(decoder.target, args.heads, **size), known)
        for seed, messages in enumerate(tqdm(prompts, unit="prompt", disable=None)):
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                sampling = {"do_sample": True, "top_k": 0, "seed": seed} if temperature else {"do_sample": False}
                text = decoder.generate(**ids, max_new_tokens=args.max_new_tokens, **sampling)[0].tolist()
                for place, length in reader.read(text, ids["input_ids"].shape[1], seed, temperature):
                    lengths[name][place].append(length)
    if not all(map(any, lengths.values())):
        raise MedheadError(f"--prompts {str(args.prompts)!r}: no answer is longer than the trees are deep; give others")
    found: dict[str, Any] = {name: summary(of) for name, of in lengths.items()}
    found |= ratios(found["greedy"], found["sampled"]) | {"heads": str(args.heads), "prompts": len(prompts), **size}
    print(table(found))
    args.output.mkdir(parents=True)
    (args.output / "familiar.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, args.output / "familiar.png")


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="familiar.py", description=__doc__,
        epilog="example:\n  python benchmarks/research/familiar.py --heads medhead/assets/heads --training-text learnt.jsonl "
        "\\\n      --prompts benchmarks/familiar/prompts.jsonl --output results/familiar",
    )  # fmt: skip
    options.add_argument("--model", default=str(DEMO_MODEL), help="folder of the target (default: the demo model)")
    options.add_argument("--heads", type=Path, required=True, help="folder of heads without a draft cache")
    options.add_argument("--training-text", type=Path, required=True,
                         help="answers that the heads were trained on, by medhead generate-data")  # fmt: skip
    options.add_argument("--prompts", type=Path, required=True, help="held-out chats (JSON lines)")
    options.add_argument("--max-new-tokens", type=int, default=128, help="token limit of an answer (default: 128)")
    options.add_argument("--tree-size", type=int, default=32, help="nodes of a tree (default: 32)")
    options.add_argument("--width", type=int, default=4, help="nodes expanded at each depth (default: 4)")
    options.add_argument("--branching", type=int, default=6, help="children proposed for each of them (default: 6)")
    options.add_argument("--output", type=Path, required=True, help="new folder for familiar.json and familiar.png")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
