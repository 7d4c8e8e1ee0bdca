"""Features of the target's layers equal transformers' hidden states, and no hook is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import noise_heads, read, tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder, MedheadError, TokenTree
from medhead.errors import UnsupportedTargetError
from medhead.model.target import Target

FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3_moe", "gemma2"]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_features_are_the_hidden_states_of_transformers(family: str) -> None:
    if not exists(family):
        pytest.skip(f"this version of transformers has no {family}")
    model: Any = tiny(family, ACCEPTED[family])
    model.set_attn_implementation("eager")  # supports every family
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [20, 3, 20, 4, 20, 5, 90]])
    states = model(ids, output_hidden_states=True).hidden_states
    target, before = Target(model, probe=False), hooks_of(model)  # transformers leaves hooks of its own
    norm = next(m for name, m in model.named_modules() if name.split(".")[-1] in ("norm", "ln_f", "final_layer_norm"))
    chunks: list[Tensor] = []

    def see(part: Tensor, start: int) -> None:
        assert start == 0
        chunks.append(part)

    for feature_layers in ([0], [1, 0], [0, 1, 2]):
        with target.active(feature_layers):
            _, features = read(target, ids)
            assert target.feature_size == 32 * len(feature_layers)
            cache = target.new_cache(2, 16)
            last = target.prefill(cache, [ids[0].tolist(), ids[1, :4].tolist()], see)
            chain = TokenTree.from_parents(torch.tensor([[8, 4], [20, 5]]), torch.tensor([0, 0]))
            _, verified = target.verify(cache, chain)
        for layer, feature in zip(feature_layers, features.split(32, -1), strict=True):
            if layer == 2:  # transformers returns the last layer's output after the norm
                feature = norm(feature)
            torch.testing.assert_close(feature, states[layer + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(chunks[-1][0], features[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[0], features[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[1], features[1, 3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(verified[1], features[1, 4:6], rtol=1e-4, atol=1e-4)
        assert hooks_of(model) == before
        assert target.feature_size == 32
    with target.active():
        _, hidden = read(target, ids)
    torch.testing.assert_close(hidden, states[-1], rtol=1e-4, atol=1e-4)


def test_hooks_are_removed_after_errors_too(model: PreTrainedModel, target: Target) -> None:
    before = hooks_of(model)

    def breaks() -> None:
        with target.active([0]):
            assert hooks_of(model) == before + 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert hooks_of(model) == before
    decoder = Decoder(model, heads=noise_heads(target, "attention"))
    decoder.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert hooks_of(model) == before


def test_a_model_whose_layers_cannot_be_found() -> None:
    model = tiny_llama()
    target, before = Target(model, probe=False), hooks_of(model)
    target.layers = 5
    with pytest.raises(UnsupportedTargetError, match="no module list of its 5 layers"), target.active([1]):
        pass
    assert hooks_of(model) == before


def test_one_set_of_feature_layers_at_a_time(target: Target) -> None:
    with target.active([0]):
        with target.active([0]):
            pass
        with pytest.raises(MedheadError, match=r"is read at layers \[0\] already, asked for \[1\]"), target.active([1]):
            pass
    with target.active(), pytest.raises(MedheadError, match="already"), target.active([1]):
        pass
