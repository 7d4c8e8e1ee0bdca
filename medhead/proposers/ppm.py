"""What earlier text says about how a text goes on: its own beginning, or a datastore.

A suffix automaton knows every earlier occurrence of the text's end at once (SAM decoding, Hu et al. 2024). Contexts are
blended longest first, as compressors do (prediction by partial matching, Cleary and Witten 1984): a context that was seen
with weight w leaves the share doubt / (w + doubt) to the next shorter one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeVar

from medhead.datastore.store import Datastore, Match
from medhead.proposers.automaton import SuffixAutomaton
from medhead.proposers.trie import DraftTrie

C = TypeVar("C")
_REST = 0.02  # when less is left, shorter contexts are not asked any more


def doubt(length: int) -> float:
    """How many occurrences a context of `length` tokens needs until what followed them is as likely as anything else.

    Fitted by eye to chats, stories and calculations, where it makes the chances true within a few hundredths.
    """
    return 4.0 / length


def best_first(
    root: int,
    context: C,
    following: Callable[[C, float], dict[int, tuple[float, C]]],
    nodes: int,
    depth: int,
    least: float,
) -> DraftTrie:
    """The `nodes` likeliest nodes below a root, by a best-first search: a child is never likelier than its parent.

    Args:
        root: token of the root.
        context: what `following` needs to know at the root.
        following: tokens behind a context, each with its chance and the context behind it; chances below the given number
            are of no use.
        nodes: most nodes, root included.
        depth: deepest node.
        least: no node is less likely.
    """
    found, heap, named = DraftTrie(root), [], 0  # type: ignore[var-annotated]
    node, prob, least = 0, 1.0, max(least, 1e-9)  # 0 is no chance
    while True:
        if found.depths[node] < depth:
            for token, (share, behind) in following(context, max(least / prob, _REST)).items():
                if prob * share >= least:
                    named += 1  # breaks ties: what was named first comes first
                    heapq.heappush(heap, (-prob * share, named, node, token, behind))
        if not heap or len(found) >= nodes:
            return found
        negative, _, parent, token, context = heapq.heappop(heap)
        prob = -negative
        node = found.add(parent, token, prob)


class TextMemory:
    """One row's text so far, and what it says about how it goes on.

    Args:
        longest: longest context that is matched.
        depth: deepest candidate.
        half_life: tokens after which an occurrence counts half.
    """

    def __init__(self, longest: int, depth: int, half_life: float) -> None:
        self.longest = longest
        self.automaton = SuffixAutomaton(longest + depth, half_life)
        self._ending: set[int] = set()  # states of the text's own suffixes

    def extend(self, text: list[int]) -> None:
        """Take in what the text has gained."""
        for place in range(self.automaton.size, len(text)):
            self.automaton.append(text[place])

    def guesses(self, root: int, nodes: int, depth: int, least: float) -> DraftTrie:
        """The likeliest `nodes` nodes below the text's end, best first; none less likely than `least`."""
        suffixes = list(self.automaton.suffixes(self.longest))
        if not suffixes or depth < 1:
            return DraftTrie(root)
        self._ending = {state for state, _ in self.automaton.suffixes(self.automaton.bound)}
        return best_first(root, suffixes[0], self._following, nodes, depth, least)

    def _following(self, context: tuple[int, int], floor: float) -> dict[int, tuple[float, tuple[int, int]]]:
        """Tokens behind a context: chance, and the longest context that they lead to (its state, its length)."""
        (state, length), automaton, rest = context, self.automaton, 1.0
        found: dict[int, tuple[float, tuple[int, int]]] = {}
        while length and rest > floor:
            followers = automaton.after(state)
            if followers:
                open_end = 1.0 if state in self._ending else 0.0  # the newest occurrence has no follower yet
                total = max(automaton.weight(state) - open_end, 0.0) + doubt(length)
                for token, reached, weight in followers:
                    share, longest = found.get(token, (0.0, (reached, length + 1)))
                    found[token] = (share + rest * weight / total, longest)
                rest *= doubt(length) / total
            state, length = automaton.shorter(state)
        return found


class StoreMemory:
    """What a datastore says about how a text goes on.

    Args:
        store: the datastore.
        longest: longest context that is matched.
        places: most places that are looked at, those with the longest common contexts.
    """

    def __init__(self, store: Datastore, longest: int, places: int = 32) -> None:
        self.store, self.longest, self.places = store, longest, places

    def guesses(self, text: list[int], nodes: int, depth: int, least: float) -> DraftTrie:
        """The likeliest `nodes` nodes below the text's end, best first; none less likely than `least`."""
        places = self.store.find_matches(text, self.longest, self.places)
        if not places or depth < 1:
            return DraftTrie(text[-1])
        return best_first(text[-1], places, self._following, nodes, depth, least)

    def _following(self, places: list[Match], floor: float) -> dict[int, tuple[float, list[Match]]]:
        """Tokens behind places, whose contexts grow shorter: chance, and the places behind them.

        A context of n tokens consists of all places that share n or more, so contexts are blended as in a text's memory.
        """
        goes_on = [(*place, self.store.next_token(place[0])) for place in places]
        known = [(place, length, token) for place, length, token in goes_on if token is not None]
        found: dict[int, tuple[float, list[Match]]] = {}
        counts: dict[int, int] = {}
        rest = 1.0
        for index, (place, length, token) in enumerate(known):
            counts[token] = counts.get(token, 0) + 1
            found.setdefault(token, (0.0, []))[1].append((place + 1, length + 1))
            if rest <= floor or (index + 1 < len(known) and known[index + 1][1] == length):
                continue  # all places of this context first
            total = index + 1 + doubt(length)
            for name, count in counts.items():
                share, behind = found[name]
                found[name] = (share + rest * count / total, behind)
            rest *= doubt(length) / total
        return {token: behind for token, behind in found.items() if behind[0]}
