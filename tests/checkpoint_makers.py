"""Small random checkpoints in the formats of other projects, written tensor by tensor, and heads that are exported to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_formulas import (
    LAYERS,
    Config,
    D,
    Formula,
    Tensors,
    V,
    dflash_formula,
    eagle_formula,
    expand,
    medusa_formula,
    speculator_formula,
    vllm_medusa_formula,
)
from conftest import read
from medhead.heads import Heads, HeadsConfig, build_heads
from medhead.model.target import Target
from medhead_training.objective.unroll import PackedBatch, unroll

IDS = "eagle_aux_hidden_state_layer_ids"


class RandomTensors:
    """Makes random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def norm(self, *shape: int) -> Tensor:
        return 1 + self(*shape, std=0.3)


def save(folder: Path, config: Config, tensors: Tensors, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder


def make_medusa(folder: Path, own: bool, blocks: int = 1) -> Formula:
    make, tensors = RandomTensors(1), {}
    for head in range(3):
        for block in range(blocks):
            tensors[f"{head}.{block}.linear.weight"] = make(D, D)
            tensors[f"{head}.{block}.linear.bias"] = make(D)
        if own:
            tensors[f"{head}.{blocks}.weight"] = make(V, D)
    config = {"medusa_num_heads": 2, "medusa_num_layers": blocks, "base_model_name_or_path": "someone/model"}
    save(folder, config, tensors, "medusa_lm_head.safetensors")
    return medusa_formula(tensors, 3, blocks)


def make_vllm_medusa(folder: Path, bias: bool, original: bool, rows: int, truncated: int | None) -> Formula:
    make, tensors = RandomTensors(2), {}
    for head in range(3):
        for block in range(2):
            tensors[f"medusa_heads.blocks.{head}.layers.{block}.weight"] = make(D, D)
            if bias:
                tensors[f"medusa_heads.blocks.{head}.layers.{block}.bias"] = make(D)
        tensors[f"medusa_heads.lm_heads.{head}.weight"] = make(rows, D)
    if truncated:
        tensors["token_map"] = torch.randperm(V, generator=make.generator)[:truncated]
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": D,
        "vocab_size": V,
        "num_heads": 3,
        "num_hidden_layers": 2,
        "truncated_vocab_size": truncated,
        "medusa_fc_bias": bias,
        "original_lm_head": original,
    }
    save(folder, config, tensors)
    return vllm_medusa_formula(tensors, config)


def make_speculator(folder: Path, tied: bool, scale: bool, copies: bool = False) -> Formula:
    make, tensors, inner, depth = RandomTensors(3), {}, 20, 3
    one = 1 if tied else depth
    for i in range(one):
        tensors[f"speculator.emb.{i}.weight"] = make(V, inner, std=1.0)
        tensors[f"speculator.ln.{i}.weight"] = make.norm(inner)
        tensors[f"speculator.ln.{i}.bias"] = make(inner)
        tensors[f"speculator.head.{i}.weight"] = make(V, inner, std=1.0)
    for i in range(2 if tied else depth):
        tensors[f"speculator.proj.{i}.weight"] = make(inner, inner if i else D)
    if copies:
        tensors["speculator.emb.2.weight"] = tensors["speculator.emb.0.weight"].clone()
    config = {
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "vocab_size": V,
        "emb_dim": D,
        "inner_dim": inner,
        "n_predict": depth,
        "tie_weights": tied,
        "scale_input": scale,
        "top_k_tokens_per_head": [5, 4, 3],
    }
    save(folder, config, tensors)
    return speculator_formula(tensors, config)


def decoder_tensors(make: RandomTensors, prefix: str, in_size: int, size: int, dim: int, inner: int = 24) -> Tensors:
    """A decoder layer with 4 query heads and 2 key and value heads."""
    shapes = {
        "self_attn.q_proj": (4 * dim, in_size),
        "self_attn.k_proj": (2 * dim, in_size),
        "self_attn.v_proj": (2 * dim, in_size),
        "self_attn.o_proj": (size, 4 * dim),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    tensors = {f"{prefix}{name}.weight": make(*shape) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"{prefix}{name}.weight": make.norm(size) for name in norms}


def decoder_config(size: int, dim: int, **fields: Any) -> Config:
    return {
        "hidden_size": size,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": dim,
        "hidden_act": "silu",
        "vocab_size": V,
        "max_position_embeddings": 128,
        **fields,
    }


def make_eagle(
    folder: Path,
    layer: str = "midlayer.",
    size: int = D,
    draft: int | None = 40,
    embed: bool = False,
    head: bool = True,
    ids: tuple[int, ...] = (2, 4, 5),
    factor: float = 1.0,
    nested: bool = False,
    **fields: Any,
) -> Formula:
    make, dim = RandomTensors(4), 10
    tensors = {
        "fc.weight": make(size, len(ids) * D, std=0.1),
        f"{layer}hidden_norm.weight": make.norm(size),
        "norm.weight": make.norm(size),
        **decoder_tensors(make, layer, 2 * size, size, dim),
    }
    if head:
        tensors["lm_head.weight"] = make(draft or V, size, std=0.5)
    if draft:
        tokens = torch.randperm(V, generator=make.generator)[:draft].sort().values
        tensors["d2t"] = tokens - torch.arange(draft)
        tensors["t2d"] = torch.tensor([token in tokens.tolist() for token in range(V)])
    if embed:
        tensors["embed_tokens.weight"] = make(V, size)
    layer_config = decoder_config(
        size, dim, model_type="llama", num_hidden_layers=1, rms_norm_eps=1e-5, rope_theta=500.0
    )
    if factor != 1.0:
        layer_config["rope_scaling"] = {"type": "linear", "factor": factor}
    if nested:
        config = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": draft}
        config |= {"transformer_layer_config": layer_config, **fields}
    else:
        config = {"architectures": ["LlamaForCausalLMEagle3"], **layer_config, "draft_vocab_size": draft, **fields}
    save(folder, config, tensors)
    return eagle_formula(tensors, layer_config | config, list(ids), factor)


def make_dflash(folder: Path, **fields: Any) -> Formula:
    make, dim = RandomTensors(5), 12
    tensors = {"fc.weight": make(D, 3 * D, std=0.1), "hidden_norm.weight": make.norm(D), "norm.weight": make.norm(D)}
    for layer in range(2):
        tensors |= decoder_tensors(make, f"layers.{layer}.", D, D, dim)
        for name in ("q_norm", "k_norm"):
            tensors[f"layers.{layer}.self_attn.{name}.weight"] = make.norm(dim)
    config = decoder_config(
        D,
        dim,
        architectures=["DFlashDraftModel"],
        model_type="qwen3",
        num_hidden_layers=2,
        num_target_layers=LAYERS,
        layer_types=["full_attention"] * 2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 700.0, "rope_type": "default"},
        block_size=5,
        dflash_config={"mask_token_id": 63, "target_layer_ids": [1, 3, 6]},
    )
    save(folder, config | fields, tensors)
    return dflash_formula(tensors, config | fields)


MAKERS: dict[str, tuple[Callable[..., Formula], dict[str, Any]]] = {
    "medusa-v1": (make_medusa, {"own": True, "blocks": 2}),
    "medusa-v2": (make_medusa, {"own": False}),
    "vllm": (make_vllm_medusa, {"bias": True, "original": False, "rows": V, "truncated": None}),
    "vllm-one-head": (make_vllm_medusa, {"bias": False, "original": True, "rows": V, "truncated": None}),
    "vllm-cut": (make_vllm_medusa, {"bias": True, "original": True, "rows": V, "truncated": 30}),
    "vllm-truncated": (make_vllm_medusa, {"bias": True, "original": False, "rows": 30, "truncated": 30}),
    "speculator": (make_speculator, {"tied": False, "scale": False}),
    "speculator-tied": (make_speculator, {"tied": True, "scale": True}),
    "speculator-copies": (make_speculator, {"tied": True, "scale": False, "copies": True}),
    "eagle3": (make_eagle, {}),
    "eagle3-residual": (make_eagle, {"layer": "layers.0.", "norm_before_residual": True, "embed": True, "factor": 4.0}),
    "eagle3-narrow": (make_eagle, {"size": 24, "embed": True, "target_hidden_size": D}),
    "eagle3-whole": (make_eagle, {"draft": None, "head": False}),
    "eagle3-ids": (make_eagle, {"ids": (1, 6, 3), "eagle_aux_hidden_state_layer_ids": [1, 6, 3]}),
    "eagle3-sglang": (
        make_eagle,
        {"ids": (2, 7), "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 6]}},
    ),
    "eagle3-speculators": (make_eagle, {"layer": "layers.0.", "nested": True, "norm_before_residual": True}),
    "dflash": (make_dflash, {}),
    "jetspec": (make_dflash, {"is_causal": True}),
}


def random_heads(target: Target, **fields: Any) -> Heads:
    torch.manual_seed(5)
    sizes = {"hidden_size": D, "vocab_size": V, "num_target_layers": LAYERS, "inner_size": 20, "head_dim": 10}
    heads = build_heads(HeadsConfig(**(sizes | fields))).eval()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if heads.draft_tokens is not None:
        heads.draft_tokens.copy_(torch.randperm(V)[: len(heads.draft_tokens)].sort().values)
    if heads.config.mask_token_id >= 0:
        heads.set_mask(target.embed(torch.tensor(heads.config.mask_token_id)).detach())
    return heads.requires_grad_(False)


EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "medusa": ("medusa", {"kind": "medusa", "depth": 3}),
    "medusa-matrices": ("medusa", {"kind": "medusa", "depth": 2, "num_layers": 2}),
    "vllm-medusa": ("vllm-medusa", {"kind": "medusa", "depth": 3, "num_layers": 2}),
    "vllm-medusa-cut": ("vllm-medusa", {"kind": "medusa", "depth": 3, "draft_vocab_size": 25}),
    "speculator": ("mlp_speculator", {"kind": "sequential", "depth": 3}),
    "speculator-tied": ("mlp_speculator", {"kind": "sequential", "depth": 3, "tie_weights": True, "scale_input": True}),
    "eagle3": (
        "eagle3",
        {"kind": "attention", "depth": 8, "feature_layers": [1, 4, 6], "draft_vocab_size": 25, "rms_norm_eps": 1e-5},
    ),
    "eagle3-whole": (
        "eagle3",
        {"kind": "attention", "depth": 8, "feature_layers": [0, 2, 7], "norm_before_residual": True, "rope_theta": 99.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "max_position_embeddings": 80},
    ),
    "speculators": (
        "speculators",
        {"kind": "attention", "depth": 8, "feature_layers": [1, 4, 6], "draft_vocab_size": 25},
    ),
    "speculators-whole": ("speculators", {"kind": "attention", "depth": 8, "feature_layers": [0, 2, 7]}),
    "dflash": (
        "dflash",
        {
            "kind": "block",
            "depth": 4,
            "feature_layers": [1, 3, 6],
            "num_layers": 2,
            "mask_token_id": 9,
            "root_slot_predicts": False,
            "causal": False,
        },
    ),
    "jetspec": (
        "dflash",
        {"kind": "block", "depth": 3, "feature_layers": [5], "mask_token_id": 9, "root_slot_predicts": False},
    ),
}


TEXT = [1, 17, 5, 40, 33, 8, 8, 51, 22, 60, 3, 29]


def logits_in_training(heads: Heads, target: Target, text: list[int]) -> list[tuple[int, int, Tensor]]:
    """Return anchor, depth and logits over the vocabulary, as training computes them on a text packed behind another one."""
    other = [9, 4, 31]
    with torch.no_grad(), target.active(heads.config.feature_layers):
        features = torch.cat([read(target, torch.tensor([ids]))[1] for ids in (other, text)], 1)
    ids = torch.tensor([other + text])
    document = torch.tensor([[0] * len(other) + [1] * len(text)])
    anchors = torch.arange(len(other), len(other) + len(text) - 2)[None]
    texts = PackedBatch(ids, torch.ones_like(ids, dtype=torch.bool), document)
    found = []
    with torch.no_grad():
        levels = unroll(heads, texts, features, target.embedding, anchors, torch.ones_like(anchors, dtype=torch.bool))
        for depth, level in enumerate(levels):
            for feature, at in zip(level.features, level.at.tolist(), strict=True):
                own, tokens = heads.own_output(depth), heads.draft_tokens
                logits = feature @ (target.output.weight if own is None else own).T
                if own is None and tokens is not None:
                    logits = logits[tokens]
                found.append((at - depth - 1 - len(other), depth, logits if tokens is None else expand(logits, tokens)))
    return found
