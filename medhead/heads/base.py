"""What a kind of heads is: a state at the root, advanced token by token along a path, read out as a feature.

The feature goes through the target's frozen output matrix and gives the distribution of the node's children. So one
interface serves training (a whole sequence at once) and proposing (a whole frontier of the tree at once).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from medhead.errors import MedheadError


@dataclass
class HeadsConfig:
    """Everything needed to build heads again and to tell whether they fit a target.

    Attributes:
        kind: registered name of the kind.
        depth: how many tokens beyond the target's own next token the heads guess.
        hidden_size: size of the target's last hidden state.
        vocab_size: rows of the target's output matrix.
        target_layers: number of layers of the target, to recognise heads of another model.
        target_type: `model_type` of the target's configuration.
        inner_size: width inside the heads; its meaning is the kind's.
        blocks: residual blocks of each Medusa head.
        accuracies: measured on held-out text: `accuracies[d][r]` is the share of positions at which the rank-r guess of
            depth d+1 was right, given that the path to it was.
        tree_size: nodes of the tree that decodes fastest with these heads on the machine that measured it.
        tree_depth: deepest tree worth growing with that size; `depth` if 0.
        draft_vocab: the heads name only this many tokens, the most frequent ones of their training text (FR-Spec, Zhao et
            al. 2025); 0 means all. The target still verifies with its whole vocabulary.
    """

    kind: str
    depth: int
    hidden_size: int
    vocab_size: int
    target_layers: int
    target_type: str = ""
    inner_size: int = 384
    blocks: int = 1
    accuracies: list[list[float]] = field(default_factory=list)
    tree_size: int = 16
    tree_depth: int = 0
    draft_vocab: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "hidden_size", "vocab_size", "inner_size", "blocks", "tree_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise MedheadError(
                    f"{name} of the heads must be a whole number of at least 1, got {getattr(self, name)!r}"
                )
        if not 0 <= self.draft_vocab <= self.vocab_size:
            raise MedheadError(
                f"draft_vocab must be from 0 to the vocabulary's {self.vocab_size}, got {self.draft_vocab!r}"
            )
        if not 0 <= self.tree_depth <= self.depth:
            raise MedheadError(f"tree_depth must be from 0 to the heads' depth {self.depth}, got {self.tree_depth!r}")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


class Heads(nn.Module):
    """Base of all kinds.

    Attributes:
        per_path: whether the state depends on the path's tokens. If not, one distribution serves a whole depth.
        draft_tokens: `[draft_vocab]` int64, token ids that the heads may name; None for all.
    """

    per_path = True

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.draft_tokens: Tensor | None
        tokens = torch.arange(config.draft_vocab) if config.draft_vocab else None
        self.register_buffer("draft_tokens", tokens)

    def start(self, hidden: Tensor) -> Tensor:
        """State before the root's token, from the target's last hidden state `[..., hidden]` at the token before it."""
        raise NotImplementedError

    def encode(self, embedding: Tensor) -> Tensor:
        """What `advance` needs of a token, from the target's embedding of it, `[..., hidden]`; the embedding itself here.

        It depends on the token alone, so that decoding may compute it once for the whole vocabulary.
        """
        return embedding

    def advance(self, state: Tensor, token: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Take one token on the path.

        Args:
            state: `[..., state]`, the parent's state.
            token: what `encode` made of the node's token.
            depth: the node's depth, 0 for the root.

        Returns:
            The node's state, and the feature `[..., hidden]` that the output matrix turns into its children's logits.
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
