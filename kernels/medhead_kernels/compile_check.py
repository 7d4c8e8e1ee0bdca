"""Compile every Triton kernel for GPUs that need not be present; finds type errors and excess shared memory.

python -m medhead_kernels.compile_check                     sm_80 and sm_90, every dtype and head size
python -m medhead_kernels.compile_check --capability 90 --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SHARED_MEMORY_KIB = {80: 163, 90: 227}  # limit of one block by compute capability; 99 for all others


@dataclass(frozen=True)
class KernelVariant:
    """One kernel with its compile-time values."""

    name: str
    kernel: Any
    pointers: dict[str, str]  # element type of every pointer argument
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()  # float arguments; all others are 32-bit integers
    int64s: tuple[str, ...] = ()  # 64-bit integer arguments (strides of large buffers)
    options: dict[str, Any] = field(default_factory=dict)  # warps, stages and what else a launch sets

    def compile(self, capability: int) -> Any:
        """Return the kernel compiled for `sm_<capability>`."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, aligned = {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
            elif name in self.pointers:
                signature[name] = "*" + self.pointers[name]
                aligned[(index,)] = [["tt.divisibility", 16]]
            elif name in self.floats:
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if name in self.int64s else "i32"
                if name[:2] in ("q_", "k_", "v_", "s_"):  # strides of tensors whose heads are multiples of 16
                    aligned[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=self.constants, attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def kernel_variants(large_smem: bool = True, quick: bool = False) -> Iterator[KernelVariant]:
    """Yield every kernel in every variant that is launched; `quick` yields two dtypes, one head size and one variant."""
    from medhead_kernels import act_mul, add_rms_norm, commit, rope_write, tree_delta_rule, tree_path_attention
    from medhead_kernels import tree_attention as attention

    for dtype, name in DTYPES.items():
        if quick and dtype == torch.float16:  # compiles as bfloat16 does
            continue
        cases: list[tuple[int, float | None, int | None]] = [(1, None, None), (64, None, None), (256, 50.0, 4096)]
        if quick:
            cases = [(256 if dtype.itemsize == 2 else 16, 50.0, 4096)]
        for dim in (64,) if quick else HEAD_DIMS:
            for rows, softcap, window in cases:
                tile = attention.tile_for(rows, dim, dtype, large_smem)
                yield KernelVariant(
                    f"split {name} head {dim} {tile.rows}x{tile.columns}{' window, cap' if window else ''}",
                    attention.split_kernel,
                    {"query": name, "key": name, "value": name, "bitmask": "i64", "depth": "i64", "lengths": "i32",
                     "partial": "fp32", "lse": "fp32"},
                    attention.split_constants(tile, 4, 4, dim, dim, dtype, softcap, window),
                    ("scale", "softcap"),
                    options={"num_warps": tile.warps, "num_stages": tile.stages},
                )  # fmt: skip
        for has_sinks, splits in ((False, 8), (True, 8), (True, attention.MAX_SPLITS)):
            constants = attention.merge_constants(4, 128, splits, has_sinks) | ({} if has_sinks else {"sinks": None})
            pointers = {"partial": "fp32", "lse": "fp32", "sinks": name, "out": name}
            label = f"merge {name} {splits} splits{' sinks' if has_sinks else ''}"
            yield KernelVariant(label, attention.merge_kernel, pointers, constants)
        for dim in (64,) if quick else HEAD_DIMS:
            for with_options in (True,) if quick else (True, False):
                yield from _path_variants(name, dtype, dim, tree_path_attention, with_options)
        yield from _fused_variants(name, act_mul, add_rms_norm, rope_write)
        pointers = {"buffer": name, "path": "i64", "lengths": "i32"}
        constants = commit.move_constants(128, False) | {"counts": None}
        yield KernelVariant(f"move {name}", commit.move_kernel, pointers, constants, int64s=("s_slot", "s_batch"))
    pointers = dict.fromkeys(("query", "key", "value", "log_decay", "beta", "state", "out", "updates", "total"), "fp32")
    for exact in (True, False):
        for nodes, size in ((64, 128),) if quick else ((64, 128), (32, 128), (12, 64)):
            launch = tree_delta_rule.launch_options(nodes)
            yield KernelVariant(
                f"delta rule {'fp32' if exact else 'tf32x3'} {nodes} nodes, head {size}",
                tree_delta_rule.delta_rule_kernel, pointers | {"bitmask": "i64"},
                tree_delta_rule.delta_rule_constants(nodes, 2, size, size, exact), options=launch,
            )  # fmt: skip


def _path_variants(name: str, dtype: torch.dtype, dim: int, paths: Any, with_options: bool) -> Iterator[KernelVariant]:
    """Yield the kernels of `path_attention` for one element type and head size, with window, soft-capping and sinks or none."""
    tile = paths.tile_for(paths.ROWS, dim, dtype)
    pointers = dict.fromkeys(("query", "key", "value"), name) | dict.fromkeys(("partial", "largest", "total"), "fp32")
    tree = dict.fromkeys(("lengths", "depth", "path", *(["first"] if with_options else [])), "i64")
    softcap, absent = (50.0, [{}, {}]) if with_options else (None, [{"first": None}, {"sinks": None}])
    constants = paths.span_constants(tile, 4, dim, dim, dtype, softcap, with_options) | absent[0]
    label, options = f"path span {name} head {dim}{' plain' * (not with_options)}", paths.launch_options(tile)
    yield KernelVariant(label, paths.span_kernel, pointers | tree, constants, ("scale", "softcap"), options=options)
    pointers |= {"sinks": "fp32", "out": name} if with_options else {"out": name}
    constants = paths.add_constants(4, dim, with_options) | absent[1]
    yield KernelVariant(f"path add{label.removeprefix('path span')}", paths.add_kernel, pointers, constants)


def _fused_variants(name: str, act_mul: Any, add_rms_norm: Any, rope_write: Any) -> Iterator[KernelVariant]:
    """Yield the kernels in place of a model's modules for one element type."""
    for size in (128, 4096):  # a head and a hidden state
        for has_residual, offset in ((False, False), (False, True), (True, False), (True, True)):
            constants = add_rms_norm.constants(size, has_residual, offset)
            pointers = {"x": name, "residual": name, "weight": name, "out": name, "total": name}
            absent = {} if has_residual else {"residual": None, "total": None}
            label = f"norm {name} {size}{' residual' if has_residual else ''}{' offset' if offset else ''}"
            options = {"num_warps": add_rms_norm.warps(size)}
            yield KernelVariant(
                label, add_rms_norm.add_rms_norm_kernel, pointers, constants | absent, ("eps",), options=options
            )
    for kind in act_mul.ACTIVATIONS:
        pointers = {"gate": name, "up": name, "out": name}
        yield KernelVariant(f"{kind} {name}", act_mul.act_mul_kernel, pointers, act_mul.constants(kind))
    pointers = dict.fromkeys(("query", "key", "value", "cos", "sin", "keys", "values"), name) | {"rows": "i64"}
    for dim in (80, 128):
        constants = rope_write.constants(dim, dim)
        options = {"num_warps": 1, "enable_fp_fusion": False}
        yield KernelVariant(f"rope {name} {dim}", rope_write.rope_write_kernel, pointers, constants, options=options)


def main(argv: list[str] | None = None) -> int:
    """Compile all variants; return 0, 1 when one fails or needs too much shared memory, or 2 without Triton."""
    options = argparse.ArgumentParser(prog="medhead_kernels.compile_check", description=__doc__.split("\n")[0])
    options.add_argument("--capability", type=int, nargs="+", default=[80, 90],
                         help="compute capabilities; 80 is A100, 90 is H100 (default: both)")  # fmt: skip
    options.add_argument("--quick", action="store_true", help="two dtypes, one head size and one variant per kernel")
    args = options.parse_args(argv)
    try:
        import triton
    except ImportError:
        print("medhead_kernels.compile_check: error: triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    failed = 0
    for capability in args.capability:
        limit = SHARED_MEMORY_KIB.get(capability, 99)
        for variant in kernel_variants(capability in SHARED_MEMORY_KIB, args.quick):
            try:
                used = variant.compile(capability).metadata.shared / 1024
                result, ok = f"{used:.1f} KiB shared" + (f", MORE THAN {limit}" * (used > limit)), used <= limit
            except Exception as error:  # any compiler error is a finding to report
                result, ok = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
            failed += not ok
            print(f"sm_{capability} {variant.name}: {result}")
    print(f"{f'failed: {failed}' if failed else 'all compiled'} (triton {triton.__version__})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
