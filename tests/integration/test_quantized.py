"""Quantised targets: int8 weights of medhead, torchao, bitsandbytes and PyTorch's dynamic quantisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import noise_heads, tiny_llama
from families import ACCEPTED, tiny
from medhead import Decoder, MedheadError, load_model
from medhead.cli.main import main
from medhead.errors import UnsupportedTargetError
from medhead.heads import save_heads
from medhead.model.block_weights import BlockLinear, use_blocks
from medhead.model.output_rows import output_rows
from medhead.model.target import Target
from medhead.user_cache import fingerprint

PROMPT, MASK = torch.tensor([[5, 9, 3, 12, 7], [0, 0, 8, 9, 10]]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
LENGTH = {"max_new_tokens": 24, "attention_mask": MASK}
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # bitsandbytes stores blocks of 64 weights


def torchao(name: str, **options: Any) -> Callable[[Any], None]:
    def quantize(model: Any) -> None:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        if "granularity" in options:
            options["granularity"] = getattr(quantization, options["granularity"])()
        quantization.quantize_(model, getattr(quantization, name)(**options))

    return quantize


def torchao_int4(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    quantization.quantize_(model, config)


def bitsandbytes_nf4(model: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                linear = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                linear.weight = bnb.nn.Params4bit(child.weight.data.clone(), requires_grad=False, quant_type="nf4")
                setattr(module, name, linear.to("cpu"))


stored, int8, int4 = (partial(use_blocks, weights=weights) for weights in ("stored", "int8", "int4"))

WEIGHT_ONLY: dict[str, Callable[[Any], None]] = {
    "stored": stored,
    "int8": int8,
    "int4": int4,
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao_int4,
    "bitsandbytes nf4": bitsandbytes_nf4,
}


def quantised(name: str, **changes: Any) -> Any:
    model = tiny_llama(**(SIZES | changes))
    WEIGHT_ONLY[name](model)
    return model


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_the_text_is_that_of_the_quantised_model(name: str) -> None:
    model: Any = quantised(name)
    expected = model.generate(PROMPT, do_sample=False, **LENGTH)
    target = Target(model)
    sampled = Decoder(target, "none").generate(PROMPT, do_sample=True, seed=4, **LENGTH)
    heads = noise_heads(target, "block_recurrent"), noise_heads(target, "attention_last", draft_vocab=20)
    for proposer, options in (
        ("none", {}),
        ("ngram", {}),
        ("heads", {"heads": heads[0]}),
        ("hybrid", {"heads": heads[1]}),
    ):
        decoder = Decoder(target, proposer, tree_size=24, **options)
        assert decoder.generate(PROMPT, do_sample=False, **LENGTH).tolist() == expected.tolist(), proposer
        assert decoder.generate(PROMPT, do_sample=True, seed=4, **LENGTH).tolist() == sampled.tolist(), proposer


@pytest.mark.parametrize("name", ["stored", "int8", "int4", "torchao int8", "torchao int4"])
def test_a_recorded_step_of_a_quantised_model(name: str) -> None:
    model = quantised(name)
    expected = model.generate(PROMPT, do_sample=False, **LENGTH)
    target = Target(model)
    decoder = Decoder(target, "heads", heads=noise_heads(target), tree_size=6, step="recorded")
    assert decoder.generate(PROMPT, do_sample=False, **LENGTH).tolist() == expected.tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["int8", "torchao int8"])
def test_heads_read_the_rows_of_the_quantised_output_matrix(name: str, tied: bool) -> None:
    plain = tiny_llama(**SIZES, tie_word_embeddings=tied)
    target = Target(quantised(name, tie_word_embeddings=tied))
    assert (target.vocab_size, target.hidden_size, target.dtype) == (64, 64, torch.float32)
    weight, bias = output_rows(target)
    expected: Any = plain.lm_head.weight.detach()
    assert bias is None
    assert torch.equal(target.embedding.weight, plain.get_input_embeddings().weight)  # not rounded, tied or not
    torch.testing.assert_close(weight, expected, atol=float(expected.abs().max()) / 127, rtol=0)
    tokens = torch.tensor([9, 3])
    assert torch.equal(output_rows(target, tokens)[0], weight[tokens])


def test_a_bias_is_kept() -> None:
    model = tiny("phi", ACCEPTED["phi"])  # its output matrix has a bias
    nn.init.normal_(model.lm_head.bias)
    expected = model.lm_head.bias.detach().clone()
    int8(model)
    bias = output_rows(Target(model))[1]
    assert bias is not None
    torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_load_model_with_weights(weights: str, folders: dict[str, Path]) -> None:
    plain, rounded = (load_model(folders["model"], "cpu", weights=weights) for weights in ("full", weights))
    kinds = [type(module) for module in rounded.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(BlockLinear) == 2 * 7 + 1
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        logits, expected = rounded(ids).logits, plain(ids).logits
    error = float((logits - expected).abs().max()) / float(expected.abs().max())
    least, most = {"stored": (0, 1e-5), "int8": (1e-5, 0.1), "int4": (1e-3, 1)}[weights]
    assert least <= error < most


def test_heads_of_the_float_model_serve_the_int8_model(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    save_heads(noise_heads(Target(model), "recurrent"), model, tmp_path / "heads")
    int8(model)
    decoder = Decoder(model, heads=tmp_path / "heads", tree_size=12)
    expected = model.generate(PROMPT, do_sample=False, **LENGTH)
    assert decoder.generate(PROMPT, do_sample=False, **LENGTH).tolist() == expected.tolist()


def test_the_command_line(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(folders["model"]), "--heads", str(folders["recurrent"]), "--prompt", "Once upon", "--raw"]
    options += ["--max-new-tokens", "12", "--weights", "int8", "--check", "--tree-size", "8", "--device", "cpu"]
    assert main(["generate", *options]) == 0
    assert "identical" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "device", "reason"),
    [
        ("int3", "cpu", "weights must be full, stored, int8 or int4, got 'int3'"),
        ("int8", "meta", "int8 weights run on a CPU"),
    ],
)
def test_other_weights_are_refused(weights: str, device: str, reason: str, folders: dict[str, Path]) -> None:
    with pytest.raises(MedheadError, match=reason) as refusal:
        load_model(folders["model"], device, "float32", weights=weights)
    assert "\n" not in str(refusal.value)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(MedheadError, match=r"does not run with int8 weights|has no plain linear layers"):
        int8(tiny("gpt2", ACCEPTED["gpt2"]).transformer)


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_families_with_int8_weights(name: str) -> None:
    if name not in ACCEPTED:
        pytest.skip("not in this version of transformers")
    model: Any = tiny(name, ACCEPTED[name])
    int8(model)
    expected = model.generate(PROMPT, do_sample=False, **LENGTH)
    assert (
        Decoder(model, "ngram", tree_size=12).generate(PROMPT, do_sample=False, **LENGTH).tolist() == expected.tolist()
    )


def quantize_dynamic(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def quantize_layers_dynamic(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model.model, {nn.Linear}, inplace=True)


PER_PASS = "quantises the activations of all tokens of a pass together"
REFUSED = {
    "quantize_dynamic": (quantize_dynamic, PER_PASS),
    "quantize_dynamic but for the output matrix": (quantize_layers_dynamic, PER_PASS),
    "torchao, a scale per pass": (torchao("Int8DynamicActivationInt8WeightConfig", granularity="PerTensor"), PER_PASS),
    "torchao, a scale per token": (
        torchao("Int8DynamicActivationInt8WeightConfig"),
        "rounds activations to a few bits",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_quantised_activations_are_refused_in_float32(name: str) -> None:
    quantize, reason = REFUSED[name]
    model = tiny_llama(**SIZES)
    quantize(model)
    with pytest.raises(UnsupportedTargetError, match=reason) as refusal:
        Decoder(model)
    assert "\n" not in str(refusal.value)


def test_activations_quantised_by_token_are_decoded_in_bfloat16() -> None:
    model = tiny_llama(**SIZES).bfloat16()
    torchao("Int8DynamicActivationInt8WeightConfig")(model)
    with Decoder(model, "ngram", tree_size=8) as decoder:
        assert decoder.generate(PROMPT, do_sample=False, **LENGTH).shape == (2, 29)


@pytest.mark.parametrize("name", ["int8", "torchao int8"])
def test_costs_of_quantised_and_plain_models_are_kept_apart(name: str) -> None:
    assert fingerprint(Target(tiny_llama(**SIZES)), 1) != fingerprint(Target(quantised(name)), 1)


def test_costs_of_kinds_of_blocks_are_kept_apart() -> None:
    found = {fingerprint(Target(quantised(name)), 1) for name in ("stored", "int8", "int4")}
    assert len(found) == 3


@pytest.mark.parametrize("name", ["stored", "int8", "int4"])
def test_the_weights_of_blocks_are_weights_of_the_model(name: str) -> None:
    """What tells models apart by their weights sees another number in a block: a receipt, the state of a target."""
    from medhead.model.fingerprint import model_state
    from medhead.receipt import weights_hash

    models = [quantised(name), quantised(name)]
    assert weights_hash(models[0]) == weights_hash(models[1])
    with torch.no_grad():
        models[1].model.layers[0].mlp.up_proj.data.flatten()[0] ^= 1
    assert weights_hash(models[0]) != weights_hash(models[1])
    target = Target(models[0])
    before = model_state(target)
    models[0].model.layers[1].mlp.up_proj.data.data.flatten()[0] ^= 1  # not counted by PyTorch
    assert model_state(target) != before


def test_a_captured_step_sees_that_quantised_weights_change() -> None:
    from medhead.model.fingerprint import model_state

    model = quantised("torchao int8")
    target = Target(model)
    before = model_state(target)
    weight: Any = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.scale.mul_(2)
    assert model_state(target) != before
