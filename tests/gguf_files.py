"""Write small GGUF files as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTISED = gguf.GGMLQuantizationType.Q8_0


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The order of rotary dimensions that llama.cpp has: pairs beside each other."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def dequantised(weight: Tensor) -> Tensor:
    """What a matrix is after it went through Q8_0."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), QUANTISED), QUANTISED).copy())


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quantised: bool = False,
    architecture: str = "llama",
    without: str = "",
) -> Path:
    """Write a Llama model and its byte-level BPE tokenizer, its matrices in float32 or Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == without:
            continue
        part = key.split(".")[-2]
        weight = interleaved(tensor, heads[part]) if part in heads else tensor
        blocks = gguf.quantize(weight.numpy(), QUANTISED) if quantised and weight.ndim == 2 else None
        name = names.get_name(key, (".weight",))
        writer.add_tensor(name, np.ascontiguousarray(weight.numpy()) if blocks is None else blocks,
                          raw_dtype=None if blocks is None else QUANTISED)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Add a byte-level BPE tokenizer with its chat template."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if token in special else 1 for token in range(len(tokenizer))])  # control, normal
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
