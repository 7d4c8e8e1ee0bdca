"""The published formulas of other projects' heads, one token at a time in plain tensor operations.

A formula maps a model, the text before the root and the path from the root to the logits of every depth. No code of medhead
takes part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

D, V, LAYERS = 32, 64, 8  # hidden size, vocabulary and layers of the target
Tensors = dict[str, Tensor]
Config = dict[str, Any]
Formula = Callable[[PreTrainedModel, list[int], list[int]], list[Tensor]]


def hidden_states(model: PreTrainedModel, text: list[int]) -> list[Tensor]:
    """`hidden_states` of transformers: the embedding, the outputs of all layers but the last, the normed last one."""
    with torch.no_grad():
        return [state[0] for state in model(torch.tensor([text]), output_hidden_states=True).hidden_states]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotate(x: Tensor, position: int, theta: float, factor: float = 1.0) -> Tensor:
    """Rotate one head: numbers i and i + dim/2 are a point in a plane."""
    half = len(x) // 2
    angles = [position / factor * theta ** (-2 * i / len(x)) for i in range(half)]
    cos, sin = torch.tensor(angles).cos(), torch.tensor(angles).sin()
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int, kv_heads: int, dim: int) -> Tensor:
    """One query `[heads * dim]` over keys and values `[kv_heads * dim]`."""
    found = []
    for head in range(heads):
        at = slice((head * kv_heads // heads) * dim, (head * kv_heads // heads + 1) * dim)
        q = query[head * dim : (head + 1) * dim]
        weights = torch.stack([q @ key[at] / math.sqrt(dim) for key in keys]).softmax(0)
        found.append(sum((weights[i] * value[at] for i, value in enumerate(values)), torch.zeros(dim)))
    return torch.cat(found)


def rotate_heads(x: Tensor, dim: int, position: int, theta: float, factor: float = 1.0) -> Tensor:
    return torch.cat([rotate(head, position, theta, factor) for head in x.split(dim)])


def feed_forward(x: Tensor, tensors: Tensors, prefix: str) -> Tensor:
    gate = F.silu(tensors[f"{prefix}gate_proj.weight"] @ x)
    return tensors[f"{prefix}down_proj.weight"] @ (gate * (tensors[f"{prefix}up_proj.weight"] @ x))


def expand(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits over the whole vocabulary, minus infinity for tokens outside the draft vocabulary."""
    full = torch.full((V,), float("-inf"))
    for place, token in enumerate(tokens.tolist()):
        full[token] = logits[place]
    return full


def medusa_formula(tensors: Tensors, depth: int, blocks: int) -> Formula:
    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = hidden_states(model, text)[-1][-1]
        logits = []
        for head in range(depth):
            x = hidden
            for block in range(blocks):
                name = f"{head}.{block}.linear"
                x = x + F.silu(tensors[f"{name}.weight"] @ x + tensors[f"{name}.bias"])
            own = tensors.get(f"{head}.{blocks}.weight")
            logits.append((model.lm_head.weight.detach() if own is None else own) @ x)
        return logits

    return formula


def vllm_medusa_formula(tensors: Tensors, config: Config) -> Formula:
    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = hidden_states(model, text)[-1][-1]
        logits = []
        for head in range(config["num_heads"]):
            x = hidden
            for block in range(config["num_hidden_layers"]):
                name = f"medusa_heads.blocks.{head}.layers.{block}"
                z = tensors[f"{name}.weight"] @ x
                x = x + F.silu(z + tensors[f"{name}.bias"] if config["medusa_fc_bias"] else z)
            matrix = tensors[f"medusa_heads.lm_heads.{0 if config['original_lm_head'] else head}.weight"]
            tokens = tensors.get("token_map")
            if tokens is None:
                logits.append(matrix @ x)
            else:
                logits.append(expand((matrix[tokens] if len(matrix) > len(tokens) else matrix) @ x, tokens))
        return logits

    return formula


def speculator_formula(tensors: Tensors, config: Config) -> Formula:
    def norm(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + 1e-6)

    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        state = hidden_states(model, text)[-1][-1]
        if config["scale_input"]:
            state = norm(state) / math.sqrt(2)
        state_weight = 0.5 ** (0.5 / config["n_predict"])
        emb_weight = math.sqrt((1 - state_weight**2) * config["inner_dim"] / 2)
        logits = []
        for depth in range(config["n_predict"]):
            i = 0 if config["tie_weights"] else depth
            project = min(depth, 1) if config["tie_weights"] else depth
            token = tensors[f"speculator.emb.{i}.weight"][path[depth]]
            z = tensors[f"speculator.proj.{project}.weight"] @ state + emb_weight / state_weight * token
            normed = norm(z) * tensors[f"speculator.ln.{i}.weight"] + tensors[f"speculator.ln.{i}.bias"]
            state = normed * 0.5 * (1 + torch.erf(normed / math.sqrt(2)))
            logits.append(tensors[f"speculator.head.{i}.weight"] @ state)
        return logits

    return formula


def eagle_formula(tensors: Tensors, config: Config, ids: list[int], factor: float = 1.0) -> Formula:
    """`ids` count hidden states, 0 being the embedding."""
    tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = hidden_states(model, text)
        embedding = tensors.get("embed_tokens.weight", model.model.embed_tokens.weight.detach())
        features = [tensors["fc.weight"] @ torch.cat([hidden[i][t] for i in ids]) for t in range(len(text))]
        tokens = [*text[1:], path[0]]  # behind each feature
        keys: list[Tensor] = []
        values: list[Tensor] = []
        logits = []
        for position in range(len(text) + len(path) - 1):
            feature, token = features[position], embedding[tokens[position]]
            normed = rms(feature, tensors["midlayer.hidden_norm.weight"], eps)
            joint = torch.cat([rms(token, tensors["midlayer.input_layernorm.weight"], eps), normed])
            query, key, value = (tensors[f"midlayer.self_attn.{n}_proj.weight"] @ joint for n in "qkv")
            keys.append(rotate_heads(key, dim, position, theta, factor))
            values.append(value)
            if position < len(text) - 1:
                continue
            query = rotate_heads(query, dim, position, theta, factor)
            found = attend(query, keys, values, heads, kv_heads, dim)
            x = normed if config.get("norm_before_residual") else feature
            x = x + tensors["midlayer.self_attn.o_proj.weight"] @ found
            x = x + feed_forward(
                rms(x, tensors["midlayer.post_attention_layernorm.weight"], eps), tensors, "midlayer.mlp."
            )
            output = tensors.get("lm_head.weight", model.lm_head.weight.detach())
            drafted = output @ rms(x, tensors["norm.weight"], eps)
            named = torch.arange(len(drafted)) + tensors.get("d2t", torch.zeros(len(drafted), dtype=torch.long))
            logits.append(expand(drafted, named))
            features.append(x)
            if len(logits) < len(path):
                tokens.append(path[len(logits)])
        return logits

    return formula


def dflash_formula(tensors: Tensors, config: Config) -> Formula:
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta, size = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"], config["block_size"]
    ids, mask = config["dflash_config"]["target_layer_ids"], config["dflash_config"]["mask_token_id"]
    causal = config.get("is_causal", False)

    def formula(model: PreTrainedModel, text: list[int], path: list[int]) -> list[Tensor]:
        hidden = hidden_states(model, text)
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
                return rotate_heads(torch.cat(normed), dim, position, theta)

            normed = [rms(x, tensors[names["input_layernorm"]], eps) for x in block]
            rows = [*context, *normed]
            keys = [project(x, "k", position) for position, x in enumerate(rows)]
            values = [tensors[f"{attention}v_proj.weight"] @ x for x in rows]
            after = []
            for slot, x in enumerate(block):
                end = len(text) + slot + 1 if causal else len(rows)
                query = project(normed[slot], "q", len(text) + slot)
                found = attend(query, keys[:end], values[:end], heads, kv_heads, dim)
                x = x + tensors[f"{attention}o_proj.weight"] @ found
                x = x + feed_forward(
                    rms(x, tensors[names["post_attention_layernorm"]], eps), tensors, f"layers.{layer}.mlp."
                )
                after.append(x)
            block = after
        output = model.lm_head.weight.detach()
        return [output @ rms(x, tensors["norm.weight"], eps) for x in block[1:]]

    return formula
