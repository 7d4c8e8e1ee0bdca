"""The layout of EAGLE-3 heads (Li et al. 2025): vLLM, SGLang, TensorRT-LLM, and speculators' form of it.

Two conventions for explicit layer ids are in use. At the top level of `config.json` (vLLM, speculators) an id counts hidden
states, so that id i is the input of layer i. Inside `eagle_config` (SGLang, SpecForge) it means the output of layer i.
Without ids the features are the inputs of layers 2, L/2 and L - 3. Exports say the ids in both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads.base import Heads
from medhead.heads.formats.export import Exported, attention_config, output_rows, require
from medhead.heads.formats.source import Source, check_draft_tokens, fill, heads_config

if TYPE_CHECKING:
    from medhead.model.target import Target

LAYOUT = "eagle3"
DEPTH = 8  # such heads have no depth of their own; this is how far they guess
IDS = "eagle_aux_hidden_state_layer_ids"
_NORMS = ("hidden_norm", "input_layernorm", "post_attention_layernorm")


def matches(source: Source) -> bool:
    """By a draft vocabulary or the norm of the feature; speculators name the algorithm."""
    said = any("eagle3" in name.lower() for name in source.architectures)
    said = said or source.config.get("speculators_model_type") == LAYOUT or "draft_vocab_size" in source.config
    named = {"midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight", "d2t"} & source.names
    return "fc.weight" in source.names and (said or bool(named))


def read(source: Source, target: Target) -> Heads:
    """Attention heads."""
    source.rename("layers.0.", "midlayer.")
    inner = source.section("transformer_layer_config")  # speculators
    if inner:
        source.config = {**inner, "norm_before_residual": True, **source.config}
    _refuse_variants(source)
    size, heads = source.number("hidden_size"), source.number("num_attention_heads")
    key_heads = source.number("num_key_value_heads", heads)
    dim = source.number("head_dim", max(1, size // heads))
    feed_forward = source.number("intermediate_size")
    source.same("target_hidden_size", target.hidden_size, target)
    source.same("vocab_size", target.vocab_size, target)
    feature_layers = _feature_layers(source, target)
    weights = {
        "fc.weight": source.take("fc.weight", size, len(feature_layers) * target.hidden_size),
        "norm.weight": source.take("norm.weight", size),
    }
    for norm in _NORMS:
        weights[f"midlayer.{norm}.weight"] = source.take(f"midlayer.{norm}.weight", size)
    shapes = {
        "self_attn.q_proj": (heads * dim, 2 * size),
        "self_attn.k_proj": (key_heads * dim, 2 * size),
        "self_attn.v_proj": (key_heads * dim, 2 * size),
        "self_attn.o_proj": (size, heads * dim),
        "mlp.gate_proj": (feed_forward, size),
        "mlp.up_proj": (feed_forward, size),
        "mlp.down_proj": (size, feed_forward),
    }
    for name, shape in shapes.items():
        weights[f"midlayer.{name}.weight"] = source.take(f"midlayer.{name}.weight", *shape)
    if own_embedding := "embed_tokens.weight" in source.names:
        weights["embed_tokens"] = source.take("embed_tokens.weight", target.vocab_size, size)
    draft = source.number("draft_vocab_size", target.vocab_size)
    own_output = draft < target.vocab_size or "lm_head.weight" in source.names
    if own_output:
        weights["lm_head"] = source.take("lm_head.weight", draft, size) * source.real("logit_scale", 1.0)
    tokens = _draft_tokens(source, draft, target)
    if tokens is not None:
        weights["draft_tokens"] = tokens
    source.finish()
    config = heads_config(
        target,
        "attention",
        depth=DEPTH,
        inner_size=feed_forward,
        feature_layers=feature_layers,
        num_heads=heads,
        key_heads=key_heads,
        head_dim=dim,
        norm_eps=source.real("rms_norm_eps", 1e-6),
        layer_size=0 if size == target.hidden_size else size,
        norm_before_residual=bool(source.config.get("norm_before_residual")),
        own_embedding=own_embedding,
        own_output=own_output,
        draft_vocab=0 if tokens is None else draft,
        **source.rope(dim, default=10000.0),
    )
    return fill(config, weights)


def _refuse_variants(source: Source) -> None:
    source.transformer()
    eagle = source.section("eagle_config")
    if eagle.get("use_aux_hidden_state", True) is False:
        raise source.error(
            "EAGLE-3 heads without features of several layers (use_aux_hidden_state false) are not supported"
        )
    for where in (source.config, eagle):
        source.refuse(("norm_before_fc", "fc_norm", "use_aux_norm", "norm_output"), "EAGLE-3.1's norms are", where)
    if source.number("num_hidden_layers", 1) > 1:
        raise source.error(
            "EAGLE-3 heads of more than one layer are not supported: config.json has num_hidden_layers above 1"
        )


def _feature_layers(source: Source, target: Target) -> list[int]:
    """Layers whose outputs are the features."""
    if source.config.get(IDS):
        return source.layers(source.config[IDS], -1, target)
    if source.section("eagle_config").get(IDS):
        return source.layers(source.section("eagle_config")[IDS], 0, target)
    return source.layers([2, target.layers // 2, target.layers - 3], -1, target)


def _draft_tokens(source: Source, draft: int, target: Target) -> Tensor | None:
    """The token of every row of the output matrix, None for all in order."""
    if "d2t" not in source.names:
        if draft < target.vocab_size:
            raise source.error("the tensor d2t is missing: nothing says which tokens the draft vocabulary means")
        source.drop("t2d")
        return None
    offsets = source.take_any("d2t", (draft,)).long()
    tokens = check_draft_tokens(source, "d2t", offsets + torch.arange(draft), target)
    if "t2d" in source.names:
        named = source.take_any("t2d", (target.vocab_size,)).bool().nonzero()[:, 0]
        if not torch.equal(named, tokens.sort().values):
            raise source.error("the tensors d2t and t2d name different tokens")
    return None if torch.equal(tokens, torch.arange(target.vocab_size)) else tokens


def write(heads: Heads, target: Target) -> Exported:
    """With the target's rows of the draft vocabulary as `lm_head`; engines take the embedding from the target."""
    require(heads, LAYOUT, "attention")
    config, weights = heads.config, heads.state_dict()
    if len(config.feature_layers) != 3:
        raise MedheadError(
            f"the layout {LAYOUT!r} reads three layers of the target, these heads read {len(config.feature_layers)}"
        )
    tensors = {name: weights[name] for name in weights if name.startswith(("fc.", "midlayer.", "norm."))}
    own, tokens = heads.own_output(0), heads.draft_tokens
    tensors["lm_head.weight"] = output_rows(heads, target) if own is None else own
    if config.own_embedding:
        tensors["embed_tokens.weight"] = weights["embed_tokens"]
    tokens = torch.arange(config.vocab_size) if tokens is None else tokens.cpu()
    tensors["d2t"] = tokens - torch.arange(len(tokens))
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **attention_config(heads),
        "num_hidden_layers": 1,
        "max_position_embeddings": config.context or target.context,
        "draft_vocab_size": len(tokens),
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": config.norm_before_residual,
        IDS: [layer + 1 for layer in config.feature_layers],
        "eagle_config": {"use_aux_hidden_state": True, IDS: list(config.feature_layers)},
    }
    return Exported(fields, tensors)
