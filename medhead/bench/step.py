"""`medhead bench step`: the time of one decode step at the sizes of real models, with random weights."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from medhead.bench import harness
from medhead.bench.captured_steps import FORWARD_ONLY, captured_steps, eager_steps
from medhead.bench.harness import Row
from medhead.bench.measure import synchronize
from medhead.cli.common import Parser, add_exact_option, exact_of, run_command
from medhead.compile import BACKENDS
from medhead.heads.base import KINDS
from medhead.model.loading import pick_device, pick_dtype
from medhead.model.target import ATTENTIONS, Target
from medhead_kernels.timing import copy_bandwidth

EXAMPLES = """\
examples:
  medhead bench step --shapes 1b 8b --output results/step            a GPU
  medhead bench step --shapes tiny --context 64 --nodes 8            any laptop, to see it run

shapes: 1b Llama-3.2-1B, 8b Llama-3.1-8B, 30b-a3b Qwen3-30B-A3B; demo and tiny are small Llamas.
method: plain and verify steps of medhead, its captured steps with and without heads, and steps of transformers generate
(eager; on CUDA also compiled with a static cache) are set against the time to read the weights once at the bandwidth of a
copy that is measured here: no step at batch 1 can be faster than that.
"""
LLAMA3 = {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "demo": lambda: LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "1b": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072, **LLAMA3,
    ),
    "8b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072, **LLAMA3,
    ),
    "30b-a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=40960,
    ),
}  # fmt: skip
NEW_TOKENS = 32  # tokens of a timed run of `generate`
EAGER, PLAIN = "transformers, eager", "medhead, plain"


def build(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of this shape with random weights, made on the device."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def weight_bytes(model: PreTrainedModel) -> float:
    """Return the bytes of weights that one token reads: one row of the embedding, and only the experts it is routed to."""
    config: Any = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    output: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    total = sum(p.nbytes * (share if ".experts." in name else 1.0) for name, p in model.named_parameters())
    tied = embedding.weight is output.weight
    return total - (0 if tied else embedding.weight.nbytes)


def time_steps(args: argparse.Namespace, target: Target, batch: int, context: int) -> dict[str, float]:
    """Return the median seconds of every kind of step."""
    ids, nodes = torch.randint(target.vocab_size, (batch, context), device=target.device), args.nodes
    found = {EAGER: generate_step(target, ids)}
    if target.device.type == "cuda":
        found["transformers, static cache, compiled"] = generate_step(target, ids, cache_implementation="static")
    for name, step in eager_steps(target, ids, nodes):
        found[f"medhead, {name}"] = median(step, target.device, args.repeats)
    for backend in args.steps:
        for name, step in captured_steps(target, batch, context, nodes, backend, args.heads):
            found[f"medhead, {name}"] = median(step, target.device, args.repeats)
    return found


def median(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a step over the repeats, after three runs to warm up."""
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def generate_step(target: Target, ids: Tensor, **options: Any) -> float:
    """Return the seconds per token of transformers `generate` without the prefill."""
    model: Any = target.model

    def run(count: int) -> float:
        began = time.perf_counter()
        limits = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **options)
        synchronize(target.device)
        return time.perf_counter() - began

    run(NEW_TOKENS), run(1)
    return statistics.median((run(NEW_TOKENS) - run(1)) / (NEW_TOKENS - 1) for _ in range(3))


def table(rows: list[Row]) -> str:
    """Return a Markdown table with one line for each step."""
    header = ["shape", "batch size", "context", "step", "ms", "× reading the weights"]
    cells = [
        [row["shape"], str(row["batch_size"]), str(row["context"]), row["step"], f"{row['ms']:.3f}",
         f"{row['vs_weight_read']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return harness.markdown_table(header, cells, left=4)


def ratios(rows: list[Row]) -> list[str]:
    """Return one line of ratios for every shape, batch size, context and way to run steps."""
    lines = []
    for place in dict.fromkeys((row["shape"], row["batch_size"], row["context"]) for row in rows):
        here = {row["step"]: row for row in rows if (row["shape"], row["batch_size"], row["context"]) == place}
        ways = ["", *(name.removeprefix(f"{PLAIN}, ") for name in here if name.startswith(f"{PLAIN}, "))]
        where = f"{place[0]}, batch {place[1]}, {place[2]} tokens"
        lines += [f"{where}, {way or 'eager'}: {_ratios_of_way(here, way)}" for way in ways]
    return lines


def _ratios_of_way(here: dict[str, Row], way: str) -> str:
    suffix = f", {way}" if way else ""
    ms = {name: row["ms"] for name, row in here.items()}
    plain, found = f"{PLAIN}{suffix}", []
    trees = [name for name in ms if name.startswith("medhead, ") and name.endswith(f"nodes{suffix}")]
    if plain in ms:
        found.append(f"a plain step takes {here[plain]['vs_weight_read']:.2f}x the time to read the weights")
        if EAGER in ms:
            found.append(f"{ms[EAGER] / ms[plain]:.2f}x the speed of transformers generate")
        if trees:
            largest = max(trees, key=_nodes)
            found.append(f"{_nodes(largest)} nodes take {ms[largest] / ms[plain]:.2f}x a plain step")
    for name in ms:
        forward = f"medhead, {_nodes(name)} nodes{suffix}, {FORWARD_ONLY}"
        if name.endswith(f"heads{suffix}") and forward in ms:
            kind = name.split(" with ")[1].split(" heads")[0]
            share = 1 - ms[forward] / ms[name]
            found.append(f"{kind} heads, {_nodes(name)} nodes: {share:.0%} of the step is outside the forward pass")
    return "; ".join(found)


def _nodes(name: str) -> int:
    """Return the number in `medhead, 64 nodes ...`, 0 for other steps."""
    digits = name.removeprefix("medhead, ").split(" ")[0]
    return int(digits) if digits.isdigit() else 0


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw the time of every step against the time to read the weights."""
    names = [f"{row['shape']}, batch {row['batch_size']}, {row['context']}: {row['step']}" for row in rows]
    with harness.figure(path, title, (9, 0.32 * len(rows) + 1.4)) as axes:
        axis = axes[0][0]
        colours = [harness.BLUE if row["step"].startswith("medhead") else harness.GREY for row in rows]
        axis.barh(names, [row["vs_weight_read"] for row in rows], color=colours)
        axis.axvline(1.0, color=harness.ORANGE, linewidth=1)
        axis.invert_yaxis()
        axis.set_xlabel("time of a step / time to read the weights once")


def parser() -> Parser:
    """Return the parser of the command."""
    options = harness.bench_parser("step", "Time one decode step at the sizes of real models.", EXAMPLES, repeats=20)
    options.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["1b", "8b"], help="(default: 1b 8b)")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="sequences per step (default: 1)")
    options.add_argument("--context", type=int, nargs="+", default=[2048], help="tokens in the cache (default: 2048)")
    options.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32, 64],
                         help="tree sizes, 2 to 256 (default: 8 16 32 64)")  # fmt: skip
    options.add_argument("--steps", nargs="*", choices=sorted(BACKENDS), metavar="BACKEND",
                         help="captured steps: graph, compiled, ... (default: graph on CUDA, else none)")  # fmt: skip
    options.add_argument("--heads", nargs="*", choices=sorted(KINDS), default=["block", "recurrent"], metavar="KIND",
                         help="random heads of depth 8 in captured steps (default: block recurrent)")  # fmt: skip
    options.add_argument("--attention", choices=ATTENTIONS, default="auto", help="attention backend (default: auto)")
    add_exact_option(options)
    options.add_argument("--dtype", default="auto", help="data type (default: bfloat16 on CUDA, float32 on a CPU)")
    return options


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    harness.check_options(args, batch_sizes=(1, 4096), context=(2, 10**7), nodes=(2, 256))
    device = pick_device(args.device)
    if args.steps is None:
        args.steps = ["graph"] if device.type == "cuda" else []
    dtype = pick_dtype("bfloat16" if args.dtype == "auto" and device.type == "cuda" else args.dtype, device)
    bandwidth, rows = copy_bandwidth(device.type), list[Row]()
    for shape in args.shapes:
        harness.say(f"{shape}: building")
        model = build(shape, device, dtype)
        target, reading = Target(model, attention=args.attention, exact=exact_of(args)), weight_bytes(model) / bandwidth
        for batch, context in product(args.batch_sizes, args.context):
            harness.say(f"{shape}: batch {batch}, context {context}")
            rows += [
                {"shape": shape, "batch_size": batch, "context": context, "step": step, "ms": round(1000 * seconds, 4),
                 "vs_weight_read": round(seconds / reading, 3), "weight_read_ms": round(1000 * reading, 4)}
                for step, seconds in time_steps(args, target, batch, context).items()
            ]  # fmt: skip
        del model, target
    title = harness.heading(args, str(dtype).removeprefix("torch."), f"copy {bandwidth / 1e9:.0f} GB/s")
    text = "\n".join([table(rows), "", *(f"- {line}" for line in ratios(rows))])
    harness.report(args, "step", title, text, rows, plot, copy_bytes_per_second=bandwidth)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(parser(), run, argv)
