"""Tiny random models of many families, from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}

# name of the model type: changes to BASE (a value of None removes the field)
ACCEPTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "qwen2": WINDOW | {"layer_types": MIXED},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24, "head_dim": None},
    "qwen3": {"num_key_value_heads": 1},
    "qwen3_moe": MOE,
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": MIXED},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": MIXED},
    "phi": {"head_dim": None},
    "phi3": {"sliding_window": 4, "head_dim": None},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "num_key_value_heads": None, "head_dim": None},
    "olmo": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "olmo3": {"head_dim": None, "sliding_window": 4, "layer_types": MIXED},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": MIXED},
    "deepseek_v2": MLA | {"topk_method": "greedy"},
    "deepseek_v3": MLA,
    "starcoder2": {"sliding_window": 4, "head_dim": None},
    "smollm3": {"layer_types": ["full_attention"] * 3},
    "granite": {"head_dim": None},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
    "cohere": {"head_dim": None},
    "cohere2": {"sliding_window": 4, "layer_types": MIXED, "head_dim": None},
    "glm": {},
    "glm4": {},
    "glm4_moe": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None, "head_dim": None},
    "exaone4": {"sliding_window": 4, "layer_types": MIXED},
    "helium": {},
    "nemotron": {},
    "ernie4_5": {},
    "arcee": {},
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "apertus": {},
    "stablelm": {"head_dim": None},
    "dots1": MOE | {"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "layer_types": ["full_attention"] * 3},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128, "num_key_value_heads": None},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128, "num_key_value_heads": None},
}  # fmt: skip

# layers that hold states: gated delta rule, Mamba-1 and -2, short convolutions, linear attention; from transformers 5.24 on
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
CONV = {"layer_types": ["conv", "full_attention", "conv"], "head_dim": None}
DELTA = {
    "layer_types": LINEAR,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
KDA = MLA | {
    "layer_types": LINEAR,
    "num_local_experts": 4,
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
    "short_conv_kernel_size": 4,
    "q_lora_rank": None,
    "n_group": 1,
}
MAMBA = {
    "state_size": 4,
    "intermediate_size": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "num_attention_heads": None,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "head_dim": None,
}
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
STATEFUL: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_next": DELTA | MOE | {"shared_expert_intermediate_size": 24},
    "olmo_hybrid": DELTA | {"head_dim": None},
    "lara_mini": DELTA | MOE | {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "sliding_window": 4, "shared_expert_intermediate_size": 24},
    "kimi_linear": KDA | {"head_dim": None},
    "bailing_hybrid": KDA | {"num_mtp_layers": 0, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA2 | SPARSE | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 24},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "num_hidden_layers": None, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "conv_kernel": 4, "expand": 2, "chunk_size": 8},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "chunk_size": 8, "head_dim": None, "num_key_value_heads": 4, "adapter_rank": 4},
    "jamba": SPARSE | {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "head_dim": None},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "n_mamba_heads": 2, "num_key_value_heads": 4, "head_dim": None},
    "lfm2": CONV | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONV | MOE | {"num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"], "sliding_window": 4},
    "zaya": {"num_experts": 4, "moe_intermediate_size": 24, "router_hidden_size": 16},
    "minimax": SPARSE | {"layer_types": LINEAR, "block_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "recurrent", "attention"]},
}  # fmt: skip

# attention that does not go through the registry or selects keys by an index, and states that transformers' caches do not hold
REFUSED: dict[str, dict[str, Any]] = {
    "rwkv": {"context_length": 64, "attention_hidden_size": 32, "num_key_value_heads": None, "head_dim": None},
}  # fmt: skip


# attention outside the registry, and keys that an indexer selects; tested from transformers 5.24 on
INDEXER = MLA | {"n_group": 1, "index_topk": 5, "index_head_dim": 8, "index_n_heads": 16}
OUTSIDE: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4, "num_key_value_heads": None, "head_dim": None},
    "falcon": {"num_key_value_heads": None, "head_dim": None},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "num_key_value_heads": None, "head_dim": None},
    "deepseek_v32": INDEXER,
    "glm_moe_dsa": INDEXER | {"indexer_types": ["full", "shared", "full"]},
}
HAS_5_24 = Version(transformers.__version__) >= Version("5.24")
if HAS_5_24:
    ACCEPTED.update(OUTSIDE)
else:
    REFUSED.update(STATEFUL)
INDEXED = {  # with layers that hold states
    "qwen4_exp_text": DELTA | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [3], "ple_embed_dim": 16, "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4},
}  # fmt: skip
REFUSED.update(INDEXED)


def exists(name: str) -> bool:
    """Whether this version of transformers has the family."""
    return name in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def tiny(name: str, changes: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of a family, ready to decode."""
    fields = {key: value for key, value in (BASE | changes).items() if value is not None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def tiny_stateful(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of a family of `STATEFUL`; its gates and convolutions are random too, which as made hide errors."""
    model = tiny(name, STATEFUL[name])
    for part, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("bias" in part or part.endswith(".D")):
            parameter.add_(0.3 * torch.randn_like(parameter))
        if "conv" in part:
            parameter.add_(0.2 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model.to(dtype)


def factories(table: dict[str, dict[str, Any]]) -> dict[str, Callable[[], PreTrainedModel]]:
    """One maker for each family of a table that this version of transformers has."""
    return {name: (lambda n=name, c=changes: tiny(n, c)) for name, changes in table.items() if exists(name)}
