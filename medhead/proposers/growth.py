"""Dynamic trees by cumulative probability, built depth by depth in tensor operations.

At each depth W states name K candidates each; the best W become the next frontier, all are remembered, and at the end
the best N by cumulative log-probability are the tree (EAGLE-2, Li et al. 2024). A parent is never less probable than
its child, and ties go to the parent, so the best N are closed under parents. Shapes are fixed; nothing walks over nodes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.tree import TokenTree

_TIE = 1e-4  # what a level costs, so that a child never ties with its parent


class Expander(Protocol):
    """Names the likeliest children of the nodes of a frontier."""

    def start(self) -> Tensor:
        """State above the root, `[batch, 1, state]`."""

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Children of frontier nodes.

        Args:
            state: `[batch, width, state]` of the nodes' parents.
            tokens: `[batch, width]` of the nodes.
            depth: depth of the nodes.

        Returns:
            State of the nodes `[batch, width, state]`; log-probabilities and tokens of their children `[batch, width, K]`.
        """


def grow_tree(roots: Tensor, expander: Expander, nodes: int, depth: int, width: int) -> TokenTree:
    """The `nodes` likeliest nodes below `roots` `[batch]`, no deeper than `depth`, with frontiers of `width` nodes."""
    return grow_scored(roots, expander, nodes, depth, width)[0]


def grow_scored(roots: Tensor, expander: Expander, nodes: int, depth: int, width: int) -> tuple[TokenTree, Tensor]:
    """The tree of `grow_tree`, and the log-probability of the path to each of its nodes, `[batch, nodes]`."""
    state, tokens = expander.start(), roots[:, None]
    scores: Tensor | None = None
    frontier = torch.zeros_like(tokens)  # index among all candidates, from 1; 0 is the root
    named, all_scores, all_tokens, frontiers = 1, [], [], []
    for level in range(depth):
        state, logp, children = expander.expand(state, tokens, level)
        branching = children.shape[2]
        candidates = (logp if scores is None else logp + scores[:, :, None]).flatten(1)
        children = children.flatten(1)
        all_scores.append(candidates)
        all_tokens.append(children)
        frontiers.append(frontier)
        if level + 1 == depth:
            break
        scores, best = candidates.topk(min(width, candidates.shape[1]), dim=1)
        tokens = children.gather(1, best)
        if state.shape[1] > 1:
            above = best // branching
            state = state.gather(1, above[:, :, None].expand(-1, -1, state.shape[2]))
        else:
            state = state.expand(-1, best.shape[1], -1)
        frontier = best + named
        named += candidates.shape[1]
    sizes = tuple(candidates.shape[1] for candidates in all_scores)
    levels, ties = _levels(sizes, roots.device)
    ranked = torch.cat(all_scores, 1) + ties
    chosen = ranked.topk(min(nodes - 1, ranked.shape[1]), dim=1, sorted=False).indices.sort(1).values
    above = torch.cat(frontiers, 1).gather(1, chosen // branching)
    ids = F.pad(chosen + 1, (1, 0))  # candidates are in order of depth, so parents stay before their children
    parents = F.pad(torch.searchsorted(ids, above), (1, 0))
    tree_tokens = torch.cat([roots[:, None], torch.cat(all_tokens, 1).gather(1, chosen)], 1)
    scored = F.pad(torch.cat(all_scores, 1).gather(1, chosen), (1, 0))
    return TokenTree(tree_tokens, parents, levels[ids], depth), scored


@lru_cache(maxsize=64)
def _levels(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Depth of the root and every candidate, `[1 + candidates]`, and what the depth costs, `[candidates]`."""
    counts = torch.tensor([1, *sizes])
    levels = torch.arange(len(sizes) + 1).repeat_interleave(counts).to(device)
    return levels, -_TIE * levels[1:]
