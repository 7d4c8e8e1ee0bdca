"""Attention of small groups of queries to keys that all groups share and to keys of their own, in one softmax.

Training has many anchors, so the scores are the largest tensor of a step: the gradient is written by hand, so that scores
are computed once and changed in place, where autograd would copy them several times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HIDDEN = torch.finfo(torch.float32).min / 2  # added to the score of a masked key


def attend(
    query: Tensor,
    shared_kv: tuple[Tensor, Tensor],
    visible: Tensor | None,
    own_kv: tuple[Tensor, Tensor] | None,
    own_masked: Tensor | None = None,
) -> Tensor:
    """Attend to shared keys and to each group's own keys.

    Args:
        query: `[batch, groups, slots, heads, dim]`; all slots of a group see the same shared keys.
        shared_kv: keys and values `[batch, length, kv_heads, dim]`.
        visible: `[batch, groups or 1, length]` bool, the shared keys that a group sees, or None for all.
        own_kv: keys and values `[batch, groups, count, kv_heads, dim]` of each group itself.
        own_masked: `[slots, count]` bool, own keys that a slot does not see.

    Returns:
        `[batch, groups, slots, heads * dim]`; zeros for a query that sees no key.
    """
    batch, groups, slots, heads, dim = query.shape
    keys, values = (part.permute(0, 2, 1, 3) for part in shared_kv)  # [batch, kv_heads, length, dim]
    kv_heads, length = keys.shape[1], keys.shape[2]
    repeat = heads // kv_heads
    q = query.unflatten(3, (kv_heads, repeat)).permute(0, 3, 1, 2, 4, 5)
    q = (q * dim**-0.5).reshape(batch, kv_heads, groups, slots * repeat, dim).to(values.dtype)
    bias = None if visible is None else torch.where(visible, 0.0, _HIDDEN)[:, None, :, None]
    own_keys = own_values = own_bias = None
    if own_kv is not None:
        own_keys, own_values = (part.permute(0, 3, 1, 2, 4).to(values.dtype) for part in own_kv)
        if own_masked is not None:
            own_bias = torch.where(own_masked, _HIDDEN, 0.0).repeat_interleave(repeat, 0)
    elif length == 0:
        return query.new_zeros(batch, groups, slots, heads * dim)
    out = _Attention.apply(q, keys.to(values.dtype), values, bias, own_keys, own_values, own_bias)
    out = out.view(batch, kv_heads, groups, slots, repeat, dim)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(batch, groups, slots, heads * dim)


class _Attention(torch.autograd.Function):
    """q `[batch, kv_heads, groups, rows, dim]`, keys `[batch, kv_heads, length, dim]`, own keys `[..., groups, count, dim]`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None,
        own_keys: Tensor | None, own_values: Tensor | None, own_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Compute one softmax over shared and own keys; a bias is added to the scores of its part."""
        with torch.autocast(q.device.type, enabled=False):
            scores = [_scores(q, keys, bias)]
            if own_keys is not None:
                scores.append(_scores(q, own_keys, own_bias))
            weights = _softmax(scores)
            out = _times(weights[0].to(q.dtype), values)
            if own_values is not None:
                out = out + _times(weights[1].to(q.dtype), own_values)
        ctx.save_for_backward(q, keys, values, own_keys, own_values, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Compute dS = P * (dP - sum(dO * O)) and the products with it."""
        q, keys, values, own_keys, own_values, out, *weights = ctx.saved_tensors
        common = (grad * out).sum(-1, keepdim=True).float()
        grads: list[Tensor | None] = []
        of_q = torch.zeros_like(q)
        for part, k, v in zip(weights, (keys, own_keys), (values, own_values), strict=False):
            of_values = _gather(part.to(q.dtype), grad, v)
            of_scores = _times(grad, v.transpose(-1, -2)).float().sub_(common).mul_(part).to(q.dtype)
            of_q += _times(of_scores, k)
            grads += [_gather(of_scores, q, k), of_values, None]
        return of_q, *grads, *([None] * (6 - len(grads)))


def _flat(x: Tensor, shared: Tensor) -> Tensor:
    """Merge groups and rows where the other factor is shared by all groups."""
    return x.flatten(2, 3) if shared.ndim == 4 else x


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Multiply `[b, g, groups, rows, m]` with `[b, g, (groups,) m, n]`."""
    return (_flat(x, y) @ y).view(*x.shape[:-1], y.shape[-1])


def _gather(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Compute x^T y over the rows of each group, or over all groups where `like` is shared by them."""
    return _flat(x, like).transpose(-1, -2) @ _flat(y, like)


def _scores(q: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    scores = _times(q, keys.transpose(-1, -2)).float()
    return scores if bias is None else scores.add_(bias)


def _softmax(parts: list[Tensor]) -> list[Tensor]:
    """Apply one softmax over the last dimension of all parts, in place; zeros where every key is masked."""
    filled = [part for part in parts if part.shape[-1]]
    top = torch.stack([part.amax(-1) for part in filled]).amax(0)[..., None].clamp_(min=_HIDDEN / 2)
    for part in filled:
        part.sub_(top).exp_()
    total = torch.stack([part.sum(-1) for part in filled]).sum(0)[..., None].clamp_(min=1e-30)  # else at least 1
    for part in filled:
        part.div_(total)
    return parts
