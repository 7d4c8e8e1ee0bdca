"""Benchmark attention over a token tree: every backend against SDPA with a dense mask and against one-token decoding."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from medhead_kernels import bench_report as report
from medhead_kernels import flex, sdpa
from medhead_kernels.attn_metadata import AttnParams, TreeMetadata
from medhead_kernels.backends import BACKENDS, AttnSpec
from medhead_kernels.timing import copy_bandwidth, time_call

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"contexts": [512, 2048, 8192, 32768, 65536], "nodes": [1, 8, 16, 32, 64], "groups": [1, 4, 8],
             "batches": [1, 8, 32], "kv_heads": 8, "dtype": "bfloat16"},
    "cpu": {"contexts": [512, 2048], "nodes": [1, 16, 64], "groups": [1, 4], "batches": [1], "kv_heads": 2,
            "dtype": "float32"},
}  # fmt: skip
Timed = tuple[str, Callable[[], object] | None, str]  # name; call, or None and the reason why it is not run
EXAMPLES = """\
examples:
  medhead bench kernels                                       all sizes (on a CPU: a small selection)
  medhead bench kernels --contexts 2048 32768 --nodes 1 64 --groups 4 --batches 1 --output results
  medhead bench kernels --backends triton flash --dtype float16

Each row of the table is one layer's attention: tokens in the cache (context), nodes of the tree, query heads per KV head
(group) and batch rows. GB/s counts each key and value once. The next column is its share of the bandwidth of a copy on
the same device, measured in the same run (bytes read plus bytes written).
"""


@dataclass(frozen=True)
class AttnShape:
    """Sizes of one measurement."""

    context: int  # committed tokens of every row
    nodes: int
    group: int  # query heads per KV head
    batch: int
    kv_heads: int
    dim: int  # head size
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes of the keys and values that attention reads."""
        columns = self.context + self.nodes
        return 2 * self.batch * self.kv_heads * columns * self.dim * DTYPES[self.dtype].itemsize


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    options = Parser(prog="medhead bench kernels", description=__doc__, epilog=EXAMPLES,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    options.add_argument("--contexts", **numbers, help="default: 512 2048 8192 32768 65536 (CPU: 512 2048)")
    options.add_argument("--nodes", **numbers, help="default: 1 8 16 32 64 (CPU: 1 16 64)")
    options.add_argument("--groups", **numbers, help="query heads per KV head (default: 1 4 8; CPU: 1 4)")
    options.add_argument("--batches", **numbers, help="default: 1 8 32 (CPU: 1)")
    options.add_argument("--kv-heads", type=int, help="default: 8 (CPU: 2)")
    options.add_argument("--dim", type=int, default=128, help="head size (default: 128)")
    options.add_argument("--backends", nargs="+", default=["sdpa", "triton", "flash"], choices=sorted(BACKENDS),
                         metavar="NAME", help=f"of {', '.join(sorted(BACKENDS))} (default: sdpa triton flash)")  # fmt: skip
    options.add_argument("--flex", action="store_true", help="add PyTorch's FlexAttention, recompiled for many sizes")
    options.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 (CPU: float32)")
    options.add_argument("--device", default="auto", help="cuda or cpu (default: cuda if available)")
    options.add_argument("--max-gib", type=float, default=16.0, help="skip caches larger than this (default: 16)")
    options.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    options.add_argument("--seconds", type=float, default=0.1, help="duration of each measurement (default: 0.1)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and bandwidth.png")
    return options


def resolve_options(args: argparse.Namespace) -> None:
    """Fill in the defaults of the device; a wrong value raises a `ValueError`."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device not in DEFAULTS:
        raise ValueError(f"--device must be auto, cuda or cpu, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; leave the option out or use --device cpu")
    for name, default in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name in ("contexts", "nodes", "groups", "batches", "kv_heads", "dim", "threads"):
        value = getattr(args, name)
        smallest = min(value) if isinstance(value, list) else value
        if smallest is not None and smallest < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {smallest}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.output is not None and args.output.is_file():
        raise ValueError(f"--output {str(args.output)!r} is a file; give a folder")


def shapes(args: argparse.Namespace) -> list[AttnShape]:
    """Return all combinations of sizes whose cache is at most `--max-gib`."""
    sizes = product(args.batches, args.groups, args.contexts, args.nodes)
    found = [AttnShape(c, n, g, b, args.kv_heads, args.dim, args.dtype) for b, g, c, n in sizes]
    return [shape for shape in found if shape.nbytes <= args.max_gib * 2**30]


def random_inputs(shape: AttnShape, device: str) -> tuple[Tensor, Tensor, Tensor, TreeMetadata]:
    """Return random queries, keys, values, and a random tree."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, columns = DTYPES[shape.dtype], shape.context + shape.nodes

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    query = normal(shape.batch, shape.kv_heads * shape.group, shape.nodes, shape.dim)
    key, value = (normal(shape.batch, shape.kv_heads, columns, shape.dim) for _ in range(2))
    visible, host = torch.eye(shape.nodes, dtype=torch.long), torch.Generator().manual_seed(0)
    for node in range(1, shape.nodes):
        visible[node] += visible[int(torch.randint(0, node, (), generator=host))]
    bits = torch.nn.functional.pad(visible, (0, -shape.nodes % 64)).unflatten(1, (-1, 64))
    bitmask, depth = (bits << torch.arange(64)).sum(-1)[None], visible.sum(1)[None] - 1
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    tree = TreeMetadata(lengths, (shape.context,) * shape.batch, bitmask.to(device), depth.to(device))
    return query, key, value, tree


def timed_calls(
    names: list[str], query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, with_flex: bool = False
) -> Iterator[Timed]:
    """Yield a call for every backend; dense masks are built here, outside of the measured time."""
    params = AttnParams(query.shape[3] ** -0.5)
    for name in names:
        reason = BACKENDS[name].unsupported_reason(AttnSpec.of(query, value, params))
        if reason is not None:
            yield name, None, reason
        elif name == "sdpa":
            bias = tree.bias(key.shape[2], None, query.dtype)
            yield name, partial(sdpa.attention, query, key, value, bias, params.scale), ""
        else:
            yield name, partial(BACKENDS[name].attention, query, key, value, tree, params), ""
    if with_flex:
        yield "FlexAttention", flex.prepare(query, key, value, tree, params.scale), ""
    if query.device.type == "cuda":
        yield _one_token(query, key, value, tree)


def _one_token(query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata) -> Timed:
    """Return flash-attn's decoding of one token over the same cache, the cost of plain decoding."""
    name = "flash-attn, one token"
    try:
        from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return name, None, "flash-attn is not installed"
    if query.dtype == torch.float32:
        return name, None, "flash-attn supports bfloat16 and float16 only"
    token = query[:, :, :1].transpose(1, 2).contiguous()
    keys, values, lengths = key.transpose(1, 2), value.transpose(1, 2), tree.lengths + 1
    return name, partial(flash_attn_with_kvcache, token, keys, values, cache_seqlens=lengths), ""


def measure(args: argparse.Namespace, copy: float) -> list[dict[str, Any]]:
    """Time every call for every shape; `copy` is the bandwidth of a copy in bytes per second."""
    todo, rows = shapes(args), list[dict[str, Any]]()
    for done, shape in enumerate(todo):
        _progress(done, len(todo), f"context {shape.context}, {shape.nodes} nodes, batch {shape.batch}")
        tensors = random_inputs(shape, args.device)
        seconds: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for name, call, reason in timed_calls(args.backends, *tensors, with_flex=args.flex):
            reasons[name] = reason
            try:
                if call is not None:
                    seconds[name] = time_call(call, args.device, args.seconds)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                reasons[name] = "out of memory"
        for name, reason in reasons.items():
            row: dict[str, Any] = {"name": name, **asdict(shape), "microseconds": None, "gb_per_second": None,
                                   "share_of_copy": None, "x_sdpa": None, "unsupported_reason": reason}  # fmt: skip
            if name in seconds:
                rate = shape.nbytes / seconds[name]
                row |= {"microseconds": round(seconds[name] * 1e6, 2), "gb_per_second": round(rate / 1e9, 2)}
                row["share_of_copy"] = round(rate / copy, 4)
                row["x_sdpa"] = round(seconds["sdpa"] / seconds[name], 3) if "sdpa" in seconds else None
            rows.append(row)
        del tensors
    _progress(len(todo), len(todo), "")
    return rows


def run(args: argparse.Namespace) -> None:
    """Check the options, measure, print the table and write the files."""
    resolve_options(args)
    if not shapes(args):
        raise ValueError(f"every requested size is larger than --max-gib {args.max_gib:g}; raise it")
    if args.device == "cpu":
        print("measuring small sizes on a CPU; the numbers say nothing about a GPU", file=sys.stderr)
    copy = copy_bandwidth(args.device)
    rows = measure(args, copy)
    machine = report.machine(args.device, copy)
    heading = f"{machine['device']}, copy {copy / 1e9:.0f} GB/s, {args.dtype}, {args.kv_heads} KV heads of {args.dim}"
    text = f"{heading}\n\n{report.table(rows)}\n"
    print(text, end="")
    if args.output is None:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
    (args.output / "table.md").write_text(text)
    written = "results.json, table.md"
    try:
        report.plot(rows, heading, args.output / "bandwidth.png")
        written += ", bandwidth.png"
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'medhead[bench]')", file=sys.stderr)
    print(f"wrote {args.output}/{written}", file=sys.stderr)


def _progress(done: int, total: int, label: str) -> None:
    if sys.stderr.isatty():
        end = "" if done < total else "\n"
        print(f"\r\033[K[{'#' * (30 * done // total):30}] {done}/{total} {label}", end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for wrong input, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"medhead bench kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
