"""Matrix products with few rows on a CPU, such as the nodes of a token tree.

BLAS libraries are tuned for one row (a matrix-vector product) and for many. For the 2 to 64 rows of a tree, `x W^T` often
spends most of its time repacking the weights, on every call. Two methods avoid that: `W x^T` reads the weights in place
(`transposed`), and oneDNN multiplies by a copy that is kept in its blocked layout (`packed`). All methods agree up to
rounding. The fastest one depends on the CPU, the library and the matrix, so it is measured once per process and size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 256  # with more rows the repacking hardly counts
MIN_ELEMENTS = 2**15  # smaller weights always use F.linear
_BUCKET_ROWS = (1, 4, 24)  # rows that represent a bucket in a measurement: one row, up to 8, more
_GAIN = 0.9  # a method must take less than this share of F.linear's time
_MEASURED_ELEMENTS = 2**21  # of a larger weight only a part is measured
_COLD_ELEMENTS = 2**22  # copies with this many elements in total exceed the inner caches, as a model's weights do
_MAX_COPIES, _ROUNDS = 64, 2
_PACK_ROWS = 16  # number of rows that packed copies are laid out for

Product = Callable[[Tensor, Tensor], Tensor]


class PackedLinear:
    """A linear layer that multiplies by the method that is fastest for the number of rows.

    A packed copy of the weights `[out, size]` is made when it is first used, and again when they were changed in place.
    PyTorch does not count changes through `weight.data`; after `recheck` the copy is compared with them by a checksum.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias, self.packable = weight, bias, can_pack(weight)
        self.group: PackGroup | None = None
        self._packed: Tensor | None = None
        self._checksums: Tensor | None = None
        self._checked, self._version = False, -1
        self._uses_packed: dict[int, bool] = {}  # by bucket

    def __call__(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to contiguous `[..., out]`. With gradients and while tracing, this is `linear`."""
        if self.packable and type(x) is Tensor and not torch.is_grad_enabled() and x.dtype == self.weight.dtype:
            rows = x.numel() // x.shape[-1]
            if 0 < rows <= MAX_ROWS and self.uses_packed(_bucket(rows)):
                return self.multiply(x)
        return linear(x, self.weight, self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to `[..., out]` by the packed copy, whatever is fastest; for weights with `packable`."""
        return _multiply(x, self._copy(), self.bias)

    def warmup(self) -> None:
        """Measure the methods for every bucket now, so that no decoding step waits for it."""
        for bucket in range(len(_BUCKET_ROWS)) if self.packable else ():
            self.uses_packed(bucket)

    def recheck(self) -> None:
        """Compare the weights and the number of threads with those of the copy at the next call."""
        self._checked = False
        self._uses_packed.clear()

    def clear(self) -> None:
        """Free the packed copy."""
        self._packed = self._checksums = None

    @property
    def nbytes(self) -> int:
        """Memory of the packed copy in bytes."""
        return 0 if self._packed is None else self.weight.nbytes

    def uses_packed(self, bucket: int) -> bool:
        """Whether the packed copy is used for a bucket of row counts."""
        if bucket not in self._uses_packed:
            group = self.group
            packed = fastest_method(self.weight, bucket, True) == "packed" if group is None else group.is_packed(bucket)
            self._uses_packed[bucket] = packed
        return self._uses_packed[bucket]

    def _copy(self) -> Tensor:
        version = 0 if self.weight.is_inference() else self.weight._version
        current = self._packed is not None and version == self._version
        if not current or not self._checked:
            checksums = row_checksums(self.weight)
            if not current or self._checksums is None or not torch.equal(checksums, self._checksums):
                self._packed, self._checksums = pack(self.weight), checksums
            self._checked, self._version = True, version
        assert self._packed is not None
        return self._packed

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copied module must not multiply by the weights of the original."""
        return


class PackGroup:
    """Layers that run one after the other and use packed copies all together or not at all, by their total time.

    A model that mixed the two libraries took longer than the sum of its products, so one decision is made for all layers.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.weights = [layer.weight for layer in layers if layer.packable]
        for layer in layers:
            layer.group = self

    def is_packed(self, bucket: int) -> bool:
        """Whether packed copies are faster for a bucket of row counts."""
        found = [measure(*weight.shape, weight.dtype, bucket, torch.get_num_threads()) for weight in self.weights]
        packed = sum(seconds["packed"] for seconds in found)
        return packed < _GAIN * sum(min(seconds["linear"], seconds.get("transposed", math.inf)) for seconds in found)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` of `[..., size]` and `[out, size]`, transposed where that is faster; the result is contiguous."""
    rows = x.numel() // x.shape[-1]
    eligible = 1 < rows <= MAX_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if eligible and fastest_method(weight, _bucket(rows), False) == "transposed":
        return transposed(x, weight, bias)
    return F.linear(x, weight, bias)


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` as `(W x^T)^T`."""
    out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    if bias is not None:
        out = out + bias
    return out.contiguous().view(*x.shape[:-1], weight.shape[0])


def can_pack(weight: Tensor) -> bool:
    """Whether a packed copy of this weight can be made on this CPU."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.layout == torch.strided
    return (
        plain
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.numel() >= MIN_ELEMENTS
        and weight.shape[1] * weight.element_size() % 8 == 0  # required by `row_checksums`
        and supports_packing(weight.dtype)
    )


def fastest_method(weight: Tensor, bucket: int, allow_packed: bool) -> str:
    """Return the fastest method for a weight and a bucket of row counts: `linear`, `transposed` or `packed`."""
    if weight.numel() < MIN_ELEMENTS:
        return "linear"
    seconds = measure(*weight.shape, weight.dtype, bucket, torch.get_num_threads())
    best = min((name for name in seconds if allow_packed or name != "packed"), key=lambda name: seconds[name])
    return best if seconds[best] < _GAIN * seconds["linear"] else "linear"


def _bucket(rows: int) -> int:
    """Return the bucket of a number of rows: 0 for one row, 1 for up to 8 rows, 2 for more."""
    return 0 if rows == 1 else 1 if rows <= 8 else 2


@cache
def measure(out: int, size: int, dtype: torch.dtype, bucket: int, threads: int) -> dict[str, float]:
    """Return the seconds that each method takes for one such weight, out of the inner caches; runs for about 10 ms."""
    part = max(1, min(out, _MEASURED_ELEMENTS // size))
    copies = max(1, min(_MAX_COPIES, _COLD_ELEMENTS // (part * size)))
    with torch.inference_mode():
        x = torch.ones(_BUCKET_ROWS[bucket], size, dtype=dtype)
        weights = [torch.ones(part, size, dtype=dtype) for _ in range(copies)]
        methods: dict[str, tuple[Product, list[Tensor]]] = {"linear": (F.linear, weights)}
        if bucket and dtype == torch.float32:
            methods["transposed"] = transposed, weights
        if supports_packing(dtype):
            methods["packed"] = _multiply, [pack(weight) for weight in weights]
        rounds = [[time_products(*method, x) for method in methods.values()] for _ in range(_ROUNDS)]  # interleaved
    scale = out / (part * copies)  # share of one weight in what was multiplied
    return {name: min(seconds) * scale for name, seconds in zip(methods, zip(*rounds, strict=True), strict=True)}


def time_products(product: Product, weights: list[Tensor], x: Tensor) -> float:
    """Return the seconds that multiplying `x` by all weights takes."""
    began = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return time.perf_counter() - began


def pack(weight: Tensor) -> Tensor:
    """Return a copy of the weight in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACK_ROWS)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


@cache
def supports_packing(dtype: torch.dtype) -> bool:
    """Whether oneDNN is available and multiplies this dtype on this CPU."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            weight, x = torch.ones(16, 16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
            return torch.equal(_multiply(x, pack(weight)), F.linear(x, weight))
    except (RuntimeError, AttributeError):  # an old CPU, or a PyTorch without these operators
        return False


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
