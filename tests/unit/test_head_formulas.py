"""Every kind of heads against a plain re-statement of its paper's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from conftest import HEADS, noise_heads, packed_batch
from medhead.model.target import Target
from medhead_training.objective.unroll import sample_anchors, unroll


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """`[heads, tokens, dim]` turned by transformers."""
    config = LlamaConfig(head_dim=x.shape[-1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return apply_rotary_pos_emb(x[None], x[None], *LlamaRotaryEmbedding(config)(x, positions[None]))[0][0]


def split(x: Tensor, dim: int = 8) -> Tensor:
    """`[tokens, heads * dim]` to `[heads, tokens, dim]`."""
    return x.unflatten(-1, (-1, dim)).transpose(0, 1)


def eagle(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """EAGLE-3 at one anchor: a decoder layer over [embedding of the next token; feature], its outputs fed back."""
    layer, attention, fused = heads.midlayer, heads.midlayer.self_attn, heads.fc(features)
    stream, found = [(embeddings[at + 1], fused[at]) for at in range(anchor + 1)], []
    for depth in range(4):
        x = torch.stack([torch.cat([layer.input_layernorm(e), layer.hidden_norm(f)]) for e, f in stream])
        positions = torch.arange(len(x))
        query = rope(split(attention.q_proj(x)), positions)[:, -1:]
        key, value = rope(split(attention.k_proj(x)), positions), split(attention.v_proj(x))
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], enable_gqa=True)[0, :, 0].flatten()
        residual = layer.hidden_norm(stream[-1][1]) if heads.config.norm_before_residual else stream[-1][1]
        hidden = residual + attention.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        found.append(heads.norm(hidden))
        stream.append((embeddings[anchor + 2 + depth], hidden))
    return found


def block(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """A block at one anchor: queries from [root, masks], keys and values from the features before it and from itself."""
    config, context = heads.config, heads.hidden_norm(heads.fc(features[: anchor + 1]))
    slots, root = heads.slots, embeddings[anchor + 1]
    if config.mask_token_id < 0:
        x = torch.cat([(root + heads.mask_embedding[0])[None], heads.mask_embedding[1:]])
    else:
        x = torch.stack([root] + [heads.mask_row] * (slots - 1))
    positions = torch.arange(anchor + 1 + slots)
    seen = torch.ones(slots, len(positions), dtype=torch.bool)
    if config.causal:
        seen = seen.tril(anchor + 1)
    for layer in heads.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        query = rope(attention.q_norm(split(attention.q_proj(normed))), positions[-slots:])
        both = torch.cat([context, normed])
        key, value = rope(attention.k_norm(split(attention.k_proj(both))), positions), split(attention.v_proj(both))
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], seen, enable_gqa=True)[0]
        x = x + attention.o_proj(out.transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    found, state = [], context[anchor]
    for depth, slot in enumerate(x if config.root_slot_predicts else x[1:]):
        token = embeddings[anchor + 1 + depth]
        if config.correction == "recurrent":
            state = heads.cell(state, heads.cell.encode(token), depth)
            found.append(heads.norm(slot + state))
        else:
            found.append(heads.norm(slot) + (heads.parent(token) if config.correction == "parent" else 0.0))
    return found


def sequential(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """`MLPSpeculator` (arXiv 2404.19124) with factored matrices."""
    config, state, found = heads.config, features[anchor], []
    state_weight = 0.5 ** (0.5 / config.depth)
    token_weight = (1 - state_weight**2) ** 0.5 * (config.inner_size / 2) ** 0.5
    if config.scale_input:
        state = state / (2 * (state.square().mean() + 1e-6)).sqrt()
    for depth in range(4):
        at = 0 if config.tie_weights else depth
        token = embeddings[anchor + 1 + depth]
        token = heads.embeddings[at][token] if config.own_embedding else heads.encoders[at](token)
        project = heads.first if depth == 0 else heads.proj[0 if config.tie_weights else depth - 1]
        z = project(state) + token_weight / state_weight * token
        z = z / (z.square().mean() + 1e-6).sqrt() * heads.norms[at].weight + heads.norms[at].bias
        state = F.gelu(z)
        found.append(state if config.own_output else heads.outputs[at](state))
    return found


def medusa(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """Residual blocks on the hidden state, and what the parent's token adds."""
    found = []
    for depth in range(4):
        x = features[anchor]
        for one in heads.heads[depth]:
            x = x + F.silu(F.linear(x, one.linear.weight, one.linear.bias))
        found.append(x if heads.correction is None else x + heads.correction(embeddings[anchor + 1 + depth]))
    return found


def recurrent(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """A state taken along the path by one cell."""
    state, found = features[anchor], []
    for depth in range(4):
        state = heads.cell(state, heads.cell.encode(embeddings[anchor + 1 + depth]), depth)
        found.append(heads.output_norm(state))
    return found


REFERENCES = {
    "attention": eagle,
    "block": block,
    "sequential": sequential,
    "medusa": medusa,
    "recurrent": recurrent,
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_kind_is_what_its_paper_says(target: Target, name: str) -> None:
    heads: Any = noise_heads(target, name)
    torch.manual_seed(4)
    texts, features = packed_batch([torch.randint(0, 64, (11,)).tolist()]), torch.randn(1, 11, heads.feature_size)
    anchors, real = sample_anchors(texts, 1.0)
    embeddings = target.embed(texts.ids[0])
    if HEADS[name].get("own_embedding"):
        embeddings = texts.ids[0] if name == "sequential_own" else heads.own_embedding(0)[texts.ids[0]]
    levels = list(unroll(heads, texts, features, target.embedding, anchors, real))
    for anchor in (0, 1, 5):
        expected = REFERENCES[heads.config.kind](heads, features[0], embeddings, anchor)
        assert len(expected) == len(levels) == 4
        for depth, level in enumerate(levels):
            found = level.features[level.at == anchor + 1 + depth][0]
            torch.testing.assert_close(found, expected[depth], rtol=1e-4, atol=1e-4)
