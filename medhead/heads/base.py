"""The interface of every kind of draft heads: a state at the root of the tree, advanced by one token per depth.

Each step returns the hidden state that the target's frozen output matrix turns into the logits of a node's children.
Training (many anchors of whole texts at once) and proposing (one frontier of the tree at once) call the same methods: all
tensors are `[batch, queries, ...]`, where queries are anchors or frontier nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from medhead.core.lengths import Lengths
from medhead.errors import MedheadError
from medhead.heads.config import HeadsConfig
from medhead.heads.draft_cache import DraftCache, TensorDraftCache

__all__ = ["KINDS", "Heads", "HeadsConfig", "build_heads", "register_kind"]


class Heads(nn.Module):
    """Base class of all kinds.

    Attributes:
        draft_tokens: `[draft_vocab_size]` int64, the token ids that the heads can propose; None for all.
        embeddings: the heads' own embedding `[vocab, size]` of every depth, or one for all; empty if they use the target's.
        output_matrices: the same for output matrices `[draft vocabulary or vocab, size]`.
    """

    path_dependent = True  # whether a node's distribution depends on its path; if not, one serves a whole depth
    corrections: tuple[str, ...] = ("none",)  # values of `config.correction` that the kind implements
    fuses_layers = False  # whether the kind reads several layers of the target at once (`config.feature_layers`)
    encode_uses_depth = False  # whether `encode` depends on the depth
    cache_entry_size = 0  # numbers stored for every committed token (`encode_cache_entry`); 0 without a draft cache
    has_tensor_cache = True  # whether `new_draft_cache` returns a `TensorDraftCache` or None
    is_resumable = False  # whether another one can be continued from stored entries too, see `DraftCache.load_tokens`

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        if config.correction not in self.corrections:
            raise MedheadError(
                f"correction of {config.kind!r} heads must be one of {', '.join(self.corrections)}, got {config.correction!r}"
            )
        if len(config.feature_layers) > 1 and not self.fuses_layers:
            raise MedheadError(
                f"{config.kind!r} heads read one layer of the target, got feature_layers {config.feature_layers}"
            )
        self.config = config
        self.embeddings = self.output_matrices = nn.ParameterList()
        self.draft_tokens: Tensor | None
        self.register_buffer("draft_tokens", torch.arange(config.draft_vocab_size) if config.draft_vocab_size else None)

    @property
    def feature_size(self) -> int:
        """Size of the target's feature of a token: its last hidden state, or the outputs of `feature_layers` concatenated."""
        return self.config.hidden_size * max(1, len(self.config.feature_layers))

    def add_own_matrices(self, count: int, size: int) -> None:
        """Create `count` random embeddings and output matrices of a width, as far as the configuration asks for them."""
        config = self.config

        def matrices(own: bool, rows: int) -> nn.ParameterList:
            parts = (torch.empty(rows, size) for _ in range(count if own else 0))
            return nn.ParameterList(nn.init.normal_(part, std=size**-0.5) for part in parts)

        self.embeddings = matrices(config.own_embedding, config.vocab_size)
        self.output_matrices = matrices(config.own_output, config.draft_vocab_size or config.vocab_size)

    def own_embedding(self, depth: int) -> Tensor | None:
        """Return the heads' own embedding `[vocab, size]`, or None if they use the target's."""
        return self.embeddings[min(depth, len(self.embeddings) - 1)] if len(self.embeddings) else None

    def own_output(self, depth: int) -> Tensor | None:
        """Return the heads' own output matrix `[draft vocabulary or vocab, size]`, or None if they use the target's."""
        return self.output_matrices[min(depth, len(self.output_matrices) - 1)] if len(self.output_matrices) else None

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """Return what `step` needs of a node's token; by default the token's embedding itself.

        The result depends on the token and the depth alone, so decoding can compute it once for the whole vocabulary.
        """
        return embedding

    def new_draft_cache(self, dtype: torch.dtype, lengths: Lengths, capacity: int) -> DraftCache | None:
        """Return an empty cache for texts of about `capacity` tokens, or None if the kind keeps none."""
        return TensorDraftCache(self.cache_entry_size, dtype, lengths, capacity) if self.cache_entry_size else None

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, max_len: int) -> Tensor:
        """Return the cache entries of committed tokens, `[batch, tokens, cache_entry_size]`.

        `features` `[batch, tokens, feature_size]` are the target's at these tokens, `token` `[batch, tokens, ...]` is the
        result of `encode` for the token after each, and `positions` `[batch or 1, tokens]` are all below `max_len`.
        """
        raise NotImplementedError

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Any]:
        """Begin a proposal at every anchor.

        Args:
            features: `[batch, anchors, feature_size]` of the target at the token before the root.
            root: `[batch, anchors, ...]`, the result of `encode` for the root's token.
            cache: `DraftCache.view()`, the entries of all tokens before the root; None for kinds that keep none.
            depth: number of depths that will be asked for; `config.depth` if None.

        Returns:
            The state above the root, `[batch, 1 or anchors, state]`, and a context of any form that all nodes share.
        """
        raise NotImplementedError

    def step(self, state: Tensor, token: Tensor, depth: int, context: Any) -> tuple[Tensor, Tensor]:
        """Advance by one token of the path.

        Args:
            state: `[batch, queries, state]`, the parents' states.
            token: `[batch, queries, ...]`, the result of `encode` for the nodes' tokens.
            depth: the nodes' depth, 0 for the root.
            context: the context that `init_state` returned.

        Returns:
            The nodes' states, and hidden states `[batch, queries, hidden]`, from which the output matrix makes the
            logits of their children.
        """
        raise NotImplementedError


KINDS: dict[str, type[Heads]] = {}
H = TypeVar("H", bound=type[Heads])


def register_kind(name: str) -> Callable[[H], H]:
    """Return a class decorator that registers a kind of heads under a name."""

    def add(kind: H) -> H:
        KINDS[name] = kind
        return kind

    return add


def build_heads(config: HeadsConfig) -> Heads:
    """Return new heads of the configured kind; an unknown kind raises a `MedheadError`."""
    if config.kind not in KINDS:
        raise MedheadError(f"kind of the heads must be one of {', '.join(sorted(KINDS))}, got {config.kind!r}")
    return KINDS[config.kind](config)
