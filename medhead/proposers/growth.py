"""Dynamic trees by cumulative probability, built depth by depth in tensor operations.

At each depth W states name K candidates each; the best W become the next frontier, all are remembered, and at the end
the best N by cumulative log-probability are the tree (EAGLE-2, Li et al. 2024). A parent is never less probable than
its child, and ties go to the parent, so the best N are closed under parents. Shapes are fixed; nothing walks over nodes.
"""

from __future__ import annotations

from typing import Protocol

import torch
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
    batch, device = roots.shape[0], roots.device
    state, tokens = expander.start(), roots[:, None]
    scores = torch.zeros(batch, 1, device=device)
    frontier = torch.zeros(batch, 1, dtype=torch.long, device=device)  # index among all candidates; 0 is the root
    all_scores, all_tokens, all_parents, named = [], [], [], 1
    for level in range(depth):
        state, logp, children = expander.expand(state, tokens, level)
        per_node = children.shape[2]
        flat = (logp + (scores[:, :, None] - _TIE)).flatten(1)
        children = children.flatten(1)
        all_scores.append(flat)
        all_tokens.append(children)
        all_parents.append(frontier.repeat_interleave(per_node, 1))
        if level + 1 == depth:
            break
        keep = min(width, flat.shape[1])
        scores, best = flat.topk(keep, dim=1)
        tokens = children.gather(1, best)
        above = best // per_node
        if state.shape[1] > 1:
            state = state.gather(1, above[:, :, None].expand(-1, -1, state.shape[2]))
        else:
            state = state.expand(-1, keep, -1)
        frontier = best + named
        named += flat.shape[1]
    return _best_nodes(
        roots, torch.cat(all_scores, 1), torch.cat(all_tokens, 1), torch.cat(all_parents, 1), nodes, depth
    )


def _best_nodes(roots: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, nodes: int, depth: int) -> TokenTree:
    """The tree of the best candidates; candidates are in order of depth, so a parent stays before its child."""
    batch = roots.shape[0]
    count = min(nodes - 1, scores.shape[1])
    chosen = scores.topk(count, dim=1, sorted=False).indices.sort(1).values
    place = torch.zeros(batch, scores.shape[1] + 1, dtype=torch.long, device=roots.device)
    ranks = torch.arange(1, count + 1, device=roots.device).expand(batch, -1)
    place.scatter_(1, chosen + 1, ranks)
    below = place.gather(1, parents.gather(1, chosen))
    tree_tokens = torch.cat([roots[:, None], tokens.gather(1, chosen)], 1)
    tree_parents = torch.nn.functional.pad(below, (1, 0))
    tree = TokenTree(tree_tokens, tree_parents, tree_parents, depth)
    tree.depth = tree.visible.sum(2) - 1
    return tree
