"""Candidates: all draft tokens of a proposer below the roots, with their probabilities; the most probable ones are the tree.

A candidate's score is the log-probability that its whole path is accepted. A parent is never less probable than its child
and wins ties, so the best N are closed under parents (EAGLE-2, Li et al. 2024). Candidates of several proposers are merged
by their paths: equal paths become one candidate with the best of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.proposers.trie import DraftTrie

_TIE = 1e-4  # subtracted from scores per level, so that a child never ties with its parent
_MIX, _PLACE = 6364136223846793005, 1442695040888963407  # multipliers of the hash of a path


@dataclass
class Candidates:
    """Nodes below the roots, level by level."""

    tokens: Tensor  # `[batch, n]` int64
    parent_index: Tensor  # `[batch, n]` int64, index of each candidate's parent, -1 below the root
    scores: Tensor  # `[batch, n]` log-probability of the whole path; -inf for padding
    levels: tuple[int, ...]  # number of candidates of every depth, on the host

    def shift(self, totals: Sequence[float], max_score: float) -> Candidates:
        """Return the candidates with `totals[level]` added to their scores, none above its parent's or `max_score`."""
        depth, _ = _depths(self.levels, self.scores.device)
        scores = (self.scores + torch.tensor([0.0, *totals], device=depth.device)[depth[1:]]).clamp(max=max_score)
        shifted = replace(self, scores=scores)
        return shifted.make_monotone() if any(below > above for above, below in pairwise(totals)) else shifted

    def best_tree(self, roots: Tensor, nodes: int) -> TokenTree:
        """Return the tree of the `nodes - 1` best candidates below `roots` `[batch]`; its shapes do not depend on values."""
        count = min(nodes - 1, self.tokens.shape[1])
        if count < 1:
            return TokenTree.root(roots)
        _, ties = _depths(self.levels, roots.device)
        ranked = (self.scores * (1 - ties) + ties).topk(count, dim=1)
        padding = ranked.values == -torch.inf
        best = ranked.indices[:, :1].masked_fill(padding[:, :1], 0)  # the first candidate is always below the root
        chosen = torch.where(padding, best, ranked.indices)  # a row with too few candidates repeats its best
        return self.select(roots, chosen.sort(1).values)

    def select(self, roots: Tensor, chosen: Tensor) -> TokenTree:
        """Return the tree of the candidates `chosen` `[batch, n]`: indices in rising order, parents included."""
        depth, _ = _depths(self.levels, roots.device)
        ids = F.pad(chosen + 1, (1, 0))
        parents = F.pad(torch.searchsorted(ids, self.parent_index.gather(1, chosen) + 1), (1, 0))
        tokens = torch.cat([roots[:, None], self.tokens.gather(1, chosen)], 1)
        return TokenTree(tokens, parents, depth[ids], len(self.levels))

    def top_probs(self, count: int) -> Tensor:
        """Return the probabilities of the `count` best candidates in falling order, `[batch, count]`."""
        return self.scores.topk(min(count, self.tokens.shape[1]), dim=1).values.exp()

    def num_possible(self) -> int:
        """Return the largest number of candidates of a row that are not padding.

        Elsewhere than on a CPU return the number of all, because the host would wait for the device.
        """
        return int((self.scores > -torch.inf).sum(1).max()) if self.scores.is_cpu else self.scores.shape[1]

    def paths(self, row: int) -> dict[tuple[int, ...], float]:
        """Return the scores of a row's paths by their tokens, for traces and tests."""
        found: list[tuple[int, ...]] = []
        for token, parent in zip(self.tokens[row].tolist(), self.parent_index[row].tolist(), strict=True):
            found.append((*(found[parent] if parent >= 0 else ()), token))
        scores = self.scores[row].tolist()
        return {path: score for path, score in zip(found, scores, strict=True) if score > -torch.inf}

    def keys(self) -> Tensor:
        """Return a hash of every candidate's path, `[batch, n]` int64: the sum of the hashes of its (token, depth) pairs."""
        depth, _ = _depths(self.levels, self.scores.device)
        key = (self.tokens + 1) * _MIX + depth[1:] * _PLACE
        key = (key ^ (key >> 29)) * _MIX
        return self._reduce_paths(key ^ (key >> 32), torch.add, 0)

    def make_monotone(self) -> Candidates:
        """Return the candidates with no score above the parent's."""
        return replace(self, scores=self._reduce_paths(self.scores, torch.minimum, math.inf))

    def _reduce_paths(self, values: Tensor, join: Callable[[Tensor, Tensor], Tensor], neutral: float) -> Tensor:
        """Return the values `[batch, n]` joined along the path to every candidate, in any order."""
        values = F.pad(values, (1, 0), value=neutral)  # position 0 is the root, which is its own parent
        parents = F.pad(self.parent_index + 1, (1, 0))
        for _ in range((len(self.levels) - 1).bit_length()):  # every round reaches twice as far up
            values, parents = join(values, values.gather(1, parents)), parents.gather(1, parents)
        return values[:, 1:]

    def condition_on_noise(self, noise: Tensor) -> Candidates:
        """Return the candidates with the probabilities that they have once the noise of their positions is known.

        A token of probability p is drawn when its `log p + noise` is above that of all others. Those have the probability
        1 - p together, so the largest of them is `log(1 - p)` plus Gumbel noise, and is below with the probability
        `exp(-exp(-noise) (1 - p) / p)`. The noise is `[batch, depths, vocab]`.
        """
        depth, _ = _depths(self.levels, self.scores.device)
        prob = (self.scores - F.pad(self.scores, (1, 0)).gather(1, self.parent_index + 1)).exp()
        own = noise.flatten(1).gather(1, (depth[1:] - 1) * noise.shape[2] + self.tokens)
        scores = self._reduce_paths(-(-own).exp() * (1 - prob).clamp(min=0) / prob, torch.add, 0)
        return replace(self, scores=scores.masked_fill(prob == 0, -torch.inf))


def merge(members: list[Candidates]) -> Candidates:
    """Return the candidates of all members with every path once, with the best of its scores.

    The first of equal paths keeps its place; the others become padding.
    """
    if len(members) == 1:
        return members[0]
    joined = _side_by_side(members)
    key, order = joined.keys().sort(dim=1, stable=True)
    is_first = F.pad(key[:, 1:] != key[:, :-1], (1, 0), value=True)
    group = is_first.long().cumsum(1) - 1
    best = torch.full_like(joined.scores, -torch.inf)
    best.scatter_reduce_(1, group, joined.scores.gather(1, order), "amax")
    sorted_scores = best.gather(1, group).masked_fill(~is_first, -torch.inf)
    scores = torch.empty_like(sorted_scores).scatter_(1, order, sorted_scores)
    starts = torch.where(is_first, torch.arange(key.shape[1], device=key.device), 0).cummax(1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, starts))  # where each path comes first
    parent_index = F.pad(first, (1, 0), value=-1).gather(1, joined.parent_index + 1)
    return Candidates(joined.tokens, parent_index, scores, joined.levels)


def _side_by_side(members: list[Candidates]) -> Candidates:
    """Return all members' candidates, level by level, equal paths included."""
    order, place, levels = _interleaved(tuple(member.levels for member in members), members[0].scores.device)
    parents, slot = [], 1  # the root comes before every member's candidates
    for member in members:
        parents.append(member.parent_index + slot)
        slot += member.parent_index.shape[1] + 1
    tokens = torch.cat([member.tokens for member in members], 1).index_select(1, order)
    scores = torch.cat([member.scores for member in members], 1).index_select(1, order)
    return Candidates(tokens, place[torch.cat(parents, 1).index_select(1, order)], scores, levels)


@lru_cache(maxsize=1024)
def _interleaved(members: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return how candidates of members with such levels become one set, level by level.

    That is the index among all members' candidates of the candidate at every place, `[n]`; the places of every member's root
    (-1) and candidates, member by member; and the levels.
    """
    depth = torch.cat([torch.arange(len(levels)).repeat_interleave(torch.tensor(levels)) for levels in members])
    order = depth.sort(stable=True).indices
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    root = torch.full((1,), -1)
    parts = [part for member in places.split([sum(levels) for levels in members]) for part in (root, member)]
    return order.to(device), torch.cat(parts).to(device), tuple(torch.bincount(depth).tolist())


@lru_cache(maxsize=256)
def _depths(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the depth of the root and every candidate, `[1 + n]`, and the shift of the scores that breaks ties, `[n]`."""
    depth = torch.tensor([depth for depth, count in enumerate((1, *levels)) for _ in range(count)], device=device)
    return depth, -_TIE * depth[1:]


def candidates_from_tries(tries: Sequence[DraftTrie], device: torch.device | str = "cpu") -> Candidates | None:
    """Return the nodes of every row's trie as candidates; None if there are none."""
    levels: list[list[list[int]]] = [[[] for _ in tries] for _ in range(max(max(trie.depths) for trie in tries))]
    for row, trie in enumerate(tries):
        for node, depth in enumerate(trie.depths[1:], 1):
            levels[depth - 1][row].append(node)
    if not levels:
        return None
    sizes = tuple(max(map(len, level)) for level in levels)
    tokens, parent_index, scores = ([[fill] * sum(sizes) for _ in tries] for fill in (0, -1, -math.inf))
    for row, trie in enumerate(tries):
        begin, places = 0, {0: -1}
        for size, level in zip(sizes, levels, strict=True):
            for place, node in enumerate(level[row], begin):
                places[node] = place
                tokens[row][place], parent_index[row][place] = trie.tokens[node], places[trie.parents[node]]
                scores[row][place] = math.log(trie.probs[node])
            begin += size
    tensors = [torch.tensor(values, device=device) for values in (tokens, parent_index, scores)]
    return Candidates(tensors[0], tensors[1], tensors[2], sizes)
