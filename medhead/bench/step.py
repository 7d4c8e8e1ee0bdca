"""What one step costs at the sizes of real models: `python -m medhead.bench.step`.

Models have random weights (nothing is downloaded) and the shapes of Llama-3.2-1B, Llama-3.1-8B or Qwen3-30B-A3B. A step of
`transformers` generate (eager, and with a static cache, which it compiles on CUDA), our plain step, our verify step at
several tree sizes, and captured steps (`medhead.compile`), with heads of noise as well, are set against the time it takes
to read the weights once at the bandwidth of a copy measured here.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from medhead.bench import captured_steps
from medhead.bench.report import machine, write_results
from medhead.bench.step_ratios import ratios
from medhead.cli.common import Parser, guarded
from medhead.compile import WAYS
from medhead.core.acceptance import accept
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.heads.base import KINDS
from medhead.model.loading import pick_device, pick_dtype
from medhead.model.target import ATTENTIONS, Target
from medhead_kernels.timing import copy_bandwidth

EXAMPLES = """\
examples:
  python -m medhead.bench.step --shapes 1b 8b --output results/step            # a GPU
  python -m medhead.bench.step --shapes tiny --context 64 --nodes 8            # any laptop, to see it run
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
NEW_TOKENS = 32  # of a run of generate


@dataclass
class Case:
    """One model, batch and context."""

    shape: str
    model: PreTrainedModel
    target: Target
    ids: Tensor
    repeats: int


def build(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with small random weights, made on the device."""
    config = copy.deepcopy(SHAPES[shape]())
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def read_bytes(model: PreTrainedModel) -> float:
    """Bytes of the weights that one token reads: all but the embedding's other rows and experts that are not asked."""
    config: Any = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    output: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    total = 0.0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        total += size * (share if ".experts." in name else 1.0)
    own = embedding.weight is not output.weight
    return total - own * embedding.weight.numel() * embedding.weight.element_size()


def steps_of(case: Case, nodes: list[int]) -> dict[str, float]:
    """Median seconds of every kind of step."""
    found = {"transformers, eager": generate_step(case)}
    if case.target.device.type == "cuda":
        found["transformers, static cache, compiled"] = generate_step(case, cache_implementation="static")
    with torch.inference_mode(), case.target.active():
        cache = case.target.new_cache(len(case.ids), case.ids.shape[1] + max(nodes) + 1)
        case.target.prefill(cache, case.ids.tolist())
        for count in (1, *nodes):
            name = "medhead, plain" if count == 1 else f"medhead, {count} nodes"
            found[name] = median(lambda count=count: whole_step(case.target, cache, count), case)  # type: ignore[misc]
    return found


def captured_steps_of(case: Case, nodes: list[int], ways: list[str], kinds: list[str]) -> dict[str, float]:
    """The same for captured steps."""
    rows, context = case.ids.shape
    found = {}
    for way in ways:
        for name, step in captured_steps.steps_of(case.target, rows, context, nodes, way, kinds):
            found[f"medhead, {name}"] = median(step, case)
    return found


def whole_step(target: Target, cache: Any, count: int) -> None:
    """Verify a random binary tree, accept, read by the host, commit; the cache is then as before."""
    batch, lengths = len(cache.lengths), list(cache.lengths)
    tokens = torch.randint(target.vocab_size, (batch, count), device=target.device)
    index = torch.arange(count, device=target.device)
    tree = TokenTree.root(tokens[:, 0])
    if count > 1:
        tree = TokenTree.from_parents(tokens, ((index - 1) // 2).clamp(min=0))
    logits, _ = target.verify(cache, tree)
    accepted = accept(tree, logits.argmax(-1))
    cache.commit(accepted.counts.tolist(), accepted.path if count > 1 else None)
    cache.lengths = lengths


def median(step: Callable[[], object], case: Case) -> float:
    """Seconds of a step: median of the repeats after three to warm up."""
    times = []
    for _ in range(case.repeats + 3):
        began = time.perf_counter()
        step()
        if case.target.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def generate_step(case: Case, **options: Any) -> float:
    """Seconds of a token of `transformers` generate, the prompt's pass taken out."""

    def run(count: int) -> float:
        began = time.perf_counter()
        case.model.generate(
            case.ids, attention_mask=torch.ones_like(case.ids), min_new_tokens=count, max_new_tokens=count,
            do_sample=False, **options,
        )  # fmt: skip
        if case.target.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(NEW_TOKENS), run(1)
    rates = [(run(NEW_TOKENS) - run(1)) / (NEW_TOKENS - 1) for _ in range(3)]
    return statistics.median(rates)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a step."""
    lines = ["| shape | batch | context | step | ms | × reading the weights |", "|---|--:|--:|---|--:|--:|"]
    lines += [
        f"| {r['shape']} | {r['batch']} | {r['context']} | {r['step']} | {r['ms']:.3f} | {r['of_reading']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of every step against reading the weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{r['shape']}, batch {r['batch']}, {r['context']}: {r['step']}" for r in rows]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.4))
    colours = ["#0072B2" if r["step"].startswith("medhead") else "#999999" for r in rows]
    axis.barh(names, [r["of_reading"] for r in rows], color=colours)
    axis.axvline(1.0, color="#D55E00", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlabel("time of a step / time to read the weights once")
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.bench.step",
        description="What does a step cost at the size of real models? Random weights, nothing is downloaded.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["1b", "8b"], help="(default: 1b 8b)")
    options.add_argument("--batch", type=int, nargs="+", default=[1], help="rows (default: 1)")
    options.add_argument("--context", type=int, nargs="+", default=[2048], help="committed tokens (default: 2048)")
    options.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32, 64], help="trees (default: 8 16 32 64)")
    options.add_argument("--steps", nargs="*", choices=sorted(WAYS), default=None, metavar="WAY",
                         help="captured steps: graph, compiled, ... (default: graph on CUDA, else none)")  # fmt: skip
    options.add_argument("--heads", nargs="*", choices=sorted(KINDS), default=["block", "recurrent"],
                         metavar="KIND", help="heads of noise in captured steps, 8 deep (default: block recurrent)")  # fmt: skip
    options.add_argument("--repeats", type=int, default=20, help="of every step of ours (default: 20)")
    options.add_argument("--attention", choices=ATTENTIONS, default="auto", help="backend (default: auto)")
    options.add_argument("--dtype", default="auto", help="type (default: bfloat16 on CUDA, float32 on a CPU)")
    options.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and step.png")
    return options


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    for name, least in (("batch", 1), ("context", 2), ("nodes", 2)):
        if min(getattr(args, name)) < least:
            raise MedheadError(f"--{name} must be at least {least}, got {min(getattr(args, name))}")
    if args.repeats < 1 or max(args.nodes) > 256:
        raise MedheadError(
            f"--repeats must be at least 1 and --nodes at most 256, got {args.repeats} and {max(args.nodes)}"
        )
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")
    device = pick_device(args.device)
    if args.steps is None:
        args.steps = ["graph"] if device.type == "cuda" else []
    dtype = pick_dtype("bfloat16" if args.dtype == "auto" and device.type == "cuda" else args.dtype, device)
    bandwidth, rows = copy_bandwidth(device.type), list[dict[str, Any]]()
    for shape in args.shapes:
        _say(f"{shape}: building")
        model = build(shape, device, dtype)
        target, reading = Target(model, attention=args.attention), read_bytes(model) / bandwidth
        for batch in args.batch:
            for context in args.context:
                _say(f"{shape}: batch {batch}, context {context}")
                ids = torch.randint(target.vocab_size, (batch, context), device=device)
                case = Case(shape, model, target, ids, args.repeats)
                steps = steps_of(case, args.nodes) | captured_steps_of(case, args.nodes, args.steps, args.heads)
                for step, seconds in steps.items():
                    rows.append(
                        {"shape": shape, "batch": batch, "context": context, "step": step, "ms": round(1000 * seconds, 4),
                         "of_reading": round(seconds / reading, 3), "reading_ms": round(1000 * reading, 4)}
                    )  # fmt: skip
        del model, target
    where = machine()
    place = where["gpu"] if device.type == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    heading = f"{str(dtype).removeprefix('torch.')}, {place}, copy {bandwidth / 1e9:.0f} GB/s, {where['date']}"
    text = "\n".join([table(rows), "", *(f"- {line}" for line in ratios(rows))])
    print(f"{heading}\n\n{text}")
    if args.output is None:
        return
    content = {"machine": where, "copy_bytes_per_second": bandwidth, "options": vars(args), "results": rows}
    _say(write_results(args.output, heading, text, content, "step.png", lambda path: plot(rows, heading, path)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.bench.step", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
