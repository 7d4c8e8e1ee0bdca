"""What all checkpoint formats share: the interface, the exported checkpoint, and the refusal of heads that do not fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads.base import Heads
from medhead.heads.config import HeadsConfig
from medhead.heads.formats.reader import WEIGHTS_FILE, CheckpointReader
from medhead.model.output_rows import output_rows
from medhead.model.target import Target


@dataclass
class ExportedCheckpoint:
    """A checkpoint in another project's format."""

    config: dict[str, Any]  # content of `config.json`
    tensors: dict[str, Tensor]
    weights_file: str  # name of the file that holds the tensors


class CheckpointFormat(ABC):
    """A checkpoint format of another project: how its folders are recognised, read and written."""

    name: str  # as users give it
    kind: str  # of the heads it holds
    needs = ""  # of the heads, besides their kind and no correction
    loaded_by: str  # programs that load it
    has_draft_vocab = False  # whether it can hold a draft vocabulary
    weights_file = WEIGHTS_FILE  # name of the file that holds the tensors

    @abstractmethod
    def matches(self, reader: CheckpointReader) -> bool:
        """Return whether a checkpoint is in this format, by names in its configuration and of its tensors."""

    @abstractmethod
    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Return the heads of a checkpoint; see `import_heads`."""

    @abstractmethod
    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Return the format's name of a tensor of the heads, or None for one that it does not store as it is."""

    @abstractmethod
    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Return the content of `config.json` for these heads."""

    def refusals(self, heads: Heads, target: Target) -> Iterator[tuple[bool, str]]:
        """Yield conditions under which the format cannot express heads, each with the reason."""
        config = heads.config
        reason = f"it has no correction, these heads have correction {config.correction!r}"
        yield config.correction != "none", f"{reason}: train with --correction none to export"
        reason = (
            f"it has no draft vocabulary, these heads propose {config.draft_vocab_size} of {config.vocab_size} tokens"
        )
        refused = config.draft_vocab_size > 0 and not self.has_draft_vocab
        yield refused, f"{reason}: train with --draft-vocab 0 to export"

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Return the tensors to store: the heads' under the format's names; formats add those they compute."""
        named = ((self.stored_name(name, heads.config), tensor) for name, tensor in heads.state_dict().items())
        return {name: tensor for name, tensor in named if name is not None}

    def write(self, heads: Heads, target: Target) -> ExportedCheckpoint:
        """Return the checkpoint of some heads; see `export_heads`."""
        for refused, reason in self.refusals(heads, target):
            if refused:
                raise MedheadError(f"these heads cannot be written in the format {self.name!r}: {reason}")
        return ExportedCheckpoint(self.config_json(heads, target), self.tensors(heads, target), self.weights_file)


def output_matrix(heads: Heads, target: Target, depth: int = 0, whole: bool = False) -> Tensor:
    """Return `[draft vocabulary or vocabulary, hidden]`: the heads' own output matrix, or the target's rows that they use.

    With `whole` the target's rows are those of all tokens.
    """
    own = heads.own_output(depth)
    if own is not None:
        return own
    if getattr(target.output, "bias", None) is not None:
        raise MedheadError(f"the output matrix of {target.name} has a bias, which no checkpoint format holds")
    tokens = None if whole else heads.draft_tokens
    return output_rows(target, None if tokens is None else tokens.to(target.device))[0]


def decoder_config_json(heads: Heads, target: Target) -> dict[str, Any]:
    """Return the keys of a transformers configuration that describe a small decoder."""
    config = heads.config
    return {
        "hidden_size": config.draft_hidden_size or config.hidden_size,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_position_embeddings or target.context,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
    }


def embedding_row(target: Target, token: int) -> Tensor | None:
    """Return `[hidden]`, a row of the target's embedding, or None if the target scales its embeddings."""
    row = target.embedding.weight[token].detach()
    embedded = target.embed(torch.tensor([token], device=row.device))[0].detach()
    return row if torch.equal(embedded, row) else None
