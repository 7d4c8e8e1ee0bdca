"""Trees from extra decoding heads: dynamic by cumulative probability, or a static shape of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.proposers.base import DecodeState, Proposer, check_tree_size, register_proposer
from medhead.proposers.growth import grow_tree
from medhead.proposers.static_tree import StaticShape
from medhead.tree import TokenTree

if TYPE_CHECKING:
    from medhead.target import Target


@register_proposer("heads")
class HeadsProposer(Proposer):
    """Proposes with heads.

    Args:
        target: the target the heads belong to.
        heads: the heads, or the folder of their checkpoint.
        tree_size: nodes of the tree, root included; what the heads' configuration says if None.
        width: nodes of a frontier.
        branching: candidates of every frontier node.
        max_depth: no tree is deeper; the heads' depth if None.
        shape: paths of ranks (Medusa's static trees) instead of a dynamic tree.

    Raises:
        MedheadError: no heads, heads of another model, or a tree deeper than the heads.
    """

    uses_noise = True

    def __init__(
        self,
        target: Target,
        heads: Heads | str | Path | None = None,
        tree_size: int | None = None,
        width: int = 4,
        branching: int = 4,
        max_depth: int | None = None,
        shape: list[list[int]] | None = None,
    ) -> None:
        if heads is None:
            raise MedheadError("the proposer 'heads' needs heads: give the folder of a heads checkpoint (--heads)")
        self.heads = heads if isinstance(heads, Heads) else load_heads(heads, target)
        depth = self.heads.config.depth
        self.shape = None if shape is None else StaticShape(shape, target.device)
        wanted = self.shape.depth if self.shape else (depth if max_depth is None else max_depth)
        if wanted > depth:
            raise MedheadError(f"the tree is {wanted} deep, but these heads guess {depth} tokens ahead; use a depth of at most {depth}")
        if wanted < 1 or width < 1 or branching < 1:
            raise MedheadError(f"depth, width and branching must be at least 1, got {wanted}, {width} and {branching}")
        self.max_depth = wanted
        self.width, self.branching = width, branching
        size = self.heads.config.tree_size if tree_size is None else tree_size
        self.tree_size = self.shape.nodes if self.shape else check_tree_size(size)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """A tree for every row, ranked by the heads and, when sampling, by the noise of the coming positions."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        if self.shape is not None:
            return self.shape.fill(state.roots, HeadsExpander(self.heads, state, self.shape.widest), depth)
        expander = HeadsExpander(self.heads, state, min(self.branching, self.tree_size - 1))
        return grow_tree(state.roots, expander, self.tree_size, depth, self.width)


class HeadsExpander:
    """Children of a frontier by the heads, for `growth.grow_tree` and `static_tree.StaticShape.fill`."""

    def __init__(self, heads: Heads, state: DecodeState, branching: int) -> None:
        self.heads, self.state, self.branching = heads, state, branching

    def start(self) -> Tensor:
        """`[batch, 1, hidden]`: the heads' state above the root."""
        return self.heads.start(self.state.hidden)[:, None]

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `growth.Expander.expand`."""
        if not self.heads.per_path and state.shape[1] > 1:
            state = state[:, :1]  # one distribution serves the whole depth
        embedding = self.state.target.embed(tokens) if self.heads.per_path else state
        state, feature = self.heads.advance(state, embedding, depth)
        logits = self.state.target.output(feature).float()
        if self.state.noise is not None:
            logits = logits / self.state.temperature + self.state.noise[:, depth, None]
        top = logits.topk(self.branching, dim=-1)
        logp = top.values - torch.logsumexp(logits, dim=-1, keepdim=True)
        width = tokens.shape[1]
        return state, logp.expand(-1, width, -1), top.indices.expand(-1, width, -1)
