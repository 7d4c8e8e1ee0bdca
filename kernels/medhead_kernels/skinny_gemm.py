"""Products of a few rows with a weight matrix on a CPU: the nodes of a tree are such rows.

BLAS libraries are made for one row (a matrix-vector product) and for many. For the 2 to 64 rows of a tree, `x W^T` often
spends most of its time bringing the weight matrix into another layout, anew in every product. Two ways around that:
`W x^T` reads the matrix where it lies (`transposed`), and oneDNN multiplies with a copy that is kept in the layout it wants
(`packed`). All three give the same numbers up to rounding; which is fastest is a matter of the machine, its library and
the matrix, so it is measured, once a process for every size.
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

MOST_ROWS = 256  # beyond, changing the layout hardly counts
LEAST_NUMBERS = 2**15  # of a matrix; smaller ones are multiplied as usual
_GAIN = 0.9  # share of the usual time that counts as faster
_MEASURED_ROWS = (1, 4, 24)  # what the three classes of rows are measured with
_MEASURED_NUMBERS = 2**21  # a larger matrix is judged by a part of it
# copies of it with so many numbers together are out of the inner caches, as a model's weights are
_COLD_NUMBERS = 2**22
_COPIES, _ROUNDS = 64, 2  # copies at most, and how often each way takes its turn
_HINT = 16  # rows that packed copies are laid out for

Product = Callable[[Tensor, Tensor], Tensor]


class PackedLinear:
    """A weight matrix to multiply with, in whichever way is fastest here for the number of rows.

    A copy is packed when it is first worth it and kept. It is made anew when the weights were changed in place; `recheck` has
    it compared with them, for changes that PyTorch does not count (those through `weight.data`).

    Args:
        weight: `[out, size]`; read, never changed.
        bias: `[out]`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias, self.packs = weight, bias, can_pack(weight)
        self._packed: Tensor | None = None
        self._stamp: Tensor | None = None
        self._checked, self._version = False, -1
        self._ways: dict[int, bool] = {}  # by class of rows: packed or not
        self.together: PackGroup | None = None  # what decides that, if it is one of several

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., size]` to `[..., out]`, contiguous. With gradients, and while a step is written down, as `linear` does it."""
        if self.packs and type(x) is Tensor and not torch.is_grad_enabled() and x.dtype == self.weight.dtype:
            rows = x.numel() // x.shape[-1]
            if 0 < rows <= MOST_ROWS and self._packs(_class(rows)):
                return _multiply(x, self._copy(), self.bias)
        return linear(x, self.weight, self.bias)

    def warmup(self) -> None:
        """Measure now which way is fastest, for any number of rows, so that no pass is the one to wait for it."""
        for class_ in range(len(_MEASURED_ROWS)) if self.packs else ():
            self._packs(class_)

    def recheck(self) -> None:
        """The weights may have been changed since they were last used, and the number of threads too."""
        self._checked = False
        self._ways.clear()

    def clear(self) -> None:
        """Give the copy back."""
        self._packed = self._stamp = None

    @property
    def nbytes(self) -> int:
        """Memory of the copy."""
        return 0 if self._packed is None else self.weight.numel() * self.weight.element_size()

    def _packs(self, class_: int) -> bool:
        known = self._ways.get(class_)
        if known is None:
            if self.together is None:
                known = fastest(self.weight, class_, True) == "packed"
            else:
                known = self.together.packs(class_)
            self._ways[class_] = known
        return known

    def _copy(self) -> Tensor:
        version = 0 if self.weight.is_inference() else self.weight._version
        known = self._packed is not None and version == self._version
        if not known or not self._checked:
            stamp = _stamp(self.weight)
            if not known or self._stamp is None or not torch.equal(stamp, self._stamp):
                self._packed, self._stamp = _pack(self.weight), stamp
            self._checked, self._version = True, version
        assert self._packed is not None
        return self._packed

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of what holds it begins without one: it would still read these weights."""
        return


class PackGroup:
    """Matrices that are multiplied one after the other: all with packed copies or none, by what all of them take.

    In whole passes a model that mixes both ways was slower than the sum of its products says, so the choice is made for all.
    """

    def __init__(self, matrices: Sequence[PackedLinear]) -> None:
        self.weights = [matrix.weight for matrix in matrices if matrix.packs]
        for matrix in matrices:
            matrix.together = self

    def packs(self, class_: int) -> bool:
        """Whether packed copies are faster for this class of rows."""
        found = [_measured(*weight.shape, weight.dtype, class_, torch.get_num_threads()) for weight in self.weights]
        packed = sum(seconds["packed"] for seconds in found)
        return packed < _GAIN * sum(min(seconds["usual"], seconds.get("transposed", math.inf)) for seconds in found)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in the order that is faster for the number of rows; nothing is kept.

    Args:
        x: `[..., size]`.
        weight: `[out, size]`.
        bias: `[out]`, or None.

    Returns:
        `[..., out]`, contiguous.
    """
    rows = x.numel() // x.shape[-1]
    turns = 1 < rows <= MOST_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if turns and fastest(weight, _class(rows), False) == "transposed":
        return transposed(x, weight, bias)
    return F.linear(x, weight, bias)


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as `(W x^T)^T`."""
    out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    if bias is not None:
        out = out + bias
    return out.contiguous().view(*x.shape[:-1], weight.shape[0])


def can_pack(weight: Tensor) -> bool:
    """Whether a packed copy of this matrix can be made here."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.layout == torch.strided
    return (
        plain
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.numel() >= LEAST_NUMBERS
        and weight.shape[1] * weight.element_size() % 8 == 0  # see _stamp
        and _packs(weight.dtype)
    )


def fastest(weight: Tensor, class_: int, packs: bool) -> str:
    """How to multiply with a matrix of this size and type: `usual`, `transposed` or `packed`.

    Args:
        weight: `[out, size]`.
        class_: of the number of rows to multiply: 0 for one, 1 for up to 8, 2 for more.
        packs: whether a packed copy may be made.
    """
    out, size = weight.shape
    if out * size < LEAST_NUMBERS:
        return "usual"
    seconds = _measured(out, size, weight.dtype, class_, torch.get_num_threads())
    best = min((name for name in seconds if packs or name != "packed"), key=lambda name: seconds[name])
    return best if seconds[best] < _GAIN * seconds["usual"] else "usual"


def _class(rows: int) -> int:
    return 0 if rows == 1 else 1 if rows <= 8 else 2


@cache
def _measured(out: int, size: int, dtype: torch.dtype, class_: int, threads: int) -> dict[str, float]:
    """Seconds that one such matrix takes in every way, with `threads` threads, out of the inner caches; takes some 10 ms."""
    part = max(1, min(out, _MEASURED_NUMBERS // size))
    copies = max(1, min(_COPIES, _COLD_NUMBERS // (part * size)))
    with torch.inference_mode():
        x = torch.ones(_MEASURED_ROWS[class_], size, dtype=dtype)
        weights = [torch.ones(part, size, dtype=dtype) for _ in range(copies)]
        ways: dict[str, tuple[Product, list[Tensor]]] = {"usual": (F.linear, weights)}
        if class_ and dtype == torch.float32:
            ways["transposed"] = transposed, weights
        if _packs(dtype):
            ways["packed"] = _multiply, [_pack(weight) for weight in weights]
        rounds = [[_seconds(*way, x) for way in ways.values()] for _ in range(_ROUNDS)]  # by turns: the machine changes
    whole = out / (part * copies)  # of the numbers that were multiplied
    return {way: min(times) * whole for way, times in zip(ways, zip(*rounds, strict=True), strict=True)}


def _seconds(product: Product, weights: list[Tensor], x: Tensor) -> float:
    began = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return time.perf_counter() - began


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _HINT)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies this type on this CPU."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            weight, x = torch.ones(16, 16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
            return torch.equal(_multiply(x, _pack(weight)), F.linear(x, weight))
    except (RuntimeError, AttributeError):  # an old CPU, or a PyTorch without it
        return False


def _stamp(weight: Tensor) -> Tensor:
    """`[out]`: a hash of every row's bits, at the speed of memory; other weights have another stamp."""
    bits = weight.detach().view(torch.int64)
    return torch.mv(bits, _factors(bits.shape[1]))


@cache
def _factors(count: int) -> Tensor:
    """`[count]` random odd numbers: no bit is lost in the modulus."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1
