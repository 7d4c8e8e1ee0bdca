"""What an engine keeps of its requests: their rows in a `PrefixCache`, as long as the model's weights stay the same."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

from medhead.core.joining import StoredPrefix
from medhead.core.sequence import Sequence
from medhead.model.fingerprint import weights_state
from medhead.model.kv_cache import TreeCache
from medhead.model.state_cache import StateCache
from medhead.model.target import Target
from medhead.proposers.base import Proposer
from medhead.serving.prefix_cache import PrefixCache, default_limit


class PrefixStore:
    """Finds and keeps the beginnings of texts.

    Texts whose rotary frequencies depend on their length (`LengthRope`) are left out, and so are those whose prompts hold
    images: equal token ids may stand for different images.

    Args:
        target: of the texts.
        limit: most bytes that are held; 0 for nothing, None for a tenth of the free memory.

    Attributes:
        cache: the rows.
    """

    def __init__(self, target: Target, limit: int | None) -> None:
        self._target = target
        self._weights: Hashable = None  # a key of those with which the rows were made
        limit = default_limit(target.device) if limit is None else limit
        self.cache = PrefixCache(limit, target.state_layers is not None)

    def refresh(self) -> None:
        """Drop everything if the weights or adapters have changed since the last call; the target is not active."""
        if not self.cache.limit:
            return
        weights = weights_state(self._target)
        if weights != self._weights:
            self.cache.clear()
        self._weights = weights

    def find(self, proposer: Proposer, sequence: Sequence) -> StoredPrefix:
        """Return what is known of the beginning of a sequence's prompt for a proposer."""
        if not self._serves(sequence, proposer):
            return StoredPrefix()
        return self.cache.find(sequence.token_ids, proposer.draft_key or None, sequence.cache_salt)

    def store(
        self, proposer: Proposer, sequence: Sequence, cache: TreeCache, draft_cache: Any, row: int, length: int
    ) -> None:
        """Keep the first `length` tokens of a sequence, which are in a row of a cache."""
        if not self._serves(sequence, proposer):
            return
        states = None
        if isinstance(cache, StateCache):
            if cache.lengths.host is None or cache.lengths.host[row] != length:
                return  # the states are those after a token that is no part of the text
            states = cache.copy_states(row)
        copy_drafts = None if draft_cache is None else partial(draft_cache.copy_tokens, row)
        text, copy_rows = sequence.token_ids[:length], partial(cache.copy_tokens, row)
        self.cache.store(text, copy_rows, proposer.draft_key, copy_drafts, states, sequence.cache_salt)

    def _serves(self, sequence: Sequence, proposer: Proposer) -> bool:
        """Return whether a text can be read from its middle on, and its token ids say all about it."""
        layers = self._target.state_layers
        in_chunks = layers is None or layers.in_chunks
        fits = self.cache.limit > 0 and len(sequence.token_ids) <= self._target.length_rope.limit
        promised = self._target.bitwise is not None and not self._target.bitwise.by_default  # texts are read whole
        if sequence.has_images or promised:
            return False
        return fits and in_chunks and proposer.draft_key is not None
