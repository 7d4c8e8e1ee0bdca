"""The Triton kernels as operators of PyTorch, for recorded and compiled steps: tensors hold nothing there."""

from __future__ import annotations

import torch
from torch import Tensor

from medhead_kernels import commit, tree_attention
from medhead_kernels.attn_metadata import Scoring, TreeColumns


def attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
    """`tree_attention.attention` as the operator `medhead::tree_attention`."""
    options = scoring.scale, scoring.window, scoring.softcap, scoring.sinks
    out: Tensor = _attention(query, key, value, tree.lengths, tree.words, tree.depth, *options)
    return out


@torch.library.custom_op("medhead::tree_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    words: Tensor,
    depth: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    tree, scoring = TreeColumns(lengths, (), words, depth), Scoring(scale, window, softcap, sinks)
    with torch.cuda.device_of(query):
        return tree_attention.attention(query, key, value, tree, scoring)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[3])


@torch.library.custom_op("medhead::move_rows", mutates_args=("store",))
def move(store: Tensor, path: Tensor, lengths: Tensor, counts: Tensor | None) -> None:
    """`commit.move` as the operator `medhead::move_rows`, which changes `store`."""
    commit.move(store, path, lengths, counts)


@move.register_fake
def _(store: Tensor, path: Tensor, lengths: Tensor, counts: Tensor | None) -> None:
    return None
