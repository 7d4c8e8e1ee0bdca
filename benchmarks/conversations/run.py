"""Time to the first token over the turns of a chat, and the gaps between others' tokens while a long prompt arrives.

The texts are the same with and without a prefix cache and for every chunk in float32; a warning says where they are not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from medhead.bench import harness
from medhead.bench.harness import BLUE, GREY, Row
from medhead.bench.prompts import read_prompts
from medhead.cli.common import Parser, add_model_options, check_range, make_decoder, run_command
from medhead.config import SamplingParams
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.model.loading import apply_template, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.serving import Engine, Request, RequestHandle

EXAMPLES = """\
example:
  python benchmarks/conversations/run.py --model smollm2 --output benchmarks/conversations/smollm2
"""
WHOLE = 10**9  # tokens of a chunk that is the whole prompt
FIRST_TOKENS = 16  # that every writer has before the long prompt arrives


def parser() -> Parser:
    """Return the parser of the program."""
    options = Parser(prog="conversations/run.py", description=__doc__, epilog=EXAMPLES)
    add_model_options(options)
    options.add_argument("--turns", type=int, default=10, help="messages of the chat (default: %(default)s)")
    options.add_argument("--answer-tokens", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    options.add_argument("--writers", type=int, default=4, help="requests that write meanwhile (default: %(default)s)")
    options.add_argument(
        "--long-tokens", type=int, default=4000, help="tokens of the long prompt (default: %(default)s)"
    )
    options.add_argument(
        "--chunks", type=int, nargs="+", default=[WHOLE, 512, 256, 128], help="values of --prefill-chunk to compare"
    )
    options.add_argument("--repeats", type=int, default=3, help="runs; medians count (default: %(default)s)")
    options.add_argument("--output", type=Path, help="folder to write results.json, table.md and conversations.png to")
    options.add_argument("--title", default="", help="title of table and plot")
    return options


def params(tokens: int) -> SamplingParams:
    """Return greedy parameters of a text of exactly so many tokens."""
    return SamplingParams(tokens, ignore_eos=True)


def chat(engine: Engine, tokenizer: Any, turns: int, answer_tokens: int) -> list[Row]:
    """Hold a chat; return a row for every turn."""
    messages: list[dict[str, str]] = []
    rows = []
    for turn, asked in enumerate(islice(cycle(read_prompts(None, turns)), turns)):
        messages.append(asked[-1])
        prompt = apply_template(tokenizer, messages)
        handle = engine.submit(Request(prompt, params(answer_tokens)))
        messages.append({"role": "assistant", "content": handle.wait()})
        result = handle.result
        rows.append({"turn": turn + 1, "prompt_tokens": len(prompt), "read": len(prompt) - result.cached_tokens})
        rows[-1] |= {"first_token_ms": 1000 * (result.first_token or 0.0), "text": messages[-1]["content"]}
    return rows


class Writer(threading.Thread):
    """Notes when the outputs of a request arrive."""

    def __init__(self, handle: RequestHandle) -> None:
        super().__init__(daemon=True)
        self.handle, self.times, self.tokens = handle, list[float](), list[int]()
        self.start()

    def run(self) -> None:
        """Read all outputs."""
        for output in self.handle:
            self.times.append(time.perf_counter())
            self.tokens += output.tokens

    def gaps(self, begin: float, end: float) -> list[float]:
        """Return the seconds between the outputs that arrived from `begin` to the first one after `end`."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs if after > begin and before < end]


def arrival(engine: Engine, prompt: list[int], others: Sequence[list[int]], limit: int) -> Row:
    """Let a long prompt arrive while others write; return its time to the first token and the others' gaps."""
    writers = [Writer(engine.submit(Request(list(other), params(limit)))) for other in others]
    while any(len(writer.tokens) < FIRST_TOKENS for writer in writers):
        time.sleep(0.001)
    begin = time.perf_counter()
    long = engine.submit(Request(prompt, params(1)))
    long.wait()
    end = time.perf_counter()
    ended = [writer.handle.done for writer in writers]
    time.sleep(0.05)
    for writer in writers:
        writer.handle.cancel()
        writer.join()
    if any(ended):
        raise MedheadError("an answer ended before the long prompt was read; give a smaller --long-tokens")
    gaps = sorted(gap for writer in writers for gap in writer.gaps(begin, end))
    row = {"first_token_ms": 1000 * (long.result.first_token or 0.0), "gaps": len(gaps)}
    row |= {"median_ms": 1000 * statistics.median(gaps), "p95_ms": 1000 * gaps[int(0.95 * (len(gaps) - 1))]}
    return row | {"max_ms": 1000 * gaps[-1], "texts": [writer.tokens for writer in writers]}


def medians(runs: list[Row]) -> Row:
    """Return the medians of the numbers of several rows; other values are those of the first one."""
    return {
        name: statistics.median(run[name] for run in runs) if isinstance(value, float) else value
        for name, value in runs[0].items()
    }


def measure_chat(decoder: Decoder, tokenizer: Any, args: argparse.Namespace) -> list[Row]:
    """Return a row for every turn, before (without a prefix cache) and after."""
    found: dict[str, list[list[Row]]] = {"before": [], "after": []}
    for _ in range(args.repeats):
        for name, limit in (("before", 0), ("after", None)):
            with Engine(decoder, tokenizer, heads=decoder.heads, prefix_cache_bytes=limit) as engine:
                found[name].append(chat(engine, tokenizer, args.turns, args.answer_tokens))
    if len({str([row["text"] for row in run]) for runs in found.values() for run in runs}) > 1:
        print("warning: texts differ with and without a prefix cache", file=sys.stderr)
    rows = []
    for name, runs in found.items():
        rows += [{"what": "chat", "way": name} | medians(list(turns)) for turns in zip(*runs, strict=True)]
    return [{key: value for key, value in row.items() if key != "text"} for row in rows]


def measure_arrival(decoder: Decoder, tokenizer: Any, args: argparse.Namespace) -> list[Row]:
    """Return a row for every size of a chunk."""
    known = [apply_template(tokenizer, one) for one in read_prompts(None, 8)]
    chats = list(islice(cycle(known), args.writers))
    prompt = list(islice(cycle(chain.from_iterable(known)), args.long_tokens))
    limit = int(decoder.target.context) - max(map(len, chats))
    found: dict[int, list[Row]] = {chunk: [] for chunk in args.chunks}
    for _ in range(args.repeats):
        for chunk, runs in found.items():
            limits: dict[str, Any] = {"prefix_cache_bytes": 0, "prefill_chunk": chunk, "max_rows": args.writers + 1}
            with Engine(decoder, tokenizer, heads=decoder.heads, **limits) as engine:
                runs.append(arrival(engine, prompt, chats, limit))
    texts = [run.pop("texts") for runs in found.values() for run in runs]
    for written in zip(*texts, strict=True):
        shortest = min(map(len, written))
        if len({tuple(tokens[:shortest]) for tokens in written}) > 1:
            print("warning: texts differ between chunks", file=sys.stderr)
    return [{"what": "arrival", "chunk": chunk} | medians(runs) for chunk, runs in found.items()]


def table(rows: list[Row]) -> str:
    """Return the two tables."""
    chats = {way: [row for row in rows if row.get("way") == way] for way in ("before", "after")}
    cells = [
        [
            str(a["turn"]),
            str(a["prompt_tokens"]),
            str(b["read"]),
            f"{a['first_token_ms']:.0f}",
            f"{b['first_token_ms']:.0f}",
        ]
        for a, b in zip(chats["before"], chats["after"], strict=True)
    ]
    header = ["turn", "prompt tokens", "read with the cache", "first token ms: without", "with"]
    other = []
    for row in (row for row in rows if row["what"] == "arrival"):
        chunk = "whole prompt" if row["chunk"] == WHOLE else str(row["chunk"])
        other.append([chunk, *(f"{row[name]:.0f}" for name in ("median_ms", "p95_ms", "max_ms", "first_token_ms"))])
    gaps = ["chunk", "gap between others' outputs ms: median", "95 %", "longest", "first token of the long prompt ms"]
    return f"{harness.markdown_table(header, cells)}\n\n{harness.markdown_table(gaps, other)}"


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw the time to the first token by turn, and the gaps by chunk."""
    with harness.figure(path, title, (9, 3.4), 1, 2) as axes:
        for way, colour in (("before", GREY), ("after", BLUE)):
            here = [row for row in rows if row.get("way") == way]
            label = "without" if way == "before" else "with a prefix cache"
            axes[0, 0].plot([r["turn"] for r in here], [r["first_token_ms"] for r in here], color=colour, label=label)
        axes[0, 0].set_xlabel("turn", fontsize=8)
        axes[0, 0].set_title("time to the first token, ms", fontsize=9)
        axes[0, 0].legend(frameon=False, fontsize=8)
        here = [row for row in rows if row["what"] == "arrival"]
        names = ["whole" if row["chunk"] == WHOLE else str(row["chunk"]) for row in here]
        bars = axes[0, 1].bar(names, [row["p95_ms"] for row in here], color=BLUE)
        axes[0, 1].bar_label(bars, fmt="%.0f", fontsize=7)
        axes[0, 1].set_xlabel("tokens of a chunk", fontsize=8)
        axes[0, 1].set_title("others' gap between outputs, 95 %, ms", fontsize=9)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    for name in ("turns", "answer_tokens", "writers", "long_tokens", "repeats"):
        check_range(args, name, 1)
    if min(args.chunks) < 1:
        raise MedheadError(f"--chunks must be at least 1, got {min(args.chunks)}")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    decoder = make_decoder(args, load_model(args.model, device, dtype, args.trust_remote_code, args.weights))
    if args.long_tokens >= decoder.target.context:
        raise MedheadError(
            f"--long-tokens must be below the context of {decoder.target.context}, got {args.long_tokens}"
        )
    rows = measure_chat(decoder, tokenizer, args) + measure_arrival(decoder, tokenizer, args)
    answers, others = f"answers of {args.answer_tokens} tokens", f"{args.writers} others"
    parts = f"a prompt of {args.long_tokens} tokens beside {others}", str(dtype).removeprefix("torch.")
    title = harness.heading(args, harness.label(args.model), f"chat with {answers}", *parts)
    harness.report(args, "conversations", title, table(rows), rows, plot)


if __name__ == "__main__":
    sys.exit(run_command(parser(), run, None))
