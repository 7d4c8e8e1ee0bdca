"""The attention kernel as a PyTorch operator, which traced and compiled steps can record."""

from __future__ import annotations

import torch
from torch import Tensor

from medhead_kernels import tree_attention
from medhead_kernels.attn_metadata import AttnParams, TreeMetadata


def attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams) -> Tensor:
    """Call `tree_attention.attention` as the operator `medhead::tree_attention`."""
    options = params.scale, params.window, params.softcap, params.sinks
    out: Tensor = _attention(query, key, value, tree.lengths, tree.ancestor_bitmask, tree.depth, *options)
    return out


@torch.library.custom_op("medhead::tree_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, ancestor_bitmask: Tensor, depth: Tensor,
               scale: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
    tree, params = TreeMetadata(lengths, (), ancestor_bitmask, depth), AttnParams(scale, window, softcap, sinks)
    with torch.cuda.device_of(query):
        return tree_attention.attention(query, key, value, tree, params)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[3])
