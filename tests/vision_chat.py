"""A tiny vision-language model for chats, with a processor, and images for it."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from medhead_training.demo.tokenizer import train_tokenizer

CONTEXT = 256
PARTS_TEMPLATE = (  # it reads lists of parts alone, as LLaVA's own does
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_processor() -> Any:
    """Return a LLaVA processor for images of 28 x 28 pixels, 4 tokens each."""
    tokenizer = train_tokenizer(["Once upon a time there was a small cat. What is this? " * 4], 300, CONTEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = PARTS_TEMPLATE
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        kind(size={"shortest_edge": 28}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=PARTS_TEMPLATE,
        num_additional_image_tokens=1,
    )


def chat_model(processor: Any) -> LlavaForConditionalGeneration:
    """Return a tiny random LLaVA for the processor."""
    torch.manual_seed(2)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(processor.tokenizer) + 1, "max_position_embeddings": CONTEXT, "initializer_range": 0.6}
    config = LlavaConfig(
        text_config=LlamaConfig(**shared, **text, num_key_value_heads=2),
        vision_config=CLIPVisionConfig(**shared, image_size=28, patch_size=14, projection_dim=32),
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return an image of one color with a black corner."""
    image = Image.new("RGB", size, color)
    image.paste("black", (0, 0, size[0] // 2, size[1] // 3))
    return image


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """Return an image as a data URL."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
