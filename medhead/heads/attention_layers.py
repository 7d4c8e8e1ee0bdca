"""Attention of small groups of queries to a memory that all share and to keys of their own, in one softmax.

In training there are many anchors, so the scores are the largest thing in a step: the gradient is written by hand, so that
they are computed once and changed in place, where autograd would copy them several times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HIDDEN = torch.finfo(torch.float32).min / 2  # added to the score of a key that is not seen


def attend(
    query: Tensor,
    memory: tuple[Tensor, Tensor],
    seen: Tensor | None,
    own: tuple[Tensor, Tensor] | None,
    own_hidden: Tensor | None = None,
) -> Tensor:
    """Attend to memory and own keys.

    Args:
        query: `[batch, groups, slots, heads, dim]`; all slots of a group see the same memory.
        memory: keys and values `[batch, length, key_heads, dim]`.
        seen: `[batch, groups or 1, length]` bool, or None when everything is seen.
        own: keys and values `[batch, groups, count, key_heads, dim]` of each group itself.
        own_hidden: `[slots, count]` bool, own keys that a slot does not see.

    Returns:
        `[batch, groups, slots, heads * dim]`; zeros for a query that sees nothing at all.
    """
    batch, groups, slots, heads, dim = query.shape
    keys, values = (part.permute(0, 2, 1, 3) for part in memory)  # [b, g, length, dim]
    key_heads, length = keys.shape[1], keys.shape[2]
    repeat = heads // key_heads
    q = query.unflatten(3, (key_heads, repeat)).permute(0, 3, 1, 2, 4, 5)
    q = (q * dim**-0.5).reshape(batch, key_heads, groups, slots * repeat, dim).to(values.dtype)
    bias = None if seen is None else torch.where(seen, 0.0, _HIDDEN)[:, None, :, None]
    own_keys = own_values = own_bias = None
    if own is not None:
        own_keys, own_values = (part.permute(0, 3, 1, 2, 4).to(values.dtype) for part in own)
        if own_hidden is not None:
            own_bias = torch.where(own_hidden, _HIDDEN, 0.0).repeat_interleave(repeat, 0)
    elif length == 0:
        return query.new_zeros(batch, groups, slots, heads * dim)
    found = _Attention.apply(q, keys.to(values.dtype), values, bias, own_keys, own_values, own_bias)
    found = found.view(batch, key_heads, groups, slots, repeat, dim)
    return found.permute(0, 2, 3, 1, 4, 5).reshape(batch, groups, slots, heads * dim)


class _Attention(torch.autograd.Function):
    """q `[b, g, groups, rows, dim]`, keys and values `[b, g, length, dim]`, own ones `[b, g, groups, count, dim]` or None."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None,
        own_keys: Tensor | None, own_values: Tensor | None, own_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Softmax over both parts; `bias` is added to the scores of a part."""
        with torch.autocast(q.device.type, enabled=False):
            scores = [_scores(q, keys, bias)]
            if own_keys is not None:
                scores.append(_scores(q, own_keys, own_bias))
            weights = _softmax(scores)
            found = _times(weights[0].to(q.dtype), values)
            if own_values is not None:
                found = found + _times(weights[1].to(q.dtype), own_values)
        ctx.save_for_backward(q, keys, values, own_keys, own_values, found, *weights)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """dS = P * (dP - sum(dO * O))."""
        q, keys, values, own_keys, own_values, found, *weights = ctx.saved_tensors
        common = (grad * found).sum(-1, keepdim=True).float()
        grads: list[Tensor | None] = []
        of_q = torch.zeros_like(q)
        for part, k, v in zip(weights, (keys, own_keys), (values, own_values), strict=False):
            of_values = _gather(part.to(q.dtype), grad, v)
            of_scores = _times(grad, v.transpose(-1, -2)).float().sub_(common).mul_(part).to(q.dtype)
            of_q += _times(of_scores, k)
            grads += [_gather(of_scores, q, k), of_values, None]
        return of_q, *grads, *([None] * (6 - len(grads)))


def _flat(x: Tensor, shared: Tensor) -> Tensor:
    """Groups and rows as one dimension where the other factor is shared by all groups."""
    return x.flatten(2, 3) if shared.ndim == 4 else x


def _times(x: Tensor, y: Tensor) -> Tensor:
    """`[b, g, groups, rows, m]` times `[b, g, (groups,) m, n]`."""
    return (_flat(x, y) @ y).view(*x.shape[:-1], y.shape[-1])


def _gather(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """x^T y over the rows of each group, or over all groups where `like` is shared by them."""
    return _flat(x, like).transpose(-1, -2) @ _flat(y, like)


def _scores(q: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    scores = _times(q, keys.transpose(-1, -2)).float()
    return scores if bias is None else scores.add_(bias)


def _softmax(parts: list[Tensor]) -> list[Tensor]:
    """One softmax over the last dimension of all parts, in place; zeros where everything is hidden."""
    filled = [part for part in parts if part.shape[-1]]
    top = torch.stack([part.amax(-1) for part in filled]).amax(0)[..., None].clamp_(min=_HIDDEN / 2)
    for part in filled:
        part.sub_(top).exp_()
    total = torch.stack([part.sum(-1) for part in filled]).sum(0)[..., None].clamp_(min=1e-30)  # else at least 1
    for part in filled:
        part.div_(total)
    return parts
