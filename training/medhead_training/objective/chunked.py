"""Sums of a loss over many positions that hold the logits of one chunk of positions in memory at a time.

The output matrix is frozen, so backward needs only the gradient with respect to the features. It is computed together
with the loss while the chunk's logits exist (as in Liger-Kernel, arXiv 2410.10989).

`soft_by_mean` is a cheaper form of the `soft` loss: the gradient of -sum p log q depends on the teacher's distribution p
only through W^T p, the mean row of the output matrix W, which `mean_output` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medhead.errors import MedheadError
from medhead_training.objective.losses import get_loss, hard, to_float32

CHUNK_BYTES = 64 * 2**20  # of float32 logits; `soft_by_mean` holds one such array, `hard` 4, `kl` 7, `js` 11
# on CUDA, where the output matrix is read from slow memory once for every chunk
CUDA_CHUNK_BYTES = 2**30

# Return the losses [c] of a slice of c positions and, if asked, their gradients [c, H].
ChunkFn = Callable[[slice, bool], tuple[Tensor, Tensor | None]]


def positions_per_chunk(vocab: int, budget: int = CHUNK_BYTES) -> int:
    """Return how many positions have float32 logits of at most `budget` bytes; at least 1."""
    return max(1, budget // (4 * vocab))


def chunk_bytes(device: torch.device, arrays: int = 1) -> int:
    """Return the bytes of a chunk's float32 logits on a device, of which a loss holds so many arrays at once."""
    return CHUNK_BYTES if device.type != "cuda" else CUDA_CHUNK_BYTES // (1 if arrays == 1 else 4)


def _chunk_size(chunk: int | None, weight: Tensor, arrays: int = 1) -> int:
    if chunk is not None and chunk < 1:
        raise MedheadError(f"chunk is {chunk}: it counts positions, so it must be 1 or more")
    return chunk or positions_per_chunk(len(weight), chunk_bytes(weight.device, arrays))


def _cast(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype, device = weight.dtype, weight.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_constants(**constants: Tensor | None) -> None:
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise MedheadError(f"{name} requires a gradient, but is a constant here: pass {name}.detach()")


def _check_lengths(length: int, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and len(tensor) != length:
            raise MedheadError(f"{name} has {len(tensor)} rows where {length} were expected")


class _SumOverChunks(torch.autograd.Function):
    """Compute sum_i weights_i loss_i and its gradient in forward; backward only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weights: Tensor | None, chunk: int, chunk_fn: ChunkFn, with_gradient: bool
    ) -> Tensor:
        total = to_float32(features.new_zeros(()))
        gradient = torch.empty_like(features) if with_gradient else None
        for begin in range(0, len(features), chunk):
            part = slice(begin, begin + chunk)
            losses, slope = chunk_fn(part, with_gradient)
            if weights is not None:
                scale = weights[part].to(losses.dtype)
                losses = losses * scale
                slope = slope if slope is None else slope * scale[:, None]  # of [c, H], not of [c, V]
            total += losses.sum()
            if gradient is not None and slope is not None:
                gradient[part] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _sum_over_chunks(features: Tensor, weights: Tensor | None, chunk: int, chunk_fn: ChunkFn) -> Tensor:
    with_gradient = features.requires_grad and torch.is_grad_enabled()
    return _SumOverChunks.apply(features, weights, chunk, chunk_fn, with_gradient)


def chunked_loss(
    name: str,
    features: Tensor,  # inputs of the output matrix, [n, H]
    weight: Tensor,  # frozen rows of the output matrix for the draft vocabulary, [Vd, H]
    *,
    bias: Tensor | None = None,  # [Vd]
    teacher_hidden: Tensor | None = None,  # hidden states of the teacher, [n, Ht]; required by all losses but `hard`
    teacher_weight: Tensor | None = None,  # the same rows of the teacher's output matrix, [Vd, Ht]
    teacher_bias: Tensor | None = None,  # [Vd]
    labels: Tensor | None = None,  # in the draft vocabulary, [n], -100 to ignore a position; required by `hard`
    weights: Tensor | None = None,  # [n], ones by default
    chunk: int | None = None,
) -> Tensor:
    """Return the scalar sum_i weights_i loss_i of the loss called `name` (a key of `LOSSES`); 0 for no positions.

    Only `features` gets a gradient. Products use the dtype of the matrix, or autocast's if that is on. If `teacher_weight`
    does not hold all rows of the teacher, its distribution is renormalised over the draft vocabulary. A chunk has `chunk`
    positions, by default as many as have `chunk_bytes` of logits.
    """
    loss, chunk = get_loss(name), _chunk_size(chunk, weight, arrays=4)
    if loss is hard:
        if labels is None:
            raise MedheadError("the loss 'hard' needs labels")
        teacher_hidden = teacher_weight = None
    elif teacher_hidden is None or teacher_weight is None:
        raise MedheadError(f"the loss {name!r} needs teacher_hidden and teacher_weight")
    else:
        _check_lengths(len(weight), teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    _check_lengths(len(features), teacher_hidden=teacher_hidden, labels=labels, weights=weights)
    _check_constants(
        weight=weight, bias=bias, weights=weights,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias,
    )  # fmt: skip
    weight, bias = _cast(weight, bias)
    if teacher_weight is not None:
        teacher_weight, teacher_bias = _cast(teacher_weight, teacher_bias)

    def chunk_fn(part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(features[part].to(weight.dtype), weight, bias)  # [c, Vd]
        teacher = None
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = F.linear(teacher_hidden[part].to(teacher_weight.dtype), teacher_weight, teacher_bias)
        with torch.enable_grad():  # it is off in the forward of an autograd.Function
            losses = loss(logits.requires_grad_(with_gradient), teacher, None if labels is None else labels[part])
        if not with_gradient:
            return losses, None
        (slope,) = torch.autograd.grad(losses, logits, torch.ones_like(losses))
        return losses.detach(), slope @ weight

    return _sum_over_chunks(features, weights, chunk, chunk_fn)


def _exponentials(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(z - max z) `[c, V]`, in `buffer`, of z = W h + b, its sums `[c, 1]` and logsumexp(z) `[c]`."""
    hidden, logits = hidden.to(weight.dtype), buffer[: len(hidden)]
    if bias is None:
        torch.mm(hidden, weight.T, out=logits)
    else:
        torch.addmm(bias, hidden, weight.T, out=logits)
    wide = to_float32(logits)  # the same memory, unless the products have a 16-bit dtype
    top = wide.amax(-1, keepdim=True)
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    if wide.dtype != logits.dtype:
        logits.copy_(wide)
    return logits, total, (top + total.log()).squeeze(-1)


def _mean_row(exponentials: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """Return softmax(z) W `[c, H]`; dividing after the product costs [c, H] instead of [c, V] operations."""
    return to_float32(exponentials @ weight).div_(total)


@torch.no_grad()
def mean_output(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Return W^T p `[n, H]` of p = softmax(W h + b), the mean output row, in the dtype of `hidden` and without gradient.

    h are the teacher's hidden states `[n, H]`, W `[Vd, H]` and b `[Vd]` the output matrix's rows for the draft vocabulary.
    """
    chunk = _chunk_size(chunk, weight)
    weight, bias = _cast(weight, bias)
    buffer, mean = weight.new_empty(min(chunk, len(hidden)), len(weight)), torch.empty_like(hidden)
    for begin in range(0, len(hidden), chunk):
        part = slice(begin, begin + chunk)
        exponentials, total, _ = _exponentials(hidden[part], weight, bias, buffer)
        mean[part] = _mean_row(exponentials, total, weight)
    return mean


def soft_by_mean(
    features: Tensor,  # [n, H]
    mean: Tensor,  # W^T p of the teacher's distribution p over the same rows W, [n, H] (see `mean_output`)
    weight: Tensor,  # W, frozen rows of the output matrix for the draft vocabulary, [Vd, H]
    *,
    bias: Tensor | None = None,  # [Vd]
    bias_mean: Tensor | None = None,  # b . p, [n], a constant: without it the loss is larger, the gradient the same
    weights: Tensor | None = None,  # [n], ones by default
    chunk: int | None = None,  # positions per chunk, by default as many as have `chunk_bytes` of logits
) -> Tensor:
    """Return the sum of the `soft` loss computed from W^T p instead of p.

    It equals `chunked_loss("soft", ...)` up to rounding: sum_i weights_i (logsumexp(W f_i + b) - f_i . mean_i - b . p_i).
    A chunk takes two products, W f and W^T softmax(W f); the gradient is the second minus the mean.
    """
    chunk = _chunk_size(chunk, weight)
    _check_lengths(len(features), mean=mean, bias_mean=bias_mean, weights=weights)
    _check_constants(mean=mean, weight=weight, bias=bias, bias_mean=bias_mean, weights=weights)
    weight, bias = _cast(weight, bias)
    buffer = weight.new_empty(min(chunk, len(features)), len(weight))

    def chunk_fn(part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        here, teacher = features[part], to_float32(mean[part])
        exponentials, total, losses = _exponentials(here, weight, bias, buffer)
        losses = losses - (to_float32(here) * teacher).sum(-1)
        if bias_mean is not None:
            losses = losses - to_float32(bias_mean[part])
        return losses, _mean_row(exponentials, total, weight).sub_(teacher) if with_gradient else None

    return _sum_over_chunks(features, weights, chunk, chunk_fn)
