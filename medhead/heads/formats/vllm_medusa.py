"""vLLM's own layout of Medusa heads: `blocks.*`, `lm_heads.*`, a truncated vocabulary with `token_map`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.formats.export import Exported, output_rows, require
from medhead.heads.formats.source import Source, check_draft_tokens, fill, heads_config

if TYPE_CHECKING:
    from medhead.model.target import Target

LAYOUT = "vllm-medusa"
_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


def matches(source: Source) -> bool:
    """By the model type, the architecture or the names of the tensors."""
    names = {name.replace("medusa_heads.", "") for name in source.names}
    said = source.config.get("model_type") == "medusa" or "MedusaModel" in source.architectures
    return any(map(_BLOCK.fullmatch, names)) or (said and any(name.startswith("lm_heads.") for name in names))


def read(source: Source, target: Target) -> Heads:
    """Medusa heads with an output matrix for each, or one for all."""
    source.rename("medusa_heads.")
    source.same("hidden_size", target.hidden_size, target)
    source.same("vocab_size", target.vocab_size, target)
    found = [match for match in map(_BLOCK.fullmatch, source.names) if match]
    if not found:
        raise source.error("holds no block of a Medusa head: no tensor is called blocks.0.layers.0.weight")
    depth = 1 + max(int(match[1]) for match in found)
    blocks = 1 + max(int(match[2]) for match in found)
    size = target.hidden_size
    weights: dict[str, Tensor] = {}
    for head in range(depth):
        for block in range(blocks):
            name, ours = f"blocks.{head}.layers.{block}", f"heads.{head}.{block}.linear"
            weights[f"{ours}.weight"] = source.take(f"{name}.weight", size, size)
            has_bias = bool(source.config.get("medusa_fc_bias"))
            weights[f"{ours}.bias"] = source.take(f"{name}.bias", size) if has_bias else torch.zeros(size)
    tokens = _draft_tokens(source, target)
    tied = bool(source.config.get("original_lm_head"))
    if tied:
        source.rename("lm_head.", "lm_heads.0.")
    for head in range(1 if tied else depth):
        weights[f"output_matrices.{head}"] = _output(source, f"lm_heads.{head}.weight", tokens, target)
    if tied:
        source.drop(*(f"lm_heads.{head}.weight" for head in range(1, depth)))
    source.finish()
    if tokens is not None:
        weights["draft_tokens"] = tokens
    config = heads_config(
        target,
        "medusa",
        depth=depth,
        blocks=blocks,
        own_output=True,
        tied=tied,
        draft_vocab=0 if tokens is None else len(tokens),
    )
    return fill(config, weights)


def _draft_tokens(source: Source, target: Target) -> Tensor | None:
    """The token that each row of the output matrices names, None for all in order."""
    truncated = source.number("truncated_vocab_size", target.vocab_size)
    if truncated == target.vocab_size:
        source.drop("token_map")
        return None
    return check_draft_tokens(source, "token_map", source.take_any("token_map", (truncated,)), target)


def _output(source: Source, name: str, tokens: Tensor | None, target: Target) -> Tensor:
    """An output matrix, cut to the draft vocabulary where it holds more."""
    full = (target.vocab_size, target.hidden_size)
    scale = source.real("logit_scale", 1.0)
    if tokens is None:
        return source.take(name, *full) * scale
    if source.shape(name) == full:
        return source.take(name, *full)[tokens] * scale
    return source.take(name, len(tokens), target.hidden_size) * scale


def write(heads: Heads, target: Target) -> Exported:
    """One output matrix for all heads unless they bring their own; a draft vocabulary becomes the truncated one."""
    require(heads, LAYOUT, "medusa")
    config, weights = heads.config, heads.state_dict()
    tensors: dict[str, Tensor] = {}
    for head in range(config.depth):
        for block in range(config.blocks):
            for part in ("weight", "bias"):
                tensors[f"blocks.{head}.layers.{block}.{part}"] = weights[f"heads.{head}.{block}.linear.{part}"]
    shared = config.tied or not config.own_output
    for head in range(1 if shared else config.depth):
        own = heads.own_output(head)
        tensors[f"lm_heads.{head}.weight"] = output_rows(heads, target) if own is None else own
    if heads.draft_tokens is not None:
        tensors["token_map"] = heads.draft_tokens
    fields = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.depth,
        "num_hidden_layers": config.blocks,
        "truncated_vocab_size": config.draft_vocab or None,
        "medusa_fc_bias": True,
        "original_lm_head": shared,
    }
    return Exported(fields, tensors)
