"""The seconds of a verify pass by its number of nodes: measured once, cached on disk, corrected while decoding."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medhead import user_cache
from medhead.core.tree import TokenTree

if TYPE_CHECKING:
    from medhead.model.target import Target

SIZES = (1, 16, 64, 4, 32, 8, 2, 12, 24)  # in measuring order; the first three ignore the time limit
MAX_NODES = max(SIZES)
PREFIX = 128  # committed tokens of every row while measuring
MAX_SECONDS = 2.0  # approximate length of a measurement of four rounds or more
_MOST_SECONDS = 8.0  # the same where passes take so long that this time is over before
_ROUNDS, _LEAST_ROUNDS, _WARM_ROUNDS = 12, 4, 2
_MAX_RATIO = 6.0  # sizes beyond one that takes so many times as long as one node are not measured
_FOLLOW = 0.1  # weight of the newest value in a moving mean
_FORGET = 0.01  # share of log(tree_factor) that decays at every pass
_MAX_TREE_FACTOR = 1.6  # limit of `tree_factor` and of its inverse
_MAX_OUTLIER = 10.0  # a pass counts as at most so many times as slow (or fast) as measured


def moving_mean(known: float | None, new: float) -> float:
    """Return the mean after a new value; `known` is the mean before it, None at first."""
    return new if known is None else known + _FOLLOW * (new - known)


class CostModel:
    """Seconds of a pass over n nodes per row, interpolated linearly between measured numbers.

    Args:
        seconds: measured seconds by number of nodes, 1 among them.

    Attributes:
        nodes: measured numbers of nodes.
        measured: measured seconds by number of nodes, made to rise: a size takes at most as long as any larger one did.
        max_nodes: the largest measured number of nodes.
        load_factor: by how much all passes take longer than measured, as with longer texts or on a busy machine.
        tree_factor: by how much passes over trees take longer still, as with rows of different lengths.
    """

    def __init__(self, seconds: dict[int, float]) -> None:
        self.nodes = sorted(seconds)
        # noise of the machine makes passes slower, so the smaller of two values is the better one
        self._seconds = list(accumulate((seconds[n] for n in reversed(self.nodes)), min))[::-1]
        self.measured, self.max_nodes = dict(zip(self.nodes, self._seconds, strict=True)), self.nodes[-1]
        self.load_factor = self.tree_factor = 1.0

    def __call__(self, nodes: int) -> float:
        """Return the expected seconds of a pass over so many nodes per row."""
        return self.load_factor * (1.0 if nodes == 1 else self.tree_factor) * self._interpolate(nodes)

    def _interpolate(self, nodes: int) -> float:
        place = bisect_left(self.nodes, nodes)
        if place == len(self.nodes):
            return self._seconds[-1] * nodes / self.max_nodes
        if self.nodes[place] == nodes:
            return self._seconds[place]
        left, right = self.nodes[place - 1], self.nodes[place]
        share = (nodes - left) / (right - left)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share

    def update(self, nodes: int, seconds: float) -> None:
        """Learn from a pass. A tree's pass corrects both factors equally; `tree_factor` decays to 1."""
        measured = self._interpolate(nodes)
        seconds = min(_MAX_OUTLIER * measured, max(measured / _MAX_OUTLIER, seconds))
        change = 1 + _FOLLOW * (seconds / self(nodes) - 1)
        if nodes == 1:
            self.load_factor *= change
            self.tree_factor **= 1 - _FORGET
            return
        factor = (self.tree_factor * change**0.5) ** (1 - _FORGET)
        factor = min(_MAX_TREE_FACTOR, max(1 / _MAX_TREE_FACTOR, factor))
        self.load_factor, self.tree_factor = self.load_factor * change * self.tree_factor / factor, factor


def measure_costs(
    target: Target, batch: int, max_nodes: int = MAX_NODES, clock: Callable[[], float] = time.perf_counter
) -> CostModel:
    """Time passes of `target` (active) over `batch` rows.

    All sizes are timed in turn, in several rounds, so that a busy moment of the machine does not fall on one of them. Sizes
    that cannot pay are left out. Where passes take long, there are fewer rounds, but for the first three sizes at least one.
    """
    max_nodes = max(1, min(max_nodes, target.context - 1))
    cache = target.new_cache(batch, PREFIX + max_nodes)
    if target.state_layers is not None:  # a pass costs more where there are no states yet
        target.prefill(cache, [[0]] * batch)
    cache.lengths.set([min(PREFIX, max(1, target.context - max_nodes - 1))] * batch)
    sizes = [nodes for nodes in SIZES if nodes <= max_nodes]
    roots = torch.zeros(batch, dtype=torch.long, device=target.device)
    trees = {nodes: TokenTree.chain(roots[:, None].repeat(1, nodes)) for nodes in sizes if nodes > 1}
    trees[1] = TokenTree.root(roots)
    for nodes in sizes[:2] if target.compiles else []:
        target.verify(cache, trees[nodes])  # compiles
    began, found = clock(), dict[int, list[float]]()
    for turn in range(_ROUNDS):
        limit = MAX_SECONDS if turn >= _LEAST_ROUNDS else _MOST_SECONDS
        for place, nodes in enumerate(sizes):
            if clock() - began > limit and (turn > 0 or place > 2):
                break
            if any(known < nodes and min(found[known]) > _MAX_RATIO * min(found[1]) for known in found):
                continue
            start = clock()
            target.verify(cache, trees[nodes])
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            found.setdefault(nodes, []).append(clock() - start)
    warm = {nodes: sorted(times[_WARM_ROUNDS:] or times[-1:]) for nodes, times in found.items()}
    return CostModel({nodes: times[len(times) // 4] for nodes, times in warm.items()})


def costs_batch(rows: int) -> int:
    """Return the number of rows that is measured for so many: the next power of two, 1 for none."""
    return 1 << max(0, rows - 1).bit_length()


def get_costs(target: Target, batch: int) -> CostModel:
    """Return the costs from the user's cache; measure and store them if they are not there."""
    found = known_costs(target, batch)
    if found is None:
        found = measure_costs(target, batch)
        store_costs(target, batch, found)
    return found


def known_costs(target: Target, batch: int) -> CostModel | None:
    """Return the costs from the user's cache, None if they are not there."""
    return user_cache.read(_file(target, batch), _parse, "the costs of a pass are measured again")


def store_costs(target: Target, batch: int, costs: CostModel) -> None:
    """Store costs in the user's cache."""
    user_cache.write(_file(target, batch), costs.measured)


def _file(target: Target, batch: int) -> Path:
    return user_cache.cache_folder() / f"{user_cache.fingerprint(target, batch)}.json"


def _parse(content: Any) -> CostModel:
    found = {int(nodes): float(seconds) for nodes, seconds in content.items()}
    if 1 not in found or not all(0 < seconds < 3600 for seconds in found.values()):
        raise ValueError("the seconds of a pass are out of range")
    return CostModel(found)
