"""How fast is attention over a tree? Every backend against PyTorch's SDPA with a dense mask, and against one-token decoding."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medhead_kernels import bench_report as report
from medhead_kernels.attn_metadata import Scoring, TreeColumns
from medhead_kernels.backends import BACKENDS, Case
from medhead_kernels.timing import copy_bandwidth, seconds_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ONE_TOKEN, FLEX = "flash-attn, one token", "FlexAttention"
EXAMPLES = """\
examples:
  python -m medhead_kernels.bench                                       everything (on a CPU: a small selection)
  python -m medhead_kernels.bench --contexts 2048 32768 --nodes 1 64 --groups 4 --batches 1 --output results
  python -m medhead_kernels.bench --backends triton flash --dtype float16

Each row is one layer's attention: tokens in the cache (context), nodes of the tree, query heads per key head (group),
batch rows. GB/s counts each key and value once, as a perfect kernel would read them; the share beside it is of a copy on
the same device, measured in the same run (its bytes counted read and written). --flex adds PyTorch's FlexAttention, which
is compiled anew for many sizes and is no backend of medhead's.
"""


@dataclass(frozen=True)
class Shape:
    """One measured size.

    Attributes:
        context: committed tokens of every row.
        nodes: nodes of the tree.
        group: query heads per key head.
        batch: rows.
        key_heads: key heads.
        dim: size of a head.
        dtype: name of the type.
    """

    context: int
    nodes: int
    group: int
    batch: int
    key_heads: int
    dim: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Keys and values that attention has to read."""
        columns = self.context + self.nodes
        return 2 * self.batch * self.key_heads * columns * self.dim * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Result:
    """What one contestant took for one shape.

    Attributes:
        name: the contestant.
        shape: what was computed.
        seconds: of one call, None when it was not run.
        why_not: the reason, if it was not run.
    """

    name: str
    shape: Shape
    seconds: float | None = None
    why_not: str = ""

    def as_dict(self, copy: float, sdpa: float | None) -> dict[str, Any]:
        """For JSON and tables, with bandwidth, its share of a copy's, and the ratio to SDPA."""
        rate = None if self.seconds is None else self.shape.bytes / self.seconds
        return {
            "name": self.name,
            **asdict(self.shape),
            "microseconds": None if self.seconds is None else round(self.seconds * 1e6, 2),
            "gb_per_second": None if rate is None else round(rate / 1e9, 2),
            "share_of_copy": None if rate is None else round(rate / copy, 4),
            "x_sdpa": None if self.seconds is None or sdpa is None else round(sdpa / self.seconds, 3),
            "why_not": self.why_not,
        }


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = argparse.ArgumentParser(
        prog="medhead_kernels.bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    options.add_argument("--contexts", **numbers, help="default: 512 2048 8192 32768 65536 (CPU: 512 2048)")
    options.add_argument("--nodes", **numbers, help="default: 1 8 16 32 64 (CPU: 1 16 64)")
    options.add_argument("--groups", **numbers, help="query heads per key head (default: 1 4 8; CPU: 1 4)")
    options.add_argument("--batches", **numbers, help="default: 1 8 32 (CPU: 1)")
    options.add_argument("--key-heads", type=int, help="default: 8 (CPU: 2)")
    options.add_argument("--dim", type=int, default=128, help="size of a head (default: 128)")
    options.add_argument("--backends", nargs="+", default=["sdpa", "triton", "flash"], choices=sorted(BACKENDS),
                         metavar="NAME", help=f"of {', '.join(sorted(BACKENDS))} (default: sdpa triton flash)")  # fmt: skip
    options.add_argument("--flex", action="store_true", help="PyTorch's FlexAttention as well, compiled")
    options.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 (CPU: float32)")
    options.add_argument("--device", default="auto", help="cuda or cpu (default: cuda if there is one)")
    options.add_argument("--most-gib", type=float, default=16.0, help="skip caches larger than this (default: 16)")
    options.add_argument("--threads", type=int, help="threads of a CPU (default: PyTorch's choice)")
    options.add_argument("--seconds", type=float, default=0.1, help="time for each measurement (default: 0.1)")
    options.add_argument("--output", type=Path, help="folder for results.json, table.md and bandwidth.png")
    return options


def fill_defaults(args: argparse.Namespace) -> None:
    """Sizes that were not given, for the device; and refusals.

    Raises:
        ValueError: names the option, its value and what is possible.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device not in ("cuda", "cpu"):
        raise ValueError(f"--device must be auto, cuda or cpu, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; leave the option out or use --device cpu")
    cpu = args.device == "cpu"
    args.contexts = args.contexts or ([512, 2048] if cpu else [512, 2048, 8192, 32768, 65536])
    args.nodes = args.nodes or ([1, 16, 64] if cpu else [1, 8, 16, 32, 64])
    args.groups = args.groups or ([1, 4] if cpu else [1, 4, 8])
    args.batches = args.batches or ([1] if cpu else [1, 8, 32])
    args.key_heads = (2 if cpu else 8) if args.key_heads is None else args.key_heads
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    for name in ("contexts", "nodes", "groups", "batches"):
        if min(getattr(args, name)) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(getattr(args, name))}")
    for name, value in (("key-heads", args.key_heads), ("dim", args.dim), ("seconds", args.seconds)):
        if value <= 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.output is not None and args.output.is_file():
        raise ValueError(f"--output {str(args.output)!r} is a file; give a folder")


def shapes(args: argparse.Namespace) -> list[Shape]:
    """All sizes that fit into `--most-gib`."""
    sizes = product(args.batches, args.groups, args.contexts, args.nodes)
    every = [Shape(c, n, g, b, args.key_heads, args.dim, args.dtype) for b, g, c, n in sizes]
    return [shape for shape in every if shape.bytes <= args.most_gib * 2**30]


def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, TreeColumns]:
    """Random query, keys, values, and a random tree."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, columns = DTYPES[shape.dtype], shape.context + shape.nodes

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    query = normal(shape.batch, shape.key_heads * shape.group, shape.nodes, shape.dim)
    key, value = (normal(shape.batch, shape.key_heads, columns, shape.dim) for _ in range(2))
    words = torch.zeros(1, shape.nodes, -(-shape.nodes // 64), dtype=torch.int64)
    depth = torch.zeros(1, shape.nodes, dtype=torch.int64)
    host = torch.Generator().manual_seed(0)
    for node in range(shape.nodes):
        if node:
            parent = int(torch.randint(0, node, (), generator=host))
            words[0, node], depth[0, node] = words[0, parent], depth[0, parent] + 1
        bit = 1 << node % 64
        words[0, node, node // 64] |= bit - (1 << 64) if bit >= 1 << 63 else bit
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    return query, key, value, TreeColumns(lengths, (shape.context,) * shape.batch, words.to(device), depth.to(device))


def contestants(
    names: list[str], query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, with_flex: bool = False
) -> Iterator[tuple[str, Callable[[], object] | None, str]]:
    """Name, call and reason of every contestant; the call is None where it cannot serve. Dense masks are made beforehand."""
    scoring = Scoring(query.shape[3] ** -0.5)
    for name in names:
        backend = BACKENDS[name]
        reason = backend.why_not(Case.of(query, value, scoring))
        if reason is not None:
            yield name, None, reason
        elif name == "sdpa":
            from medhead_kernels import sdpa

            bias = tree.bias(key.shape[2], None, query.dtype)
            yield name, partial(sdpa.attention, query, key, value, bias, scoring.scale), ""
        else:
            yield name, partial(backend.attention, query, key, value, tree, scoring), ""
    if with_flex:
        from medhead_kernels import flex

        yield FLEX, flex.prepared(query, key, value, tree, scoring.scale), ""
    if query.device.type == "cuda":
        yield ONE_TOKEN, *_one_token(query, key, value, tree)


def _one_token(query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns) -> tuple[Callable[[], object] | None, str]:
    """flash-attn's decoding of one token over the same cache: what a tree of one node costs elsewhere."""
    try:
        from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None, "flash-attn is not installed"
    if query.dtype == torch.float32:
        return None, "flash-attn computes in halves only"
    one = query[:, :, :1].transpose(1, 2).contiguous()
    keys, values, lengths = key.transpose(1, 2), value.transpose(1, 2), tree.lengths + 1
    return lambda: flash_attn_with_kvcache(one, keys, values, cache_seqlens=lengths), ""


def measure(args: argparse.Namespace) -> list[Result]:
    """Every contestant for every shape."""
    todo, results = shapes(args), []
    for done, shape in enumerate(todo):
        _progress(done, len(todo), shape)
        tensors = inputs(shape, args.device)
        for name, call, reason in contestants(args.backends, *tensors, with_flex=args.flex):
            if call is None:
                results.append(Result(name, shape, why_not=reason))
                continue
            try:
                results.append(Result(name, shape, seconds_of(call, args.device, args.seconds)))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                results.append(Result(name, shape, why_not="out of memory"))
        del tensors
    _progress(len(todo), len(todo), None)
    return results


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    fill_defaults(args)
    if not shapes(args):
        raise ValueError(f"every size asked for is larger than --most-gib {args.most_gib:g}")
    if args.device == "cpu":
        print("a CPU: small sizes; nothing here says how fast a GPU is", file=sys.stderr)
    copy = copy_bandwidth(args.device)
    results = measure(args)
    sdpa = {result.shape: result.seconds for result in results if result.name == "sdpa"}
    rows = [result.as_dict(copy, sdpa.get(result.shape)) for result in results]
    where = report.machine(args.device, copy)
    heading = f"{where['device']}, copy {copy / 1e9:.0f} GB/s, {args.dtype}, {args.key_heads} key heads of {args.dim}"
    text = report.table(rows)
    print(f"{heading}\n\n{text}")
    if args.output is None:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps({"machine": where, "results": rows}, indent=1) + "\n")
    (args.output / "table.md").write_text(f"{heading}\n\n{text}\n")
    try:
        report.plot(rows, heading, args.output / "bandwidth.png")
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'medhead[bench]')", file=sys.stderr)
    print(f"wrote {args.output}/results.json, table.md, bandwidth.png", file=sys.stderr)


def _progress(done: int, total: int, shape: Shape | None) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        now = f"context {shape.context}, {shape.nodes} nodes, batch {shape.batch}" if shape else ""
        print(f"\r\033[K[{bar:30}] {done}/{total} {now}", end="" if shape else "\n", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 wrong input, 130 stopped with Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"medhead_kernels.bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
