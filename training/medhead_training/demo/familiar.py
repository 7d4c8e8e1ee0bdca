"""Whether heads guess sampled text worse than greedy text, or unfamiliar text worse than familiar text.

At every position of answers to prompts that nobody has learnt, the heads name a tree, and how much of it the answer goes on with
is counted. A position is as familiar as the rarest of the four 4-grams that end with the answer's next four tokens: how often
that one occurs in what the heads learnt from. Greedy text of a small model is familiar nearly everywhere, sampled text nearly
nowhere; so the two are compared position by position of equal familiarity, and their means with equal shares of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from medhead.cli.common import Parser, guarded
from medhead.core.acceptance import accept
from medhead.core.gumbel import GumbelNoise, LazyGumbel
from medhead.core.tree import TokenTree
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL, load_model, load_tokenizer
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsProposer
from medhead_training.demo.jsonl import read_jsonl
from medhead_training.demo.variety import GRAM, grams

CLASSES = (0, 1, 3, 10, 30, 100)  # least occurrences of a class
AHEAD = 4  # tokens behind a position that say how familiar it is


def familiarity(text: list[int], learnt: Counter[tuple[int, ...]], position: int) -> int:
    """Class of the position of a root: of the rarest 4-gram that ends with one of the next four tokens."""
    ends = range(position + 2, position + 2 + AHEAD)
    rarest = min(learnt[tuple(text[end - GRAM : end])] for end in ends)
    return max(place for place, least in enumerate(CLASSES) if rarest >= least)


def followed(tree: TokenTree, text: list[int]) -> int:
    """Tokens of a pass: how far a tree of one row goes along the text behind its root, and one more."""
    behind = torch.tensor(text[: tree.max_depth] + [-1] * (tree.max_depth + 1 - min(len(text), tree.max_depth)))
    return int(accept(tree, behind[tree.depth]).counts)


class Reader:
    """Reads answers position by position.

    Args:
        target: the target.
        heads: the proposer, with heads that keep no memory.
        learnt: 4-grams of the text that the heads learnt from.
    """

    def __init__(self, target: Target, heads: HeadsProposer, learnt: Counter[tuple[int, ...]]) -> None:
        self.target, self.heads, self.learnt = target, heads, learnt
        if heads.heads.memory_size:
            raise MedheadError(f"heads of kind {heads.heads.config.kind!r} look back; give heads that do not")

    @torch.inference_mode()
    def read(self, text: list[int], start: int, seed: int, temperature: float) -> Iterator[tuple[int, int]]:
        """Class and tokens of a pass for every position from `start` on that has enough text behind it.

        Args:
            text: prompt and answer.
            start: tokens of the prompt.
            seed: that the answer was drawn with.
            temperature: the same; 0 for a greedy answer.
        """
        noise = GumbelNoise(seed, self.target.vocab_size) if temperature else None
        with self.target.active(self.heads.feature_layers):
            features = self._features(text)
            self.heads.begin(self.target, [text[:start]])
            for root in range(start, len(text) - max(self.heads.max_depth, AHEAD)):
                coming = None if noise is None else self._coming(noise, root)
                roots = torch.tensor([text[root]])
                state = DecodeState(
                    self.target, [text[: root + 1]], roots, features[root - 1 : root], coming, temperature or 1.0
                )
                tree = self.heads.propose(state, self.heads.max_depth)
                yield familiarity(text, self.learnt, root), followed(tree, text[root + 1 :])

    def _features(self, text: list[int]) -> Tensor:
        parts: list[Tensor] = []
        self.target.prefill(self.target.new_cache(1, len(text)), [text], lambda features, _: parts.append(features))
        return torch.cat(parts, 1)[0]

    def _coming(self, noise: GumbelNoise, root: int) -> LazyGumbel:
        positions = root + 1 + torch.arange(self.heads.max_depth)[None]
        return LazyGumbel.of(noise.gumbel(torch.zeros_like(positions), positions))


def summary(counts: list[list[int]]) -> dict[str, Any]:
    """Means of tokens by class; `counts` has the tokens of every position of every class."""
    positions = sum(map(len, counts))
    classes = [
        {
            "least": least,
            "positions": len(of),
            "share": len(of) / positions,
            "tokens": sum(of) / len(of) if of else None,
        }
        for least, of in zip(CLASSES, counts, strict=True)
    ]
    return {"positions": positions, "tokens": sum(map(sum, counts)) / positions, "classes": classes}


def compared(greedy: dict[str, Any], sampled: dict[str, Any]) -> dict[str, float]:
    """The ratio of sampled to greedy tokens a pass: as they are, and with equal shares of the classes that both have."""
    both = [
        (one, other)
        for one, other in zip(greedy["classes"], sampled["classes"], strict=True)
        if one["positions"] and other["positions"]
    ]

    def ratio(shares: list[float]) -> float:
        of_greedy, of_sampled = (
            sum(pair[side]["tokens"] * share for pair, share in zip(both, shares, strict=True)) for side in (0, 1)
        )
        return of_sampled / of_greedy if both else float("nan")

    return {
        "ratio": sampled["tokens"] / greedy["tokens"],
        "ratio_with_shares_of_greedy": ratio([one["share"] for one, _ in both]),
        "ratio_with_shares_of_sampled": ratio([other["share"] for _, other in both]),
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens a pass and shares of positions by class."""
    from matplotlib.figure import Figure

    names = [f"{least}" if least < 1 else f"{least}+" for least in CLASSES]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    tokens, shares = figure.subplots(1, 2)
    for offset, (name, label) in zip((-0.2, 0.2), (("greedy", "greedy"), ("sampled", "temperature 1")), strict=True):
        places = [place + offset for place in range(len(CLASSES))]
        classes = found[name]["classes"]
        tokens.bar(places, [of["tokens"] or 0 for of in classes], 0.38, label=label)
        shares.bar(places, [of["share"] for of in classes], 0.38, label=label)
    tokens.set_ylabel("tokens a pass")
    shares.set_ylabel("share of positions")
    for axes in (tokens, shares):
        axes.set_xticks(range(len(CLASSES)), names)
        axes.set_xlabel("occurrences in what heads learnt from")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    """Answer, read, print and write."""
    if args.output.exists():
        raise MedheadError(f"--output {str(args.output)!r} is there already; nothing is overwritten")
    if args.max_new_tokens < 16:
        raise MedheadError(f"--max-new-tokens must be at least 16, got {args.max_new_tokens}")
    for name in ("learnt", "prompts"):
        if not getattr(args, name).is_file():
            raise MedheadError(f"--{name} {str(getattr(args, name))!r} is no file; it must be JSON lines")
    prompts = [record.get("messages") for record in read_jsonl(args.prompts) if isinstance(record, dict)]
    if not prompts or not all(prompts):
        raise MedheadError(f"--prompts {str(args.prompts)!r}: every line must be a chat, an object with 'messages'")
    tokenizer = load_tokenizer(args.model, False)
    model = load_model(args.model, torch.device("cpu"), torch.float32)
    learnt: Counter[tuple[int, ...]] = Counter()
    for record in read_jsonl(args.learnt):
        if not isinstance(record, dict) or not {"prompt_ids", "answer_ids"} <= record.keys():
            raise MedheadError(f"{args.learnt} was not written by medhead_training.generate_data")
        learnt.update(grams([*record["prompt_ids"][1 - GRAM :], *record["answer_ids"]]))
    with Decoder(model, "none") as decoder:
        size = {"tree_size": args.tree_size, "width": args.width, "branching": args.branching}
        reader = Reader(decoder.target, HeadsProposer(decoder.target, args.heads, **size), learnt)
        counts: dict[str, list[list[int]]] = {name: [[] for _ in CLASSES] for name in ("greedy", "sampled")}
        for seed, messages in enumerate(tqdm(prompts, unit="prompt", disable=None)):
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            start = ids["input_ids"].shape[1]
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                sampling = {"do_sample": True, "top_k": 0, "seed": seed} if temperature else {"do_sample": False}
                text = decoder.generate(**ids, max_new_tokens=args.max_new_tokens, **sampling)[0].tolist()
                for place, tokens in reader.read(text, start, seed, temperature):
                    counts[name][place].append(tokens)
    if not all(map(any, counts.values())):
        raise MedheadError(f"no answer is longer than the heads are deep; give other --prompts than {args.prompts}")
    found: dict[str, Any] = {name: summary(of) for name, of in counts.items()}
    found |= compared(found["greedy"], found["sampled"]) | {"heads": str(args.heads), "prompts": len(prompts), **size}
    print(
        "| occurrences | greedy: share | tokens a pass | temperature 1: share | tokens a pass |\n|--:|--:|--:|--:|--:|"
    )
    for greedy, sampled in zip(found["greedy"]["classes"], found["sampled"]["classes"], strict=True):
        cells = [f"{of['share']:.1%} | {of['tokens'] or float('nan'):.2f}" for of in (greedy, sampled)]
        print(f"| {greedy['least']}{'+' if greedy['least'] else ''} | {' | '.join(cells)} |")
    print(f"| all | | {found['greedy']['tokens']:.2f} | | {found['sampled']['tokens']:.2f} |")
    print(
        f"temperature 1 has {found['ratio']:.2f} of greedy tokens a pass; with equal shares of every class "
        f"{found['ratio_with_shares_of_greedy']:.2f} (greedy's) and {found['ratio_with_shares_of_sampled']:.2f} (its own)"
    )
    args.output.mkdir(parents=True)
    (args.output / "familiar.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, args.output / "familiar.png")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(prog="python -m medhead_training.demo.familiar", description=__doc__)
    options.add_argument("--model", default=str(DEMO_MODEL), help="folder of the target (the demo model)")
    options.add_argument("--heads", type=Path, required=True, help="folder of heads that do not look back")
    options.add_argument("--learnt", type=Path, required=True, help="the text they learnt from, by generate_data")
    options.add_argument("--prompts", type=Path, required=True, help="chats that nobody has learnt (JSON lines)")
    options.add_argument("--max-new-tokens", type=int, default=128, help="of every answer (128)")
    options.add_argument("--tree-size", type=int, default=32, help="nodes of a tree (32)")
    options.add_argument("--width", type=int, default=4, help="nodes of a frontier (4)")
    options.add_argument("--branching", type=int, default=6, help="candidates of each of them (6)")
    options.add_argument("--output", type=Path, required=True, help="new folder for familiar.json and familiar.png")
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.demo.familiar", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
