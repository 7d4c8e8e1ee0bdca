"""What all exports share: what is written, and the refusals of heads that a layout cannot express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads.base import Heads
from medhead.heads.formats.source import WEIGHTS_FILE

if TYPE_CHECKING:
    from medhead.model.target import Target


@dataclass
class Exported:
    """A checkpoint in another project's layout.

    Attributes:
        config: content of `config.json`.
        tensors: by name.
        weights_file: name of the file they belong in.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights_file: str = WEIGHTS_FILE


def require(heads: Heads, layout: str, kind: str, whole_vocabulary: bool = False) -> None:
    """Refuse heads whose formula a layout does not have.

    Args:
        heads: the heads.
        layout: its name.
        kind: the only kind that fits.
        whole_vocabulary: the layout has no draft vocabulary.

    Raises:
        MedheadError: gives the reason.
    """
    config = heads.config
    if config.kind != kind:
        raise MedheadError(f"the layout {layout!r} holds heads of kind {kind!r}, these are of kind {config.kind!r}")
    if config.correction != "none":
        raise MedheadError(
            f"the layout {layout!r} has no correction, these heads have correction {config.correction!r}: "
            "train with --correction none to export"
        )
    if whole_vocabulary and config.draft_vocab:
        raise MedheadError(
            f"the layout {layout!r} has no draft vocabulary, these heads name {config.draft_vocab} of {config.vocab_size} "
            "tokens: train with --draft-vocab 0 to export"
        )


def output_rows(heads: Heads, target: Target) -> Tensor:
    """`[draft vocabulary or vocabulary, hidden]`: rows of the target's output matrix that the heads name tokens with.

    Raises:
        MedheadError: the target adds a bias, which no layout has.
    """
    if getattr(target.output, "bias", None) is not None:
        raise MedheadError(f"the output matrix of {target.name} has a bias, which no serving layout holds")
    weight = target.output.weight.detach()
    return weight if heads.draft_tokens is None else weight[heads.draft_tokens.to(weight.device)]


def attention_config(heads: Heads) -> dict[str, Any]:
    """The keys of a transformers configuration that describe a small decoder."""
    config = heads.config
    return {
        "hidden_size": config.layer_size or config.hidden_size,
        "intermediate_size": config.inner_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
    }


def raw_embedding(target: Target, token: int) -> Tensor | None:
    """`[hidden]`, a row of the target's embedding, or None if the target scales its embeddings."""
    row = target.embedding.weight[token].detach()
    given = target.embed(torch.tensor([token], device=row.device))[0].detach()
    return row if torch.equal(given, row) else None
