"""The layout of DFlash block heads (2026), and of JetSpec, which is the same with causal attention inside the block.

A block of b slots, [root, mask, mask, ...], guesses b - 1 tokens: slot j speaks for the token j places behind the
root. The mask is the target's embedding of one token. A layer id means that layer's output. There is no embedding and
no output matrix. What DFlash2 and DSpark add is not supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads.base import Heads
from medhead.heads.formats.export import Exported, attention_config, output_rows, raw_embedding, require
from medhead.heads.formats.source import Source, fill, heads_config

if TYPE_CHECKING:
    from medhead.model.target import Target

LAYOUT = "dflash"
_EXTRAS = {
    "candidate_selector": "DFlash2's candidate selector",
    "attention_conv": "DFlash2's convolutions",
    "mlp_conv": "DFlash2's convolutions",
    "markov": "DSpark's Markov pair",
    "confidence": "DSpark's confidence head",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def matches(source: Source) -> bool:
    """By the architecture or the section of the configuration."""
    names = " ".join(source.architectures).lower()
    return "dflash" in names or "dspark" in names or "dflash_config" in source.config


def read(source: Source, target: Target) -> Heads:
    """Block heads."""
    _refuse_variants(source)
    config = {**source.config, **source.section("dflash_config")}
    source.config = config
    size, heads = target.hidden_size, source.number("num_attention_heads")
    source.same("hidden_size", size, target)
    source.same("num_target_layers", target.layers, target)
    key_heads = source.number("num_key_value_heads", heads)
    blocks, feed_forward = source.number("num_hidden_layers"), source.number("intermediate_size")
    shape = source.shape("layers.0.self_attn.q_norm.weight")
    dim = source.number("head_dim", shape[0] if shape else None)
    slots = source.number("block_size")
    if slots < 2:
        raise source.error("block_size in config.json must be at least 2: the root and one mask")
    feature_layers = source.layers(config.get("target_layer_ids"), 0, target)
    mask_token, mask = _mask(source, config.get("mask_token_id"), target)
    weights: dict[str, Tensor] = {
        "fc.weight": source.take("fc.weight", size, len(feature_layers) * size),
        "hidden_norm.weight": source.take("hidden_norm.weight", size),
        "norm.weight": source.take("norm.weight", size) * source.real("output_multiplier", 1.0),
        "mask_row": mask,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * dim, size),
        "self_attn.k_proj": (key_heads * dim, size),
        "self_attn.v_proj": (key_heads * dim, size),
        "self_attn.o_proj": (size, heads * dim),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (feed_forward, size),
        "mlp.up_proj": (feed_forward, size),
        "mlp.down_proj": (size, feed_forward),
    } | dict.fromkeys(_NORMS, (size,))
    for layer in range(blocks):
        for name, expected in shapes.items():
            full = f"layers.{layer}.{name}.weight"
            weights[full] = source.take(full, *expected)
    source.finish()
    causal = config.get("is_causal")
    fields = heads_config(
        target,
        "block",
        depth=slots - 1,
        inner_size=feed_forward,
        blocks=blocks,
        feature_layers=feature_layers,
        num_heads=heads,
        key_heads=key_heads,
        head_dim=dim,
        norm_eps=source.real("rms_norm_eps", 1e-6),
        causal=bool(config.get("causal") if causal is None else causal),
        anchor_predicts=False,
        mask_token=mask_token,
        **source.rope(dim),
    )
    return fill(fields, weights)


def _refuse_variants(source: Source) -> None:
    for part, what in _EXTRAS.items():
        named = sorted(name for name in source.names if part in name)
        if named:
            raise source.error(f"{what} is not supported: it holds the tensor {named[0]}")
    for name in source.architectures:
        if any(variant in name.lower() for variant in ("dflash2", "dspark")):
            raise source.error(f"the architecture {name} is not supported, only DFlashDraftModel")
    source.refuse(("speculators_model_type",), "speculators' form of DFlash is")
    dflash = source.section("dflash_config")
    for where in (source.config, dflash):
        source.refuse(("use_swa", "attention_sink_bias", "final_logit_softcapping"), "this variant of DFlash is", where)
    source.transformer()


def _mask(source: Source, token: Any, target: Target) -> tuple[int, Tensor]:
    """The mask's token and the target's embedding of it."""
    count = target.embedding.weight.shape[0]
    if not isinstance(token, int) or not 0 <= token < count:
        raise source.error(f"mask_token_id in config.json must be a token from 0 to {count - 1}, got {token!r}")
    row = raw_embedding(target, token)
    if row is None or source.real("input_embedding_scale", 1.0) != 1.0:
        raise source.error(
            f"{target.name} or these heads scale embeddings, which is not supported with the layout {LAYOUT!r}"
        )
    return token, row.clone()


def write(heads: Heads, target: Target) -> Exported:
    """Only heads whose block is DFlash's: one mask token, the root's slot silent, no correction."""
    require(heads, LAYOUT, "block", whole_vocabulary=True)
    config, weights = heads.config, heads.state_dict()
    output_rows(heads, target)  # refuses a bias
    if config.anchor_predicts:
        raise MedheadError(
            f"in the layout {LAYOUT!r} the root's slot of a block predicts nothing, in these heads it does (anchor_predicts)"
        )
    if config.mask_token < 0:
        raise MedheadError(
            f"in the layout {LAYOUT!r} masks are the target's embedding of one token, these heads learnt vectors of their own "
            "(mask_token is -1)"
        )
    row = raw_embedding(target, config.mask_token)
    if row is None or not row.equal(weights["mask_row"].to(row)):
        raise MedheadError(
            f"the mask of these heads is not the embedding of token {config.mask_token} of {target.name}"
        )
    if not config.feature_layers:
        raise MedheadError(f"the layout {LAYOUT!r} reads layers of the target, these heads read its last hidden state")
    block = {
        "block_size": config.depth + 1,
        "mask_token_id": config.mask_token,
        "target_layer_ids": list(config.feature_layers),
    }
    fields: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **attention_config(heads),
        "num_hidden_layers": config.blocks,
        "max_position_embeddings": config.context or target.context,
        "layer_types": ["full_attention"] * config.blocks,
        "sliding_window": None,
        "use_sliding_window": False,
        "num_target_layers": config.target_layers,
        "block_size": block["block_size"],
        "is_causal": config.causal,
        "dflash_config": block | {"causal": config.causal},
    }
    return Exported(fields, {name: tensor for name, tensor in weights.items() if name != "mask_row"})
