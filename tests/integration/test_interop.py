"""Heads in other projects' layouts, against plain re-statements of the published formulas; nothing of medhead computes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from conftest import noise_heads, read, tiny_llama
from medhead import Decoder, MedheadError
from medhead.heads import Heads, HeadsConfig, build_heads, load_heads, save_heads
from medhead.heads.formats import export_heads
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsExpander, HeadsProposer
from medhead_training.export import main as export_main
from medhead_training.export import write as write_checkpoint
from medhead_training.objective.unroll import PackedBatch, unroll

D, V, LAYERS = 32, 64, 8  # of the target
Tensors = dict[str, Tensor]
Config = dict[str, Any]
Formula = Callable[
    [PreTrainedModel, list[int], list[int]], list[Tensor]
]  # text before the root, path from it -> logits


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    return tiny_llama(seed=11, num_hidden_layers=LAYERS, initializer_range=0.3)


@pytest.fixture(scope="module")
def deep_target(deep: PreTrainedModel) -> Target:
    return Target(deep)


class Maker:
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


# ---------------------------------------------------------------- the published formulas, one token at a time


def states(model: PreTrainedModel, text: list[int]) -> list[Tensor]:
    """`hidden_states` of transformers: the embedding, the outputs of all layers but the last, the normed last one."""
    with torch.no_grad():
        return [state[0] for state in model(torch.tensor([text]), output_hidden_states=True).hidden_states]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def transposed(x: Tensor, position: int, theta: float, factor: float = 1.0) -> Tensor:
    """Rotary positions of one head: number i and number i + dim/2 are a point in a plane that turns."""
    half = len(x) // 2
    angles = [position / factor * theta ** (-2 * i / len(x)) for i in range(half)]
    cos, sin = torch.tensor(angles).cos(), torch.tensor(angles).sin()
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def attended(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int, key_heads: int, dim: int) -> Tensor:
    """One query `[heads * dim]` over keys and values `[key_heads * dim]`."""
    found = []
    for head in range(heads):
        at = slice((head * key_heads // heads) * dim, (head * key_heads // heads + 1) * dim)
        q = query[head * dim : (head + 1) * dim]
        weights = torch.stack([q @ key[at] / math.sqrt(dim) for key in keys]).softmax(0)
        found.append(sum((weights[i] * value[at] for i, value in enumerate(values)), torch.zeros(dim)))
    return torch.cat(found)


def heads_turned(x: Tensor, dim: int, position: int, theta: float, factor: float = 1.0) -> Tensor:
    return torch.cat([transposed(head, position, theta, factor) for head in x.split(dim)])


def feed_forward(x: Tensor, tensors: Tensors, prefix: str) -> Tensor:
    gate = F.silu(tensors[f"{prefix}gate_proj.weight"] @ x)
    return tensors[f"{prefix}down_proj.weight"] @ (gate * (tensors[f"{prefix}up_proj.weight"] @ x))


def expanded(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits over the whole vocabulary, minus infinity where the head names nothing."""
    full = torch.full((V,), float("-inf"))
    for place, token in enumerate(tokens.tolist()):
        full[token] = logits[place]
    return full


def medusa_formula(tensors: Tensors, depth: int, blocks: int) -> Formula:
    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = states(model, text)[-1][-1]
        said = []
        for head in range(depth):
            x = hidden
            for block in range(blocks):
                name = f"{head}.{block}.linear"
                x = x + F.silu(tensors[f"{name}.weight"] @ x + tensors[f"{name}.bias"])
            own = tensors.get(f"{head}.{blocks}.weight")
            said.append((model.lm_head.weight.detach() if own is None else own) @ x)
        return said

    return formula


def vllm_medusa_formula(tensors: Tensors, config: Config) -> Formula:
    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = states(model, text)[-1][-1]
        said = []
        for head in range(config["num_heads"]):
            x = hidden
            for block in range(config["num_hidden_layers"]):
                name = f"medusa_heads.blocks.{head}.layers.{block}"
                z = tensors[f"{name}.weight"] @ x
                x = x + F.silu(z + tensors[f"{name}.bias"] if config["medusa_fc_bias"] else z)
            matrix = tensors[f"medusa_heads.lm_heads.{0 if config['original_lm_head'] else head}.weight"]
            tokens = tensors.get("token_map")
            if tokens is None:
                said.append(matrix @ x)
            else:
                said.append(expanded((matrix[tokens] if len(matrix) > len(tokens) else matrix) @ x, tokens))
        return said

    return formula


def speculator_formula(tensors: Tensors, config: Config) -> Formula:
    def norm(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + 1e-6)

    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        state = states(model, text)[-1][-1]
        if config["scale_input"]:
            state = norm(state) / math.sqrt(2)
        state_weight = 0.5 ** (0.5 / config["n_predict"])
        emb_weight = math.sqrt((1 - state_weight**2) * config["inner_dim"] / 2)
        said = []
        for depth in range(config["n_predict"]):
            i = 0 if config["tie_weights"] else depth
            project = min(depth, 1) if config["tie_weights"] else depth
            token = tensors[f"speculator.emb.{i}.weight"][path[depth]]
            z = tensors[f"speculator.proj.{project}.weight"] @ state + emb_weight / state_weight * token
            normed = norm(z) * tensors[f"speculator.ln.{i}.weight"] + tensors[f"speculator.ln.{i}.bias"]
            state = normed * 0.5 * (1 + torch.erf(normed / math.sqrt(2)))
            said.append(tensors[f"speculator.head.{i}.weight"] @ state)
        return said

    return formula


def eagle_formula(tensors: Tensors, config: Config, ids: list[int], factor: float = 1.0) -> Formula:
    """`ids` count hidden states, 0 being the embedding."""
    tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    heads, key_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = states(model, text)
        embedding = tensors.get("embed_tokens.weight", model.model.embed_tokens.weight.detach())
        features = [tensors["fc.weight"] @ torch.cat([hidden[i][t] for i in ids]) for t in range(len(text))]
        tokens = [*text[1:], path[0]]  # behind each feature
        keys: list[Tensor] = []
        values: list[Tensor] = []
        said = []
        for position in range(len(text) + len(path) - 1):
            feature, token = features[position], embedding[tokens[position]]
            normed = rms(feature, tensors["midlayer.hidden_norm.weight"], eps)
            joint = torch.cat([rms(token, tensors["midlayer.input_layernorm.weight"], eps), normed])
            query, key, value = (tensors[f"midlayer.self_attn.{n}_proj.weight"] @ joint for n in "qkv")
            keys.append(heads_turned(key, dim, position, theta, factor))
            values.append(value)
            if position < len(text) - 1:
                continue
            query = heads_turned(query, dim, position, theta, factor)
            found = attended(query, keys, values, heads, key_heads, dim)
            x = normed if config.get("norm_before_residual") else feature
            x = x + tensors["midlayer.self_attn.o_proj.weight"] @ found
            x = x + feed_forward(
                rms(x, tensors["midlayer.post_attention_layernorm.weight"], eps), tensors, "midlayer.mlp."
            )
            output = tensors.get("lm_head.weight", model.lm_head.weight.detach())
            logits = output @ rms(x, tensors["norm.weight"], eps)
            draft = torch.arange(len(logits)) + tensors.get("d2t", torch.zeros(len(logits), dtype=torch.long))
            said.append(expanded(logits, draft))
            features.append(x)
            if len(said) < len(path):
                tokens.append(path[len(said)])
        return said

    return formula


def dflash_formula(tensors: Tensors, config: Config) -> Formula:
    heads, key_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta, size = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"], config["block_size"]
    ids, mask = config["dflash_config"]["target_layer_ids"], config["dflash_config"]["mask_token_id"]
    causal = config.get("is_causal", False)

    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = states(model, text)
        embedding = model.model.embed_tokens.weight.detach()
        context = [
            rms(tensors["fc.weight"] @ torch.cat([hidden[i + 1][t] for i in ids]), tensors["hidden_norm.weight"], eps)
            for t in range(len(text))
        ]
        block = [embedding[token] for token in [path[0], *[mask] * (size - 1)]]
        for layer in range(config["num_hidden_layers"]):
            names = {n: f"layers.{layer}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")}
            attention = f"layers.{layer}.self_attn."

            def project(x: Tensor, name: str, position: int, attention: str = attention) -> Tensor:
                y = tensors[f"{attention}{name}_proj.weight"] @ x
                normed = [rms(head, tensors[f"{attention}{name}_norm.weight"], eps) for head in y.split(dim)]
                return heads_turned(torch.cat(normed), dim, position, theta)

            normed = [rms(x, tensors[names["input_layernorm"]], eps) for x in block]
            rows = [*context, *normed]
            keys = [project(x, "k", position) for position, x in enumerate(rows)]
            values = [tensors[f"{attention}v_proj.weight"] @ x for x in rows]
            after = []
            for slot, x in enumerate(block):
                end = len(text) + slot + 1 if causal else len(rows)
                query = project(normed[slot], "q", len(text) + slot)
                found = attended(query, keys[:end], values[:end], heads, key_heads, dim)
                x = x + tensors[f"{attention}o_proj.weight"] @ found
                x = x + feed_forward(
                    rms(x, tensors[names["post_attention_layernorm"]], eps), tensors, f"layers.{layer}.mlp."
                )
                after.append(x)
            block = after
        output = model.lm_head.weight.detach()
        return [output @ rms(x, tensors["norm.weight"], eps) for x in block[1:]]

    return formula


# ---------------------------------------------------------------- small checkpoints, tensor by tensor


def make_medusa(folder: Path, own: bool, blocks: int = 1) -> Formula:
    make, tensors = Maker(1), {}
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
    make, tensors = Maker(2), {}
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
    make, tensors, inner, depth = Maker(3), {}, 20, 3
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
    make, heads, key_heads, dim, inner = Maker(4), 4, 2, 10, 24
    tensors = {
        "fc.weight": make(size, len(ids) * D, std=0.1),
        f"{layer}hidden_norm.weight": make.norm(size),
        f"{layer}input_layernorm.weight": make.norm(size),
        f"{layer}post_attention_layernorm.weight": make.norm(size),
        f"{layer}self_attn.q_proj.weight": make(heads * dim, 2 * size),
        f"{layer}self_attn.k_proj.weight": make(key_heads * dim, 2 * size),
        f"{layer}self_attn.v_proj.weight": make(key_heads * dim, 2 * size),
        f"{layer}self_attn.o_proj.weight": make(size, heads * dim),
        f"{layer}mlp.gate_proj.weight": make(inner, size),
        f"{layer}mlp.up_proj.weight": make(inner, size),
        f"{layer}mlp.down_proj.weight": make(size, inner),
        "norm.weight": make.norm(size),
    }
    if head:
        tensors["lm_head.weight"] = make(draft or V, size, std=0.5)
    if draft:
        tokens = torch.randperm(V, generator=make.generator)[:draft].sort().values
        tensors["d2t"] = tokens - torch.arange(draft)
        tensors["t2d"] = torch.tensor([token in tokens.tolist() for token in range(V)])
    if embed:
        tensors["embed_tokens.weight"] = make(V, size)
    layer_config = {
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": dim,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "vocab_size": V,
        "rope_theta": 500.0,
        "max_position_embeddings": 128,
    }
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
    make, heads, key_heads, dim, inner = Maker(5), 4, 2, 12, 24
    tensors = {"fc.weight": make(D, 3 * D, std=0.1), "hidden_norm.weight": make.norm(D), "norm.weight": make.norm(D)}
    for layer in range(2):
        tensors[f"layers.{layer}.input_layernorm.weight"] = make.norm(D)
        tensors[f"layers.{layer}.post_attention_layernorm.weight"] = make.norm(D)
        tensors[f"layers.{layer}.self_attn.q_proj.weight"] = make(heads * dim, D)
        tensors[f"layers.{layer}.self_attn.k_proj.weight"] = make(key_heads * dim, D)
        tensors[f"layers.{layer}.self_attn.v_proj.weight"] = make(key_heads * dim, D)
        tensors[f"layers.{layer}.self_attn.o_proj.weight"] = make(D, heads * dim)
        tensors[f"layers.{layer}.self_attn.q_norm.weight"] = make.norm(dim)
        tensors[f"layers.{layer}.self_attn.k_norm.weight"] = make.norm(dim)
        tensors[f"layers.{layer}.mlp.gate_proj.weight"] = make(inner, D)
        tensors[f"layers.{layer}.mlp.up_proj.weight"] = make(inner, D)
        tensors[f"layers.{layer}.mlp.down_proj.weight"] = make(D, inner)
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": D,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": dim,
        "num_hidden_layers": 2,
        "num_target_layers": LAYERS,
        "layer_types": ["full_attention"] * 2,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "vocab_size": V,
        "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"},
        "max_position_embeddings": 128,
        "block_size": 5,
        "dflash_config": {"mask_token_id": 63, "target_layer_ids": [1, 3, 6]},
        **fields,
    }
    save(folder, config, tensors)
    return dflash_formula(tensors, config)


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


@pytest.fixture(params=MAKERS)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Formula]:
    make, fields = MAKERS[request.param]
    return tmp_path / "heads", make(tmp_path / "heads", **fields)


TEXT = [1, 17, 5, 40, 33, 8, 8, 51, 22, 60, 3, 29]


def along(heads: Heads, target: Target, text: list[int]) -> list[tuple[int, int, Tensor]]:
    """Anchor, depth and logits over the vocabulary, as training runs heads along a text (packed behind another one)."""
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
                found.append(
                    (at - depth - 1 - len(other), depth, logits if tokens is None else expanded(logits, tokens))
                )
    return found


def decoded(heads: Heads, target: Target, text: list[int], path: list[int]) -> list[Tensor]:
    """Log-probabilities over the vocabulary at every depth, as decoding runs heads: text read in chunks, then a path."""
    proposer = HeadsProposer(target, heads, dtype=torch.float32)
    with torch.no_grad(), target.active(proposer.feature_layers):
        cache = target.new_cache(1, 64)
        whole = [*text, path[0]]
        proposer.begin(target, [whole])
        features = target.prefill(cache, [text], proposer.on_prefill)
        state = DecodeState(target, [whole], torch.tensor([path[0]]), features)
        memory = None if proposer._memory is None else proposer._memory.view()
        expander = HeadsExpander(proposer.output_head, state, memory, V, len(path), None)
        node, found = expander.start(), []
        for depth, token in enumerate(path):
            node, logp, children = expander.expand(node, torch.tensor([[token]]), depth)
            full = torch.full((V,), float("-inf"))
            found.append(full.scatter(0, children[0, 0], logp[0, 0]))
    return found


# ---------------------------------------------------------------- import


def test_training_computes_the_published_formula(
    deep: PreTrainedModel, deep_target: Target, foreign: tuple[Path, Formula]
) -> None:
    folder, formula = foreign
    heads = load_heads(folder, deep_target)
    found = along(heads, deep_target, TEXT)
    assert {anchor for anchor, _, _ in found} == set(range(len(TEXT) - 2))
    for anchor in (0, 1, 4, 8, len(TEXT) - 3):
        path = TEXT[anchor + 1 : anchor + 1 + heads.config.depth]
        expected = formula(deep, TEXT[: anchor + 1], path + [0] * (heads.config.depth - len(path)))
        given = {depth: logits for at, depth, logits in found if at == anchor}
        assert len(given) == min(heads.config.depth, len(TEXT) - 2 - anchor)
        for depth, logits in given.items():
            torch.testing.assert_close(logits, expected[depth], rtol=2e-4, atol=2e-4)


def test_decoding_computes_the_published_formula(
    deep: PreTrainedModel, deep_target: Target, foreign: tuple[Path, Formula]
) -> None:
    folder, formula = foreign
    heads = load_heads(folder, deep_target)
    for length in (1, 7, len(TEXT)):
        path = [19, 44, 2, 2, 57, 30, 6, 12][: heads.config.depth]
        expected = formula(deep, TEXT[:length], path)
        for depth, logp in enumerate(decoded(heads, deep_target, TEXT[:length], path)):
            torch.testing.assert_close(logp, expected[depth].log_softmax(-1), rtol=2e-4, atol=2e-4)


def test_decoding_gives_the_targets_text(deep: PreTrainedModel, foreign: tuple[Path, Formula]) -> None:
    decoder = Decoder(deep, heads=foreign[0], tree_size=12)
    ids = torch.tensor([TEXT[:6], [0, 0, *TEXT[2:6]]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = deep.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(decoder.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False), expected)
    assert decoder.proposer.name == "hybrid"


def test_stored_types_become_the_targets(deep_target: Target, tmp_path: Path) -> None:
    make_eagle(tmp_path / "heads")
    path = tmp_path / "heads" / "model.safetensors"
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(path).items()}, path)
    heads = load_heads(tmp_path / "heads", deep_target)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    assert not heads.training


def test_tensors_in_several_files(deep_target: Target, tmp_path: Path) -> None:
    make_eagle(tmp_path / "one")
    make_eagle(tmp_path / "two")
    whole = load_file(tmp_path / "two" / "model.safetensors")
    (tmp_path / "two" / "model.safetensors").unlink()
    where = {}
    for part, names in enumerate((sorted(whole)[:6], sorted(whole)[6:])):
        file = f"model-{part}.safetensors"
        save_file({name: whole[name] for name in names}, tmp_path / "two" / file)
        where.update(dict.fromkeys(names, file))
    index = tmp_path / "two" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    one, two = (load_heads(tmp_path / name, deep_target).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../one/model.safetensors"}}))
    with pytest.raises(MedheadError, match="names no files of this folder"):
        load_heads(tmp_path / "two", deep_target)


def damage(folder: Path, config: Config, tensors: dict[str, Tensor | None]) -> None:
    """Change a checkpoint: configuration, and tensors, which None takes away."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (weights,) = folder.glob("*.safetensors")
    stored = load_file(weights) | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, weights)


Z = torch.zeros
EAGLE_IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("name", "config", "tensors", "says"),
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
        ("speculator", {"inner_dim": 21}, {}, r"proj.0.weight is \[20, 32\], expected \[21, 32\]"),
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
        ("eagle3", {EAGLE_IDS: [0, 4, 5]}, {}, r"layer ids \[0, 4, 5\] do not name distinct layers"),
        ("eagle3", {EAGLE_IDS: [4, 4, 5]}, {}, "do not name distinct layers"),
        ("eagle3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rotary scaling 'dynamic'"),
        ("eagle3", {"rope_scaling": {"rope_type": "llama3"}}, {}, "cannot be used"),
        ("eagle3", {"hidden_act": "relu"}, {}, "activation 'relu'"),
        ("eagle3", {"vocab_size": 63}, {}, "vocab_size in config.json is 63"),
        ("eagle3-narrow", {"target_hidden_size": 48}, {}, "target_hidden_size in config.json is 48"),
        ("eagle3-narrow", {}, {"embed_tokens.weight": None}, "needs an embedding"),
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
def test_mismatches(
    deep_target: Target, tmp_path: Path, name: str, config: Config, tensors: dict[str, Tensor | None], says: str
) -> None:
    make, fields = MAKERS[name]
    make(tmp_path / "heads", **fields)
    damage(tmp_path / "heads", config, tensors)
    with pytest.raises(MedheadError, match=says) as refusal:
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
    with pytest.raises(MedheadError, match="none of the layouts vllm-medusa, medusa, mlp_speculator, dflash, eagle3"):
        load_heads(tmp_path / "model", deep_target)


# ---------------------------------------------------------------- export


def random_heads(target: Target, **fields: Any) -> Heads:
    torch.manual_seed(5)
    sizes = {"hidden_size": D, "vocab_size": V, "target_layers": LAYERS, "inner_size": 20, "head_dim": 10}
    heads = build_heads(HeadsConfig(**(sizes | fields))).eval()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if heads.draft_tokens is not None:
        heads.draft_tokens.copy_(torch.randperm(V)[: len(heads.draft_tokens)].sort().values)
    if heads.config.mask_token >= 0:
        heads.set_mask(target.embed(torch.tensor(heads.config.mask_token)).detach())
    return heads.requires_grad_(False)


EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "medusa": ("medusa", {"kind": "medusa", "depth": 3}),
    "medusa-matrices": ("medusa", {"kind": "medusa", "depth": 2, "blocks": 2}),
    "vllm-medusa": ("vllm-medusa", {"kind": "medusa", "depth": 3, "blocks": 2}),
    "vllm-medusa-cut": ("vllm-medusa", {"kind": "medusa", "depth": 3, "draft_vocab": 25}),
    "speculator": ("mlp_speculator", {"kind": "sequential", "depth": 3}),
    "speculator-tied": ("mlp_speculator", {"kind": "sequential", "depth": 3, "tied": True, "scale_input": True}),
    "eagle3": (
        "eagle3",
        {"kind": "attention", "depth": 8, "feature_layers": [1, 4, 6], "draft_vocab": 25, "norm_eps": 1e-5},
    ),
    "eagle3-whole": (
        "eagle3",
        {"kind": "attention", "depth": 8, "feature_layers": [0, 2, 7], "norm_before_residual": True, "rope_theta": 99.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "context": 80},
    ),
    "dflash": (
        "dflash",
        {
            "kind": "block",
            "depth": 4,
            "feature_layers": [1, 3, 6],
            "blocks": 2,
            "mask_token": 9,
            "anchor_predicts": False,
            "causal": False,
        },
    ),
    "jetspec": (
        "dflash",
        {"kind": "block", "depth": 3, "feature_layers": [5], "mask_token": 9, "anchor_predicts": False},
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_heads_say_the_same(deep: PreTrainedModel, deep_target: Target, tmp_path: Path, name: str) -> None:
    layout, fields = EXPORTS[name]
    heads = random_heads(deep_target, **fields)
    write_checkpoint(export_heads(heads, deep_target, layout), tmp_path / "out", torch.float32)
    again = load_heads(tmp_path / "out", deep_target)
    assert (again.config.kind, again.config.depth) == (heads.config.kind, heads.config.depth)
    before, after = along(heads, deep_target, TEXT), along(again, deep_target, TEXT)
    for (anchor, depth, logits), (anchor_after, depth_after, logits_after) in zip(before, after, strict=True):
        assert (anchor, depth) == (anchor_after, depth_after)
        torch.testing.assert_close(logits_after, logits, rtol=1e-4, atol=1e-4)


def test_exported_names_are_the_published_ones(deep_target: Target, tmp_path: Path) -> None:
    """Tensor names, shapes and configuration of exports are those of the checkpoints above, which engines load."""
    pairs = {"eagle3": "eagle3", "dflash": "dflash", "speculator": "speculator", "speculator-tied": "speculator-tied"}
    for export, made in pairs.items():
        make, fields = MAKERS[made]
        make(tmp_path / made, **fields)
        layout, config = EXPORTS[export]
        write_checkpoint(
            export_heads(random_heads(deep_target, **config), deep_target, layout),
            tmp_path / export / "out",
            torch.float32,
        )
        expected = {n.removeprefix("speculator.") for n in load_file(tmp_path / made / "model.safetensors")}
        assert set(load_file(tmp_path / export / "out" / "model.safetensors")) == expected
        wanted = json.loads((tmp_path / made / "config.json").read_text())
        given = json.loads((tmp_path / export / "out" / "config.json").read_text())
        assert wanted.keys() - given.keys() <= {"rope_parameters"}, export
        assert wanted["architectures"] == given["architectures"]
    given = json.loads((tmp_path / "eagle3" / "out" / "config.json").read_text())
    assert given[EAGLE_IDS] == [2, 5, 7]
    assert given["eagle_config"][EAGLE_IDS] == [1, 4, 6]


@pytest.mark.parametrize(
    ("layout", "fields", "says"),
    [
        ("eagle3", {"kind": "medusa", "depth": 2}, "holds heads of kind 'attention', these are of kind 'medusa'"),
        ("medusa", {"kind": "medusa", "depth": 2, "correction": "parent"}, "these heads have correction 'parent'"),
        ("medusa", {"kind": "medusa", "depth": 2, "draft_vocab": 9}, "no draft vocabulary, these heads name 9 of 64"),
        ("mlp_speculator", {"kind": "sequential", "depth": 2, "draft_vocab": 9}, "no draft vocabulary"),
        ("eagle3", {"kind": "attention", "depth": 2, "feature_layers": [1, 2]}, "reads three layers of the target"),
        ("dflash", {"kind": "block", "depth": 2, "feature_layers": [1]}, "anchor_predicts"),
        (
            "dflash",
            {"kind": "block", "depth": 2, "feature_layers": [1], "anchor_predicts": False},
            "learnt vectors of their own",
        ),
        ("dflash", {"kind": "block", "depth": 2, "anchor_predicts": False, "mask_token": 3}, "last hidden state"),
        ("dflash", {"kind": "block", "depth": 2, "correction": "recurrent"}, "these heads have correction 'recurrent'"),
        ("gguf", {"kind": "medusa", "depth": 2}, "no layout is called 'gguf'"),
    ],
)
def test_heads_that_a_layout_cannot_express(
    deep_target: Target, layout: str, fields: dict[str, Any], says: str
) -> None:
    heads = random_heads(deep_target, **fields)
    with pytest.raises(MedheadError, match=says) as refusal:
        export_heads(heads, deep_target, layout)
    assert "\n" not in str(refusal.value)


def test_a_bias_of_the_target_and_another_mask_are_refused(deep_target: Target) -> None:
    heads = random_heads(deep_target, **EXPORTS["dflash"][1])
    heads.set_mask(torch.zeros(D))
    with pytest.raises(MedheadError, match="is not the embedding of token 9"):
        export_heads(heads, deep_target, "dflash")
    biased = Target(tiny_llama(num_hidden_layers=LAYERS), probe=False)
    biased.output.bias = torch.nn.Parameter(torch.ones(V))
    with pytest.raises(MedheadError, match="has a bias"):
        export_heads(random_heads(biased, **EXPORTS["vllm-medusa"][1]), biased, "vllm-medusa")


def test_the_export_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(folders["model"]), tmp_path / "new" / "out"
    common = ["--heads", str(folders["medusa"]), "--model", model, "--layout", "vllm-medusa", "--output", str(out)]
    assert export_main([*common, "--dtype", "bfloat16"]) == 0
    assert "tensors in the layout vllm-medusa" in capsys.readouterr().out
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before = (out / "model.safetensors").read_bytes()
    assert export_main(common) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(SystemExit) as ended:
        export_main([*common[:4], "--layout", "gguf", "--output", str(tmp_path / "x")])
    assert ended.value.code == 2
    recurrent = ["--heads", str(folders["recurrent"]), *common[2:6], "--output", str(tmp_path / "x")]
    assert export_main(recurrent) == 2
    assert "these are of kind 'recurrent'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_heads_with_one_mask_token_are_stored_and_read_back(
    deep: PreTrainedModel, deep_target: Target, tmp_path: Path
) -> None:
    heads = random_heads(deep_target, **EXPORTS["dflash"][1])
    save_heads(heads, deep, tmp_path / "heads")
    again = load_heads(tmp_path / "heads", deep_target)
    assert again.config == heads.config
    assert torch.equal(again.mask_row, deep.model.embed_tokens.weight[9])
    assert noise_heads(deep_target, "block").mask_row is None
