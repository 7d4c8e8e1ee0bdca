"""Fused kernels in place of a model's modules, interpreted on a CPU: what they serve, and that they change nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_conformance import random_tree
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import tiny_llama
from fake_cuda import Operations
from families import ACCEPTED, exists, tiny
from medhead import Decoder
from medhead.bench.captured_steps import loop_buffers
from medhead.compile.backends import fixed_step
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise
from medhead.model.fused import FusedModules
from medhead.model.target import Target
from medhead.proposers.base import PlainProposer
from triton_here import interpreted, needs_triton

pytestmark = [needs_triton, interpreted]
LAUNCHES = {"medhead.tree_attention.default": 2}
NOTHING = {"aten._unsafe_view.default", "aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}


@torch.inference_mode()
def verify(target: Target, nodes: int = 3) -> Tensor:
    """The logits of a random tree behind two tokens."""
    with target.active():
        cache = target.new_cache(1, 16)
        target.prefill(cache, [[5, 6]])
        return target.verify(cache, random_tree(1, nodes, 60, torch.Generator().manual_seed(0)))[0]


@torch.no_grad()
def spread_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Give norms weights that tell Llama's from Gemma's."""
    for part, weight in model.named_parameters():
        if weight.ndim == 1 and "norm" in part:
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def kinds(target: Target) -> set[str]:
    """The parts of class names that say what the kernels serve."""
    names = {type(module).__name__ for module in target.fused.forwards}
    return {kind for kind in ("Norm", "MLP", "Attention", "DecoderLayer", "Linear") for name in names if kind in name}


ALL = {"Norm", "MLP", "Attention", "DecoderLayer", "Linear"}
SANDWICH = ALL - {"DecoderLayer"}  # norms before and after attention and MLP


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", ALL), ("qwen2", ALL), ("qwen3", ALL), ("mistral", ALL), ("gemma", ALL), ("gemma2", SANDWICH),
     ("gemma3_text", SANDWICH), ("granite", SANDWICH), ("glm", {"Norm", "Linear", "DecoderLayer"}),
     ("cohere2", {"MLP", "Linear"}), ("phi", {"Linear"})],
)  # fmt: skip
def test_families(name: str, expected: set[str]) -> None:
    """What is recognised by what it computes; the logits of a tree stay those of the model's own modules."""
    if not exists(name):
        pytest.skip(f"no {name} here")
    changes = {"num_hidden_layers": 1, "layer_types": None} | (
        {"residual_multiplier": 0.2} if name == "granite" else {}
    )
    model = spread_norms(tiny(name, ACCEPTED[name] | changes))
    before = {part: weight.clone() for part, weight in model.state_dict().items()}
    own = verify(Target(model, probe=False))
    target = Target(model, probe=False, fused=True)
    assert kinds(target) == expected
    found = verify(target)
    assert float((found - own).abs().max()) <= 2e-5 * float(own.abs().max())
    assert all(torch.equal(weight, before[part]) for part, weight in model.state_dict().items())
    assert "forward" not in model.model.layers[0].__dict__


def test_text_and_gradients_are_those_of_the_model() -> None:
    model, ids = tiny_llama(num_hidden_layers=1), torch.tensor([[7, 8, 9, 7, 8]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    decoder = Decoder(model, "ngram", fused=True, tree_size=4)
    assert torch.equal(decoder.generate(ids, max_new_tokens=5), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    with decoder.target.active():
        hidden, _ = decoder.target.read_hidden(model, ids, torch.arange(5)[None])
        with torch.no_grad():  # without a cache nothing would rotate the keys
            again, _ = decoder.target.read_hidden(model, ids, torch.arange(5)[None])
    assert torch.equal(hidden, model.model(ids).last_hidden_state)
    assert torch.equal(again, hidden)
    hidden.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None


def per_layer(fused: bool) -> int:
    """Launches of one layer in a captured step in float16: those of two layers less those of one."""
    counts = []
    for layers in (1, 2):
        model = tiny_llama(num_hidden_layers=layers).to(torch.float16)
        target, proposer = Target(model, probe=False, attention="triton", fused=fused), PlainProposer()
        with target.active(), torch.no_grad():
            like = loop_buffers(target, 1, 8, proposer)
            buffers = StepBuffers.allocate(like, 1, 64, proposer.steps)
            with Operations() as seen:
                fixed_step(target, proposer, GumbelNoise(target.vocab_size, target.device))(buffers)
        counts.append(sum(LAUNCHES.get(name, 1) for name in seen.names if name not in NOTHING))
    return counts[1] - counts[0]


def test_launches_of_a_layer() -> None:
    assert per_layer(False) >= 40
    assert per_layer(True) <= 12


def test_weights_are_merged_only_where_fused_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default an earlier state dict keeps the memory of the parameters."""
    model: Any = tiny_llama(num_hidden_layers=1)
    before = model.state_dict()
    first = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([first]))  # a model on CUDA, for the default
    for enabled in (None, True):
        fused = FusedModules(model, {8}, enabled)
        with torch.inference_mode(), fused.active():
            pass
        moved = {name for name, weight in model.state_dict().items() if weight.data_ptr() != before[name].data_ptr()}
        assert model.model.norm in fused.forwards
        assert {name.split(".")[-2] for name in moved} == (
            {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} if enabled else set()
        )


def test_what_others_watch_or_replace_is_left_alone() -> None:
    model = tiny_llama(num_hidden_layers=1)
    layer, seen = model.model.layers[0], []
    layer.mlp.act_fn.register_forward_hook(lambda *given: None)
    layer.post_attention_layernorm.register_forward_hook(lambda module, given, out: seen.append(out))
    layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj)
    target = Target(model, probe=False, fused=True)
    served = set(target.fused.forwards)
    assert layer.input_layernorm in served
    assert not served & {layer, layer.mlp, layer.post_attention_layernorm, layer.self_attn.q_proj}
    verify(target)
    assert seen


def add_hook(layer: Any, name: str) -> None:
    getattr(layer if "norm" in name else layer.mlp, name).register_forward_hook(lambda module, given, out: 3 * out)


def add_adapter(layer: Any, name: str) -> None:
    """An adapter like PEFT's for norms: it hands out the weight of its base layer."""

    class Tuned(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.base(x)

    setattr(layer, name, Tuned(getattr(layer, name)))


@pytest.mark.parametrize(
    ("change", "name"),
    [(add_hook, "act_fn"), (add_hook, "post_attention_layernorm"), (add_adapter, "post_attention_layernorm")],
)
def test_what_others_change_later_is_left_alone(change: Any, name: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    target = Target(model, probe=False, fused=True)
    before = verify(target)
    change(model.model.layers[0], name)
    found, own = verify(target), verify(Target(model, probe=False))
    assert not torch.allclose(found, before, rtol=1e-2)
    assert float((found - own).abs().max()) <= 2e-5 * float(own.abs().max())


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes the check of its module here, and fails that of the model."""
    monkeypatch.setattr("medhead.model.fused._is_layer", lambda *given: True)
    model = tiny("granite", ACCEPTED["granite"] | {"num_hidden_layers": 1, "residual_multiplier": 0.2})
    own = verify(Target(model, probe=False))
    with pytest.warns(
        UserWarning, match="fused kernels do not serve GraniteForCausalLM, which is slower: logits differ"
    ):
        target = Target(model, probe=False, fused=True)
    assert not target.fused.forwards
    assert torch.equal(verify(target), own)


def test_merged_weights_are_one_piece_of_memory_that_follows_the_model() -> None:
    model: Any = tiny_llama(num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    first = Target(model, probe=False, fused=True)
    place, size = attention.q_proj.weight.data_ptr(), attention.q_proj.weight.nbytes
    assert attention.k_proj.weight.data_ptr() == place + size
    Target(model, probe=False, fused=True)  # a second one takes what is there
    assert attention.q_proj.weight.data_ptr() == place
    own = verify(first)
    attention.v_proj.weight = nn.Parameter(2 * attention.v_proj.weight.detach())
    assert not torch.equal(verify(first), own)
    assert not any(weight.is_inference() for weight in model.parameters())  # `verify` runs in inference mode
    assert float((verify(first) - verify(Target(model, probe=False))).abs().max()) <= 2e-5 * float(own.abs().max())
