"""How many nodes the next pass verifies: as many as pay, and none when guessing does not.

The expected tokens of a pass are one a row, plus the probabilities of its nodes; the expected seconds are those of
proposing and of the pass. The budget maximises tokens by seconds (CaDDTree). When guessing has been slower than plain
decoding for a while, it rests, and looks again after a pause that grows with every failure.
"""

from __future__ import annotations

from collections.abc import Sequence

from medhead.scheduling.cost_model import CostModel

_FIRST_REST, _LONGEST_REST, _GROWTH = 16, 512, 2
_START, _TRUST = 0.8, 10.0  # before anything was seen: time of guessing by that of plain decoding, over so many tokens
_AGAIN, _DOUBT = 0.98, 3.0  # the same after a rest: one bad pass is enough to rest again, one good one to go on
_DEAR = 1.5  # passes of plain decoding: no dearer tree for several rows as long as guessing has not paid once
_AWAKE = 8  # passes before the end of a rest
_SHARE = 0.05  # of the time may be lost by looks at the beginnings of texts
_MEMORY = 0.97  # what a pass remembers of the ones before
_STEP, _FOLLOW = 1.05, 0.1  # a step of plain decoding by its pass alone, before any was seen; weight of the newest


class SpeculationBackoff:
    """Whether guessing has paid lately, and how long it rests after it has not; for one number of rows.

    Args:
        trust: tokens that count as seen before anything was.
        share: time they took, by that of plain decoding.
    """

    def __init__(self, trust: float, share: float) -> None:
        self._tokens, self._spent = trust, share * trust  # recently, the second in passes of plain decoding
        self._rest, self._pause = 0, _FIRST_REST
        self.proven = False  # since the last rest
        self._owed = 0.0  # passes that make good for what the last look lost

    def resting(self) -> bool:
        """Whether the next pass is one of plain decoding, without asking anybody."""
        return self._rest > 0

    def asleep(self) -> bool:
        """Whether the rest goes on for some passes, so that nothing has to be known now."""
        return self._rest > _AWAKE

    def look(self) -> None:
        """One look now where there was failure, if the last one is paid for; it rests on at once if that fails too."""
        if self._pause > _FIRST_REST and self._owed <= 0:
            self._doubt()

    def rested(self) -> None:
        """A pass of plain decoding is over."""
        self._rest, self._owed = self._rest - 1, self._owed - 1
        if not self._rest:
            self._doubt()

    def saw(self, tokens: float, spent: float) -> None:
        """A pass over a tree is over, which a row got so many tokens from in the time of `spent` passes of plain decoding."""
        self._tokens = _MEMORY * self._tokens + tokens
        self._spent = _MEMORY * self._spent + spent
        if self._spent > self._tokens:
            self._owed = (spent - tokens) / _SHARE
            self._rest, self._pause = self._pause, min(_LONGEST_REST, self._pause * _GROWTH)
        elif self._spent < _START * self._tokens:
            self._pause = _FIRST_REST
        self.proven = self.proven or 1 < tokens > spent

    def _doubt(self) -> None:
        self._rest, self._tokens, self._spent, self.proven = 0, _DOUBT, _AGAIN * _DOUBT, False


class TreeSizeController:
    """The budget of one generation after the other.

    Args:
        costs: of a pass over n nodes a row.
        most: nodes that are never exceeded.
        batch: class of the number of rows: what pays for one text need not pay for sixteen.
    """

    def __init__(self, costs: CostModel, most: int, batch: int = 1) -> None:
        self._all_sizes, self._step = _sizes(most), _STEP
        self._known: dict[int, SpeculationBackoff] = {}
        self.rows_change(costs, batch)

    @property
    def most(self) -> int:
        """The largest tree it may choose."""
        return self.sizes[-1]

    def resting(self) -> bool:
        """Whether the next pass is one of plain decoding, without asking anybody."""
        return self._patience.resting()

    def asleep(self) -> bool:
        """Whether it rests, and will for some passes yet: who learns from passes may miss this one."""
        return self._patience.asleep()

    def again(self, costs: CostModel, batch: int = 1) -> None:
        """Another text begins: one look, with the patience that was left, unless looks would take too much of the time.

        Args:
            costs: of a pass over the rows that there are now.
            batch: class of their number.
        """
        self.rows_change(costs, batch)
        self._patience.look()

    def rows_change(self, costs: CostModel, batch: int) -> None:
        """There are more or fewer rows; what was learnt with so many goes on. The arguments are those of `again`."""
        self.costs = costs
        self.sizes = [nodes for nodes in self._all_sizes if nodes <= max(costs.most, 1)]  # that were worth measuring
        self._patience = self._of(batch)

    def _of(self, batch: int) -> SpeculationBackoff:
        """Of one class of rows. One text may be unlucky for some passes; one pass over many texts tells."""
        if batch not in self._known:
            trusted = batch == 1 and not self._known
            self._known[batch] = SpeculationBackoff(_TRUST, _START) if trusted else SpeculationBackoff(_DOUBT, _AGAIN)
        return self._known[batch]

    def choose(self, gains: Sequence[float], rows: int, proposing: float) -> tuple[int, float]:
        """Nodes of the next tree, and the tokens a second that are expected of it.

        Args:
            gains: probabilities of acceptance of the likeliest nodes, added up over the rows, falling.
            rows: running rows.
            proposing: seconds it took to propose.
        """
        best, rate = 1, 0.0
        expected, place = float(rows), 0
        for nodes in self._affordable():
            while place < min(nodes - 1, len(gains)):
                expected += gains[place]
                place += 1
            now = expected / (proposing + self.costs(nodes))
            if now > rate:
                best, rate = nodes, now
        return best, rate

    def deepest(self) -> int:
        """No tree that it would choose now is deeper."""
        return 0 if self.resting() else max(self._affordable()) - 1

    def _affordable(self) -> list[int]:
        """Sizes that may be chosen now: before guessing has paid, none but the smallest that is dear.

        A look at one row is cheap, and tells little when its tree is small.
        """
        sizes, dearest = self.sizes, _DEAR * self.costs(1)
        if self._patience.proven or self._patience is self._known.get(1):
            return sizes
        return [nodes for nodes in sizes if nodes <= 2 or self.costs(nodes) <= dearest]

    def saw(self, nodes: int, tokens: float, seconds: float, outside: float) -> None:
        """A step is over.

        Args:
            nodes: of its tree.
            tokens: emitted by a row on average.
            seconds: of the pass.
            outside: seconds of the step that were not the pass: proposing, accepting, learning.
        """
        self.costs.saw(nodes, seconds)
        if self.resting():
            if seconds > 0:
                self._step += _FOLLOW * (min(2.0, 1 + outside / seconds) - self._step)
            self._patience.rested()
        else:
            self._patience.saw(tokens, (seconds + outside) / (self.costs(1) * self._step))


def _sizes(most: int) -> list[int]:
    """Sizes that are tried: every one up to 8, then about six in an octave, and `most` itself."""
    found: list[int] = []
    size = 1.0
    while size < most:
        if not found or int(size) > found[-1]:
            found.append(int(size))
        size = size + 1 if size < 8 else size * 1.125
    return [*found, most]
