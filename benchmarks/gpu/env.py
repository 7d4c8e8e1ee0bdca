"""The machine and its ceilings: bandwidth of a copy, a matrix product, which kernel serves PyTorch's attention."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable

import torch
import transformers
from measure import DEVICE, DTYPE, ON_GPU, TINY, attempt, kernels, milliseconds, say
from torch import Tensor

from medhead.bench.measure import synchronize
from medhead_kernels.timing import copy_bandwidth

QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def attention_call(keys: int, masked: bool) -> Callable[[], Tensor]:
    """Return PyTorch's attention of 64 queries in groups of four over so many keys."""
    query = torch.randn(1, 32, 64, 128, device=DEVICE, dtype=DTYPE)
    key = torch.randn(1, 8, keys, 128, device=DEVICE, dtype=DTYPE)
    mask = torch.zeros(1, 1, 64, keys, device=DEVICE, dtype=DTYPE) if masked else None
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, key, key, attn_mask=mask, enable_gqa=True)


def seconds_of(calls: list[Callable[[], Tensor]]) -> float:
    """Return the seconds of a call, in the mean, without a warm-up."""
    synchronize(DEVICE)
    began = time.perf_counter()
    for call in calls:
        call()
        synchronize(DEVICE)
    return (time.perf_counter() - began) / len(calls)


def product() -> dict[str, float]:
    """Return the TFLOP/s of a square matrix product."""
    size = 64 if TINY else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    ms = milliseconds(lambda: left @ right)
    return {"ms": ms, "tflops": round(2 * size**3 / ms / 1e9, 1)}


def main() -> None:
    """Print everything."""
    if ON_GPU:
        card = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True
        )
        say(card=card.stdout.strip(), cudnn=torch.backends.cudnn.version(), cuda=torch.version.cuda)
    say(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=str(DEVICE),
    )
    attempt("copy", lambda: {"gb_s": round(copy_bandwidth(DEVICE.type) / 1e9)})
    attempt("matrix product", product)
    for masked in (False, True):
        first = seconds_of([attention_call(1000, masked)])
        each = seconds_of([attention_call(keys, masked) for keys in range(1001, 1004 if TINY else 1011)])
        say(sdpa_with_mask=masked, first_ms=round(1e3 * first, 1), ms_for_every_new_length=round(1e3 * each, 2))
        kernels(attention_call(2048, masked), f"sdpa, mask {masked}", 3)
    if hasattr(torch._C, "_get_sdp_priority_order"):
        say(priority_of_sdpa_kernels=[str(kernel) for kernel in torch._C._get_sdp_priority_order()])


main()
