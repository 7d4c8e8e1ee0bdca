"""Attention of tree nodes whose bits do not depend on the other nodes; for `exact`.

By blocks: `medhead_kernels.path_attention`, which reads the keys once for all nodes, or `tree_path_attention` on a GPU. These
are not the bits of PyTorch's attention. As one: a node attends by the very call that plain decoding of transformers makes.
PyTorch's kernel for one query sums in another order than that for several, and a mask changes bits too, so the call has no
mask and one range of keys. For this the keys of the node's ancestors lie in order after the committed prefix: nodes are visited
depth first, and the keys of each are written to `length + depth` before its call. All keys are read again for every node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from medhead.core.tree import TokenTree
from medhead.errors import UnsupportedTargetError
from medhead_kernels import path_attention, reference


@dataclass(frozen=True)
class NodeVisits:
    """How the nodes of a tree attend.

    Attributes:
        tree: the tree.
        lengths: committed tokens of every row.
        by_blocks: nodes attend by blocks where the kernel serves a layer; else as one.
        by_triton: the kernel is that for GPUs.
    """

    tree: TokenTree
    lengths: list[int]
    by_blocks: bool = False
    by_triton: bool = False

    @cached_property
    def paths(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments `lengths`, `depth` and `path` of `path_attention.attention`."""
        seen = self.tree.visible.expand(len(self.lengths), -1, -1)  # node by node: a parent comes before its child
        path = torch.sort(seen.byte(), dim=-1, descending=True, stable=True).indices[..., : self.tree.max_depth + 1]
        return self._lengths, self.tree.depth.contiguous(), path.contiguous()

    @property
    def _lengths(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.tree.depth.device)

    @cached_property
    def rows(self) -> list[list[tuple[int, int, bool]]]:
        """The order in which the nodes of every row attend as one: node, depth, and whether its keys are not yet at its depth."""
        if self.tree.nodes == 1:
            return [[(0, 0, False)]] * len(self.lengths)
        return [_visits(*row) for row in zip(self.tree.parents.tolist(), self.tree.depth.tolist(), strict=True)]

    def first_keys(self, mask_function: Callable, device: torch.device) -> Tensor | None:
        """Return the first key that every node sees, `[batch, 1, nodes, 1]` int64, by a layer's mask function; None for 0.

        Raises:
            UnsupportedTargetError: the keys that a node sees are not one range that ends with the node.
        """
        if mask_function is causal_mask_function:
            return None
        last = (self._lengths[:, None] + self.tree.depth).to(device)
        keys = torch.arange(int(last.max()) + 1, device=device)
        rows = torch.arange(len(last), device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        seen = mask_function(rows, head, last[:, None, :, None], keys[None, None, None, :])
        seen = seen.expand(len(last), 1, last.shape[1], len(keys))[:, 0]
        first = seen.long().argmax(-1)
        expected = (keys >= first[..., None]) & (keys <= last[..., None])
        if not torch.equal(seen, expected):
            raise UnsupportedTargetError(
                "`exact` needs layers whose tokens see one range of keys, and a mask of this model is another one; leave the "
                "option out"
            )
        return first[:, None, :, None]


def _visits(parents: list[int], depths: list[int]) -> list[tuple[int, int, bool]]:
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    lies_at = list(range(len(parents)))  # the node whose keys lie at length + index
    visits, stack = [], [0]
    while stack:
        node = stack.pop()
        depth = depths[node]
        visits.append((node, depth, lies_at[depth] != node))
        lies_at[depth] = node
        stack += reversed(children[node])
    return visits


def attention(
    visits: NodeVisits, query: Tensor, key: Tensor, value: Tensor, first_keys: Tensor | None, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Map queries `[batch, heads, nodes, dim]` to `[batch, nodes, heads, dim]`; keys and values are left as they were.

    Args:
        visits: of the pass.
        query: of the nodes.
        key: `[batch, kv_heads, columns, dim]`, of every row the prefix and then the nodes.
        value: as `key`.
        first_keys: see `NodeVisits.first_keys`.
        scale: factor of the scores.
        softcap: bound of the scores; None for none.
        sinks: `[heads]` scores of a key without a value; None for none.
    """
    if not visits.by_blocks or any(size % path_attention.LANES for size in (key.shape[3], value.shape[3])):
        return _as_one(visits, query, key, value, first_keys, scale, softcap, sinks)
    first = None if first_keys is None else first_keys[:, 0, :, 0].contiguous()
    sinks = None if sinks is None else sinks.float()
    kernel = path_attention.attention
    if visits.by_triton:
        from medhead_kernels import tree_path_attention

        kernel = tree_path_attention.attention
    return kernel(query, key, value, *visits.paths, scale, first, sinks, softcap)


def _as_one(
    visits: NodeVisits, query: Tensor, key: Tensor, value: Tensor, first_keys: Tensor | None, scale: float,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    nodes, grouped, plain = query.shape[2], query.shape[1] != key.shape[1], softcap is None and sinks is None
    firsts = None if first_keys is None else first_keys[:, 0, :, 0].tolist()
    rows = list[Tensor]()
    for row, (length, steps) in enumerate(zip(visits.lengths, visits.rows, strict=True)):
        keys, values = key[row : row + 1], value[row : row + 1]
        moves = any(moved for _, _, moved in steps)
        kept = [part[:, :, length : length + nodes].clone() for part in (keys, values)] if moves else []
        queries, found = query[row : row + 1].split(1, 2), dict[int, Tensor]()
        for node, depth, moved in steps:
            if moved:
                keys[:, :, length + depth], values[:, :, length + depth] = kept[0][:, :, node], kept[1][:, :, node]
            first = 0 if firsts is None else firsts[row][node]
            own, seen = queries[node], length + depth + 1 - first
            k, v = keys.narrow(2, first, seen), values.narrow(2, first, seen)
            if plain:
                found[node] = F.scaled_dot_product_attention(own, k, v, scale=scale, enable_gqa=grouped)
            else:
                found[node] = reference.attention(own, k, v, None, scale, softcap, sinks).transpose(1, 2)
        rows.append(torch.cat([found[node] for node in range(nodes)], 2))
        for part, before in zip((keys, values), kept, strict=False):
            part[:, :, length : length + nodes] = before
    return torch.cat(rows).transpose(1, 2).contiguous()
