"""Time the linear layers of SmolLM2-135M by the kernel of medhead and by products of PyTorch, for plain passes and trees.

Random weights of the model's 211 matrices are multiplied one after the other, so that every weight comes from main memory
as in a real pass. One thread; the smallest CPU time of the rounds, in which the methods are interleaved.

    OMP_NUM_THREADS=1 python benchmarks/int8/linear_products.py --output benchmarks/int8/linear_products.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead_kernels import block_linear

SHAPES = {"576x576": 60, "192x576": 60, "1536x576": 60, "576x1536": 30, "49152x576": 1}  # out x in: how many of them
ROWS = (1, 2, 4, 8, 16, 32, 64)
Method = tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor]]  # prepare a weight, multiply


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[out, in]` int8 weights and their `[out]` scales."""
    scales = weight.abs().amax(1) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def dequantized_linear(x: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
    """Convert the weights on every call, then multiply as in float32."""
    weight, scales = given
    return F.linear(x, weight.to(x.dtype)) * scales


def fbgemm_weight(weight: Tensor) -> Any:
    """Pack a weight as `quantize_dynamic` does, with one scale for each row."""
    values, scales = quantized(weight)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    stored = torch.quantize_per_channel(values.float() * scales[:, None], scales.double(), zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(stored, None)


def fbgemm_rows(x: Tensor, packed: Any) -> Tensor:
    """Quantise every row of `x` to 7 bits with a scale of its own (8 bits overflow the 16-bit sums of AVX2)."""
    scale = x.abs().amax(1, keepdim=True) / 63
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / scale, 1.0, 64, packed) * scale


def onednn_weight(weight: Tensor) -> Any:
    """Pack a weight for oneDNN; return it with its scales."""
    values, scales = quantized(weight)
    return torch.ops.onednn.qlinear_prepack(values.t().contiguous().t(), None), scales


def onednn_pointwise(x: Tensor, given: Any) -> Tensor:
    """Quantise `x` to 8 bits with one scale and multiply."""
    packed, scales = given
    scale = float(x.abs().max()) / 127
    stored = (x / scale).round().to(torch.int8).view(torch.uint8) ^ 128  # uint8 with zero point 128
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        stored, scale, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def int_mm(x: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
    """Quantise every row of `x` to 8 bits with a scale of its own and multiply integers."""
    weight, scales = given
    scale = x.abs().amax(1, keepdim=True) / 127
    return torch._int_mm((x / scale).round().to(torch.int8), weight.t()) * scale * scales


def int4_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return random packed 4-bit weights of this shape, with scales and zeros for groups of 32."""
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, weight.shape, dtype=torch.int32), 2)
    return packed, torch.rand(weight.shape[1] // 32, weight.shape[0], 2, dtype=torch.float32)


METHODS: dict[str, Method] = {
    "float32 F.linear": (lambda w: w, F.linear),
    "medhead float32": (block_linear.store, block_linear.linear),
    "medhead bfloat16": (lambda w: block_linear.store(w.bfloat16()), block_linear.linear),
    "medhead int8": (lambda w: block_linear.round_to(w, "int8"), block_linear.linear),
    "medhead int4": (lambda w: block_linear.round_to(w, "int4"), block_linear.linear),
    "float32 oneDNN packed": (
        lambda w: torch.ops.mkldnn._reorder_linear_weight(w, 16),
        lambda x, w: torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], ""),
    ),
    "int8 _weight_int8pack_mm, float32": (quantized, lambda x, w: torch.ops.aten._weight_int8pack_mm(x, *w)),
    "int8 _weight_int8pack_mm, bfloat16": (
        lambda w: tuple(part if part.dtype == torch.int8 else part.bfloat16() for part in quantized(w)),
        lambda x, w: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), *w),
    ),
    "int8 to float32, F.linear": (quantized, dequantized_linear),
    "int8 quantize_dynamic (fbgemm, scale per pass)": (
        fbgemm_weight,
        lambda x, w: torch.ops.quantized.linear_dynamic(x, w, reduce_range=True),
    ),
    "int8 fbgemm, scale per row": (fbgemm_weight, fbgemm_rows),
    "int8 onednn.qlinear_pointwise (scale per pass)": (onednn_weight, onednn_pointwise),
    "int8 _int_mm, scale per row": (quantized, int_mm),
    "int4 _weight_int4pack_mm_for_cpu, float32": (
        int4_weight,
        lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1]),
    ),
}  # fmt: skip


def one_pass(multiply: Callable[[Tensor, Any], Tensor], weights: dict[str, list[Any]], rows: int) -> dict[str, float]:
    """Return the CPU seconds of all products of each shape."""
    seconds = {}
    for shape, prepared in weights.items():
        x = torch.randn(rows, int(shape.split("x")[1]))
        began = time.process_time()
        for weight in prepared:
            multiply(x, weight)
        seconds[shape] = time.process_time() - began
    return seconds


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=0.6, help="seconds of a pass above which a method is left out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (reason := block_linear.unavailable()) is not None:
        raise SystemExit(reason)
    names = [shape.split("x") for shape in SHAPES]
    table: list[dict[str, Any]] = []
    with torch.inference_mode():
        dense = {
            shape: [torch.randn(int(out), int(size)) * 0.05 for _ in range(SHAPES[shape])]
            for shape, (out, size) in zip(SHAPES, names, strict=True)
        }
        prepared: dict[str, Any] = {}
        for name in args.methods:
            prepare, multiply = METHODS[name]
            try:
                multiply(torch.randn(2, 576), prepare(dense["192x576"][0]))
                prepared[name] = {shape: [prepare(weight) for weight in parts] for shape, parts in dense.items()}
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                table.append({"product": name, "error": " ".join(str(error).split())[:200]})
                print(table[-1], flush=True)
        for rows in ROWS:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in prepared}
            for _ in range(args.rounds):
                for name in prepared:
                    if not found[name] or sum(found[name][0].values()) < args.limit:
                        found[name].append(one_pass(METHODS[name][1], prepared[name], rows))
            for name, passes in found.items():
                best = {shape: round(1e3 * min(one[shape] for one in passes), 3) for shape in SHAPES}
                total = round(1e3 * min(sum(one.values()) for one in passes), 2)
                table.append({"product": name, "rows": rows, "pass_ms": total, "ms_by_shape": best})
                print(f"{rows:3d} {total:9.2f} ms  {name}  {best}", flush=True)
    with open("/proc/cpuinfo", encoding="ascii") as lines:
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu}, 1 thread, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "method": f"CPU time of the 211 linear layers of SmolLM2-135M with random weights, one after the other; smallest of "
        f"{args.rounds} interleaved rounds, in ms; ms_by_shape sums the layers of a shape (out x in); layers: {SHAPES}",
    }
    if args.output is not None:  # one line for each product and number of rows
        lines = ",\n".join(f"  {json.dumps(row)}" for row in table)
        args.output.write_text(
            f'{json.dumps(report, indent=1)[:-2]},\n "results": [\n{lines}\n ]\n}}\n', encoding="utf-8"
        )


if __name__ == "__main__":
    main()
