"""What a kind of heads is: a state at the root, advanced token by token along a path, read out as a feature.

The feature goes through the target's frozen output matrix and gives the distribution of the node's children. One
interface serves training (many anchors of whole sequences at once) and proposing (a whole frontier of the tree at
once): all tensors are `[batch, queries, ...]`, where queries are anchors or frontier nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from medhead.core.lengths import Lengths
from medhead.errors import MedheadError
from medhead.heads.config import HeadsConfig
from medhead.heads.draft_cache import DraftCache, DraftCacheView, TensorDraftCache

__all__ = ["KINDS", "Draft", "Heads", "HeadsConfig", "build_heads", "register_kind"]


@dataclass
class Draft:
    """The beginning of one proposal.

    Attributes:
        state: `[batch, 1 or anchors, state]`, the state above the root.
        shared: what all nodes of the proposal share; its form is the kind's.
    """

    state: Tensor
    shared: Any


class Heads(nn.Module):
    """Base of all kinds.

    Attributes:
        per_path: whether what a node says depends on its path. If not, one distribution serves a whole depth.
        corrections: values of `config.correction` that the kind knows.
        fuses: whether the kind reads several layers of the target at once (`config.feature_layers`).
        encodes_by_depth: whether `encode` depends on the depth.
        memory_size: numbers kept for every committed token (`encode_cache_entry`); 0 if the heads do not look back.
        plain_draft_cache: whether `new_draft_cache` is a `TensorDraftCache`, or None.
        draft_tokens: `[draft_vocab]` int64, token ids that the heads may name; None for all.
    """

    per_path = True
    corrections: tuple[str, ...] = ("none",)
    fuses = False
    encodes_by_depth = False
    memory_size = 0
    plain_draft_cache = True

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        if config.correction not in self.corrections:
            raise MedheadError(
                f"heads of kind {config.kind!r} know the corrections {', '.join(self.corrections)}; got {config.correction!r}"
            )
        if len(config.feature_layers) > 1 and not self.fuses:
            raise MedheadError(
                f"heads of kind {config.kind!r} read one layer of the target, got feature_layers {config.feature_layers}"
            )
        self.config = config
        self.draft_tokens: Tensor | None
        tokens = torch.arange(config.draft_vocab) if config.draft_vocab else None
        self.register_buffer("draft_tokens", tokens)

    @property
    def feature_size(self) -> int:
        """Size of what the target hands over for a token: its last hidden state, or the outputs of the tapped layers."""
        return self.config.hidden_size * max(1, len(self.config.feature_layers))

    def own_embedding(self, depth: int) -> Tensor | None:
        """`[vocab, size]` an embedding that the heads bring, or None for the target's."""
        return None

    def own_output(self, depth: int) -> Tensor | None:
        """`[draft vocabulary or vocab, size]` an output matrix that the heads bring, or None for the target's."""
        return None

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """What a node of this depth needs of its token, from the token's embedding; the embedding itself here.

        It depends on the token (and the depth) alone, so that decoding may compute it once for the whole vocabulary.
        """
        return embedding

    def new_draft_cache(self, dtype: torch.dtype, lengths: Lengths, capacity: int) -> DraftCache | None:
        """Return empty storage for texts of about `capacity` tokens; None for kinds that do not look back."""
        return TensorDraftCache(self.memory_size, dtype, lengths, capacity) if self.memory_size else None

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, longest: int) -> Tensor:
        """What is kept of committed tokens, `[batch, tokens, memory_size]`.

        Args:
            features: `[batch, tokens, feature_size]` of the target at these tokens.
            token: `[batch, tokens, ...]`, what `encode` made of the token behind each of them.
            positions: `[batch or 1, tokens]` of these tokens.
            longest: all positions are below it (known on the host).
        """
        raise NotImplementedError

    def start(self, features: Tensor, root: Tensor, memory: DraftCacheView | None, depth: int | None = None) -> Draft:
        """Begin a proposal at every anchor.

        Args:
            features: `[batch, anchors, feature_size]` of the target at the token before the root.
            root: `[batch, anchors, ...]`, what `encode` made of the root's token.
            memory: of all tokens before the root; None for kinds that keep none.
            depth: how many levels will be asked for; the heads' own depth if None.
        """
        raise NotImplementedError

    def advance(self, state: Tensor, token: Tensor, depth: int, shared: Any) -> tuple[Tensor, Tensor]:
        """Take one token on the path.

        Args:
            state: `[batch, queries, state]`, the parents' states.
            token: `[batch, queries, ...]`, what `encode` made of the nodes' tokens.
            depth: the nodes' depth, 0 for the root.
            shared: what `start` shared.

        Returns:
            The nodes' states, and the features `[batch, queries, hidden]` that the output matrix turns into the logits of
            their children.
        """
        raise NotImplementedError


KINDS: dict[str, type[Heads]] = {}
H = TypeVar("H", bound=type[Heads])


def register_kind(name: str) -> Callable[[H], H]:
    """Class decorator: make a kind of heads known by its name."""

    def add(kind: H) -> H:
        KINDS[name] = kind
        return kind

    return add


def build_heads(config: HeadsConfig) -> Heads:
    """New heads of the configured kind.

    Raises:
        MedheadError: no kind has that name.
    """
    if config.kind not in KINDS:
        raise MedheadError(f"no kind of heads is called {config.kind!r}; known kinds: {', '.join(sorted(KINDS))}")
    return KINDS[config.kind](config)
