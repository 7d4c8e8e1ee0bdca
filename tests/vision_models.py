"""Tiny random vision-language models of many types, and prompts with images for some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tiny_types import tiny_type

# types whose texts without images are those of `generate`; True where prompts with images are tested too
VISION: dict[str, bool] = {
    **dict.fromkeys(("gemma3", "glm4v", "idefics3", "llava", "mistral3", "qwen2_5_vl"), True),
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "smolvlm"), True),
    **dict.fromkeys(("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "fuyu", "got_ocr2", "idefics2"), False),
    **dict.fromkeys(("llava_next", "llava_onevision", "mllama", "ovis2", "qwen3_vl_moe", "vipllava"), False),
    **dict.fromkeys(("gemma4", "glm4v_moe", "lighton_ocr", "video_llama_3", "video_llava"), False),
}


def vision_type_exists(name: str) -> bool:
    """Whether this version of transformers has the type."""
    return name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def tiny_vision(name: str) -> PreTrainedModel:
    """Return a tiny random float32 model of a type."""
    return tiny_type(name, "vision")


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


def image_rows(name: str, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return the prompts of `image_prompts` one by one, without padding."""
    prompts = image_prompts(name, model)
    kept = prompts["attention_mask"].bool()
    sizes = prompts["image_grid_thw"].prod(1).tolist() if "image_grid_thw" in prompts else [1, 1]
    pixels = prompts["pixel_values"].split(sizes)
    rows = []
    for row, mask in enumerate(kept):
        per_token = {key: one[row, mask][None] for key, one in prompts.items() if one.shape == kept.shape}
        others = {key: one[row : row + 1] for key, one in prompts.items() if one.shape != kept.shape}
        rows.append(per_token | others | {"pixel_values": pixels[row]})
    return rows


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
