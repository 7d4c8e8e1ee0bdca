"""`growth.grow` for one row on a CPU, without starting a tensor operation at every step (`kernels.loops`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.proposers.candidates import Candidates
from medhead_kernels.availability import has_numba, loops

if TYPE_CHECKING:
    from medhead.core.gumbel import LazyGumbel
    from medhead.heads.output_head import OutputHead

_ROUNDS = 5  # of each way, by turns


def native_growth(
    output_head: OutputHead, width: int, branching: int, depth: int, wanted: bool | None
) -> NativeGrowth | None:
    """Growth for these heads, where there is one; arguments as of `NativeGrowth`.

    Args:
        output_head: of the heads.
        width: nodes of a frontier.
        branching: candidates of each of them.
        depth: levels at most.
        wanted: True for always, False for never, None for where it is faster.

    Raises:
        MedheadError: it is wanted and cannot be had.
    """
    reason = "" if wanted is not False else "not wanted"
    if not reason and output_head.weight.device.type != "cpu":
        reason = f"these loops run on a CPU, the heads are on {output_head.weight.device}"
    if not reason and not has_numba():
        reason = "they need numba: pip install 'medhead[cpu]'"
    if not reason:
        from medhead.heads.native import cell_of

        make_cell = cell_of(output_head)
        if make_cell is not None:
            return NativeGrowth(output_head, make_cell, width, branching, depth, wanted)
        reason = f"there are none for these heads of kind {output_head.heads.config.kind!r}"
    if wanted:
        raise MedheadError(f"compiled loops for the heads are wanted (native=True), but {reason}")
    return None


class NativeGrowth:
    """Grows candidates below one root.

    Args:
        output_head: of heads that have a cell here, see `native_growth`.
        make_cell: what `heads.native.cell_of` says.
        width: nodes of a frontier.
        branching: candidates of each of them.
        depth: levels at most.
        pays: whether it is the faster way; None measures (`compare`).
    """

    def __init__(
        self, output_head: OutputHead, make_cell: Any, width: int, branching: int, depth: int, pays: bool | None = None
    ) -> None:
        self._output_head, self._make_cell = output_head, make_cell
        vocab = output_head.weight.shape[0]
        self._width, self._branching = width, (branching := min(branching, vocab))
        self._names = np.arange(vocab) if output_head.tokens is None else output_head.tokens.numpy()
        self._logits = np.zeros((width, vocab), np.float32)
        self._depth, most = depth, 1 + depth * width
        self._scores, self._tokens = np.zeros((most, branching), np.float32), np.zeros((most, branching), np.int64)
        self._best, self._places = np.zeros(width, np.float32), np.zeros(width, np.int64)
        self._none = np.zeros(0, np.float32)
        self._given, self._pays = pays, dict[int, bool]()  # by number of threads
        self.refresh()

    @property
    def pays(self) -> bool:
        """Whether it is the faster way with this number of threads."""
        return self._pays.get(torch.get_num_threads(), False) if self._given is None else self._given

    def compare(self, usual: Callable[[], Any], this: Callable[[], Any]) -> bool:
        """Measure which of two calls is faster, once for every number of threads; takes some 20 ms, and longer where loops
        have to be compiled first. Says whether it measured now."""
        threads = torch.get_num_threads()
        if self._given is not None or threads in self._pays:
            return False
        seconds: dict[Callable[[], Any], list[float]] = {usual: [], this: []}
        for _ in range(1 + _ROUNDS):
            for way, times in seconds.items():
                began = time.perf_counter()
                way()
                times.append(time.perf_counter() - began)
        self._pays[threads] = min(seconds[this][1:]) < min(seconds[usual][1:])
        return True

    def refresh(self) -> None:
        """Weights may be others than before."""
        output_head = self._output_head
        self._cell = self._make_cell(self._width)
        self._weight = loops().array_of(output_head.weight)
        self._bias = self._none if output_head.bias is None else output_head.bias.float().numpy()

    def grow(
        self,
        root: int,
        features: Tensor,
        depth: int,
        scale: float,
        noise: LazyGumbel | None = None,
        nodes: int | None = None,
        least: float = 0.0,
    ) -> Candidates:
        """The same candidates as `growth.grow`.

        Args:
            root: the root's token.
            features: `[1, size]` of the target at the token before.
            depth: levels at most.
            scale: what logits are multiplied by.
            noise: of the coming positions, added to the logits.
            nodes: see `growth.grow`.
            least: the same.
        """
        native, width, branching = loops(), self._width, self._branching
        state = features.float().numpy()
        origin, tokens = np.zeros(1, np.int64), np.array([root])
        parent_index, frontier, found = (
            np.zeros(1, np.float32),
            np.full(1, -1),
            0,
        )  # of the nodes; `found` of them are done
        levels, frontiers = [], []
        depth = min(depth, self._depth)  # there is room for no more
        for level in range(depth):
            count = len(tokens)
            state, feature = self._cell.advance(state, origin, tokens, count, level)
            native.product(self._weight, feature, count, self._logits)
            scores, named = self._scores[found : found + count], self._tokens[found : found + count]
            coming = self._none if noise is None else noise.at(level)[0].numpy()
            native.children(self._logits, count, self._bias, scale, coming, self._names, parent_index, scores, named)
            levels.append(count * branching)
            frontiers.append(frontier)
            if level + 1 == depth:
                break
            kept = min(width, count * branching)
            flat = scores.reshape(-1)
            native.likeliest(flat, kept, self._best, self._places)
            if not self._matters(float(self._best[0]), found + count, nodes, least):
                break
            places = self._places[:kept]
            origin, tokens, parent_index = places // branching, named.reshape(-1)[places], self._best[:kept].copy()
            frontier = places + found * branching
            found += count
        return self._candidates(frontiers, levels)

    def _matters(self, best: float, done: int, nodes: int | None, least: float) -> bool:
        """See `growth._matters`."""
        most = math.inf if nodes is None or nodes < 2 else nodes - 1
        if done * self._branching >= most and loops().count_above(self._scores[:done].reshape(-1), best) >= most:
            return False
        return best > -math.inf and math.exp(best) >= least

    def _candidates(self, frontiers: list[Any], levels: list[int]) -> Candidates:
        done = sum(levels) // self._branching
        scores, tokens = (torch.from_numpy(part[:done].reshape(1, -1).copy()) for part in (self._scores, self._tokens))
        parent_index = torch.from_numpy(np.concatenate(frontiers).repeat(self._branching)[None])
        return Candidates(tokens, parent_index, scores, tuple(levels))
