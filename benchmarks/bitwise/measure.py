"""Measure `exact`: which texts are equal without it and in its two modes, and what these cost.

Texts: for every prompt the greedy texts of all proposers, in the modes and without, and of transformers. Speed: tokens/s of
plain decoding and of the default proposer after prompts of several lengths, in the modes and without, a few steps of each in
turn. Every prompt and every length is a line of `results.jsonl` in the output folder as soon as it is measured, and `table.md`
is written anew from all lines, so that a run may be stopped, and the next one goes on where it was.
Usage: python benchmarks/bitwise/measure.py --model FOLDER --heads medhead/assets/smollm2-heads --prompts spec_bench.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medhead import Decoder
from medhead.bench.prompts import encode_prompts, padded, read_prompts
from medhead.config import EXACT, SamplingParams
from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker
from medhead.generation_config import end_tokens
from medhead.model.loading import load_model, load_tokenizer
from medhead.model.target import Target
from medhead.receipt import environment

PROPOSERS = ("none", "ngram", "recycling", "heads", "hybrid")
WITHOUT = "without"
MODES = (WITHOUT, *EXACT)
TURN, WARM, TURNS = 8, 1, 6  # steps of a turn; turns that are not counted, and those that are
PROMPTS = Path(__file__).parents[1] / "prompts.jsonl"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the program."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="model folder (default: the demo model)")
    options.add_argument("--heads", help="folder of its heads (default: no heads)")
    options.add_argument("--dtype", default="bfloat16", help="type of the weights (default: bfloat16)")
    options.add_argument(
        "--prompts", default=str(PROMPTS), help="JSON lines of prompts (default: benchmarks/prompts.jsonl)"
    )
    options.add_argument("--no-packed", action="store_true", help="no packed copies of weights: bits of transformers")
    options.add_argument("--num-prompts", type=int, default=12, help="prompts whose texts are compared (default: 12)")
    options.add_argument(
        "--max-prompt-tokens", type=int, default=120, help="longer prompts are left out (default: 120)"
    )
    options.add_argument(
        "--batch-size", type=int, default=1, help="prompts that medhead decodes together, transformers 1 (default: 1)"
    )
    options.add_argument("--max-new-tokens", type=int, default=48, help="tokens of a text (default: 48)")
    options.add_argument(
        "--tree-size", type=int, default=8, help="nodes of all trees but the default proposer's (default: 8)"
    )
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    options.add_argument("--contexts", type=int, nargs="*", default=[200, 1000, 4000], help="(default: 200 1000 4000)")
    options.add_argument("--minutes", type=float, default=14, help="no prompt is begun after so many (default: 14)")
    options.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the results")
    return options


class Results:
    """The lines of `results.jsonl`, and the table that is made of them."""

    def __init__(self, folder: Path) -> None:
        self._file, self._table = folder / "results.jsonl", folder / "table.md"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **fields: Any) -> bool:
        """Whether a line has these fields."""
        return any(row.items() >= fields.items() for row in self.rows)

    def add(self, **row: Any) -> None:
        """Append a line and write the table anew."""
        self.rows.append(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._table.write_text(table(self.rows), encoding="utf-8")
        print(json.dumps({key: value for key, value in row.items() if key != "texts"}), flush=True)


def decoders(args: argparse.Namespace, targets: dict[str, Target]) -> Iterator[tuple[str, str, Decoder]]:
    """Yield the decoders of all modes with their mode and proposer."""
    for mode, target in targets.items():
        for name in PROPOSERS:
            if name == "heads" and args.heads is None:
                continue
            size = {} if name in ("none", "hybrid") else {"tree_size": args.tree_size}
            yield mode, name, Decoder(target, name, heads=args.heads, **size)


def compare_texts(
    args: argparse.Namespace, targets: dict[str, Target], prompts: list[Tensor], results: Results
) -> None:
    """Decode prompts by all proposers in all modes and by transformers, until the time is over."""
    ends, model = time.monotonic() + 60 * args.minutes, targets[WITHOUT].model
    ways, stops = list(decoders(args, targets)), set(end_tokens(model))
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    if args.temperature:
        options |= {"do_sample": True, "temperature": args.temperature, "top_k": 0, "seed": 0}
    left = [
        index
        for index in range(min(args.num_prompts, len(prompts)))
        if not results.has(kind="texts", prompt=index, temperature=args.temperature, batch_size=args.batch_size)
    ]
    for begin in range(0, len(left), args.batch_size):
        if time.monotonic() > ends:
            break
        batch = left[begin : begin + args.batch_size]
        found: list[dict[str, list[int]]] = [{} for _ in batch]
        if not args.temperature:  # transformers draws other random numbers
            for index, texts in zip(batch, found, strict=True):
                ids = prompts[index]
                (texts["transformers"],) = new_tokens(model, ids, torch.ones_like(ids), options, stops)
        ids, mask = padded([prompts[index][0].tolist() for index in batch], model.device)
        lengths = {}
        for mode, name, decoder in ways:
            for texts, text in zip(found, new_tokens(decoder, ids, mask, options, stops), strict=True):
                texts[f"{mode} {name}"] = text
            lengths[f"{mode} {name}"] = round(decoder.statistics.accepted_length, 3)
        for index, texts in zip(batch, found, strict=True):
            row = {"kind": "texts", "prompt": index, "temperature": args.temperature, "batch_size": args.batch_size}
            results.add(**row, prompt_tokens=prompts[index].shape[1], accepted_lengths=lengths, texts=texts)


def new_tokens(model: Any, ids: Tensor, mask: Tensor, options: dict[str, Any], ends: set[int]) -> list[list[int]]:
    """Return what a model or decoder generates for every row, up to and with the first token that ends a text."""
    rows = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    cut = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: at + 1] for row, at in zip(rows, cut, strict=True)]


def measure_speed(
    args: argparse.Namespace, targets: dict[str, Target], prompts: list[Tensor], results: Results
) -> None:
    """Time steps of plain decoding and of the default proposer in all modes, in turns, after prompts of every length."""
    text = torch.cat([ids[0] for ids in prompts])
    for context in args.contexts:
        if results.has(kind="speed", context=context) or context + 600 > targets[WITHOUT].context:
            continue
        ids = text.repeat(-(-context // len(text)))[:context].tolist()
        loops: dict[str, tuple[DecodeLoop, Sequence]] = {}
        for mode, target in targets.items():
            for name in ("none", "hybrid"):
                decoder = Decoder(target, name, heads=args.heads)
                decoder.warmup()
                sequence = Sequence(ids, list(ids), StopChecker(10**6), SamplingParams(10**6))
                loop = decoder.new_loop()
                with loop.active():
                    loop.join([sequence])
                loops[f"{mode} {name}"] = loop, sequence
        spent, emitted = dict.fromkeys(loops, 0.0), dict.fromkeys(loops, 0)
        for turn in range(WARM + TURNS):
            for name, (loop, sequence) in loops.items():
                before, seconds = len(sequence.output_ids), loop.decode_seconds
                with loop.active():
                    for _ in range(TURN):
                        loop.step()
                if turn >= WARM:
                    spent[name] += loop.decode_seconds - seconds
                    emitted[name] += len(sequence.output_ids) - before
        speeds = {name: round(emitted[name] / spent[name], 2) for name in loops}
        steps = TURN * TURNS
        lengths = {name: round(emitted[name] / steps, 2) for name in loops}
        prefills = {name: round(loop.prefill_seconds, 2) for name, (loop, _) in loops.items()}
        results.add(
            kind="speed", context=context, tokens_per_second=speeds, accepted_lengths=lengths, prefill_seconds=prefills
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the two tables in Markdown."""
    lines = list[str]()
    texts = [row for row in rows if row["kind"] == "texts"]
    for temperature, size in sorted({(row["temperature"], row["batch_size"]) for row in texts}):
        part = [row for row in texts if (row["temperature"], row["batch_size"]) == (temperature, size)]
        lines += [*_texts_table(part, temperature), ""]
    speeds = [row for row in rows if row["kind"] == "speed"]
    if speeds:
        names = list(speeds[0]["tokens_per_second"])
        pairs = [(mode, name) for mode in EXACT for name in ("none", "hybrid")]
        costly = [f"cost of {mode}, {name}" for mode, name in pairs]
        lines += [f"| tokens/s after | {' | '.join([*names, *costly])} |", "|---" * (len(names) + len(pairs) + 1) + "|"]
        for row in speeds:
            found = row["tokens_per_second"]
            costs = [f"{found[f'{WITHOUT} {name}'] / found[f'{mode} {name}'] - 1:+.1%}" for mode, name in pairs]
            cells = [f"{found[name]:.2f} (×{row['accepted_lengths'][name]})" for name in names]
            lines.append(f"| {row['context']} | {' | '.join([*cells, *costs])} |")
    lines += [
        "",
        *(f"{row['model']}, {row['dtype']}, {json.dumps(row['environment'])}" for row in rows if row["kind"] == "run"),
    ]
    return "\n".join(lines) + "\n"


def _texts_table(texts: list[dict[str, Any]], temperature: float) -> list[str]:
    title = f"temperature {temperature}" if temperature else "greedy"
    title += f", batches of {texts[0]['batch_size']}"
    columns = [f"{what}, {mode}" for mode in MODES for what in ("equal to plain", "accepted length")]
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (2 * len(MODES) + 1) + "|"]
    for name in [name.split()[1] for name in texts[0]["texts"] if name.startswith(WITHOUT)]:
        cells = [part for mode in MODES for part in _cells(texts, mode, name)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if not temperature:
        same = [sum(row["texts"]["transformers"] == row["texts"][f"{mode} none"] for row in texts) for mode in MODES]
        lines.append(f"| transformers | {' | '.join(f'{count} of {len(texts)} | ' for count in same)} |")
    return lines


def _cells(texts: list[dict[str, Any]], mode: str, name: str) -> list[str]:
    same = sum(row["texts"][f"{mode} {name}"] == row["texts"][f"{mode} none"] for row in texts)
    length = sum(row["accepted_lengths"][f"{mode} {name}"] for row in texts) / len(texts)
    return [f"{same} of {len(texts)}", f"{length:.2f}"]


def main() -> None:
    """Run the program."""
    args = parser().parse_args()
    model, tokenizer = load_model(args.model, "cpu", args.dtype), load_tokenizer(args.model)
    encoded = encode_prompts(tokenizer, read_prompts(args.prompts, 10**6), 10**6)
    results = Results(args.output)
    packed = False if args.no_packed else None
    targets = {mode: Target(model, packed=packed, exact=None if mode == WITHOUT else mode) for mode in MODES}
    name = Path(args.model).name if args.model else "the demo model"
    promise = [target.bitwise.describe() for target in targets.values() if target.bitwise is not None]
    if not results.has(kind="run", promise=promise):
        results.add(kind="run", model=name, dtype=args.dtype, promise=promise, environment=environment())
    prompts = [torch.tensor([ids]) for ids in encoded if len(ids) <= args.max_prompt_tokens]
    step = max(1, len(prompts) // max(1, args.num_prompts))
    compare_texts(args, targets, prompts[::step], results)
    measure_speed(args, targets, prompts, results)


if __name__ == "__main__":
    main()
