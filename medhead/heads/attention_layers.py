"""Attention of small groups of queries to keys that all groups share and to keys of their own, in one softmax.

Training has many anchors, so the scores are the largest tensor of a step: the gradient is written by hand, so that scores
are changed in place, where autograd would copy them several times. Scores of more than `SCORE_BYTES` are never held together:
groups are computed in parts, and their weights again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HIDDEN = torch.finfo(torch.float32).min / 2  # added to the score of a masked key
SCORE_BYTES = 512 * 2**20  # of float32 scores, up to which weights are kept for backward


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
        ctx.parts, outs = _parts(q, keys, own_keys), []
        weights: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            for part in ctx.parts:
                weights = _weights(part, q, keys, bias, own_keys, own_bias)
                out = _times(weights[0].to(q.dtype), values)
                if own_values is not None:
                    out = out + _times(weights[1].to(q.dtype), own_values[:, :, part])
                outs.append(out)
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        kept = weights if len(outs) == 1 else []
        ctx.save_for_backward(q, keys, values, bias, own_keys, own_values, own_bias, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Compute dS = P * (dP - sum(dO * O)) and the products with it."""
        q, keys, values, bias, own_keys, own_values, own_bias, out, *kept = ctx.saved_tensors
        of_keys, of_values = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)
        )
        of_q, of_own = [], []
        for part in ctx.parts:
            weights = kept or _weights(part, q, keys, bias, own_keys, own_bias)
            here = q[:, :, part], grad[:, :, part], out[:, :, part]
            total, *shares = _gradients(*here, weights[0], keys, values)
            of_keys += shares[0]
            of_values += shares[1]
            if own_keys is not None:
                more, *of_group = _gradients(*here, weights[1], own_keys[:, :, part], own_values[:, :, part])
                total += more
                of_own.append(of_group)
            of_q.append(total)
        joined = [torch.cat(parts, 2) for parts in zip(*of_own, strict=True)]
        own: list[Tensor | None] = [*joined] or [None, None]
        return torch.cat(of_q, 2), of_keys.to(keys.dtype), of_values.to(values.dtype), None, *own, None


def _gradients(q: Tensor, grad: Tensor, out: Tensor, weights: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys and values of one part of the softmax."""
    common = (grad * out).sum(-1, keepdim=True).float()
    of_scores = _times(grad, v.transpose(-1, -2)).float().sub_(common).mul_(weights).to(q.dtype)
    return _times(of_scores, k), _gather(of_scores, q, k), _gather(weights.to(q.dtype), grad, v)


def _parts(q: Tensor, keys: Tensor, own_keys: Tensor | None) -> list[slice]:
    """Return slices of the groups whose scores have at most `SCORE_BYTES` each."""
    columns = keys.shape[2] + (0 if own_keys is None else own_keys.shape[3])
    groups, of_group = q.shape[2], 4 * columns * q.numel() // max(1, q.shape[2] * q.shape[4])
    size = max(1, min(groups, SCORE_BYTES // max(1, of_group)))
    return [slice(begin, begin + size) for begin in range(0, max(1, groups), size)]


def _weights(
    part: slice, q: Tensor, keys: Tensor, bias: Tensor | None, own_keys: Tensor | None, own_bias: Tensor | None
) -> list[Tensor]:
    """Return the softmax over shared keys and each group's own, for a part of the groups."""
    here = q[:, :, part]
    scores = [_scores(here, keys, bias if bias is None or bias.shape[2] == 1 else bias[:, :, part])]
    if own_keys is not None:
        scores.append(_scores(here, own_keys[:, :, part], own_bias))
    return _softmax(scores)


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
