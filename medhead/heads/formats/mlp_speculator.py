"""The layout of `mlp_speculator` (Wertheimer et al. 2024): vLLM, TGI, IBM's accelerators.

Every depth has `emb.{i} [vocab, inner]`, `proj.{i}`, `ln.{i}` and `head.{i} [vocab, inner]`; tied, all depths share one
of each, but `proj.0`, which takes the target's hidden state, stands apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.formats.export import Exported, output_rows, require
from medhead.heads.formats.source import Source, fill, heads_config

if TYPE_CHECKING:
    from medhead.model.target import Target

LAYOUT = "mlp_speculator"
_ARCHITECTURE = "MLPSpeculatorPreTrainedModel"


def matches(source: Source) -> bool:
    """By the model type or the architecture."""
    return source.config.get("model_type") == LAYOUT or _ARCHITECTURE in source.architectures


def read(source: Source, target: Target) -> Heads:
    """Sequential heads with embeddings and output matrices of their own."""
    source.rename("speculator.")
    source.same("emb_dim", target.hidden_size, target)
    source.same("vocab_size", target.vocab_size, target)
    depth = source.number("n_predict")
    size, vocab = target.hidden_size, target.vocab_size
    inner = size if source.config.get("inner_dim") in (0, None) else source.number("inner_dim")
    tied = bool(source.config.get("tie_weights"))
    weights: dict[str, Tensor] = {"first.weight": source.take("proj.0.weight", inner, size)}
    copies = [tuple(range(depth))] if tied else [(i,) for i in range(depth)]
    for ours, depths in enumerate(copies):
        weights[f"embeddings.{ours}"] = _take(source, "emb.{}.weight", depths, vocab, inner)
        weights[f"norms.{ours}.weight"] = _take(source, "ln.{}.weight", depths, inner)
        weights[f"norms.{ours}.bias"] = _take(source, "ln.{}.bias", depths, inner)
        weights[f"output_matrices.{ours}"] = _take(source, "head.{}.weight", depths, vocab, inner)
    for ours, depths in enumerate([tuple(range(1, depth))] if tied else [(i,) for i in range(1, depth)]):
        weights[f"proj.{ours}.weight"] = _take(source, "proj.{}.weight", depths, inner, inner)
    source.finish()
    config = heads_config(
        target,
        "sequential",
        depth=depth,
        inner_size=inner,
        tied=tied,
        scale_input=bool(source.config.get("scale_input")),
        own_embedding=True,
        own_output=True,
    )
    return fill(config, weights)


def _take(source: Source, pattern: str, depths: tuple[int, ...], *shape: int) -> Tensor:
    """The tensor that these depths share; stored once, or several times with the same content."""
    stored = [name for name in map(pattern.format, depths) if name in source.names]
    if not stored:
        raise source.error(f"the tensor {pattern.format(depths[0] if depths else 1)} is missing")
    first = source.take(stored[0], *shape)
    for name in stored[1:]:
        if not torch.equal(source.take(name, *shape), first):
            raise source.error(f"config.json says tie_weights, but the tensors {stored[0]} and {name} differ")
    return first


def write(heads: Heads, target: Target) -> Exported:
    """Factored embeddings and outputs are multiplied out to matrices over the vocabulary."""
    require(heads, LAYOUT, "sequential", whole_vocabulary=True)
    config, weights = heads.config, heads.state_dict()
    tensors = {"proj.0.weight": weights["first.weight"]}
    for depth in range(1 if config.tied else config.depth):
        tensors[f"emb.{depth}.weight"] = _embedding(heads, target, depth)
        tensors[f"ln.{depth}.weight"] = weights[f"norms.{depth}.weight"]
        tensors[f"ln.{depth}.bias"] = weights[f"norms.{depth}.bias"]
        tensors[f"head.{depth}.weight"] = _output(heads, target, depth)
    for index in range(1 if config.tied else config.depth - 1):
        tensors[f"proj.{index + 1}.weight"] = weights[f"proj.{index}.weight"]
    fields = {
        "architectures": [_ARCHITECTURE],
        "model_type": LAYOUT,
        "base_model_name_or_path": str(target.model.config.name_or_path),
        "vocab_size": config.vocab_size,
        "emb_dim": config.hidden_size,
        "inner_dim": config.inner_size,
        "n_predict": config.depth,
        "tie_weights": config.tied,
        "scale_input": config.scale_input,
        "top_k_tokens_per_head": [4, 3, 2, *[1] * config.depth][: config.depth],
    }
    return Exported(fields, tensors)


def _embedding(heads: Heads, target: Target, depth: int) -> Tensor:
    """`[vocab, inner]`."""
    own = heads.own_embedding(depth)
    if own is not None:
        return own
    rows = target.embed(torch.arange(heads.config.vocab_size, device=target.device)).detach()
    return rows @ heads.get_parameter(f"encoders.{depth}.weight").to(rows).T


def _output(heads: Heads, target: Target, depth: int) -> Tensor:
    """`[vocab, inner]`."""
    own = heads.own_output(depth)
    if own is not None:
        return own
    rows = output_rows(heads, target)
    return rows @ heads.get_parameter(f"outputs.{depth}.weight").to(rows)
