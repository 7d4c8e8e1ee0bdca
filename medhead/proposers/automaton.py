"""A suffix automaton of a growing text, with decaying counts of all substrings and of the tokens that follow them.

A state stands for all substrings that end at the same positions (Blumer et al. 1985); appending a token takes amortised
constant time. Every state also has the weight of its occurrences; an occurrence counts half after `half_life` tokens. Old
weights are not scaled down: new ones are larger, so the order of a state's followers changes only where an occurrence is
added. Weights are exact for substrings of up to `bound` tokens, at the cost of at most `bound` further operations per token.
"""

from __future__ import annotations

from collections.abc import Iterator

ROOT = 0  # state of the empty substring
_RESCALE = 500.0  # half-lives after which weights are scaled down, far from the largest float


class SuffixAutomaton:
    """Substrings of a growing text with weights and followers.

    Args:
        bound: longest substring whose weight is exact.
        half_life: number of tokens after which an occurrence counts half.
        followers: largest number of followers of a state that `after` returns; the heaviest are kept.

    Attributes:
        size: number of tokens of the text.
        now: weight of an occurrence that ends at the newest token.
        length: of every state, the length of its longest substring.
        link: of every state, the state of the longest suffix of its substrings that occurs elsewhere too; -1 of `ROOT`.
        recent: state of the text's last `bound - 1` tokens.
    """

    def __init__(self, bound: int, half_life: float, followers: int = 8) -> None:
        self.bound, self.half_life, self.followers = bound, half_life, followers
        self.size, self.now = 0, 1.0
        self.link, self.length, self.recent = [-1], [0], ROOT
        self._scale = 0.0  # half-lives that were scaled out of all weights
        self._next: list[dict[int, int]] = [{}]
        self._weight = [0.0]
        self._heaviest: dict[int, list[int]] = {}  # the heaviest followers in order, of states with many
        self._last = ROOT  # state of the whole text

    def append(self, token: int) -> None:
        """Append a token to the text."""
        self._extend(token)
        self.now = 2.0 ** (self.size / self.half_life - self._scale)
        if self.now > 2.0**_RESCALE:
            self._weight = [weight * 2.0**-_RESCALE for weight in self._weight]
            self.now, self._scale = self.now * 2.0**-_RESCALE, self._scale + _RESCALE
        self._count(token)
        self.size += 1

    def suffixes(self, max_length: int) -> Iterator[tuple[int, int]]:
        """Yield the states of the text's non-empty suffixes that also occur earlier, the longest first.

        Each comes with the length of its longest such suffix of at most `max_length` (and below `bound`) tokens.
        """
        length = min(max_length, self.size, self.bound - 1)
        state = self.recent
        while state != ROOT:
            shorter = self.link[state]
            if self._next[state] and self.length[shorter] < length:
                yield state, min(self.length[state], length)
            state = shorter

    def weight(self, state: int) -> float:
        """Return the weight of all occurrences of a state's substrings, in units of one that ends now."""
        return self._weight[state] / self.now

    def after(self, state: int) -> list[tuple[int, int, float]]:
        """Return the heaviest followers of a state: token, the state it leads to, weight in units of one that ends now."""
        following, weight, now = self._next[state], self._weight, self.now
        tokens = self._heaviest.get(state)
        if tokens is None:
            tokens = list(following)
            if len(tokens) > 1:
                tokens.sort(key=lambda token: -weight[following[token]])
        return [(token, following[token], weight[following[token]] / now) for token in tokens]

    def _new(self, length: int) -> int:
        self._next.append({})
        self.link.append(ROOT)
        self.length.append(length)
        self._weight.append(0.0)
        return len(self.length) - 1

    def _extend(self, token: int) -> None:
        """Add the states of a new token by the classical online construction."""
        following, link, length = self._next, self.link, self.length
        added, state = self._new(length[self._last] + 1), self._last
        while state != -1 and token not in following[state]:
            following[state][token] = added
            state = link[state]
        if state != -1:
            reached = following[state][token]
            if length[state] + 1 == length[reached]:
                link[added] = reached
            else:
                link[added] = self._split(reached, length[state] + 1)
                while state != -1 and following[state].get(token) == reached:
                    following[state][token] = link[added]
                    state = link[state]
        self._last = added

    def _split(self, state: int, length: int) -> int:
        """Return a new state for the substrings of `state` with at most `length` tokens, which occur here too."""
        copy = self._new(length)
        self._next[copy] = dict(self._next[state])
        if state in self._heaviest:
            self._heaviest[copy] = list(self._heaviest[state])
        self._weight[copy], self.link[copy] = self._weight[state], self.link[state]
        self.link[state] = copy
        return copy

    def _count(self, token: int) -> None:
        """Add an occurrence of every suffix of the text, `token` included, of up to `bound` tokens."""
        following, link, length, weight, now = self._next, self.link, self.length, self._weight, self.now
        state = self.recent
        recent, counted = following[state][token], -1
        while state != -1:
            reached = following[state][token]
            if reached != counted:
                weight[reached] += now
                counted = reached
            if state != ROOT:
                self._promote(state, token)
            state = link[state]
        while length[link[recent]] >= min(self.size + 1, self.bound - 1):
            recent = link[recent]
        self.recent = recent

    def _promote(self, state: int, token: int) -> None:
        """Keep the followers of a state in order after that of `token` became heavier."""
        following, weight, heaviest = self._next[state], self._weight, self._heaviest.get(state)
        if heaviest is None:
            if len(following) <= self.followers:
                return  # `after` sorts them
            heaviest = sorted(following, key=lambda name: -weight[following[name]])[: self.followers]
            self._heaviest[state] = heaviest
        own = weight[following[token]]
        if token in heaviest:
            place = heaviest.index(token)
        elif own > weight[following[heaviest[-1]]]:
            heaviest[-1], place = token, len(heaviest) - 1
        else:
            return
        while place and weight[following[heaviest[place - 1]]] < own:
            heaviest[place], heaviest[place - 1] = heaviest[place - 1], token
            place -= 1
