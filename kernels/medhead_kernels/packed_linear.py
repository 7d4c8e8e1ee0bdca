"""A second copy of a linear layer's weights in the layout of the block kernel, made when it is first used."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from medhead_kernels import block_linear
from medhead_kernels.block_linear import Blocks

MIN_ELEMENTS = 2**15  # smaller weights always use F.linear


class PackedLinear:
    """A linear layer that multiplies by a copy of its weights `[out, size]`.

    The copy holds them without loss, or rounded to 8 bits if `rounded`. It is made again when the weights were changed in place.
    PyTorch does not count changes through `weight.data`; after `recheck` the copy is compared with them by a checksum.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, least: int = MIN_ELEMENTS, rounded: bool = False
    ) -> None:
        self.weight, self.bias, self._rounded = weight, bias, rounded
        self.packable = can_pack(weight, least) and block_linear.unavailable() is None
        self._blocks: Blocks | None = None
        self._checksums: Tensor | None = None
        self._checked, self._version = False, -1

    def __call__(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to `[..., out]`. With gradients, and while tracing without a copy made before, this is `F.linear`."""
        usable = type(x) is Tensor or (type(x) is FakeTensor and self._blocks is not None)
        if self.packable and usable and not torch.is_grad_enabled() and x.dtype == self.weight.dtype:
            blocks = self.copy() if type(x) is Tensor else self._blocks
            assert blocks is not None
            out = block_linear.linear(x, blocks)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)

    def recheck(self) -> None:
        """Compare the weights with those of the copy at the next call."""
        self._checked = False

    def clear(self) -> None:
        """Free the copy."""
        self._blocks = self._checksums = None

    @property
    def nbytes(self) -> int:
        """Memory of the copy in bytes."""
        return 0 if self._blocks is None else self._blocks.nbytes

    def copy(self) -> Blocks:
        """Return the copy, made now if there is none of the current weights."""
        version = 0 if self.weight.is_inference() else self.weight._version
        current = self._blocks is not None and version == self._version
        if not current or not self._checked:
            checksums = row_checksums(self.weight)
            if not current or self._checksums is None or not torch.equal(checksums, self._checksums):
                weight = self.weight
                self._blocks = block_linear.round_to(weight, "int8") if self._rounded else block_linear.store(weight)
                self._checksums = checksums
            self._checked, self._version = True, version
        assert self._blocks is not None
        return self._blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copied module must not multiply by the weights of the original."""
        return


def can_pack(weight: Tensor, least: int = MIN_ELEMENTS) -> bool:
    """Whether the kernel can multiply by this weight, which has at least `least` elements, and is faster in this type."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.layout == torch.strided
    return (
        plain
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.numel() >= least
        and weight.shape[1] * weight.element_size() % 8 == 0  # required by `row_checksums`
        and _is_faster(weight.dtype)
    )


@cache
def _is_faster(dtype: torch.dtype) -> bool:
    """Whether the kernel is faster with activations of a type: float32, and half types that this CPU has no products of."""
    ops = torch.ops.mkldnn
    halves = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return dtype == torch.float32 or (dtype in halves and not halves[dtype]())


def row_checksums(weight: Tensor) -> Tensor:
    """Return `[out]` hashes of the bits of every row, computed at memory bandwidth."""
    bits = weight.detach().view(torch.int64)
    return torch.mv(bits, _odd_factors(bits.shape[1]))


@cache
def _odd_factors(count: int) -> Tensor:
    """Return `[count]` random odd numbers; odd factors lose no bit modulo 2^64."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1
