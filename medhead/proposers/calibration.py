"""Calibration of a proposer's probabilities while decoding.

At every depth, of the nodes on the text's path, `_predicted` sums the probabilities of their children and `_observed` counts
how often one of the children was the text's next token. Their ratio corrects later estimates: probabilities must be
calibrated before a tree size is chosen by them.
"""

from __future__ import annotations

import itertools
import math

from medhead.proposers.candidates import Candidates

_PRIOR = 4.0  # nodes that count as seen, with correct estimates
_DECAY = 0.99  # weight of the past at every node
_MAX_SCORE = -1e-3  # largest corrected log-probability


class Calibration:
    """Ratios of observed to predicted probability, by depth, of one proposer."""

    def __init__(self) -> None:
        self._observed: dict[int, float] = {}  # by depth
        self._predicted: dict[int, float] = {}

    def ratio(self, depth: int) -> float:
        """Return the factor by which estimates at a depth are too low; depth 0 is that of the root's children."""
        return self._observed.get(depth, 1.0) / self._predicted.get(depth, 1.0)

    def correct(self, candidates: Candidates) -> Candidates:
        """Return the candidates with corrected scores."""
        steps = [math.log(self.ratio(depth)) for depth in range(len(candidates.levels))]
        return candidates.shift(list(itertools.accumulate(steps)), _MAX_SCORE) if any(steps) else candidates

    def update(self, candidates: Candidates, emitted: list[list[int]], counts: list[int]) -> None:
        """Compare uncorrected candidates with the emitted tokens of every row, of which the first `counts` are real."""
        all_tokens, all_parents = candidates.tokens.tolist(), candidates.parent_index.tolist()
        all_probs = candidates.scores.exp().tolist()
        for row, count in enumerate(counts):
            tokens, parent_index, probs = all_tokens[row], all_parents[row], all_probs[row]
            node, begin, prob = -1, 0, 1.0
            for depth, size in enumerate(candidates.levels[:count]):
                level = range(begin, begin + size)
                begin += size
                children = [place for place in level if parent_index[place] == node and probs[place] > 0]
                if not children:
                    break
                hit = next((place for place in children if tokens[place] == emitted[row][depth]), None)
                self._note(depth, min(1.0, sum(probs[place] for place in children) / prob), hit is not None)
                if hit is None:
                    break
                node, prob = hit, probs[hit]

    def _note(self, depth: int, predicted: float, hit: bool) -> None:
        for sums, value in ((self._observed, hit), (self._predicted, predicted)):
            sums[depth] = _DECAY * sums.get(depth, _PRIOR) + (1 - _DECAY) * _PRIOR + value
