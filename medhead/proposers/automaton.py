"""A suffix automaton of a growing text that counts: everything the text has repeated so far, and what came next.

A state stands for all substrings that end at the same places (Blumer et al. 1985); appending a token costs amortised
constant time. Beside that every state keeps the weight of its occurrences, each of which counts half after `half_life`
tokens. Instead of making all old weights smaller, every new one is larger, so the order of a state's followers only
changes where an occurrence is added. Weights are exact for substrings of up to `bound` tokens, which costs at most `bound`
more operations a token, and only in text that repeats itself that much.
"""

from __future__ import annotations

from collections.abc import Iterator

_ROOT = 0
_RESCALE = 500.0  # half-lives after which weights are brought down, far from the largest float


class SuffixAutomaton:
    """Substrings of a growing text with weights and followers.

    Args:
        bound: longest substring whose weight is exact.
        half_life: tokens after which an occurrence counts half.
        followers: followers of a state that can be named; the heaviest are.

    Attributes:
        size: tokens of the text.
        now: weight of an occurrence that ends at the newest token.
    """

    def __init__(self, bound: int, half_life: float, followers: int = 8) -> None:
        self.bound, self.half_life, self.followers = bound, half_life, followers
        self.size, self.now = 0, 1.0
        self._scale = 0.0  # half-lives that were taken out of all weights
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._weight = [-1], [0], [0.0]
        self._heaviest: list[list[int] | None] = [None]  # first followers by weight, where a state has many
        self._last = _ROOT  # state of the whole text
        self._near = _ROOT  # state of its last `bound - 1` tokens

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        self._extend(token)
        self.now = 2.0 ** (self.size / self.half_life - self._scale)
        if self.now > 2.0**_RESCALE:
            self._rescale()
        self._count(token)
        self.size += 1

    def suffixes(self, longest: int) -> Iterator[tuple[int, int]]:
        """States of the text's own suffixes of at most `longest` (below `bound`) tokens that also occur earlier, each with
        the length of its longest such suffix; the longest first. The empty suffix is left out."""
        length = min(longest, self.size, self.bound - 1)
        state = self._near
        while state != _ROOT:
            shorter = self._link[state]
            if self._next[state] and self._length[shorter] < length:
                yield state, min(self._length[state], length)
            state = shorter

    def shorter(self, state: int) -> tuple[int, int]:
        """The longest proper suffix of a state's substrings that occurs elsewhere too, and its length."""
        link = self._link[state]
        return link, self._length[link]

    def weight(self, state: int) -> float:
        """Weight of all occurrences of a state's substrings, in units of one that ends now."""
        return self._weight[state] / self.now

    def after(self, state: int) -> list[tuple[int, int, float]]:
        """The heaviest tokens behind a state: token, state that is then reached, weight in units of one that ends now."""
        below, weight, now = self._next[state], self._weight, self.now
        named = self._heaviest[state]
        if named is None:
            named = list(below)
            if len(named) > 1:
                named.sort(key=lambda token: -weight[below[token]])
        return [(token, below[token], weight[below[token]] / now) for token in named]

    # ---------------------------------------------------------------- inside

    def _new(self, length: int) -> int:
        self._next.append({})
        self._link.append(_ROOT)
        self._length.append(length)
        self._weight.append(0.0)
        self._heaviest.append(None)
        return len(self._length) - 1

    def _extend(self, token: int) -> None:
        """The classical online construction."""
        below, link, length = self._next, self._link, self._length
        fresh, state = self._new(length[self._last] + 1), self._last
        while state != -1 and token not in below[state]:
            below[state][token] = fresh
            state = link[state]
        if state != -1:
            reached = below[state][token]
            if length[state] + 1 == length[reached]:
                link[fresh] = reached
            else:
                link[fresh] = self._split(reached, length[state] + 1)
                while state != -1 and below[state].get(token) == reached:
                    below[state][token] = link[fresh]
                    state = link[state]
        self._last = fresh

    def _split(self, state: int, length: int) -> int:
        """A state for those substrings of `state` that have at most `length` tokens: they occur here too."""
        copy = self._new(length)
        self._next[copy] = dict(self._next[state])
        named = self._heaviest[state]
        self._heaviest[copy] = None if named is None else list(named)
        self._weight[copy], self._link[copy] = self._weight[state], self._link[state]
        self._link[state] = copy
        return copy

    def _count(self, token: int) -> None:
        """One more occurrence of every suffix of the text, `token` included, of up to `bound` tokens."""
        below, link, length, weight, now = self._next, self._link, self._length, self._weight, self.now
        state = self._near
        near, counted = below[state][token], -1
        while state != -1:
            reached = below[state][token]
            if reached != counted:
                weight[reached] += now
                counted = reached
            if state != _ROOT:
                self._promote(state, token)
            state = link[state]
        while length[link[near]] >= min(self.size + 1, self.bound - 1):
            near = link[near]
        self._near = near

    def _promote(self, state: int, token: int) -> None:
        """Keep the followers of a state in order; only that of `token` became heavier."""
        below, weight, named = self._next[state], self._weight, self._heaviest[state]
        if named is None:
            if len(below) <= self.followers:
                return  # sorted when asked for
            named = self._heaviest[state] = sorted(below, key=lambda name: -weight[below[name]])[: self.followers]
        mine = weight[below[token]]
        if token in named:
            place = named.index(token)
        elif mine > weight[below[named[-1]]]:
            named[-1], place = token, len(named) - 1
        else:
            return
        while place and weight[below[named[place - 1]]] < mine:
            named[place], named[place - 1] = named[place - 1], token
            place -= 1

    def _rescale(self) -> None:
        factor = 2.0**-_RESCALE
        self._weight = [weight * factor for weight in self._weight]
        self._scale += _RESCALE
        self.now *= factor
