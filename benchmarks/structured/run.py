"""Tokens per second of answers that a JSON schema constrains, beside the free answers of the same model to the same prompts.

Four ways take turns, prompt by prompt: plain decoding and the default proposer, each free and constrained. Texts of plain
decoding and of the proposer are compared. In free answers the end token does not end the text, so that it is as long as the
constrained one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from medhead import Decoder, Grammar
from medhead.bench import harness
from medhead.bench.harness import BLUE, GREY, Row
from medhead.cli.common import Parser, add_model_options, check_range, make_decoder, run_command
from medhead.model.loading import encode_chat, load_model, load_tokenizer, pick_device, pick_dtype

EXAMPLES = """\
example:
  python benchmarks/structured/run.py --model smollm2 --dtype float32 --output benchmarks/structured
"""
TEXT = {"type": "string", "maxLength": 40}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 1000}


def schema(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has all these properties."""
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("person", "Invent a person. Give name, job, city and age.", schema(name=TEXT, job=TEXT, city=TEXT, age=NUMBER)),
    ("weather", "What is the weather in Paris in May?", schema(
        city=TEXT, month=TEXT, temperature_celsius=NUMBER, sky={"enum": ["sunny", "cloudy", "rainy"]}, advice=TEXT)),
    ("recipe", "Give me a recipe for pancakes.", schema(
        title=TEXT, minutes=NUMBER, servings=NUMBER,
        ingredients={"type": "array", "minItems": 3, "maxItems": 3, "items": schema(name=TEXT, grams=NUMBER)})),
    ("review", "Review a film that you like.", schema(
        film=TEXT, year=NUMBER, stars={"enum": [1, 2, 3, 4, 5]}, recommended={"type": "boolean"}, reason=TEXT)),
]  # fmt: skip
WAYS = [("plain", False), ("plain", True), ("speculation", False), ("speculation", True)]


def parser() -> Parser:
    """Return the parser of the program."""
    options = Parser(prog="structured/run.py", description=__doc__, epilog=EXAMPLES)
    add_model_options(options)
    options.add_argument("--max-new-tokens", type=int, default=160, help="longest answer (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=2, help="runs of every way (default: %(default)s)")
    options.add_argument("--output", type=Path, help="folder to write results.json, table.md and structured.png to")
    options.add_argument("--title", default="", help="title of table and plot")
    return options


def answer(
    decoder: Decoder, tokenizer: Any, ids: torch.Tensor, tokens: int, grammar: Grammar | None
) -> tuple[float, int, int, str]:
    """Return seconds, passes, new tokens and text of one greedy answer."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens}
    options |= {} if grammar is None else {"grammar": grammar, "tokenizer": tokenizer}
    own = decoder.model.generation_config
    end = own.eos_token_id
    try:
        own.eos_token_id = None if grammar is None else end
        out = decoder.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    finally:
        own.eos_token_id = end
    text = tokenizer.decode(out, skip_special_tokens=True)
    return decoder.statistics.decode_seconds, decoder.statistics.passes, len(out), text


def rows_of(decoders: dict[str, Decoder], tokenizer: Any, args: argparse.Namespace) -> list[Row]:
    """Return a row for every prompt and way."""
    rows = []
    for name, question, wanted in CASES:
        ids = torch.tensor([encode_chat(tokenizer, f"{question} Answer with JSON.", None, False)])
        grammar, tokens = Grammar.json_schema(wanted), args.max_new_tokens
        tokens = answer(decoders["plain"], tokenizer, ids, tokens, grammar)[2]  # of the constrained text
        found: dict[tuple[str, bool], list[tuple[float, int, int, str]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, constrained in WAYS:
                run = answer(decoders[way], tokenizer, ids, tokens, grammar if constrained else None)
                found[way, constrained].append(run)
        for (way, constrained), runs in found.items():
            seconds, passes, count, text = min(runs)
            row: Row = {"case": name, "decoding": way, "constrained": constrained, "seconds": round(seconds, 4)}
            row |= {"passes": passes, "new_tokens": count, "same": text == min(found["plain", constrained])[3]}
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def total(rows: list[Row], way: tuple[str, bool], field: str) -> float:
    """Return the sum of a field over all prompts."""
    return float(sum(row[field] for row in rows if (row["decoding"], row["constrained"]) == way))


def table(rows: list[Row]) -> str:
    """Return a row for every way."""
    base = {
        constrained: total(rows, ("plain", constrained), "new_tokens") / total(rows, ("plain", constrained), "seconds")
        for constrained in (False, True)
    }
    cells = []
    for way in WAYS:
        tokens, seconds, passes = (total(rows, way, field) for field in ("new_tokens", "seconds", "passes"))
        same = sum(row["same"] for row in rows if (row["decoding"], row["constrained"]) == way)
        speed = tokens / seconds
        cells.append([
            f"{way[0]}, {'JSON schema' if way[1] else 'free'}", f"{speed:.1f}", f"{speed / base[way[1]]:.2f}",
            f"{tokens / passes:.2f}", f"{int(same)}/{len(CASES)}",
        ])  # fmt: skip
    header = ["decoding", "tokens/s", "x plain of its kind", "accepted length", "texts as plain"]
    return harness.markdown_table(header, cells)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw the tokens per second of every way."""
    names = [f"{way}\n{'JSON schema' if constrained else 'free'}" for way, constrained in WAYS]
    speeds = [total(rows, way, "new_tokens") / total(rows, way, "seconds") for way in WAYS]
    with harness.figure(path, title, (6, 3.2)) as axes:
        bars = axes[0, 0].bar(names, speeds, color=[BLUE if constrained else GREY for _, constrained in WAYS])
        axes[0, 0].bar_label(bars, fmt="%.1f", fontsize=8)
        axes[0, 0].set_title("tokens per second", fontsize=9)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    for name in ("max_new_tokens", "repeats"):
        check_range(args, name, 1)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    decoder = make_decoder(args, load_model(args.model, device, dtype, args.trust_remote_code, args.weights))
    decoders = {"plain": Decoder(decoder.target, "none"), "speculation": decoder}
    for one in decoders.values():
        one.warmup()
    rows = rows_of(decoders, tokenizer, args)
    parts = f"greedy, {len(CASES)} prompts", str(dtype).removeprefix("torch.")
    harness.report(
        args, "structured", harness.heading(args, harness.label(args.model), *parts), table(rows), rows, plot
    )


if __name__ == "__main__":
    sys.exit(run_command(parser(), run, None))
