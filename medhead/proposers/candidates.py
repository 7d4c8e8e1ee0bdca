"""Candidates: all that a proposer can name below the roots, with how likely each is; the best N of them are the tree.

A candidate's score is the log-probability that its whole path is accepted. A parent is never less likely than its
child and ties go to the parent, so the best N are closed under parents (EAGLE-2, Li et al. 2024). Candidates of several
proposers are merged by their paths: equal paths become one candidate with the best of its scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.proposers.trie import DraftTrie

_TIE = 1e-4  # what a level costs, so that a child never ties with its parent
_MIX, _PLACE = 6364136223846793005, 1442695040888963407  # of the hash of a path


@dataclass
class Candidates:
    """Nodes below the roots, level by level.

    Attributes:
        tokens: `[batch, n]` int64.
        above: `[batch, n]` int64, index of each candidate's parent, -1 below the root.
        scores: `[batch, n]` log-probability of the whole path; -inf for what only fills a row up.
        levels: how many candidates each depth has, on the host.
    """

    tokens: Tensor
    parent_index: Tensor
    scores: Tensor
    levels: tuple[int, ...]

    def to(self, device: torch.device | str) -> Candidates:
        """The same on a device."""
        return Candidates(self.tokens.to(device), self.parent_index.to(device), self.scores.to(device), self.levels)

    def corrected(self, totals: Sequence[float], most: float) -> Candidates:
        """The same candidates with other scores; a child that would become likelier than its parent gets its parent's.

        Args:
            totals: what is added to the scores of every level.
            most: the largest score.
        """
        scores = (self.scores + self.of_levels(totals)).clamp(max=most)
        found = Candidates(self.tokens, self.parent_index, scores, self.levels)
        rises = any(deeper > parent_index for parent_index, deeper in pairwise(totals))
        return found.make_monotone() if rises else found

    def best(self, roots: Tensor, nodes: int) -> TokenTree:
        """Return the tree of the `nodes - 1` likeliest candidates below `roots` `[batch]`; its shapes are always the same."""
        count = min(nodes - 1, self.tokens.shape[1])
        if count < 1:
            return TokenTree.root(roots)
        depth, ties = _depths(self.levels, roots.device)
        ranked = (self.scores * (1 - ties) + ties).topk(count, dim=1)
        unknown = ranked.values == -torch.inf
        likeliest = ranked.indices[:, :1].masked_fill(unknown[:, :1], 0)  # the first candidate is always below the root
        chosen = torch.where(unknown, likeliest, ranked.indices)  # a row that knows too little repeats its best
        chosen = chosen.sort(1).values  # in order of depth, so parents stay before their children
        ids = F.pad(chosen + 1, (1, 0))
        parents = F.pad(torch.searchsorted(ids, self.parent_index.gather(1, chosen) + 1), (1, 0))
        tokens = torch.cat([roots[:, None], self.tokens.gather(1, chosen)], 1)
        return TokenTree(tokens, parents, depth[ids], len(self.levels))

    def of_levels(self, values: Sequence[float]) -> Tensor:
        """`[n]`: the value of every candidate's level."""
        depth, _ = _depths(self.levels, self.scores.device)
        return torch.tensor([0.0, *values], device=depth.device)[depth[1:]]

    def gains(self, nodes: int) -> Tensor:
        """`[batch, nodes]`: probabilities of acceptance of the likeliest candidates, falling."""
        count = min(nodes, self.tokens.shape[1])
        return self.scores.topk(count, dim=1).values.exp()

    def paths(self, row: int) -> dict[tuple[int, ...], float]:
        """Scores of all paths of a row by their tokens; for people who look, it walks over nodes."""
        tokens, parent_index, scores = (part[row].tolist() for part in (self.tokens, self.parent_index, self.scores))
        ways: list[tuple[int, ...]] = []
        for token, parent in zip(tokens, parent_index, strict=True):
            ways.append((*(ways[parent] if parent >= 0 else ()), token))
        return {way: score for way, score in zip(ways, scores, strict=True) if score > -torch.inf}

    def keys(self) -> Tensor:
        """`[batch, n]` int64: a hash of every candidate's path, the sum of hashes of its tokens and their places."""
        depth, _ = _depths(self.levels, self.scores.device)
        key = (self.tokens + 1) * _MIX + depth[1:] * _PLACE
        key = (key ^ (key >> 29)) * _MIX
        return self._along_paths(key ^ (key >> 32), torch.add, 0)

    def make_monotone(self) -> Candidates:
        """The same candidates, none likelier than its parent, as `best` needs them: a node comes with all above it."""
        scores = self._along_paths(self.scores, torch.minimum, math.inf)
        return Candidates(self.tokens, self.parent_index, scores, self.levels)

    def _along_paths(self, values: Tensor, add: Callable[[Tensor, Tensor], Tensor], nothing: float) -> Tensor:
        """Values `[batch, n]` added up from the root to every candidate.

        Args:
            values: of the candidates.
            add: joins two of them, in any order.
            nothing: what changes nothing when it is added.
        """
        values = F.pad(values, (1, 0), value=nothing)  # position 0 is the root, which is its own parent
        parents = F.pad(self.parent_index + 1, (1, 0))
        for _ in range((len(self.levels) - 1).bit_length()):  # every round reaches twice as far up
            values, parents = add(values, values.gather(1, parents)), parents.gather(1, parents)
        return values[:, 1:]

    def condition_on_noise(self, noise: Tensor) -> Candidates:
        """The same candidates, likelier where the noise of their positions favours them.

        A token of probability p is drawn when its `log p + noise` beats all others'. Those have 1 - p together, so the
        largest of them is `log(1 - p)` plus Gumbel noise too, and stays below with the probability
        `exp(-exp(-noise) (1 - p) / p)`.

        Args:
            noise: `[batch, depths, vocab]` Gumbel noise, see `DecodeState.noise`.
        """
        depth, _ = _depths(self.levels, self.scores.device)
        share = (self.scores - F.pad(self.scores, (1, 0)).gather(1, self.parent_index + 1)).exp()
        seen = noise.flatten(1).gather(1, (depth[1:] - 1) * noise.shape[2] + self.tokens)
        seen = self._along_paths(-(-seen).exp() * (1 - share).clamp(min=0) / share, torch.add, 0)
        return Candidates(self.tokens, self.parent_index, seen.masked_fill(share == 0, -torch.inf), self.levels)


def merge(members: list[Candidates]) -> Candidates:
    """One set of candidates with every path once; of equal paths the best score counts.

    What several members name keeps its first place; later ones are left behind with a score of -inf.
    """
    if len(members) == 1:
        return members[0]
    whole = _side_by_side(members)
    key, order = whole.keys().sort(dim=1, stable=True)
    fresh = F.pad(key[:, 1:] != key[:, :-1], (1, 0), value=True)
    group = fresh.long().cumsum(1) - 1
    best = torch.full_like(whole.scores, -torch.inf)
    best.scatter_reduce_(1, group, whole.scores.gather(1, order), "amax")
    of_sorted = best.gather(1, group).masked_fill(~fresh, -torch.inf)
    scores = torch.empty_like(of_sorted).scatter_(1, order, of_sorted)
    starts = torch.where(fresh, torch.arange(key.shape[1], device=key.device), 0).cummax(1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, starts))  # where each path stands first
    parent_index = F.pad(first, (1, 0), value=-1).gather(1, whole.parent_index + 1)
    return Candidates(whole.tokens, parent_index, scores, whole.levels)


def _side_by_side(members: list[Candidates]) -> Candidates:
    """All members' candidates, still level by level, their parents' places renewed."""
    order, place, levels = _interleaved(tuple(member.levels for member in members), members[0].scores.device)
    tokens, scores = (
        torch.cat(parts, 1).index_select(1, order)
        for parts in ([member.tokens for member in members], [member.scores for member in members])
    )
    parent_index, slot = [], 1  # the root comes before every member's candidates
    for member in members:
        parent_index.append(member.parent_index + slot)
        slot += member.parent_index.shape[1] + 1
    return Candidates(tokens, place[torch.cat(parent_index, 1).index_select(1, order)], scores, levels)


@lru_cache(maxsize=1024)
def _interleaved(members: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """How candidates of several members become one set, level by level.

    Args:
        members: levels of each.
        device: of what is given.

    Returns:
        Which candidate of all members' stands at every place, `[n]`; the place of every member's root (-1) and candidates,
        member by member; the levels.
    """
    depth = torch.cat([torch.arange(len(levels)).repeat_interleave(torch.tensor(levels)) for levels in members])
    order = depth.sort(stable=True).indices
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    root = torch.full((1,), -1)
    parts = [part for member in places.split([sum(levels) for levels in members]) for part in (root, member)]
    return order.to(device), torch.cat(parts).to(device), tuple(torch.bincount(depth).tolist())


@lru_cache(maxsize=256)
def _depths(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Depth of the root and every candidate, `[1 + n]`, and what the depth costs, `[n]`."""
    counts = torch.tensor([1, *levels])
    depth = torch.arange(len(levels) + 1).repeat_interleave(counts).to(device)
    return depth, -_TIE * depth[1:]


def candidates_from_tries(rows: Sequence[DraftTrie], device: torch.device | str = "cpu") -> Candidates | None:
    """DraftTrie of every row as tensors; None if no row has any."""
    levels: list[list[list[int]]] = []  # [depth][row] nodes
    for row, guesses in enumerate(rows):
        for node in range(1, len(guesses)):
            depth = guesses.depths[node] - 1
            if depth == len(levels):
                levels.append([[] for _ in rows])
            levels[depth][row].append(node)
    if not levels:
        return None
    sizes = tuple(max(map(len, level)) for level in levels)
    total = sum(sizes)
    tokens, parent_index = ([[fill] * total for _ in rows] for fill in (0, -1))
    scores = [[-torch.inf] * total for _ in rows]
    for row, guesses in enumerate(rows):
        begin, places = 0, {0: -1}
        for size, level in zip(sizes, levels, strict=True):
            for place, node in enumerate(level[row], begin):
                places[node] = place
                tokens[row][place], parent_index[row][place] = guesses.tokens[node], places[guesses.parents[node]]
                scores[row][place] = math.log(guesses.probs[node])
            begin += size
    return Candidates(torch.tensor(tokens), torch.tensor(parent_index), torch.tensor(scores), sizes).to(device)
