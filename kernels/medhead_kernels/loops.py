"""Loops over a few rows, compiled for this CPU by numba.

One level of heads for two nodes is three small products and some forty operations on a few thousand numbers; PyTorch takes
longer to start those than to do them. These loops do such work without starting anything. Nothing that the target says is
computed here: guesses may be rounded otherwise than by tensor operations, which cannot reach the text, and noise is the same
to the last bit.

All arrays are contiguous. Weights are float32, or bfloat16 as the uint16 bits that numpy has for it; sums are float32.
Importing this module needs numba (the extra `cpu`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_LOG2_E = np.float32(1.4426950408889634)
_POWERS = tuple(
    np.float32(0.6931471805599453**n / float(np.prod(range(1, n + 1)))) for n in range(7)
)  # of 2^x around 0
_ERF = tuple(np.float32(x) for x in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
_ERF_P, _ROOT_HALF = np.float32(0.3275911), np.float32(0.7071067811865476)
_MOST, _LEAST = np.float32(126), np.float32(-126)  # powers of two that float32 has
_VERSION = zlib.crc32(Path(__file__).read_bytes())
_FREEDOM = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; infinities mean what they mean


def loop(function: F) -> F:
    """Compile a function when it is first called, for the types it is called with.

    The result is kept on disk where a folder for it can be written, by the name of the function. Numba looks for changes in the
    function's own file alone, so the name says which version of this file, of which it may call something, it was made with.
    """
    function.__qualname__ = f"{function.__qualname__}_{_VERSION:08x}"
    options: dict[str, Any] = {"fastmath": _FREEDOM, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder can be written
        return cast(F, numba.njit(**options)(function))


def inlined(function: F) -> F:
    """The same for what loops call for every number."""
    return cast(F, numba.njit(inline="always", fastmath=_FREEDOM, error_model="numpy")(function))


def array_of(tensor: Tensor) -> Array:
    """A view of a contiguous tensor's numbers, bfloat16 as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _number(context: Any, stored: Any) -> Any:
    """A stored number as float32: bfloat16 is its upper half."""

    def widen(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.shl(builder.zext(values[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    def keep(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        return values[0]

    return types.float32(stored), (widen if stored == types.uint16 else keep)


def _power_of_two(context: Any, exponent: Any) -> Any:
    """2 to a whole number from -126 to 126, float32."""

    def build(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(
            builder.shl(builder.add(values[0], ir.Constant(word, 127)), ir.Constant(word, 23)), ir.FloatType()
        )

    return types.float32(types.int32), build


number: Any = intrinsic(_number)
_power: Any = intrinsic(_power_of_two)


@inlined
def exp(x):
    """`e^x` to 1e-7 of it (1 + |x|), in operations that compilers can do for many numbers at once (numpy's they cannot)."""
    scaled = min(max(x * _LOG2_E, _LEAST), _MOST)
    whole = np.floor(scaled + _HALF)
    x = scaled - whole
    near = _POWERS[4] + x * (_POWERS[5] + x * _POWERS[6])
    near = _POWERS[0] + x * (_POWERS[1] + x * (_POWERS[2] + x * (_POWERS[3] + x * near)))
    return near * _power(np.int32(whole))


@inlined
def silu(x):
    """`x * sigmoid(x)`."""
    return x / (_ONE + exp(-x))


@inlined
def gelu(x):
    """`x * Phi(x)`; the error function to 2e-7 (Abramowitz and Stegun 7.1.26)."""
    z = abs(x) * _ROOT_HALF
    t = _ONE / (_ONE + _ERF_P * z)
    tail = t * (_ERF[0] + t * (_ERF[1] + t * (_ERF[2] + t * (_ERF[3] + t * _ERF[4])))) * exp(-z * z)
    half = _HALF * x
    return half + abs(half) * (_ONE - tail)


@loop
def product(weight, x, rows, out):
    """`out[r] = weight x[r]` for the first `rows` rows: `[outs, size]`, `[most, at least size]`, `[most, outs]`.

    Two lines of the matrix and two rows at a time, so that what is read serves four sums.
    """
    outs, size = weight.shape
    for o in range(0, outs - 1, 2):
        line, next_line = weight[o], weight[o + 1]
        for r in range(0, rows - 1, 2):
            first, second = x[r], x[r + 1]
            a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
            for i in range(size):
                v, w = number(line[i]), number(next_line[i])
                a += v * first[i]
                b += v * second[i]
                c += w * first[i]
                d += w * second[i]
            out[r, o], out[r + 1, o], out[r, o + 1], out[r + 1, o + 1] = a, b, c, d
    for r in range(rows):
        single = r == rows - 1 and rows % 2 == 1
        for o in range(0 if single else outs - outs % 2, outs):
            line, a = weight[o], _ZERO
            for i in range(size):
                a += number(line[i]) * x[r, i]
            out[r, o] = a


@loop
def layer_norm(x, weight, eps, out):
    """A layer norm without bias, `[size]` each."""
    size = np.float32(x.shape[0])
    total, squares = _ZERO, _ZERO
    for i in range(x.shape[0]):
        total += x[i]
    mean = total / size
    for i in range(x.shape[0]):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = _ONE / np.sqrt(squares / size + eps)
    for i in range(x.shape[0]):
        out[i] = (x[i] - mean) * scale * weight[i]


@loop
def children(logits, rows, bias, scale, noise, names, above, scores, tokens):
    """The likeliest children of a level's nodes, best first, none likelier than its parent.

    Args:
        logits: `[most, vocab]` of the nodes' children, without the bias; overwritten by scaled ones.
        rows: how many nodes there are.
        bias: `[vocab]` of the output matrix, or empty.
        scale: what logits are multiplied by.
        noise: what is added to the logits of the tokens that `names` names, or empty.
        names: `[vocab]` int64, token ids.
        above: `[rows]` log-probabilities of the nodes' paths.
        scores: `[rows, branching]`, out: log-probabilities of the children's paths.
        tokens: `[rows, branching]`, out.
    """
    vocab, branching = logits.shape[1], scores.shape[1]
    for r in range(rows):
        line, best = logits[r], scores[r]
        if bias.shape[0]:
            for v in range(vocab):
                line[v] += bias[v]
        for v in range(vocab):
            line[v] *= scale
        if noise.shape[0]:
            for v in range(vocab):
                line[v] += noise[names[v]]
        best[:], tokens[r] = -np.inf, 0
        for v in range(vocab):
            if line[v] > best[branching - 1]:
                _insert(best, tokens[r], line[v], v)
        total = _ZERO
        for v in range(vocab):
            total += exp(line[v] - best[0])
        # what is subtracted from a logit to have its log-probability, and the path's
        share = best[0] + np.float32(np.log(total)) - above[r]
        for k in range(branching):
            best[k] = min(best[k] - share, above[r])  # what is certain would be rounded to more
            tokens[r, k] = names[tokens[r, k]]


@loop
def likeliest(scores, count, values, places):
    """The best `count` of `scores` `[n]`, best first; `values` and `places` `[at least count]` are written."""
    values[:count] = -np.inf
    places[:count] = 0
    for i in range(scores.shape[0]):
        if scores[i] > values[count - 1]:
            _insert(values[:count], places[:count], scores[i], i)


@loop
def count_above(scores, least):
    """How many of the scores `[n]` are above `least`."""
    count = 0
    for i in range(scores.shape[0]):
        count += scores[i] > least
    return count


@inlined
def _insert(values, places, value, place):
    """Put a value that belongs there into a falling list, whose last one is lost."""
    k = values.shape[0] - 1
    while k > 0 and value > values[k - 1]:
        values[k], places[k] = values[k - 1], places[k - 1]
        k -= 1
    values[k], places[k] = value, place


@inlined
def _mixed(x):
    """See `medhead.core.gumbel._mix_`. Numba makes 64 bits of two times 32, so every result is cut."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@loop
def uniform(low, high, rows, positions, lanes, out):
    """Uniform numbers of `medhead.core.gumbel`, the same to the last bit.

    Args:
        low: lower half of the seed, uint32.
        high: its upper half.
        rows: `[n]` uint32.
        positions: `[n]` uint32.
        lanes: `[vocab]` uint32.
        out: `[n, vocab]` float32.
    """
    for place in range(rows.shape[0]):
        key = _mixed(np.uint32(rows[place] * np.uint32(0x9E3779B9) + low))
        key = _mixed(np.uint32((key ^ positions[place]) + high))
        second = _mixed(np.uint32(key + np.uint32(0x9E3779B9)))
        line = out[place]
        for lane in range(lanes.shape[0]):
            bits = _mixed(np.uint32(_mixed(np.uint32(lanes[lane] ^ key)) ^ second))
            line[lane] = (np.float32(np.int32(bits >> np.uint32(9))) + _HALF) * np.float32(2.0**-23)
