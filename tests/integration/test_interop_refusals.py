"""Damaged and mismatched checkpoints of other projects are refused with one line that names the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from checkpoint_formulas import Config, D, V
from checkpoint_makers import IDS, MAKERS, make_medusa
from medhead import MedheadError
from medhead.heads import load_heads
from medhead.model.target import Target


def damage(folder: Path, config: Config, tensors: dict[str, Tensor | None]) -> None:
    """Change a checkpoint: configuration, and tensors, which None takes away."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (weights,) = folder.glob("*.safetensors")
    stored = load_file(weights) | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, weights)


Z = torch.zeros


@pytest.mark.parametrize(
    ("name", "config", "tensors", "message"),
    [
        ("medusa-v1", {}, {"1.0.linear.bias": None}, "tensor 1.0.linear.bias is missing"),
        ("medusa-v1", {}, {"0.2.weight": Z(V + 1, D)}, r"tensor 0.2.weight is \[65, 32\], expected \[64, 32\]"),
        ("medusa-v1", {}, {"2.2.weight": None}, "tensor 2.2.weight is missing"),
        ("medusa-v2", {}, {"0.0.linear.weight": Z(D + 2, D)}, r"0.0.linear.weight is \[34, 32\]"),
        ("medusa-v2", {}, {"surprise": Z(1)}, "tensor surprise is not part of"),
        ("medusa-v2", {}, {"0.0.linear.weight": Z(D, D, dtype=torch.int8)}, "quantised"),
        ("vllm", {"medusa_fc_bias": False}, {}, r"blocks.0.layers.0.bias is not part of"),
        ("vllm", {"vocab_size": 65}, {}, "another model: vocab_size in config.json is 65"),
        ("vllm", {"truncated_vocab_size": 30}, {}, "tensor token_map is missing"),
        ("vllm-cut", {}, {"token_map": torch.full((30,), 3)}, "token_map names a token twice"),
        ("vllm-cut", {}, {"token_map": torch.arange(40, 70)}, "token_map names tokens outside"),
        ("vllm-truncated", {"truncated_vocab_size": 29}, {}, r"token_map is \[30\], expected \[29\]"),
        ("speculator", {"emb_dim": 64}, {}, "another model: emb_dim in config.json is 64"),
        ("speculator", {"n_predict": 4}, {}, "proj.3.weight is missing|emb.3.weight is missing"),
        ("speculator", {"n_predict": "x"}, {}, "n_predict in config.json must be a whole number"),
        ("speculator", {"inner_dim": 21}, {}, r"emb.0.weight is \[64, 20\], expected \[64, 21\]"),
        ("speculator", {"tie_weights": True}, {}, "emb.0.weight and emb.1.weight differ"),
        ("eagle3", {}, {"midlayer.hidden_norm.weight": None}, "midlayer.hidden_norm.weight is missing"),
        ("eagle3", {}, {"midlayer.self_attn.q_proj.bias": Z(40)}, "self_attn.q_proj.bias is not part of"),
        ("eagle3", {}, {"fc.weight": Z(D, 2 * D)}, r"fc.weight is \[32, 64\], expected \[32, 96\]"),
        ("eagle3", {}, {"d2t": None}, "d2t is missing"),
        ("eagle3", {}, {"d2t": torch.arange(40)}, "d2t names tokens outside"),
        ("eagle3", {}, {"t2d": torch.ones(V, dtype=torch.bool)}, "d2t and t2d name different tokens"),
        ("eagle3", {"num_hidden_layers": 2}, {}, "more than one layer"),
        ("eagle3", {"norm_output": True}, {}, "EAGLE-3.1's norms are not supported: config.json has norm_output"),
        ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, {}, "use_aux_hidden_state false"),
        ("eagle3", {IDS: [0, 4, 5]}, {}, r"layer ids \[0, 4, 5\] do not name distinct layers"),
        ("eagle3", {IDS: [4, 4, 5]}, {}, "do not name distinct layers"),
        ("eagle3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rotary scaling 'dynamic'"),
        ("eagle3", {"rope_scaling": {"rope_type": "llama3"}}, {}, "cannot be used"),
        ("eagle3", {"hidden_act": "relu"}, {}, "activation 'relu'"),
        ("eagle3", {"vocab_size": 63}, {}, "vocab_size in config.json is 63"),
        ("eagle3-narrow", {"target_hidden_size": 48}, {}, "target_hidden_size in config.json is 48"),
        ("eagle3-narrow", {}, {"embed_tokens.weight": None}, "need an embedding"),
        ("dflash", {"hidden_size": 48}, {}, "hidden_size in config.json is 48"),
        ("dflash", {"num_target_layers": 6}, {}, "num_target_layers in config.json is 6"),
        ("dflash", {"layer_types": ["sliding_attention"] * 2}, {}, "sliding-window"),
        ("dflash", {"dflash_config": {"target_layer_ids": [1, 3, 6]}}, {}, "mask_token_id in config.json must be"),
        (
            "dflash",
            {"dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 8]}},
            {},
            "do not name distinct layers",
        ),
        ("dflash", {"dflash_config": {"mask_token_id": 5}}, {}, "layer ids None"),
        ("dflash", {"architectures": ["Qwen3DSparkModel"]}, {}, "Qwen3DSparkModel is not supported"),
        ("dflash", {"speculators_model_type": "dflash"}, {}, "speculators' form"),
        ("dflash", {"rope_parameters": {}}, {}, "rope_theta in config.json must be"),
        ("dflash", {}, {"candidate_selector.hidden_projection.weight": Z(4, D)}, "DFlash2's candidate selector"),
        ("dflash", {}, {"layers.0.attention_conv.base_kernel": Z(2, 2, D)}, "DFlash2's convolutions"),
        ("dflash", {}, {"markov_head.weight": Z(V, 4)}, "DSpark's Markov pair"),
        ("dflash", {}, {"layers.1.self_attn.k_norm.weight": None}, "layers.1.self_attn.k_norm.weight is missing"),
        ("dflash", {}, {"embed_tokens.weight": Z(V, D)}, "embed_tokens.weight is not part of"),
    ],
)
def test_mismatches_are_refused(
    deep_target: Target, tmp_path: Path, name: str, config: Config, tensors: dict[str, Tensor | None], message: str
) -> None:
    make, fields = MAKERS[name]
    make(tmp_path / "heads", **fields)
    damage(tmp_path / "heads", config, tensors)
    with pytest.raises(MedheadError, match=message) as refusal:
        load_heads(tmp_path / "heads", deep_target)
    assert "\n" not in str(refusal.value)


def test_folders_that_cannot_be_read(deep: PreTrainedModel, deep_target: Target, tmp_path: Path) -> None:
    make_medusa(tmp_path / "heads", own=True)
    path = tmp_path / "heads" / "medusa_lm_head.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(MedheadError, match="truncated or damaged"):
        load_heads(tmp_path / "heads", deep_target)
    path.unlink()
    torch.save({"0.0.linear.weight": torch.zeros(D, D)}, tmp_path / "heads" / "medusa_lm_head.pt")
    with pytest.raises(MedheadError, match=r"medusa_lm_head.pt, a pickle, .* convert it to safetensors"):
        load_heads(tmp_path / "heads", deep_target)
    (tmp_path / "heads" / "medusa_lm_head.pt").unlink()
    with pytest.raises(MedheadError, match=r"holds no model.safetensors"):
        load_heads(tmp_path / "heads", deep_target)
    (tmp_path / "heads" / "config.json").write_text("[1]")
    with pytest.raises(MedheadError, match="must hold names and values"):
        load_heads(tmp_path / "heads", deep_target)
    deep.save_pretrained(tmp_path / "model")
    with pytest.raises(MedheadError, match=r"none of the formats vllm-medusa, .*, speculators, eagle3"):
        load_heads(tmp_path / "model", deep_target)
