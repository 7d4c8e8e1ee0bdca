"""vLLM's format of Medusa heads: `blocks.*`, `lm_heads.*`, and a truncated vocabulary with `token_map`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medhead.heads.base import Heads, HeadsConfig
from medhead.heads.formats.base import CheckpointFormat, fitting_config, output_matrix
from medhead.heads.formats.medusa import count_blocks
from medhead.heads.formats.reader import CheckpointReader

if TYPE_CHECKING:
    from medhead.model.target import Target

_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


class VllmMedusa(CheckpointFormat):
    """It writes one output matrix for all heads unless they bring their own; a draft vocabulary becomes the truncated one."""

    name, kind, has_draft_vocab = "vllm-medusa", "medusa", True

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for blocks, or for output matrices of a model that calls itself Medusa."""
        names = {name.replace("medusa_heads.", "") for name in reader.names}
        declared = reader.config.get("model_type") == "medusa" or "MedusaModel" in reader.architectures
        return any(map(_BLOCK.fullmatch, names)) or (declared and any(name.startswith("lm_heads.") for name in names))

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read Medusa heads with an output matrix for each, or one for all."""
        reader.rename("medusa_heads.")
        reader.check_target(target, hidden_size=target.hidden_size, vocab_size=target.vocab_size)
        depth, num_layers = count_blocks(reader, _BLOCK, "blocks.0.layers.0.weight")
        given: dict[str, Tensor] = {}
        if not reader.flag("medusa_fc_bias"):
            biases = (f"heads.{head}.{layer}.linear.bias" for head in range(depth) for layer in range(num_layers))
            given |= {name: torch.zeros(target.hidden_size) for name in biases}
        tokens, count = None, reader.number("truncated_vocab_size", target.vocab_size)
        if count != target.vocab_size:
            tokens = given["draft_tokens"] = reader.take_token_ids("token_map", count, target)
        reader.drop("token_map")
        tied = reader.flag("original_lm_head")
        if tied:
            reader.rename("lm_head.", "lm_heads.0.")
        for head in range(1 if tied else depth):
            given[f"output_matrices.{head}"] = _output_matrix(reader, f"lm_heads.{head}.weight", tokens, target)
        if tied:
            reader.drop(*(f"lm_heads.{head}.weight" for head in range(1, depth)))
        config = fitting_config(
            target, self.kind, depth=depth, num_layers=num_layers, own_output=True, tie_weights=tied,
            draft_vocab_size=0 if tokens is None else count,
        )  # fmt: skip
        return reader.load(config, self.stored_name, given)

    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Call heads `blocks`, their blocks `layers`, and the output matrices `lm_heads`."""
        if name == "draft_tokens":
            return "token_map"
        name = re.sub(r"^output_matrices\.(\d+)$", r"lm_heads.\1.weight", name)
        return re.sub(r"^heads\.(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Add the target's output matrix, where the heads use it."""
        return super().tensors(heads, target) | {"lm_heads.0.weight": output_matrix(heads, target)}

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Name sizes and switches."""
        config = heads.config
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_heads": config.depth,
            "num_hidden_layers": config.num_layers,
            "truncated_vocab_size": config.draft_vocab_size or None,
            "medusa_fc_bias": True,
            "original_lm_head": config.tie_weights or not config.own_output,
        }


def _output_matrix(reader: CheckpointReader, name: str, tokens: Tensor | None, target: Target) -> Tensor:
    """Take an output matrix, and cut it to the draft vocabulary where it holds more."""
    full, scale = (target.vocab_size, target.hidden_size), reader.real("logit_scale", 1.0)
    if tokens is None or reader.shape(name) == full:
        matrix = reader.take(name, *full)
        return (matrix if tokens is None else matrix[tokens]) * scale
    return reader.take(name, len(tokens), target.hidden_size) * scale
