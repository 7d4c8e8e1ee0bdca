"""Retrieval: what followed the same words in the text (prompt lookup, Saxena 2023) or a datastore (REST, He et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medhead.core.tree import TokenTree
from medhead.datastore.store import Datastore, check_vocabulary
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, register_proposer
from medhead.proposers.candidates import Candidates, candidates_from_tries
from medhead.proposers.host_drafts import DEPTH
from medhead.proposers.ppm import StoreMemory, TextMemory
from medhead.proposers.trie import DraftTrie, to_token_tree

if TYPE_CHECKING:
    from medhead.model.target import Target


@register_proposer("ngram")
class NgramProposer(Proposer):
    """Proposes what followed the same tokens earlier.

    Args:
        target: the target; its vocabulary must fit the datastore.
        tree_size: largest number of nodes of the tree, root included; trees are smaller where little repeats.
        max_context: largest number of tokens of context that are matched.
        max_depth: depth of the deepest node.
        half_life: number of tokens after which an occurrence counts half as much as a new one.
        min_prob: smallest estimated probability of a node, 0 to 1.
        datastore: a datastore of other text, or its folder.
        tokenizer: the target's tokenizer, to check that the datastore was built with it; without one only the size of the
            vocabulary is checked.

    Raises:
        MedheadError: a number is out of range, or the datastore is missing, damaged or of another tokenizer.
    """

    row_states: list[TextMemory]
    uses_noise = capturable = takes_drafts = True

    def __init__(
        self,
        target: Target | None = None,
        tree_size: int = 24,
        max_context: int = 16,
        max_depth: int = 24,
        half_life: float = 4096,
        min_prob: float = 0.02,
        datastore: Datastore | str | Path | None = None,
        tokenizer: Any = None,
    ) -> None:
        if max_context < 1 or max_depth < 1:
            raise MedheadError(f"max_context and max_depth must be at least 1, got {max_context} and {max_depth}")
        if not half_life >= 1 or not 0 <= min_prob <= 1:
            raise MedheadError(
                f"half_life must be at least 1, min_prob from 0 to 1, got {half_life!r} and {min_prob!r}"
            )
        self.tree_size, self.max_context = tree_size, max_context
        self.max_depth = min(max_depth, max(1, self.tree_size - 1))
        self.half_life, self.min_prob = half_life, min_prob
        self._store: StoreMemory | None = None
        if datastore is not None:
            store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
            check_vocabulary(store, None if target is None else target.vocab_size, tokenizer)
            self._store = StoreMemory(store, max_context)

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Forget the last texts; the prompts are read at the first proposal."""
        self.row_states = [TextMemory(self.max_context, self.max_depth, self.half_life) for _ in texts]

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """Return the tries of all rows as candidates, conditioned on the noise when sampling."""
        if state.fixed:
            found = state.drafts if max_depth > 0 else None
        else:
            found = candidates_from_tries(self.tries(state, max_depth), state.roots.device)
        if found is None or state.noise is None:
            return found
        return found.condition_on_noise(state.noise.prefix(len(found.levels)))

    def tries(self, state: DecodeState, max_depth: int) -> list[DraftTrie]:
        """Return the `tree_size` most probable nodes of every row, from text and datastore."""
        return self._tries(state.texts, min(max_depth, self.max_depth))

    def host_tries(self, texts: list[list[int]]) -> list[DraftTrie]:
        """Return the same for the next captured step."""
        return self._tries(texts, self.captured_depth)

    @property
    def captured_depth(self) -> int:
        """That of the layout in which the host's draft tokens travel."""
        return min(DEPTH, self.max_depth)

    def _tries(self, texts: list[list[int]], depth: int) -> list[DraftTrie]:
        found = []
        for memory, text in zip(self.row_states, texts, strict=True):
            trie = memory.trie(text, self.tree_size, depth, self.min_prob)
            if self._store is not None:
                trie.merge(self._store.trie(text, self.tree_size, depth, self.min_prob))
            found.append(trie.prune(self.tree_size))
        return found

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return the trie of every row as its tree; in a captured step, one of a fixed number of nodes."""
        if state.fixed:
            found = self.candidates(state, max_depth)
            return TokenTree.root(state.roots) if found is None else found.best_tree(state.roots, self.tree_size)
        return to_token_tree(self.tries(state, max_depth), state.roots)
