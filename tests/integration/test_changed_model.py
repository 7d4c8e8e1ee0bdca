"""A model that changes while a decoder is open: the new model's text, or one line that asks for a new decoder."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from conftest import noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.model.hf_patch import patch_generate
from medhead.model.target import Target

PROMPT = torch.tensor([[5, 9, 3, 12, 7]])
LENGTH = {"max_new_tokens": 16, "do_sample": False}
SIZES: dict[str, Any] = {"vocab": 256, "hidden_size": 128, "intermediate_size": 256}  # layers that are worth packing


def train_one_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()


def write_through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.3).add_(0.01)


def replace_layer(model: Any) -> None:
    linear = nn.Linear(128, 128, bias=False)
    nn.init.normal_(linear.weight, std=0.3)
    model.model.layers[0].self_attn.q_proj = linear


def prune(model: Any) -> None:
    from torch.nn.utils.prune import l1_unstructured

    for layer in model.model.layers:
        l1_unstructured(layer.mlp.up_proj, "weight", 0.5)


def replace_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    old = mlp.forward
    mlp.forward = lambda x: 0.5 * old(x)


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "optimizer": train_one_step,
    "data": write_through_data,
    "load": lambda model: model.load_state_dict(tiny_llama(seed=9, **SIZES).state_dict()),
    "assign": lambda model: model.load_state_dict(tiny_llama(seed=9, **SIZES).state_dict(), assign=True),
    "layer": replace_layer,
    "prune": prune,
    "hook": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 0.5 * output),
    "forward": replace_forward,
    "tie": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
}


def copy_layer(model: Any) -> None:
    """Its attention reads another configuration than a target has changed."""
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])
    model.model.layers[0].self_attn.layer_idx = 0


REFUSED: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "device": lambda model: model.to("meta"),
    "larger": lambda model: model.resize_token_embeddings(300, mean_resizing=False),
    "smaller": lambda model: model.resize_token_embeddings(200),
    "output": lambda model: model.set_output_embeddings(nn.Linear(128, 256, bias=False)),
    "copied layer": copy_layer,
    "quantised": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True),
}


RECORDED = ["data", "hook", "forward"]  # changes of what a trace holds


@pytest.mark.parametrize(
    ("change", "step"), [*((name, "loop") for name in sorted(FOLLOWED)), *((name, "recorded") for name in RECORDED)]
)
def test_a_decoder_follows(change: str, step: str) -> None:
    model = tiny_llama(**SIZES)
    target = Target(model, packed=True)
    decoder = Decoder(target, "heads", heads=noise_heads(target, depth=2), tree_size=6, step=step)
    before = decoder.generate(PROMPT, **LENGTH)
    FOLLOWED[change](model)
    after, expected = decoder.generate(PROMPT, **LENGTH), model.generate(PROMPT, **LENGTH)
    assert after.tolist() == expected.tolist() != before.tolist()


@pytest.mark.slow
def test_a_compiled_pass_follows() -> None:
    model = tiny_llama(**SIZES)
    decoder = Decoder(model, step="compiled")
    before = decoder.generate(PROMPT, **LENGTH)
    write_through_data(model)
    after, expected = decoder.generate(PROMPT, **LENGTH), model.generate(PROMPT, **LENGTH)
    assert after.tolist() == expected.tolist() != before.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("change", sorted(REFUSED))
def test_a_decoder_refuses(change: str) -> None:
    model = tiny_llama(**SIZES)
    decoder = Decoder(model, probe=False)
    REFUSED[change](model)
    with pytest.raises(MedheadError, match="make a new Decoder") as refusal:
        decoder.generate(PROMPT, **LENGTH)
    assert "\n" not in str(refusal.value)


def test_a_weight_that_a_hook_computes_is_not_packed() -> None:
    model = tiny_llama(**SIZES)
    up = model.model.layers[0].mlp.up_proj
    nn.utils.weight_norm(up)
    decoder = Decoder(model, packed=True)
    before = decoder.generate(PROMPT, **LENGTH)
    with torch.no_grad():
        up.weight_v.copy_(torch.randn_like(up.weight_v))
    expected = model.generate(PROMPT, **LENGTH)
    assert expected.tolist() != before.tolist()
    with torch.no_grad():
        up.weight_v.copy_(torch.randn_like(up.weight_v))
    assert decoder.generate(PROMPT, **LENGTH).tolist() == model.generate(PROMPT, **LENGTH).tolist()


def test_every_module_keeps_its_mode() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    decoder = Decoder(model)
    decoder.generate(PROMPT, **LENGTH)
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.eval().model.norm.train()
    decoder.generate(PROMPT, **LENGTH)
    assert [name for name, module in model.named_modules() if module.training] == ["model.norm"]


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save", "save_pretrained"])
def test_copies_of_a_model_with_an_open_decoder(how: str, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    decoder = Decoder(model)
    expected = decoder.generate(PROMPT, **LENGTH)
    if how == "pickle":
        stored = pickle.dumps(model)
        assert b"medhead" not in stored  # it loads where medhead is not installed
        other = pickle.loads(stored)
    elif how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        model.save_pretrained(tmp_path)
        other = LlamaForCausalLM.from_pretrained(tmp_path)
    columns: list[int] = []
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the copy must not depend on the original
    assert other.generate(PROMPT, **LENGTH).tolist() == expected.tolist()
    with Decoder(other) as second:
        streamer: Any = type("", (), {"put": lambda self, ids: columns.extend(ids.flatten().tolist()), "end": int})()
        other.generate(PROMPT, custom_generate=second, streamer=streamer, **LENGTH)
    assert columns[-16:] == expected[0, 5:].tolist()


def test_a_patched_model_is_freed_with_its_last_reference() -> None:
    model = nn.Linear(1, 1)
    patch_generate(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
