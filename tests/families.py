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
}  # fmt: skip

# recurrent and convolutional layers, and attention that does not go through the registry
REFUSED: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "intermediate_size": None, "num_key_value_heads": None, "head_dim": None},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "num_key_value_heads": None},
    "falcon_mamba": {"state_size": 4, "intermediate_size": None, "num_key_value_heads": None, "head_dim": None},
    "rwkv": {"context_length": 64, "attention_hidden_size": 32, "num_key_value_heads": None, "head_dim": None},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]},
    "jamba": {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "head_dim": None},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "head_dim": None},
    "qwen3_next": MOE
    | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
    },
    "bloom": {"n_layer": 2, "n_head": 4, "num_key_value_heads": None, "head_dim": None},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "num_key_value_heads": None, "head_dim": None},
}  # fmt: skip


# families whose attention goes through the registry from transformers 5.24 on
SINCE_5_24: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128, "num_key_value_heads": None},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128, "num_key_value_heads": None},
}  # fmt: skip
(ACCEPTED if Version(transformers.__version__) >= Version("5.24") else REFUSED).update(SINCE_5_24)


def exists(name: str) -> bool:
    """Whether this version of transformers has the family."""
    return name in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def tiny(name: str, changes: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of a family, ready to decode."""
    fields = {key: value for key, value in (BASE | changes).items() if value is not None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def factories(table: dict[str, dict[str, Any]]) -> dict[str, Callable[[], PreTrainedModel]]:
    """One maker for each family of a table that this version of transformers has."""
    return {name: (lambda n=name, c=changes: tiny(n, c)) for name, changes in table.items() if exists(name)}
