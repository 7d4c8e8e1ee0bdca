"""Losses that make heads predict their target, and their sums without the logits of all positions in memory.

`LOSSES` holds one function for each loss, of logits `[n, V]`. `chunked_loss` sums one of them over positions whose
logits it makes a chunk at a time: the output matrix is frozen, so the gradient with respect to the features is all
that backward needs, and it is computed along with the loss while the chunk's logits are there (as Liger-Kernel,
arXiv 2410.10989, does for the cross-entropy). `soft_by_mean` is the cheap way to the `soft` loss: the gradient of
`-sum_v p_v log q_v` needs the teacher's distribution p only as the mean row `W^T p` of the output matrix W.

All results are in nats. The losses work in float32 (float64 stays float64), whatever the logits come in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medhead.errors import MedheadError

CHUNK_BYTES = 64 * 2**20  # of float32 logits; `soft_by_mean` holds one such array, `hard` 4, `kl` 7, `js` 11
HYBRID_ETA = 3.0  # the best of arXiv 2602.23881

# --- One loss for each position, `[n]`, of draft logits `[n, V]`, teacher logits `[n, V]` and labels `[n]`. p is the teacher's
# distribution, q the draft's; no gradient goes to the teacher, and only `hard` looks at labels. ---


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 when it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _log_q(draft_logits: Tensor) -> Tensor:
    return F.log_softmax(_wide(draft_logits), -1)


def _log_p(teacher_logits: Tensor) -> Tensor:
    """Never -inf, so that 0 log 0 is 0 for a teacher that excludes tokens."""
    log_p = F.log_softmax(_wide(teacher_logits.detach()), -1)
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _log_acceptance(draft_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`[n]`: log of alpha = sum_v min(p_v, q_v), the probability that speculative sampling accepts a draft."""
    return torch.minimum(_log_p(teacher_logits), _log_q(draft_logits)).logsumexp(-1).clamp(max=0)


def hard(draft_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy with the label; a label of -100 counts as zero (Medusa, arXiv 2401.10774)."""
    return F.cross_entropy(_wide(draft_logits), labels, reduction="none")


def soft(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy with the teacher's distribution, -sum p log q (Hinton et al., arXiv 1503.02531)."""
    return -(_log_p(teacher_logits).exp_() * _log_q(draft_logits)).sum(-1)


def kl(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """KL(p || q): `soft` less the teacher's entropy, so the gradient is the same and zero is the best."""
    log_p = _log_p(teacher_logits)
    return (log_p.exp() * (log_p - _log_q(draft_logits))).sum(-1)


def reverse_kl(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """KL(q || p), which seeks a mode of p (MiniLLM, arXiv 2306.08543); infinite where p excludes what q allows."""
    log_q = _log_q(draft_logits)
    return (log_q.exp() * (log_q - _log_p(teacher_logits))).sum(-1)


def js(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence, KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2: symmetric, at most log 2."""
    log_p, log_q = _log_p(teacher_logits), _log_q(draft_logits)
    log_2m = torch.logaddexp(log_p, log_q)
    twice = log_p.exp() * (log_p - log_2m) + log_q.exp() * (log_q - log_2m)
    return twice.sum(-1) / 2 + math.log(2)


def tv(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Total variation, 1 - sum min(p, q): how often speculative sampling rejects (DistillSpec, arXiv 2310.08461)."""
    return -torch.expm1(_log_acceptance(draft_logits, teacher_logits))


def lk(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """-log sum min(p, q): the gradient of `tv` over the acceptance, so that it does not vanish early (2602.23881)."""
    return -_log_acceptance(draft_logits, teacher_logits)


def hybrid_lk(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """From KL while little is accepted to TV when much is: weight exp(-3 alpha) on `kl`, without gradient (2602.23881)."""
    distance = tv(draft_logits, teacher_logits)
    share = torch.exp(-HYBRID_ETA * (1 - distance.detach()))
    return share * kl(draft_logits, teacher_logits) + (1 - share) * distance


Loss = Callable[[Tensor, Any, Any], Tensor]  # draft logits [n, V], teacher logits [n, V], labels [n] to [n]
LOSSES: dict[str, Loss] = {f.__name__: f for f in (hard, soft, kl, reverse_kl, js, tv, lk, hybrid_lk)}


def loss_named(name: str) -> Loss:
    """The loss of that name; an error that names those there are otherwise."""
    if name not in LOSSES:
        raise MedheadError(f"no loss is called {name!r}: choose one of {', '.join(LOSSES)}")
    return LOSSES[name]


# --- sums over positions, a chunk of logits at a time ---


def positions_per_chunk(vocab: int, budget: int = CHUNK_BYTES) -> int:
    """How many positions have float32 logits of at most `budget` bytes; at least one."""
    return max(1, budget // (4 * vocab))


def _chunk(chunk: int | None, weight: Tensor) -> int:
    if chunk is not None and chunk < 1:
        raise MedheadError(f"chunk is {chunk}: it counts positions, so it must be 1 or more")
    return chunk or positions_per_chunk(len(weight))


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What a product with `weight` is computed in: autocast's type where that is on, else the matrix's own."""
    kind = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _cast(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = _product_dtype(weight)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _refuse_gradients(**constants: Tensor | None) -> None:
    """Their gradient is not computed, and must not be missing silently."""
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise MedheadError(f"{name} requires a gradient, but is a constant here: pass {name}.detach()")


def _refuse_lengths(length: int, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and len(tensor) != length:
            raise MedheadError(f"{name} has {len(tensor)} rows where {length} were expected")


class _SumOverChunks(torch.autograd.Function):
    """sum_i weights_i loss_i, with its gradient computed in forward and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weights: Tensor | None,
        chunk: int,
        part_of: Callable[[slice, bool], tuple[Tensor, Tensor | None]],
        with_gradient: bool,
    ) -> Tensor:
        """Run over the chunks.

        Args:
            ctx: autograd's.
            features: `[n, H]`.
            weights: `[n]`, or None for ones.
            chunk: positions at once.
            part_of: gives the losses `[c]` of a slice of c positions and, if asked, their gradients `[c, H]`.
            with_gradient: whether backward may come.
        """
        total = _wide(features.new_zeros(()))
        gradient = torch.empty_like(features) if with_gradient else None
        for begin in range(0, len(features), chunk):
            part = slice(begin, begin + chunk)
            losses, slope = part_of(part, with_gradient)
            if weights is not None:
                share = weights[part].to(losses.dtype)
                losses = losses * share
                slope = slope if slope is None else slope * share[:, None]  # after the product: [c, H], not [c, V]
            total += losses.sum()
            if gradient is not None and slope is not None:
                gradient[part] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _sum_over_chunks(features: Tensor, weights: Tensor | None, chunk: int, part_of: Callable) -> Tensor:
    with_gradient = features.requires_grad and torch.is_grad_enabled()
    return _SumOverChunks.apply(features, weights, chunk, part_of, with_gradient)


def _fused_hard(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor | None:
    """The sum of `hard` by Liger's kernel; None where that is not installed."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    weight, bias = _cast(weight, bias)
    result = LigerFusedLinearCrossEntropyFunction.apply(
        features.to(weight.dtype), weight, labels, bias, None, -100, 0.0, 0.0, "sum"
    )
    return result[0] if isinstance(result, tuple) else result  # newer versions add metrics


def chunked_loss(
    name: str,
    features: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """sum_i weights_i loss_i of the loss called `name`, with the logits of one chunk of positions in memory at a time.

    Everything but the features is a constant. Products are computed in the matrix's type, or autocast's where that is
    on (pass a matrix of that type: another is copied in each call). The features have a gradient of their own type.

    Args:
        name: a key of `LOSSES`.
        features: `[n, H]`, what the output matrix is applied to.
        weight: `[Vd, H]`, the frozen output matrix: the rows of the draft vocabulary.
        bias: `[Vd]`.
        teacher_hidden: `[n, Ht]`, whose product with `teacher_weight` is the teacher's logits; all but `hard` need it.
        teacher_weight: `[Vd, Ht]`, the same rows of the teacher's output matrix. If they are not all of its rows, the
            teacher's distribution is the one among the draft vocabulary.
        teacher_bias: `[Vd]`.
        labels: `[n]`, indices into the draft vocabulary, -100 to leave out; `hard` needs it.
        weights: `[n]`, ones by default. Without them `hard` uses Liger's kernel on CUDA if `liger-kernel` is installed
            (a weight for each position is not among that kernel's options).
        chunk: positions at once; by default as many as have logits of at most `CHUNK_BYTES`.

    Returns:
        A scalar, 0 for no positions.
    """
    loss, chunk = loss_named(name), _chunk(chunk, weight)
    if loss is hard:
        if labels is None:
            raise MedheadError("the loss 'hard' needs labels")
        teacher_hidden = teacher_weight = None
    elif teacher_hidden is None or teacher_weight is None:
        raise MedheadError(f"the loss {name!r} needs teacher_hidden and teacher_weight")
    else:
        _refuse_lengths(len(weight), teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    _refuse_lengths(len(features), teacher_hidden=teacher_hidden, labels=labels, weights=weights)
    _refuse_gradients(
        weight=weight, bias=bias, weights=weights,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias,
    )  # fmt: skip
    if loss is hard and labels is not None and weights is None and features.is_cuda and len(features):
        fused = _fused_hard(features, weight, bias, labels)
        if fused is not None:
            return fused
    weight, bias = _cast(weight, bias)
    if teacher_weight is not None:
        teacher_weight, teacher_bias = _cast(teacher_weight, teacher_bias)

    def part_of(part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(features[part].to(weight.dtype), weight, bias)  # [c, Vd]
        teacher = None
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = F.linear(teacher_hidden[part].to(teacher_weight.dtype), teacher_weight, teacher_bias)
        with torch.enable_grad():  # forward of an autograd.Function runs without
            losses = loss(logits.requires_grad_(with_gradient), teacher, None if labels is None else labels[part])
        if not with_gradient:
            return losses, None
        (slope,) = torch.autograd.grad(losses, logits, torch.ones_like(losses))
        return losses.detach(), slope @ weight

    return _sum_over_chunks(features, weights, chunk, part_of)


# --- soft targets by the mean row of the output matrix ---


def _exponentials(hidden: Tensor, weight: Tensor, bias: Tensor | None, space: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z - max z) of z = W h + b, without gradient and in the space given.

    Args:
        hidden: `[c, H]`.
        weight: `[V, H]`.
        bias: `[V]`.
        space: `[at least c, V]` in the matrix's type; the first result lies there.

    Returns:
        The exponentials `[c, V]`, their sums `[c, 1]` and logsumexp(z) `[c]`.
    """
    hidden, logits = hidden.to(weight.dtype), space[: len(hidden)]
    if bias is None:
        torch.mm(hidden, weight.T, out=logits)
    else:
        torch.addmm(bias, hidden, weight.T, out=logits)
    wide = _wide(logits)  # the same memory, unless the products are in a 16-bit type
    top = wide.amax(-1, keepdim=True)
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    if wide.dtype != logits.dtype:
        logits.copy_(wide)
    return logits, total, (top + total.log()).squeeze(-1)


def _mean_row(exponentials: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """`[c, H]`: softmax(z) W. The division is left for the end, where it is of `[c, H]` and not of `[c, V]`."""
    return _wide(exponentials @ weight).div_(total)


def _space(features: Tensor, weight: Tensor, chunk: int) -> Tensor:
    return weight.new_empty(min(chunk, len(features)), len(weight))


@torch.no_grad()
def mean_output(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """W^T p of the distribution p = softmax(W h + b): the mean row of the output matrix, what `soft_by_mean` needs.

    Args:
        hidden: `[n, H]` of the teacher.
        weight: `[Vd, H]`, the output matrix W: the rows of the draft vocabulary.
        bias: `[Vd]`.
        chunk: positions at once; by default as many as have logits of at most `CHUNK_BYTES`.

    Returns:
        `[n, H]` in the type of `hidden`, without gradient.
    """
    chunk = _chunk(chunk, weight)
    weight, bias = _cast(weight, bias)
    space, mean = _space(hidden, weight, chunk), torch.empty_like(hidden)
    for begin in range(0, len(hidden), chunk):
        part = slice(begin, begin + chunk)
        exponentials, total, _ = _exponentials(hidden[part], weight, bias, space)
        mean[part] = _mean_row(exponentials, total, weight)
    return mean


def soft_by_mean(
    features: Tensor,
    mean: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    bias_mean: Tensor | None = None,
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The sum of the `soft` loss from W^T p in place of p.

    That is sum_i weights_i (logsumexp(W f_i + b) - f_i . mean_i - b . p_i). Two products for each chunk, W f and
    W^T softmax(W f); the gradient is the latter less the mean. Types and memory are as in `chunked_loss`, which this
    equals for `soft` but for rounding.

    Args:
        features: `[n, H]`.
        mean: `[n, H]`, W^T p of the teacher's distribution p (see `mean_output`), over the same rows W.
        weight: `[Vd, H]`, the frozen output matrix W: the rows of the draft vocabulary.
        bias: `[Vd]`.
        bias_mean: `[n]`, b . p. It does not depend on the features: without it the gradient is right all the same, and
            the loss is too large by sum_i weights_i b . p_i.
        weights: `[n]`, ones by default.
        chunk: positions at once; by default as many as have logits of at most `CHUNK_BYTES`.

    Returns:
        A scalar, 0 for no positions.
    """
    chunk = _chunk(chunk, weight)
    _refuse_lengths(len(features), mean=mean, bias_mean=bias_mean, weights=weights)
    _refuse_gradients(mean=mean, weight=weight, bias=bias, bias_mean=bias_mean, weights=weights)
    weight, bias = _cast(weight, bias)
    space = _space(features, weight, chunk)

    def part_of(part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        here, teacher = features[part], _wide(mean[part])
        exponentials, total, losses = _exponentials(here, weight, bias, space)
        losses = losses - (_wide(here) * teacher).sum(-1)
        if bias_mean is not None:
            losses = losses - _wide(bias_mean[part])
        return losses, _mean_row(exponentials, total, weight).sub_(teacher) if with_gradient else None

    return _sum_over_chunks(features, weights, chunk, part_of)


# --- what a depth counts ---


def depth_weights(depth: int, decay: float) -> Tensor:
    """`[depth]`: proportional to decay ** d, summing to 1 (Medusa, arXiv 2401.10774, uses 0.8)."""
    if depth < 1 or decay < 0:
        raise MedheadError(f"depth is {depth} and decay {decay}: at least 1 and at least 0 were expected")
    weights = torch.tensor([decay**d for d in range(depth)], dtype=torch.float64)
    return (weights / weights.sum()).float()
