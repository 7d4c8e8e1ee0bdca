"""Continuations of a text, predicted by partial matching (PPM, Cleary and Witten 1984) from its past or from a datastore.

A suffix automaton knows all earlier occurrences of the text's end (SAM decoding, Hu et al. 2024). Contexts are blended,
the longest first: a context with weight w leaves the share escape_mass / (w + escape_mass) to the next shorter one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from medhead.datastore.store import Datastore, Match
from medhead.proposers.automaton import SuffixAutomaton
from medhead.proposers.trie import DraftTrie

C = TypeVar("C")
# contexts as length, weight, and the tokens that follow them: token, its weight, the context that includes it
Contexts = Iterator[tuple[int, float, list[tuple[int, float, C]]]]
_MIN_SHARE = 0.02  # no shorter context is blended in once the longer ones leave less than this


def escape_mass(length: int) -> float:
    """Return the weight of everything that never followed a context of `length` tokens, in occurrences of the context.

    Fitted to chats, stories and calculations, where probabilities are then calibrated to within a few hundredths.
    """
    return 4.0 / length


def blend(contexts: Contexts[C], min_share: float) -> dict[int, tuple[float, C]]:
    """Return the probability of every token that follows the contexts, and the longest context that includes it."""
    found: dict[int, tuple[float, C]] = {}
    rest = 1.0
    for length, weight, followers in contexts:
        if rest <= min_share:
            break
        total = weight + escape_mass(length)
        for token, count, longer in followers:
            share, longest = found.get(token, (0.0, longer))
            found[token] = (share + rest * count / total, longest)
        rest *= escape_mass(length) / total
    return found


def best_first(
    root: int,
    context: C,
    contexts: Callable[[C], Contexts[C]],
    nodes: int,
    depth: int,
    min_prob: float,
) -> DraftTrie:
    """Return the `nodes` most probable nodes below a root, in falling order; a child is never more probable than its parent.

    `contexts` gives a context and its shorter ones, see `blend`. No node is deeper than `depth` or less probable than `min_prob`.
    """
    trie, heap, pushed = DraftTrie(root), [], 0  # type: ignore[var-annotated]
    node, prob, min_prob = 0, 1.0, max(min_prob, 1e-9)
    while True:
        if trie.depths[node] < depth:
            for token, (share, longer) in blend(contexts(context), max(min_prob / prob, _MIN_SHARE)).items():
                if prob * share >= min_prob:
                    pushed += 1  # of equal probabilities the one pushed first comes first
                    heapq.heappush(heap, (-prob * share, pushed, node, token, longer))
        if not heap or len(trie) >= nodes:
            return trie
        negative, _, parent, token, context = heapq.heappop(heap)
        prob = -negative
        node = trie.add(parent, token, prob)


class TextMemory:
    """Predicts how one text continues, from its past; see `NgramProposer` for the arguments."""

    def __init__(self, max_context: int, depth: int, half_life: float) -> None:
        self.max_context = max_context
        self.automaton = SuffixAutomaton(max_context + depth, half_life)
        self._suffixes: set[int] = set()  # states of the text's own suffixes

    def trie(self, text: list[int], nodes: int, depth: int, min_prob: float) -> DraftTrie:
        """Read what the text has gained; return the most probable nodes that follow it, see `best_first`."""
        for place in range(self.automaton.size, len(text)):
            self.automaton.append(text[place])
        longest = next(self.automaton.suffixes(self.max_context), None)
        if longest is None or depth < 1:
            return DraftTrie(text[-1])
        self._suffixes = {state for state, _ in self.automaton.suffixes(self.automaton.bound)}
        return best_first(text[-1], longest, self._contexts, nodes, depth, min_prob)

    def _contexts(self, context: tuple[int, int]) -> Contexts[tuple[int, int]]:
        """Yield a context, as state and length, and its shorter ones."""
        (state, length), automaton = context, self.automaton
        while length:
            followers = automaton.after(state)
            if followers:
                unfinished = 1.0 if state in self._suffixes else 0.0  # nothing follows the newest occurrence yet
                weight = max(automaton.weight(state) - unfinished, 0.0)
                yield length, weight, [(token, own, (reached, length + 1)) for token, reached, own in followers]
            state = automaton.link[state]
            length = automaton.length[state]


@dataclass
class StoreMemory:
    """Predicts how a text continues, from the `max_matches` longest context matches in a datastore."""

    store: Datastore
    max_context: int
    max_matches: int = 32

    def trie(self, text: list[int], nodes: int, depth: int, min_prob: float) -> DraftTrie:
        """Return the most probable nodes that follow the text; see `best_first`."""
        matches = self.store.find_matches(text, self.max_context, self.max_matches)
        if not matches or depth < 1:
            return DraftTrie(text[-1])
        return best_first(text[-1], matches, self._contexts, nodes, depth, min_prob)

    def _contexts(self, matches: list[Match]) -> Contexts[list[Match]]:
        """Yield the contexts of matches, the longest first; that of n tokens consists of all matches of n or more tokens."""
        continued = [(*match, self.store.next_token(match[0])) for match in matches]
        known = [(place, length, token) for place, length, token in continued if token is not None]
        longer: dict[int, list[Match]] = {}
        for place, length, token in known:
            longer.setdefault(token, []).append((place + 1, length + 1))
        counts: dict[int, int] = {}
        for seen, (_, length, token) in enumerate(known, 1):
            counts[token] = counts.get(token, 0) + 1
            if seen == len(known) or known[seen][1] != length:
                yield length, seen, [(name, count, longer[name]) for name, count in counts.items()]
