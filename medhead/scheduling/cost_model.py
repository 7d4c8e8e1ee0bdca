"""What a verify pass costs by its number of nodes: measured once, kept in the user's cache folder, followed while decoding."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medhead import user_cache
from medhead.core.tree import TokenTree

if TYPE_CHECKING:
    from medhead.model.target import Target

GRID = (1, 16, 64, 4, 32, 8, 2, 12, 24)  # in the order of measuring; the first three in any case
MOST = max(GRID)
PREFIX = 128  # committed tokens of every row while measuring
SECONDS = 2.0  # the measurement ends after about so long
_TURNS = 12
_WORTHLESS = 6.0  # no tree is worth a pass that takes so many times as long as a pass over one node
_FOLLOW = 0.1  # weight of the newest pass
_FORGET = 0.01  # how much of the trees' own dearness every pass takes back
_DEAREST = 1.6  # no tree is so many times dearer (or cheaper) than measured, beside a pass over one node
_FARTHEST = 10.0  # no pass counts as more than so many times as slow (or fast) as measured


class CostModel:
    """Seconds of a pass over n nodes a row, between measured numbers by straight lines.

    Args:
        seconds: measured seconds by number of nodes; 1 is among them.

    Attributes:
        drift: how much longer all passes take than measured: longer texts and busy machines make them dearer alike.
        skew: how much longer passes over trees take besides: rows of different lengths, memory that a batch has to fetch.
    """

    def __init__(self, seconds: dict[int, float]) -> None:
        self.nodes = sorted(seconds)
        self._seconds = [seconds[n] for n in self.nodes]
        for place in range(1, len(self._seconds)):  # noise must not make more nodes look cheaper
            self._seconds[place] = max(self._seconds[place], self._seconds[place - 1])
        self.drift = self.skew = 1.0

    @property
    def measured(self) -> dict[int, float]:
        """Seconds by number of nodes, as they were measured."""
        return dict(zip(self.nodes, self._seconds, strict=True))

    @property
    def most(self) -> int:
        """The largest number of nodes that was measured."""
        return self.nodes[-1]

    def __call__(self, nodes: int) -> float:
        """Seconds of a pass over so many nodes a row, as things are now."""
        return self.drift * (1.0 if nodes == 1 else self.skew) * self._between(nodes)

    def _between(self, nodes: int) -> float:
        place = bisect_left(self.nodes, nodes)
        if place == len(self.nodes):
            return self._seconds[-1] * nodes / self.most
        if self.nodes[place] == nodes:
            return self._seconds[place]
        left, right = self.nodes[place - 1], self.nodes[place]
        share = (nodes - left) / (right - left)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share

    def saw(self, nodes: int, seconds: float) -> None:
        """A pass took so long. What only passes over trees tell is half theirs, and in the long run everybody's."""
        measured = self._between(nodes)
        seconds = min(_FARTHEST * measured, max(measured / _FARTHEST, seconds))
        change = 1 + _FOLLOW * (seconds / self(nodes) - 1)
        if nodes == 1:
            self.drift *= change
            self.skew **= 1 - _FORGET
            return
        skew = min(_DEAREST, max(1 / _DEAREST, (self.skew * change**0.5) ** (1 - _FORGET)))
        self.drift, self.skew = self.drift * change * self.skew / skew, skew


def measure_costs(target: Target, batch: int, most: int = MOST) -> CostModel:
    """Time passes of `target` (active) over `batch` rows.

    All sizes are timed in turn, several times over, so that a busy moment of the machine does not fall on one of them. Sizes
    too dear to be worth it are left out, and it ends early where passes take long.
    """
    most = max(1, min(most, target.context - 1))
    cache = target.new_cache(batch, PREFIX + most)
    cache.lengths.set([min(PREFIX, max(1, target.context - most - 1))] * batch)
    sizes = [nodes for nodes in GRID if nodes <= most]
    trees = {nodes: _tree(target, batch, nodes) for nodes in sizes}
    for nodes in sizes[:2] if target.compiles else []:
        target.verify(cache, trees[nodes])  # compiling is no cost of a pass
    began, found = time.perf_counter(), dict[int, list[float]]()
    for turn in range(_TURNS):
        for place, nodes in enumerate(sizes):
            late = time.perf_counter() - began > SECONDS
            if late and (turn > 0 or place > 2):
                break
            if any(known < nodes and min(found[known]) > _WORTHLESS * min(found[1]) for known in found):
                continue
            found.setdefault(nodes, []).append(_seconds(target, lambda nodes=nodes: target.verify(cache, trees[nodes])))  # type: ignore[misc]
    return CostModel({nodes: _typical(times) for nodes, times in found.items()})


def _tree(target: Target, batch: int, nodes: int) -> TokenTree:
    tokens = torch.zeros(batch, nodes, dtype=torch.long, device=target.device)
    return TokenTree.root(tokens[:, 0]) if nodes == 1 else TokenTree.chain(tokens)


def _typical(times: list[float]) -> float:
    """The lower quartile after the first turns, which warm up."""
    return sorted(times[min(2, len(times) - 1) :])[len(times[2:]) // 4]


def _seconds(target: Target, action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter() - began


def costs_batch(rows: int) -> int:
    """The number of rows whose costs serve so many: the next power of two."""
    return 1 << (rows - 1).bit_length()


def costs_of(target: Target, batch: int, most: int = MOST) -> CostModel:
    """The costs from the user's cache, or measured now and kept there."""
    found = known_costs(target, batch, most)
    if found is not None:
        return found
    measured = measure_costs(target, batch)
    store_costs(target, batch, measured)
    return _up_to(most, measured.measured)


def known_costs(target: Target, batch: int, most: int = MOST) -> CostModel | None:
    """The costs from the user's cache; None if they are not there."""
    known = user_cache.read(_file(target, batch), _parse, "the costs of a pass are measured again")
    return None if known is None else _up_to(most, known)


def _up_to(most: int, seconds: dict[int, float]) -> CostModel:
    return CostModel({nodes: spent for nodes, spent in seconds.items() if nodes <= max(most, 1)})


def store_costs(target: Target, batch: int, costs: CostModel) -> None:
    """Keep costs in the user's cache."""
    user_cache.write(_file(target, batch), costs.measured)


def _file(target: Target, batch: int) -> Path:
    return user_cache.cache_folder() / f"{user_cache.fingerprint(target, batch)}.json"


def _parse(content: Any) -> dict[int, float]:
    found = {int(nodes): float(seconds) for nodes, seconds in content.items()}
    if 1 not in found or not all(0 < seconds < 3600 for seconds in found.values()):
        raise ValueError("numbers that cannot be")
    return found
