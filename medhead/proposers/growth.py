"""Dynamic trees by cumulative probability, built depth by depth in tensor operations.

At each depth W states name K candidates each; the best W become the next frontier, all are remembered, and at the end
the best N by cumulative log-probability are the tree (EAGLE-2, Li et al. 2024; see `Candidates`). Shapes are fixed;
nothing walks over nodes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.proposers.candidates import Candidates


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


def grow_tree(
    roots: Tensor, expander: Expander, nodes: int, depth: int, width: int, early_exit: bool = True
) -> TokenTree:
    """Return the `nodes` likeliest nodes below `roots` `[batch]`, no deeper than `depth`, with frontiers of `width` nodes.

    With `early_exit`, growing on a CPU ends where nothing deeper can be in the tree; without, shapes never change.
    """
    return grow(roots, expander, depth, width, nodes if early_exit else None).best(roots, nodes)


def grow(
    roots: Tensor, expander: Expander, depth: int, width: int, nodes: int | None = None, least: float = 0.0
) -> Candidates:
    """All candidates below `roots` `[batch]` down to `depth`, the likeliest `width` of every level expanded further.

    On a CPU, where looking costs nothing, growing ends early when nothing deeper can matter. On a GPU it does not: the host
    would have to wait.

    Args:
        roots: `[batch]`.
        expander: names children.
        depth: levels at most.
        width: nodes of a frontier.
        nodes: size of the tree that the candidates are for; what cannot be among its nodes does not matter.
        least: probability of the likeliest path, in the mean of the rows, below which nothing matters.
    """
    looks = roots.device.type == "cpu" and (nodes is not None or least > 0)
    state, tokens = expander.start(), roots[:, None]
    scores: Tensor | None = None
    frontier = torch.full_like(tokens, -1)  # index among all candidates; -1 is the root
    named, all_scores, all_tokens, frontiers = 0, [], [], []
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
        if looks and not _matters(scores, all_scores, nodes, least):  # on a CPU only: no waiting
            break
        tokens = children.gather(1, best)
        if state.shape[1] > 1:
            origin = best // branching
            state = state.gather(1, origin[:, :, None].expand(-1, -1, state.shape[2]))
        else:
            state = state.expand(-1, best.shape[1], -1)
        frontier = best + named
        named += candidates.shape[1]
    levels = tuple(candidates.shape[1] for candidates in all_scores)
    parent_index = torch.cat(frontiers, 1).repeat_interleave(branching, 1)
    return Candidates(torch.cat(all_tokens, 1), parent_index, torch.cat(all_scores, 1), levels)


def _matters(frontier: Tensor, all_scores: list[Tensor], nodes: int | None, least: float) -> bool:
    """Whether anything below a frontier can matter: no child is likelier than its parent, so one look tells.

    Args:
        frontier: `[batch, width]` scores of the likeliest nodes, falling.
        all_scores: of every level so far.
        nodes: see `grow`.
        least: see `grow`.
    """
    best = frontier[:, 0]
    if nodes is not None:
        known = torch.cat(all_scores, 1)
        if known.shape[1] >= nodes - 1 > 0:
            best = best.masked_fill(best < known.topk(nodes - 1, dim=1).values[:, -1], -torch.inf)
    scores = best.tolist()
    return max(scores) > -math.inf and sum(map(math.exp, scores)) >= least * len(scores)
