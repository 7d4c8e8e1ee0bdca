"""The automatic tree size: the number of nodes with the best expected rate of tokens, and a pause where speculation loses.

The expected tokens of a pass are one per row plus the probabilities of its nodes; the expected seconds are those of the
proposers and of the pass. The chosen size maximises tokens per second (CaDDTree). When speculation has been slower than plain
decoding for a while, it pauses with exponential backoff, tracked per batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

from medhead.scheduling.cost_model import CostModel, moving_mean

_FIRST_PAUSE, _MAX_PAUSE, _BACKOFF = 16, 512, 2  # passes, passes, factor from one pause to the next
_PRIOR_COST, _PRIOR_TOKENS = 0.8, 10.0  # prior: time per token relative to plain decoding, number of tokens
_PROBE_COST, _PROBE_TOKENS = 0.98, 3.0  # the same after a pause: one bad pass pauses again
_MAX_PROBE_COST = 1.5  # plain passes that a tree for several rows may take before speculation has paid once
_CATCH_UP = 8  # last passes of a pause in which skippable proposers are updated again
_MAX_PROBE_SHARE = 0.02  # share of the time that probes at the beginnings of texts may lose
_DECAY = 0.97  # weight of the past at every pass
_STEP_RATIO = 1.05  # initial ratio: plain step time / its pass time


class SpeculationBackoff:
    """Whether speculation has paid lately and how long it pauses otherwise, for one batch size.

    Times are counted in passes of plain decoding. At first `tokens` tokens count as seen that took `cost` each.

    Attributes:
        pause: remaining passes of the pause; 0 while speculation runs.
        has_paid: whether a pass since the last pause gained tokens faster than plain decoding.
    """

    def __init__(self, tokens: float, cost: float) -> None:
        self._tokens, self._spent = tokens, cost * tokens  # decaying sums
        self.pause, self._next_pause = 0, _FIRST_PAUSE
        self.has_paid = False
        self._debt = 0.0  # passes until the loss of the last failure is small enough for a probe

    def probe(self) -> None:
        """Resume speculation once the loss of the last failure is amortized; one bad pass pauses it again."""
        if self._next_pause > _FIRST_PAUSE and self._debt <= 0:
            self._resume()

    def count_plain(self) -> None:
        """Count a pass of plain decoding."""
        self.pause, self._debt = self.pause - 1, self._debt - 1
        if not self.pause:
            self._resume()

    def update(self, tokens: float, spent: float) -> None:
        """Learn from a pass over a tree that emitted `tokens` per row in the time of `spent` passes of plain decoding."""
        self._tokens = _DECAY * self._tokens + tokens
        self._spent = _DECAY * self._spent + spent
        if self._spent > self._tokens:
            self._debt = (spent - tokens) / _MAX_PROBE_SHARE
            self.pause, self._next_pause = self._next_pause, min(_MAX_PAUSE, self._next_pause * _BACKOFF)
        elif self._spent < _PRIOR_COST * self._tokens:
            self._next_pause = _FIRST_PAUSE
        self.has_paid = self.has_paid or 1 < tokens > spent

    def _resume(self) -> None:
        self.pause, self._tokens, self._spent, self.has_paid = 0, _PROBE_TOKENS, _PROBE_COST * _PROBE_TOKENS, False


class TreeSizeController:
    """Chooses the tree size of every pass.

    Args:
        costs: cost of a pass over n nodes per row.
        max_nodes: largest tree.
        batch: class of the number of rows, see `costs_batch`; every class has a backoff of its own.
    """

    def __init__(self, costs: CostModel, max_nodes: int, batch: int = 1) -> None:
        self._all_sizes, self._step_ratio = _candidate_sizes(max_nodes), _STEP_RATIO
        self._backoffs: dict[int, SpeculationBackoff] = {}
        self.set_batch(costs, batch)

    def set_batch(self, costs: CostModel, batch: int) -> None:
        """Change the class of the number of rows and the costs; the backoff continues where it was with that class."""
        self.costs = costs
        self.sizes = [nodes for nodes in self._all_sizes if nodes <= max(costs.max_nodes, 1)]
        if batch not in self._backoffs:  # lenient prior for a first text; with many rows one pass is evidence enough
            trusted = batch == 1 and not self._backoffs
            prior = (_PRIOR_TOKENS, _PRIOR_COST) if trusted else (_PROBE_TOKENS, _PROBE_COST)
            self._backoffs[batch] = SpeculationBackoff(*prior)
        self._backoff = self._backoffs[batch]

    def begin_text(self, costs: CostModel, batch: int = 1) -> None:
        """Begin another text: as `set_batch`, and probe during a pause."""
        self.set_batch(costs, batch)
        self._backoff.probe()

    @property
    def is_paused(self) -> bool:
        """Whether the next pass is one of plain decoding and no proposer is asked."""
        return self._backoff.pause > 0

    @property
    def may_skip_updates(self) -> bool:
        """Whether the pause lasts so long that proposers may miss the next update."""
        return self._backoff.pause > _CATCH_UP

    @property
    def max_depth(self) -> int:
        """Depth of the deepest tree that it may choose now."""
        return 0 if self.is_paused else max(self._allowed_sizes()) - 1

    def choose(self, probs: Sequence[float], rows: int, propose_seconds: float) -> tuple[int, float]:
        """Return the number of nodes of the next tree, and its expected tokens per second.

        `probs` are the acceptance probabilities of the best nodes, summed over the rows, falling.
        """
        best, best_rate = 1, 0.0
        expected, place = float(rows), 0
        for nodes in self._allowed_sizes():
            while place < min(nodes - 1, len(probs)):
                expected += probs[place]
                place += 1
            rate = expected / (propose_seconds + self.costs(nodes))
            if rate > best_rate:
                best, best_rate = nodes, rate
        return best, best_rate

    def update(self, nodes: int, tokens: float, verify_seconds: float, other_seconds: float) -> None:
        """Learn from a step: the nodes of its tree, the tokens it emitted per row, and the seconds of the pass and the rest."""
        self.costs.update(nodes, verify_seconds)
        if not self.is_paused:
            self._backoff.update(tokens, (verify_seconds + other_seconds) / (self.costs(1) * self._step_ratio))
            return
        if verify_seconds > 0:
            self._step_ratio = moving_mean(self._step_ratio, min(2.0, 1 + other_seconds / verify_seconds))
        self._backoff.count_plain()

    def _allowed_sizes(self) -> list[int]:
        """Return the sizes that may be chosen now: for several rows no expensive ones before speculation has paid."""
        if self._backoff.has_paid or self._backoff is self._backoffs.get(1):
            return self.sizes
        limit = _MAX_PROBE_COST * self.costs(1)
        return [nodes for nodes in self.sizes if nodes <= 2 or self.costs(nodes) <= limit]


def _candidate_sizes(max_nodes: int) -> list[int]:
    """Return every size up to 8, about six per octave beyond, and `max_nodes`."""
    found, size = list(range(1, min(8, max_nodes))), 8.0
    while size < max_nodes:
        found.append(int(size))
        size *= 1.125
    return [*found, max_nodes]
