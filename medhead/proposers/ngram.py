"""Retrieval: what followed these words before, in prompt and output (prompt lookup, Saxena 2023) or in the user's own text.

The candidates come from `recall.py`: a suffix automaton of each row's text and, if there is one, a datastore (REST, He et
al. 2024). Here they are merged, and the likeliest become the tree. Where nothing repeats there is no tree but the root.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medhead.core.tree import TokenTree
from medhead.datastore.store import Datastore, check_vocabulary
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, register_proposer
from medhead.proposers.candidates import Candidates, candidates_from_tries
from medhead.proposers.ppm import StoreMemory, TextMemory
from medhead.proposers.trie import DraftTrie, to_token_tree

if TYPE_CHECKING:
    from medhead.model.target import Target


@register_proposer("ngram")
class NgramProposer(Proposer):
    """Proposes what followed the same words earlier.

    Args:
        target: the target; its vocabulary must fit the datastore.
        tree_size: most nodes of the tree, root included; fewer are named where little repeats.
        longest: most tokens of context that are matched.
        max_depth: most tokens that are guessed ahead.
        half_life: tokens after which an occurrence counts half as much as a new one.
        least: no node whose estimated chance is smaller is named, 0 to 1.
        datastore: a datastore of other text, or its folder (`python -m medhead.datastore` makes one).
        tokenizer: the target's tokenizer, to be sure that the datastore was built with it; without one only the size of
            the vocabulary is checked.

    Raises:
        MedheadError: a number that cannot be, or a datastore that is missing, damaged or of another tokenizer.
    """

    def __init__(
        self,
        target: Target | None = None,
        tree_size: int = 24,
        longest: int = 16,
        max_depth: int = 24,
        half_life: float = 4096,
        least: float = 0.02,
        datastore: Datastore | str | Path | None = None,
        tokenizer: Any = None,
    ) -> None:
        if longest < 1 or max_depth < 1:
            raise MedheadError(f"n-gram length and depth must be at least 1, got {longest} and {max_depth}")
        if not half_life >= 1 or not 0 <= least <= 1:
            raise MedheadError(
                f"half_life must be at least 1 and least must be from 0 to 1, got {half_life!r} and {least!r}"
            )
        self.tree_size, self.longest = tree_size, longest
        self.max_depth = min(max_depth, max(1, self.tree_size - 1))
        self.half_life, self.least = half_life, least
        self._store: StoreMemory | None = None
        if datastore is not None:
            store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
            check_vocabulary(store, None if target is None else target.vocab_size, tokenizer)
            self._store = StoreMemory(store, longest)
        self._texts: list[TextMemory] = []

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Forget the last texts; the prompts are read at the first proposal."""
        self._texts = [TextMemory(self.longest, self.max_depth, self.half_life) for _ in texts]

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """The guesses of all rows; when sampling, seen with the noise of the coming positions."""
        found = candidates_from_tries(self.guesses(state, max_depth), state.roots.device)
        return (
            found
            if found is None or state.noise is None
            else found.condition_on_noise(state.noise.prefix(len(found.levels)))
        )

    def guesses(self, state: DecodeState, max_depth: int) -> list[DraftTrie]:
        """The likeliest `tree_size` nodes of every row, text and datastore merged."""
        depth = min(max_depth, self.max_depth)
        return [self._row(memory, text, depth) for memory, text in zip(self._texts, state.texts, strict=True)]

    def _row(self, memory: TextMemory, text: list[int], depth: int) -> DraftTrie:
        memory.extend(text)
        found = memory.guesses(text[-1], self.tree_size, depth, self.least)
        if self._store is not None:
            found.merge(self._store.guesses(text, self.tree_size, depth, self.least))
        return found.likeliest(self.tree_size)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """The likeliest candidates of every row as its tree."""
        return to_token_tree(self.guesses(state, max_depth), state.roots)

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self._texts = [self._texts[row] for row in rows]

    def merge(self, newcomers: NgramProposer) -> None:
        """Their texts join."""
        self._texts = self._texts + newcomers._texts
