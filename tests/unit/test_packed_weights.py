"""Packed copies of a model's weights: the same text, an unchanged model, changes seen, memory freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from medhead import Decoder, MedheadError
from medhead.model import packed_linear as module
from medhead.model.packed_linear import PackedWeights
from medhead.model.target import Target
from medhead_kernels import block_linear
from medhead_kernels.packed_linear import can_pack

pytestmark = pytest.mark.skipif(block_linear.unavailable() is not None, reason=f"{block_linear.unavailable()}")


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Large enough to be packed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and can_pack(layer.weight)]


@pytest.mark.parametrize("proposer", ["none", "ngram", "recycling"])
def test_the_text_is_that_of_plain_decoding(model: LlamaForCausalLM, proposer: str) -> None:
    """Packed or not, and that of transformers; afterwards no layer is changed."""
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    for packed in (True, False):
        with Decoder(model, proposer, packed=packed) as decoder:
            assert torch.equal(decoder.generate(ids, max_new_tokens=40, do_sample=False), expected)
            assert (decoder.statistics.packed_bytes > 0) == packed
        assert not any("forward" in layer.__dict__ for layer in _layers(model))
    assert decoder.target.packed_weights.nbytes == 0


def test_layers_multiply_by_copies_while_active(model: LlamaForCausalLM) -> None:
    """Only plain layers whose `forward` was not replaced are packed."""
    layers = _layers(model)
    changed, kept = layers[0], layers[0].forward
    changed.forward = kept  # type: ignore[method-assign]
    weights = PackedWeights(model, True)
    with weights.active():
        assert all("forward" in layer.__dict__ for layer in layers[1:])
        assert changed.forward is kept
    assert changed.forward is kept
    assert not any("forward" in layer.__dict__ for layer in layers[1:])


def _new_weights(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _new_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def _merged(layer: nn.Linear) -> None:
    layer.weight.data += torch.randn_like(layer.weight)  # as PEFT merges adapters


@pytest.mark.parametrize("change", [_new_weights, _new_data, _merged])
def test_changes_between_texts_are_seen(model: LlamaForCausalLM, change: Any) -> None:
    """The next text is that of the changed model."""
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    with Decoder(model, "ngram", packed=True) as decoder:
        before = decoder.generate(ids, max_new_tokens=30, do_sample=False)
        for layer in model.modules():
            if type(layer) is nn.Linear:
                change(layer)
        expected = model.generate(ids, max_new_tokens=30, do_sample=False)
        assert not torch.equal(before, expected)
        assert torch.equal(decoder.generate(ids, max_new_tokens=30, do_sample=False), expected)


def test_memory_decides(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default copies take at most a quarter of the free memory."""
    size = sum({id(layer.weight): layer.weight.nbytes for layer in _layers(model)}.values())
    monkeypatch.setattr(module, "free_bytes", lambda: 4 * size)
    assert PackedWeights(model).enabled
    monkeypatch.setattr(module, "free_bytes", lambda: 4 * size - 4)
    assert not PackedWeights(model).enabled
    assert PackedWeights(model, True).enabled
    assert not PackedWeights(model, False).enabled
    assert module.free_bytes() > 0


@pytest.mark.parametrize(
    "names", [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
)
def test_a_container_has_less(tmp_path: Path, names: tuple[str, str]) -> None:
    """The limit of a control group counts; none, or one that says `max`, does not."""
    assert module.cgroup_free_bytes(tmp_path) == 1 << 62
    for name, text in zip(names, ("1000\n", "400\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert module.cgroup_free_bytes(tmp_path) == 600
    (tmp_path / names[0]).write_text("max\n")
    assert module.cgroup_free_bytes(tmp_path) == 1 << 62


def test_it_is_part_of_what_costs_are_kept_for(model: LlamaForCausalLM) -> None:
    """A packed target's passes have costs of their own."""
    from medhead.user_cache import fingerprint

    packed, plain = (Target(model, probe=False, packed=packed) for packed in (True, False))
    assert fingerprint(packed, 1) != fingerprint(plain, 1)


def test_without_the_kernel(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch multiplies, with a warning; who asks for copies is told why there are none."""
    monkeypatch.setattr(block_linear, "unavailable", lambda: "cpu_ops.cpp cannot be compiled (no compiler)")
    with pytest.warns(UserWarning, match="no compiler"):
        assert not PackedWeights(model).enabled
    assert not PackedWeights(model, False).enabled
    with pytest.raises(MedheadError, match="no compiler"):
        PackedWeights(model, True)
