"""Time verify passes of a hybrid target against passes over one token, and count the memory that a node adds.

The target has the shape of a Qwen3.5 model (Gated DeltaNet and attention) and random weights. Passes of all sizes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medhead.bench import harness
from medhead.bench.harness import COLOURS, Row
from medhead.bench.measure import synchronize
from medhead.bench.memory import PeakMemory
from medhead.cli.common import Parser, run_command
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.model.kv_cache import TreeCache
from medhead.model.loading import pick_device, pick_dtype
from medhead.model.target import Target

SHAPES: dict[str, dict[str, Any]] = {
    "0.8b": {
        "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "tie_word_embeddings": True,
    },
}  # fmt: skip
FORMS = {"once": "all nodes at once", "depth": "depth by depth"}
TRANSFORMERS = "transformers"
MIB = 2**20
EXAMPLES = """\
examples:
  OMP_NUM_THREADS=2 python benchmarks/hybrids/run.py --output benchmarks/hybrids
  python benchmarks/hybrids/run.py --shape tiny --repeats 3 --context 16        a second, to see it run

columns: ms is the median of a verify pass, and of the commit that follows it; the ratio is that of both to those of one node.
A node adds the memory that the cache holds until the commit (held), and what a pass needs at its peak, logits included (peak);
keys and values lie in the cache's buffers and are not counted.
"""


def parser() -> Parser:
    """Return the parser of the program."""
    options = harness.bench_parser("hybrids", __doc__ or "", EXAMPLES, repeats=15)
    options.add_argument("--shape", choices=sorted(SHAPES), default="0.8b", help="that of a model (default: 0.8b)")
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="(default: bfloat16 float32)")
    options.add_argument("--nodes", type=int, nargs="+", default=[16, 32, 64],
                         help="tree sizes beside one node, 2 to 256 (default: 16 32 64)")  # fmt: skip
    options.add_argument("--context", type=int, default=256, help="tokens in the cache (default: %(default)s)")
    options.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=["once"],
                         help="of layers with states: once (all nodes), depth (the reference; default: once)")  # fmt: skip
    return options


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model of this shape with random weights, made on the device."""
    try:
        config = AutoConfig.for_model("qwen3_5_text", **SHAPES[shape])
    except ValueError:
        raise MedheadError("this benchmark needs a transformers that has the model type qwen3_5_text") from None
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def binary_tree(nodes: int, device: torch.device) -> TokenTree:
    """Return a tree in which every node has two children; one node is plain decoding."""
    index = torch.arange(nodes, device=device)
    return TokenTree.from_parents(index, ((index - 1) // 2).clamp(min=0))


class Passes:
    """Passes over trees on one context, whose length never changes: the commits change states alone."""

    def __init__(self, target: Target, context: int, nodes: list[int], forms: list[str]) -> None:
        self.target, self.context, device = target, context, target.device
        assert target.state_layers is not None, "the shapes are those of hybrids"
        self.dense = target.state_layers.dense
        self.trees = {count: binary_tree(count, device) for count in [1, *nodes]}
        self.cases = [(count, form) for count, form in product(self.trees, forms) if count > 1 or form == forms[0]]
        self.prompt = torch.randint(target.vocab_size, (1, context), device=device)
        self.cache = self.filled_cache()

    def filled_cache(self) -> TreeCache:
        """Return a cache that holds the prompt, with room for the largest tree."""
        cache = self.target.new_cache(1, self.context + max(self.trees))
        self.target.prefill(cache, self.prompt.tolist())
        return cache

    def run(self, nodes: int, form: str) -> tuple[float, float]:
        """Return the seconds of a verify pass, and of the commit of the path to its last node."""
        assert self.target.state_layers is not None
        self.target.state_layers.dense = self.dense if form == "once" else {}
        tree = self.trees[nodes]
        path = tree.visible[0, -1].nonzero()[:, 0][None]
        counts = torch.tensor([path.shape[1]], device=path.device)
        began = time.perf_counter()
        self.target.verify(self.cache, tree)
        synchronize(self.target.device)
        verified = time.perf_counter()
        self.cache.commit(path, counts)
        synchronize(self.target.device)
        return verified - began, time.perf_counter() - verified

    def memory(self, nodes: int, form: str) -> tuple[float, float]:
        """Return the MiB that a verify pass leaves in the cache until the commit, and that it needs at its peak."""
        assert self.target.state_layers is not None
        self.target.state_layers.dense = self.dense if form == "once" else {}
        with PeakMemory() as memory:
            self.target.verify(self.cache, self.trees[nodes])
        return memory.alive() / MIB, memory.peak / MIB


def transformers_pass(model: Any, prompt: torch.Tensor) -> Callable[[], float]:
    """Return a function that decodes a token with the model's own cache and returns the seconds that it took."""
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    def run() -> float:
        began = time.perf_counter()
        model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
        synchronize(prompt.device)
        return time.perf_counter() - began

    return run


@torch.inference_mode()
def measure(target: Target, args: argparse.Namespace, dtype: str) -> list[Row]:
    """Return a row of medians for every number of nodes and form, and one for a token of transformers."""
    with target.active():
        passes = Passes(target, args.context, args.nodes, args.forms)
    own = transformers_pass(target.model, passes.prompt)
    own_times, times = [], {case: list[tuple[float, float]]() for case in passes.cases}
    for repeat in range(args.repeats + 1):
        turn = repeat % len(passes.cases)
        with target.active():
            for case in passes.cases[turn:] + passes.cases[:turn]:
                times[case].append(passes.run(*case))
        own_times.append(own())
    rows: list[Row] = [
        {"dtype": dtype, "nodes": 1, "form": TRANSFORMERS, "verify_ms": _median_ms(own_times), "commit_ms": 0.0}
    ]
    for (nodes, form), pairs in times.items():
        with target.active():
            held, peak = passes.memory(nodes, form)
        verify, commit = (_median_ms(list(part)) for part in zip(*pairs, strict=True))
        rows.append({"dtype": dtype, "nodes": nodes, "form": form, "verify_ms": verify, "commit_ms": commit,
                     "held_mib": round(held, 4), "peak_mib": round(peak, 4)})  # fmt: skip
    return rows


def _median_ms(seconds: list[float]) -> float:
    """Return the median after the first, which warms up, in milliseconds."""
    return round(1000 * statistics.median(seconds[1:]), 3)


def ratio(row: Row, rows: list[Row]) -> float:
    """Return the time of a step relative to that of medhead's step over one node in the same data type."""
    one = next(r for r in rows if r["dtype"] == row["dtype"] and r["nodes"] == 1 and r["form"] != TRANSFORMERS)
    return (row["verify_ms"] + row["commit_ms"]) / (one["verify_ms"] + one["commit_ms"])


def table(rows: list[Row]) -> str:
    """Return a Markdown table of the medians."""
    header = ["data type", "form", "nodes", "verify ms", "commit ms", "ratio", "held, MiB a node", "peak, MiB a node"]
    cells = [
        [
            row["dtype"], _form(row), str(row["nodes"]), f"{row['verify_ms']:.1f}", f"{row['commit_ms']:.1f}",
            f"{ratio(row, rows):.2f}",
            *(f"{row[name] / row['nodes']:.2f}" if name in row else "" for name in ("held_mib", "peak_mib")),
        ]
        for row in rows
    ]  # fmt: skip
    return harness.markdown_table(header, cells, left=2)


def _form(row: Row) -> str:
    if row["form"] == TRANSFORMERS:
        return TRANSFORMERS
    return "one node" if row["nodes"] == 1 else FORMS[row["form"]]


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw the ratio of every data type and form by the number of nodes."""
    with harness.figure(path, title, (6, 3.5)) as axes:
        axis, lines = axes[0, 0], dict[tuple[str, str], list[tuple[int, float]]]()
        for row in rows:
            if row["form"] != TRANSFORMERS:
                lines.setdefault((row["dtype"], row["form"]), []).append((row["nodes"], ratio(row, rows)))
        for ((dtype, form), points), colour in zip(lines.items(), COLOURS, strict=False):
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"{dtype}, {FORMS[form]}")
        axis.set(xlabel="nodes", ylabel="time of a step / that of one node", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    harness.check_options(args, nodes=(2, 256), context=(1, 10**6))
    device, rows = pick_device(args.device), list[Row]()
    for dtype in args.dtypes:
        harness.say(f"{dtype}: building")
        target = Target(build(args.shape, device, pick_dtype(dtype, device)))
        rows += measure(target, args, dtype)
        del target
    title = harness.heading(args, f"shape of Qwen3.5 {args.shape}, random weights, {args.context} tokens of context")
    harness.report(args, "hybrids", title, table(rows), rows, plot)


if __name__ == "__main__":
    sys.exit(run_command(parser(), run, None))
