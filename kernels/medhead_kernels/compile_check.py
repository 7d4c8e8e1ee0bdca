"""Compile every kernel for GPUs that are not there: finds the type errors and the sizes that an interpreter cannot see.

python -m medhead_kernels.compile_check                     sm_80 and sm_90, every type and head size
python -m medhead_kernels.compile_check --capability 90 --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIMS = (64, 80, 96, 128, 192, 256)
SHARED_LIMIT = {80: 163, 90: 227}  # KiB of shared memory that a block may have; others: 99


@dataclass(frozen=True)
class Job:
    """One kernel with its compile-time values.

    Attributes:
        name: what to call it.
        kernel: the Triton function.
        pointers: type of every pointer argument.
        constants: compile-time values.
        floats: arguments that are float numbers; all others are 32-bit whole numbers.
        wide: arguments that are 64-bit whole numbers (strides of large stores).
        options: warps and stages.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)

    def compile(self, capability: int) -> Any:
        """The compiled kernel for `sm_<capability>`."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, aligned = {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
            elif name in self.pointers:
                signature[name] = "*" + self.pointers[name]
                aligned[(place,)] = [["tt.divisibility", 16]]
            elif name in self.floats:
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if name in self.wide else "i32"
                if "_" in name and name[0] in "qkvs":  # strides of tensors whose heads are multiples of 16
                    aligned[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=self.constants, attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def jobs(roomy: bool = True, quick: bool = False) -> Iterator[Job]:
    """Every kernel in every form that is launched.

    Args:
        roomy: as in `tile_for`.
        quick: two types, one head size and one form are enough.
    """
    from medhead_kernels import commit
    from medhead_kernels import tree_attention as attention

    for dtype, name in TYPES.items():
        if quick and dtype == torch.float16:  # compiles as bfloat16 does
            continue
        for dim in (64,) if quick else DIMS:
            forms: list[tuple[int, float | None, int | None]]
            forms = (
                [(256 if dtype.itemsize == 2 else 16, 50.0, 4096)]
                if quick
                else [(1, None, None), (64, None, None), (256, 50.0, 4096)]
            )
            for rows, softcap, window in forms:
                tile = attention.tile_for(rows, dim, dtype, roomy)
                yield Job(
                    f"split {name} head {dim} {tile.rows}x{tile.columns}{' window, cap' if window else ''}",
                    attention.split_kernel,
                    {"query": name, "key": name, "value": name, "words": "i64", "depth": "i64", "lengths": "i32",
                     "partial": "fp32", "logsum": "fp32"},
                    attention.split_constants(tile, 4, 4, dim, dim, dtype, softcap, window),
                    ("scale", "softcap"),
                    options={"num_warps": tile.warps, "num_stages": tile.stages},
                )  # fmt: skip
        for sinks in (False, True):
            constants = attention.merge_constants(4, 128, sinks) | ({} if sinks else {"sinks": None})
            pointers = {"partial": "fp32", "logsum": "fp32", "sinks": name, "out": name}
            yield Job(f"merge {name}{' sinks' if sinks else ''}", attention.merge_kernel, pointers, constants)
        pointers = {"store": name, "path": "i64", "lengths": "i32"}
        constants = commit.move_constants(128, False) | {"counts": None}
        yield Job(f"move {name}", commit.move_kernel, pointers, constants, wide=("s_slot", "s_batch"))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 when a kernel does not compile or needs too much shared memory."""
    options = argparse.ArgumentParser(prog="medhead_kernels.compile_check", description=__doc__.split("\n")[0])
    options.add_argument(
        "--capability", type=int, nargs="+", default=[80, 90], help="80 is A100, 90 is H100 (default: both)"
    )
    options.add_argument("--quick", action="store_true", help="two types, one head size and one form of each kernel")
    args = options.parse_args(argv)
    try:
        import triton
    except ImportError:
        print("medhead_kernels.compile_check: error: triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    failed = 0
    for capability in args.capability:
        limit = SHARED_LIMIT.get(capability, 99) * 1024
        for job in jobs(capability in SHARED_LIMIT, args.quick):
            try:
                compiled = job.compile(capability)
            except Exception as error:  # whatever the compiler throws is the finding
                failed += 1
                print(f"sm_{capability} {job.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            fits = compiled.metadata.shared <= limit
            failed += not fits
            print(
                f"sm_{capability} {job.name}: {compiled.metadata.shared / 1024:.1f} KiB shared{'' if fits else ', TOO MUCH'}"
            )
    print(f"{'failed: ' + str(failed) if failed else 'all compiled'} (triton {triton.__version__})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
