"""How far a proposer's estimates can be trusted, learnt while decoding.

At every depth, of the nodes that turned out to be on the text's path, a share `predicted` of their children's
probabilities was promised, and in a share `right` of cases one of the children was the text's next token. Their ratio
corrects the coming estimates (ALGORITHMS: probabilities must be calibrated before a budget is chosen by them).
"""

from __future__ import annotations

import itertools
import math

from medhead.proposers.candidates import Candidates

_PRIOR = 4.0  # promises that count as kept before any was seen
_MEMORY = 0.99  # what a pass remembers of the ones before
_MOST = -1e-3  # largest log-probability after the correction: nothing is certain


class Calibration:
    """Ratios by depth for one proposer."""

    def __init__(self) -> None:
        self._right: list[float] = []
        self._predicted: list[float] = []

    def ratio(self, depth: int) -> float:
        """How much likelier than promised a right child is at this depth, 0 for the root's children."""
        if depth >= len(self._right):
            return 1.0
        return self._right[depth] / self._predicted[depth]

    def correct(self, candidates: Candidates) -> Candidates:
        """The same candidates with corrected scores."""
        steps = [math.log(self.ratio(depth)) for depth in range(len(candidates.levels))]
        if not any(steps):
            return candidates
        return candidates.corrected(list(itertools.accumulate(steps)), _MOST)

    def learn(self, candidates: Candidates, emitted: list[list[int]], counts: list[int]) -> None:
        """See what the text went on with.

        Args:
            candidates: what was promised, before the correction.
            emitted: tokens of every row after the pass.
            counts: how many of them are real.
        """
        all_tokens, all_parents = candidates.tokens.tolist(), candidates.parent_index.tolist()
        promised = candidates.scores.exp().tolist()
        for row, count in enumerate(counts):
            tokens, parent_index, probs = all_tokens[row], all_parents[row], promised[row]
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

    def _note(self, depth: int, predicted: float, right: bool) -> None:
        while len(self._right) <= depth:
            self._right.append(_PRIOR)
            self._predicted.append(_PRIOR)
        self._right[depth] = _MEMORY * self._right[depth] + (1 - _MEMORY) * _PRIOR + right
        self._predicted[depth] = _MEMORY * self._predicted[depth] + (1 - _MEMORY) * _PRIOR + predicted
