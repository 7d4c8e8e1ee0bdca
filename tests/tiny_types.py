"""A tiny random model of any type of the installed transformers, made by shrinking the type's default configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from families import ACCEPTED, INDEXED, REFUSED, STATEFUL, tiny, tiny_stateful

KINDS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "vision": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
MAX_PARAMETERS = 8_000_000


def _named(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_TEXT = {
    **_named("vocab_size vocab_size_per_layer_input unpadded_vocab_size", 99),
    **_named("hidden_size d_model n_embd embed_dim emb_dim word_embed_proj_dim embedding_size embedding_dim", 32),
    **_named("input_embedding_size output_embedding_size attention_hidden_size lru_width projection_hidden_dim", 32),
    **_named("merged_hidden_size text_hidden_size projector_hidden_size vision_hidden_size projection_hidden_size", 32),
    **_named("backbone_hidden_size out_hidden_size projection_dim hidden_size_global resampler_hidden_size", 32),
    **_named("intermediate_size intermediate_size_mlp ffn_dim d_ff d_inner dim_ff dff ffn_hidden_size", 48),
    **_named("decoder_ffn_dim encoder_ffn_dim dense_intermediate_size feed_forward_size", 48),
    **_named("alignment_intermediate_size", 64),
    **_named("num_hidden_layers num_layers n_layer n_layers layers decoder_layers num_decoder_layers num_blocks", 3),
    **_named("encoder_layers num_encoder_layers depth num_layers_per_stack", 2),
    **_named("num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads", 4),
    **_named("encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads", 4),
    **_named("swa_num_attention_heads num_sliding_attention_heads", 4),
    **_named("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups", 2),
    **_named("head_dim global_head_dim swa_head_dim d_kv d_head dim_head attention_head_dim attention_head_size", 8),
    **_named("hidden_size_per_layer_input query_pre_attn_scalar laurel_rank linear_head_dim kv_channels d_rel", 8),
    **_named("qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim rope_dim", 8),
    **_named("mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads ssm_state_size mamba_d_state", 8),
    **_named("mamba_chunk_size chunk_size hc_lowrank pronunciation_embed_dim shape_embed_dim", 8),
    **_named("q_lora_rank kv_lora_rank o_lora_rank", 12),
    **_named("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_named("num_experts_per_tok moe_k moe_topk num_experts_per_token", 2),
    **_named("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size share_expert_dim", 24),
    **_named("shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size", 24),
    **_named("n_shared_experts n_group topk_group first_k_dense_replace", 1),
    **_named("linear_num_key_heads zero_expert_num hc_count", 2),
    **_named("linear_num_value_heads linear_num_heads router_hidden_size loop_gate_rank gated_norm_rank", 4),
    **_named("sliding_window attention_chunk_size sliding_window_size window_size local_attention", 6),
    **_named("max_position_embeddings n_positions max_seq_len n_ctx max_target_positions", 256),
    **_named("encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size", 64),
    **_named("index_head_dim", 8), **_named("index_n_heads", 16), **_named("index_topk", 5),
    "max_source_positions": 64, "num_kv_shared_layers": 0, "initializer_range": 0.2, "mm_tokens_per_image": 4,
    "qk_head_dim": 16, "rel_extent": 32, "dim_model_base": 8, "scale_factor": 1, "image_seq_length": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    **_named("hidden_size d_model embed_dim out_hidden_size vision_output_dim mlp_dim output_dim encoder_hidden_size", 32),
    **_named("projection_dim projector_input_dim projector_output_dim text_hidden_size projection_hidden_dim", 32),
    **_named("downsample_hidden_size adapter_out_dim image_token_embed_dim patch_embed_hidden_size output_channels", 32),
    **_named("num_hidden_layers num_layers depth encoder_layers n_layers num_blocks conf_num_hidden_layers mlp_ratio", 2),
    **_named("num_attention_heads num_heads num_key_value_heads encoder_attention_heads attention_heads", 4),
    **_named("image_size window_size min_image_size max_image_size", 28),
    **_named("encoder_ffn_dim intermediate_size projection_intermediate_size d_ff", 48),
    **_named("base_channels latent_channels num_filters codebook_dim num_pos_feats", 32),
    **_named("num_position_embeddings pos_emb_height pos_emb_width num_patches max_num_patches", 16),
    **_named("codebook_size num_embeddings vocab_size", 64),
    "head_dim": 8, "d_kv": 8, "patch_size": 14, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0],
    "global_attn_indexes": [1], "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "vision_start_token_id",
    "vision_end_token_id", "image_start_token_id", "image_end_token_id", "boi_token_id", "eoi_token_id",
    "boi_token_index", "eoi_token_index", "audio_token_id", "audio_token_index", "vision_token_id",
    "boa_token_id", "eoa_token_id", "eoa_token_index", "image_patch_id", "im_start_id", "im_end_id",
    "im_newline_id", "vision_start_token_index",
)  # fmt: skip
_KINDS_OF_LAYERS = ["layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"]
_EVEN_IF_NONE = ("num_key_value_heads", "pad_token_id")
_ENCODERS = ("vision", "visual", "audio", "qformer", "perceiver", "resampler", "vq", "image", "sam", "tower")

_ENCODERS_AS_DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {  # its layers with windows have sizes of their own
    "layer_types": None, "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 12, "swa_kv_lora_rank": 12, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
# what a type needs besides, by name; a dot leads into a part of the configuration
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _ENCODERS_AS_DECODERS},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "ministral": {"head_dim": 8},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": _ROPE | {"rope_type": "dynamic", "alpha": 2.0, "factor": 1.0}},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "minimax_m3_vl": {"text_config.index_block_size": 4, "text_config.index_topk_blocks": 2},
    "step3p7": {"text_config.sliding_window": 6},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 80, "vision_end_token_id": 81},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 80, "vision_end_token_id": 81},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dbrx": {"attn_config.clip_qkv": 8.0, "attn_config.rope_theta": 10000.0, "attn_config.kv_n_heads": 2},
    "dots3_note": {"text_config." + name: value for name, value in _DOTS3.items()},
    "dots3_note_text": _DOTS3,
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "dense"]},
    "granite4_vision": {"deepstack_layer_map": [], "use_spatial_sampling": False},
    "qwen4_exp": {"text_config." + name: value for name, value in INDEXED["qwen4_exp_text"].items()},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "molmo2": {"vision_config.image_size": [28, 28], "vision_config.image_default_input_size": [28, 28]},
    "internvl": {"vision_config.image_size": [28, 28], "vision_config.patch_size": [14, 14]},
    "qianfan_ocr": {"vision_config.image_size": [28, 28], "vision_config.patch_size": [14, 14]},
    "chameleon": {"vocabulary_map": {"<image>": 90}, "vq_config.channel_multiplier": [1, 1]},
    "emu3": {"vocabulary_map": {"<image>": 90}, "vq_config.channel_multiplier": [1, 1]},
    "janus": {"vq_config.channel_multiplier": [1, 1]},
    "apertus1p5": {"vision_config.channel_multiplier": [1, 1]},
}


def types(kind: str) -> list[str]:
    """Return the types of a kind that the installed transformers has."""
    return sorted(KINDS[kind])


def tiny_type(name: str, kind: str) -> PreTrainedModel:
    """Return a tiny random float32 model of a type, ready to decode.

    Raises:
        RuntimeError: it is not tiny, so a size was not found.
    """
    if kind == "causal" and name in STATEFUL:
        return tiny_stateful(name)
    if kind == "causal" and name in (tested := ACCEPTED | REFUSED):
        return tiny(name, tested[name])
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForImageTextToText
    config = tiny_config(name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise RuntimeError(f"the tiny model has {count / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the default configuration of a type with all sizes made small."""
    return _shrink(AutoConfig.for_model(name), CHANGES.get(name, {}))


def _shrink(config: Any, changes: dict[str, Any], encoder: bool = False) -> Any:
    """Return a configuration like this one with small sizes; what follows from them is derived by its constructor."""
    given: dict[str, Any] = {}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and not name.startswith("_"):
            inner = {path[len(name) + 1 :]: value for path, value in changes.items() if path.startswith(name + ".")}
            given[name] = _shrink(part, inner, encoder or any(word in name for word in _ENCODERS))
    known = set(vars(config)) | set(config.attribute_map)
    for name, value in (_VISION if encoder else _TEXT).items():
        if name in known and ((before := _given(config, name)) is not None or name in _EVEN_IF_NONE):
            given[name] = _like(before, value)
    given |= {name: 90 - place for place, name in enumerate(_TOKENS) if isinstance(_given(config, name), int)}
    layers = given.get("num_hidden_layers", given.get("n_layer", 3))
    for name in _KINDS_OF_LAYERS:
        if found := _kinds(vars(config).get(name), layers):
            given[name] = found
    if "kv_lora_rank" in known:  # multi-head latent attention expands to keys of every head
        given["num_key_value_heads"] = 4
    if isinstance(vars(config).get("no_rope_layers"), list):
        given["no_rope_layers"] = [1, 0, 1]
    given |= {path: value for path, value in changes.items() if "." not in path}
    try:
        config = type(config)(**given)
    except Exception:  # its constructor refuses some of it, so the default one is changed
        for name, value in given.items():
            setattr(config, name, value)
    rope = getattr(config, "rope_parameters", None)
    flat = isinstance(rope, dict) and not any(isinstance(one, dict) for one in rope.values())
    if flat and "rope_parameters" not in changes:
        half = int(4 * (rope.get("partial_rotary_factor") or 1))  # of a head of 8
        rope["mrope_section"] = [half - 2, 1, 1] if half > 2 else [1, 1, 0]
    return config


def _like(before: Any, value: Any) -> Any:
    """Return a small value in the form of the one before."""
    if isinstance(before, list | tuple) and not isinstance(value, list):
        return [value] * len(before)
    return float(value) if isinstance(before, float) else value


def _kinds(kinds: Any, count: int) -> list[Any] | None:
    """Return the kinds of so many layers, taking turns; None for layers of one kind."""
    known = list(dict.fromkeys(kinds)) if isinstance(kinds, list | tuple) else []
    return None if len(known) < 2 else [known[place % len(known)] for place in range(count)]


def _given(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some fields of heterogeneous configurations differ from layer to layer
        return None
