"""Growing candidates level by level in tensor operations, with fixed shapes and without a loop over nodes.

At each depth the W states of a frontier give K candidates each; the best W of those are the next frontier, and all are
kept. The best N by cumulative log-probability are the tree (EAGLE-2, Li et al. 2024; see `Candidates`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from medhead.proposers.candidates import Candidates


class Expander(Protocol):
    """Gives the most probable children of the nodes of a frontier."""

    def start(self) -> Tensor:
        """Return the state above the root, `[batch, 1, state]`."""

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Expand the nodes `tokens` `[batch, width]` of a depth, given the state `[batch, width, state]` of their parents.

        Returns:
            State of the nodes `[batch, width, state]`; log-probabilities and tokens of their children `[batch, width, K]`.
        """


def grow(
    roots: Tensor,
    expander: Expander,
    depth: int,
    width: int | Sequence[Tensor],
    nodes: int | None = None,
    min_prob: float = 0.0,
) -> Candidates:
    """Return the candidates below `roots` `[batch]`.

    With `nodes` or `min_prob` growth on a CPU ends early where nothing deeper can matter; on a GPU the host would have to wait.

    Args:
        roots: `[batch]`.
        expander: gives the children of nodes.
        depth: largest number of levels.
        width: number of nodes of a frontier, the best ones; or their places among the candidates of every level.
        nodes: size of the tree that is wanted; levels that cannot be part of it are left out.
        min_prob: probability of the best path of a level, in the mean of the rows, below which growth ends.
    """
    early_exit = roots.device.type == "cpu" and (nodes is not None or min_prob > 0)
    state, tokens = expander.start(), roots[:, None]
    scores: Tensor | None = None
    frontier = torch.full_like(tokens, -1)  # index among all candidates; -1 is the root
    count, all_scores, all_tokens, frontiers = 0, [], [], []
    for level in range(depth):
        state, logp, children = expander.expand(state, tokens, level)
        branching = children.shape[2]
        level_scores = (logp if scores is None else logp + scores[:, :, None]).flatten(1)
        all_scores.append(level_scores)
        all_tokens.append(children.flatten(1))
        frontiers.append(frontier)
        if level + 1 == depth:
            break
        if isinstance(width, int):
            scores, best = level_scores.topk(min(width, level_scores.shape[1]), dim=1)
        else:
            best = width[level].expand(len(roots), -1)
            scores = level_scores.gather(1, best)
        if early_exit and not _goes_on(scores, all_scores, nodes, min_prob):
            break
        tokens = all_tokens[-1].gather(1, best)
        if state.shape[1] > 1:
            state = state.gather(1, (best // branching)[:, :, None].expand(-1, -1, state.shape[2]))
        else:
            state = state.expand(-1, best.shape[1], -1)
        frontier = best + count
        count += level_scores.shape[1]
    levels = tuple(part.shape[1] for part in all_scores)
    parent_index = torch.cat(frontiers, 1).repeat_interleave(branching, 1)
    return Candidates(torch.cat(all_tokens, 1), parent_index, torch.cat(all_scores, 1), levels)


def _goes_on(frontier: Tensor, all_scores: list[Tensor], nodes: int | None, min_prob: float) -> bool:
    """Return whether a node below a frontier with falling scores `[batch, width]` can matter: none scores above its parent."""
    best = frontier[:, 0]
    if nodes is not None:
        known = torch.cat(all_scores, 1)
        if known.shape[1] >= nodes - 1 > 0:
            best = best.masked_fill(best < known.topk(nodes - 1, dim=1).values[:, -1], -torch.inf)
    scores = best.tolist()
    return max(scores) > -math.inf and sum(map(math.exp, scores)) >= min_prob * len(scores)
