"""Linear layers on a CPU whose weights stay in the type they are stored in, multiplied with float32 rows.

A pass over few rows reads every weight once, so it takes as long as reading takes: 16-bit weights take half the time of
float32, 4-bit ones a sixth. The kernel is in `cpu_ops.cpp`; its result for a row does not depend on the other rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead_kernels import native

KINDS = ("float32", "bfloat16", "float16", "int8", "int4", "uint8", "int8 by 16")
WIDTH = GROUP = 32  # outputs of a panel, inputs that share a scale but for `int8 by 16`
_ROUNDED_ROWS = 64 * WIDTH  # of a weight, at a time
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX = {kind: index for index, kind in enumerate(KINDS)}


class Blocks(NamedTuple):
    """A weight matrix `[out, size]` as the kernel reads it.

    Attributes:
        data: `[panels, size, bytes of 32 outputs]` uint8; a panel holds 32 outputs, and the last one is filled up with zeros.
        scales: `[panels, groups of 32 inputs, 32]` float32, of 16 inputs for `int8 by 16`; empty for floating-point kinds.
        minimums: like `scales`; empty unless the kind is `int4` or `uint8`, whose weights are `scale * q + minimum`.
        kind: one of `KINDS`.
        out: number of outputs.
    """

    data: Tensor
    scales: Tensor
    minimums: Tensor
    kind: str
    out: int

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.data.nbytes + self.scales.nbytes + self.minimums.nbytes


@cache
def unavailable() -> str | None:
    """Load the kernel; return None, or one line that says why it cannot be used on this machine."""
    reason = native.unavailable("cpu_ops")
    if reason is None:
        torch.library.register_fake("medhead::block_linear", _fake)
    return reason


def linear(x: Tensor, blocks: Blocks) -> Tensor:
    """Compute `x W^T` of `[..., size]` in float32; the result `[..., out]` has the type of `x`. It has no gradient."""
    flat = x.reshape(-1, x.shape[-1]).float()
    data, scales, minimums, kind, out = blocks
    of_groups = (
        part if part.numel() else None for part in (scales, minimums)
    )  # an empty constant confuses AOTInductor
    found: Tensor = torch.ops.medhead.block_linear(flat, data, *of_groups, _INDEX[kind], out)
    return found.to(x.dtype).view(*x.shape[:-1], out)


def store(weight: Tensor) -> Blocks:
    """Keep a weight `[out, size]` in the smallest floating-point kind that holds it without loss."""
    kinds = ("bfloat16", "float16", "float32")
    weight = weight.detach().float()
    kind = next(kind for kind in kinds if torch.equal(weight.to(_DTYPES[kind]).float(), weight))
    data = _panels(weight.to(_DTYPES[kind])).transpose(1, 2).contiguous().view(torch.uint8)
    return Blocks(data, weight.new_empty(0), weight.new_empty(0), kind, len(weight))


def round_to(weight: Tensor, kind: str) -> Blocks:
    """Round a weight `[out, size]`: `int8` from -127 to 127 times a scale, `int4` 0 to 15 times a scale plus a minimum."""
    parts = [_round(part, kind) for part in weight.detach().split(_ROUNDED_ROWS)]  # a part takes little memory
    data, scales, minimums = map(torch.cat, zip(*(part[:3] for part in parts), strict=True))
    return Blocks(data, scales, minimums, kind, len(weight))


def _round(weight: Tensor, kind: str) -> Blocks:
    groups = _groups(weight.float())
    if kind == "int8":
        scales, minimums = groups.abs().amax(-1) / 127, torch.empty(0)
        levels = groups / _divisor(scales)
    else:
        minimums = groups.amin(-1)
        scales = (groups.amax(-1) - minimums) / 15
        levels = (groups - minimums[..., None]) / _divisor(scales)
    return from_levels(levels.round().flatten(1)[:, : weight.shape[1]], scales, minimums, kind)


def from_levels(levels: Tensor, scales: Tensor, minimums: Tensor, kind: str) -> Blocks:
    """Return blocks of integers.

    Args:
        levels: `[out, size]` integers: -128 to 127 for the kinds `int8` and `int8 by 16`, 0 to 255 for `uint8`, 0 to 15 for
            `int4`.
        scales: `[out, groups]` float32; an even number of groups for `int8 by 16`.
        minimums: the same for `int4` and `uint8`; else empty.
        kind: one of these.
    """
    panels = _panels(levels.to(torch.int8 if kind.startswith("int8") else torch.uint8)).transpose(1, 2)
    if kind == "int4":
        panels = panels[..., : WIDTH // 2] | panels[..., WIDTH // 2 :] << 4
    scales, minimums = (
        _panels(part).transpose(1, 2).contiguous() if part.numel() else part for part in (scales, minimums)
    )
    return Blocks(panels.contiguous().view(torch.uint8), scales, minimums, kind, len(levels))


def rows(blocks: Blocks, tokens: Tensor | None = None) -> Tensor:
    """Return rows `[tokens, size]` of the weight in float32; None is all of them."""
    tokens = torch.arange(blocks.out) if tokens is None else tokens
    panel, lane = tokens // WIDTH, tokens % WIDTH
    if blocks.kind in _DTYPES:
        return blocks.data.view(_DTYPES[blocks.kind])[panel, :, lane].float()
    if blocks.kind != "int4":
        levels = blocks.data.view(torch.uint8 if blocks.kind == "uint8" else torch.int8)[panel, :, lane].float()
    else:
        pair = blocks.data[panel, :, lane % (WIDTH // 2)]
        levels = torch.where((lane < WIDTH // 2)[:, None], pair & 15, pair >> 4).float()
    size = levels.shape[1]
    scales, minimums = (
        part[panel, :, lane].repeat_interleave(GROUP // 2 if blocks.kind == "int8 by 16" else GROUP, 1)[:, :size]
        if part.numel()
        else torch.zeros(())
        for part in (blocks.scales, blocks.minimums)
    )
    return levels * scales + minimums


def _panels(weight: Tensor) -> Tensor:
    """Fill `[out, n]` up with rows of zeros and split it into `[panels, 32, n]`."""
    return F.pad(weight, (0, 0, 0, -len(weight) % WIDTH)).unflatten(0, (-1, WIDTH))


def _groups(weight: Tensor) -> Tensor:
    """Split `[out, size]` into `[out, groups, 32]`; the last group is filled up with its own last weight."""
    missing = -weight.shape[1] % GROUP
    return torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, GROUP))


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)[..., None]


def _fake(x: Tensor, data: Tensor, scales: Tensor | None, minimums: Tensor | None, kind: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
