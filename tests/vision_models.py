"""Tiny random vision-language models of many types, and prompts with images for some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# types whose texts without images are those of `generate`; True where prompts with images are tested too
VISION: dict[str, bool] = {
    **dict.fromkeys(("gemma3", "glm4v", "idefics3", "llava", "mistral3", "qwen2_5_vl"), True),
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "smolvlm"), True),
    **dict.fromkeys(("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "fuyu", "got_ocr2", "idefics2"), False),
    **dict.fromkeys(("llava_next", "llava_onevision", "mllama", "ovis2", "qwen3_vl_moe", "vipllava"), False),
    **dict.fromkeys(("gemma4", "glm4v_moe", "lighton_ocr", "video_llama_3", "video_llava"), False),
}
_TEXT: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_layer_input", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 6),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    "max_position_embeddings": 256, "num_kv_shared_layers": 0, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 2, "mm_tokens_per_image": 4, "scale_factor": 1,
}  # fmt: skip
_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "out_hidden_size", "vision_output_dim"), 32),
    **dict.fromkeys(("projection_dim", "projector_input_dim", "projector_output_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "mlp_ratio"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("image_size", "window_size"), 28),
    "intermediate_size": 48, "head_dim": 8, "patch_size": 14, "fullatt_block_indexes": [1], "initializer_range": 0.2,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "vision_start_token_id")
_TOKENS += ("vision_end_token_id", "image_start_token_id", "image_end_token_id", "boi_token_id", "eoi_token_id")
_TOKENS += ("boi_token_index", "eoi_token_index", "audio_token_id", "vision_token_id")


def vision_type_exists(name: str) -> bool:
    """Whether this version of transformers has the type."""
    return name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def tiny_vision(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny random float32 model of a type, made by shrinking its default configuration."""
    torch.manual_seed(seed)
    config = _shrink(AutoConfig.for_model(name))
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=2)
    return model


def _shrink(config: PreTrainedConfig, vision: bool = False) -> PreTrainedConfig:
    for name, part in list(vars(config).items()):
        if isinstance(part, PreTrainedConfig):
            _shrink(part, vision or any(word in name for word in ("vision", "audio", "qformer", "perceiver")))
    known = set(vars(config)) | set(config.attribute_map)
    fields = {name: value for name, value in (_VISION if vision else _TEXT).items() if name in known}
    for name, value in vars(config).items():
        if name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            count = fields.get("num_hidden_layers", 3)
            fields[name] = (list(dict.fromkeys(value)) * count)[:count]
        if (
            name == "rope_parameters"
            and isinstance(value, dict)
            and not any(isinstance(v, dict) for v in value.values())
        ):
            half = int(4 * (value.get("partial_rotary_factor") or 1))  # of a head of 8
            value["mrope_section"] = [half - 2, 1, 1] if half > 2 else [1, 1, 0]
    fields |= {name: 90 - place for place, name in enumerate(_TOKENS) if isinstance(getattr(config, name, None), int)}
    for name, value in fields.items():
        try:
            given = getattr(config, name, None)
        except Exception:  # in Gemma 4 some fields differ from layer to layer
            continue
        if given is not None or name in ("num_key_value_heads", "pad_token_id"):
            setattr(config, name, value)
    return config


def image_prompts(name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return arguments of `generate` for two prompts of different length, padded on the left, with an image each."""
    generator = torch.Generator().manual_seed(5)
    config: Any = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    found, counts = _images(name, config, generator)
    start = [config.vision_start_token_id] if hasattr(config, "vision_start_token_id") else []
    rows = []
    for count, before, after in zip(counts, (3, 2), (6, 2), strict=True):
        text = torch.randint(3, 60, (before + after,), generator=generator).tolist()
        rows.append([*text[:before], *start, *[token] * count, *text[before:]])
    width = max(map(len, rows))
    found["input_ids"] = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    found["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    types = (found["input_ids"] == token).long()
    if name == "gemma3":
        found["token_type_ids"] = types
    elif "image_grid_thw" in found:
        found["mm_token_type_ids"] = types
    return found


def _images(name: str, config: Any, generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
    """Return what a processor makes of an image for each of two rows, and the number of tokens of each."""
    if name.startswith(("qwen", "glm4v")):
        grid = torch.tensor([[1, 4, 4], [1, 4, 6]])
        vision = config.vision_config
        size = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        pixels = torch.randn(int(grid.prod(1).sum()), size, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grid}, [4, 6]
    if name in ("idefics3", "smolvlm"):
        return {"pixel_values": torch.randn(2, 1, 3, 28, 28, generator=generator)}, [4, 4]
    if name == "mistral3":
        pixels = torch.randn(2, 3, 56, 56, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 56]] * 2)}, [4, 4]
    return {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}, [4, 4]
