"""Every method of PEFT: the text of `PeftModel.generate`, or one line that refuses."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.model.target import Target

METHODS = {str(kind.value): config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
REFUSED = {"LILY", "POLY", "SHADOW"}
TOKENS = list(range(3, 40))
FIELDS: dict[str, dict[str, Any]] = {  # what a method needs for a model of width 32
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "DELORA": {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "delora_lambda": 60},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"n_tasks": 2, "n_skills": 2, "r": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": TOKENS, "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "r": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
AT_THE_ENDS: dict[
    str, dict[str, Any]
] = {  # adapters of the embedding, of the output matrix and of weights next to them
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens_of_both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "dora": {"use_dora": True},
    "dora_head": {"use_dora": True, "target_modules": ["lm_head"]},
    "bias": {"bias": "all", "lora_bias": True},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
}
PROMPT = torch.tensor([[5, 9, 3, 12, 7]])
LENGTH = {"max_new_tokens": 16, "do_sample": False}


def randomise(module: nn.Module, *names: str, seed: int = 0) -> None:
    """Give all trainable parameters, and those whose name contains one of `names`, other values."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or any(part in name for part in names):
            nn.init.normal_(parameter, std=0.5)


def adapted(config: Any, **changes: Any) -> Any:
    """A tiny model with a randomised adapter."""
    model = get_peft_model(tiny_llama(**changes), config).eval()
    randomise(model)
    return model


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj", "v_proj"], "r": 4} | fields))


def new_tokens(ids: Tensor) -> list[int]:
    return ids[0, PROMPT.shape[1] :].tolist()


def assert_same_text(model: Any, decoder: Decoder, unlike: Tensor | None = None) -> None:
    """The decoder's text is that of PEFT, called either way, and not the base model's."""
    expected = model.generate(input_ids=PROMPT, **LENGTH)
    assert new_tokens(decoder.generate(PROMPT, **LENGTH)) == new_tokens(expected)
    assert new_tokens(model.generate(input_ids=PROMPT, custom_generate=decoder, **LENGTH)) == new_tokens(expected)
    if unlike is not None:
        assert new_tokens(expected) != new_tokens(unlike)


@pytest.fixture(scope="module")
def plain(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, **LENGTH)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method: str, plain: Tensor) -> None:
    if method == "XLORA":
        pytest.skip("needs folders of adapters, see below")
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in inspect.signature(METHODS[method]).parameters:
        fields["target_modules"] = ["q_proj", "v_proj"]
    try:
        model = adapted(METHODS[method](**fields | FIELDS.get(method, {})))
    except ImportError as error:
        pytest.skip(str(error))
    if method in REFUSED or issubclass(METHODS[method], peft.PromptLearningConfig):
        with pytest.raises(MedheadError, match=method) as refusal:
            Decoder(model)
        assert "PeftModel.generate" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return
    expected = model.generate(input_ids=PROMPT, **LENGTH)
    ours = Decoder(model, probe=False).generate(PROMPT, **LENGTH)
    assert new_tokens(ours) == new_tokens(expected) != new_tokens(plain)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(AT_THE_ENDS))
def test_adapters_at_the_ends(name: str, tied: bool) -> None:
    if tied and name == "tokens_of_both":
        pytest.skip("one matrix")
    base = tiny_llama(tie_word_embeddings=tied).generate(PROMPT, **LENGTH)
    model = adapted(lora(**AT_THE_ENDS[name]), tie_word_embeddings=tied)
    target = Target(model, probe=False)
    assert_same_text(model, Decoder(target, heads=noise_heads(target, depth=2)), base)


def test_prompt_learning_of_a_decoded_model_is_refused(plain: Tensor) -> None:
    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    decoder = Decoder(model.get_base_model())
    with pytest.raises(MedheadError, match="PROMPT_TUNING"):
        model.generate(input_ids=PROMPT, custom_generate=decoder, **LENGTH)
    assert new_tokens(decoder.generate(PROMPT, **LENGTH)) == new_tokens(plain)
    with model.disable_adapter():
        assert new_tokens(model.generate(input_ids=PROMPT, custom_generate=decoder, **LENGTH)) == new_tokens(plain)


def test_activated_lora_is_refused_while_it_is_enabled(plain: Tensor) -> None:
    model = adapted(lora(alora_invocation_tokens=[9, 3]))
    with pytest.raises(MedheadError, match="activated LoRA"):
        Decoder(model)
    with model.disable_adapter():
        decoder = Decoder(model)
        assert new_tokens(decoder.generate(PROMPT, **LENGTH)) == new_tokens(plain)
    with pytest.raises(MedheadError, match="activated LoRA"):
        decoder.generate(PROMPT, **LENGTH)


def test_x_lora_is_refused(tmp_path: Path) -> None:
    adapted(lora()).save_pretrained(tmp_path)
    base = tiny_llama()
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"0": str(tmp_path)})
    base.config.use_cache = False  # which X-LoRA asks for
    model = get_peft_model(base, config)
    with pytest.raises(MedheadError, match="XLORA"):
        Decoder(model)


def test_adapter_names_of_rows_are_refused() -> None:
    model = adapted(lora())
    decoder = Decoder(model)
    names = ["default", "__base__"]
    with pytest.raises(MedheadError, match="adapter_names"):
        model.generate(input_ids=PROMPT.repeat(2, 1), adapter_names=names, custom_generate=decoder, **LENGTH)
    assert_same_text(model, decoder)


def test_switched_and_disabled_adapters(plain: Tensor) -> None:
    model = adapted(lora())
    model.add_adapter("second", lora(target_modules=["up_proj", "down_proj"]))
    randomise(model, "second", seed=1)
    decoder, texts = Decoder(model), []
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        assert_same_text(model, decoder, plain)
        texts.append(new_tokens(decoder.generate(PROMPT, **LENGTH)))
    assert texts[0] == texts[2] != texts[1]
    with model.disable_adapter():
        assert new_tokens(decoder.generate(PROMPT, **LENGTH)) == new_tokens(plain)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    assert_same_text(model, decoder, plain)


def test_mixed_adapters(plain: Tensor) -> None:
    model = get_peft_model(tiny_llama(), lora(), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(target_modules=["up_proj"]))
    model.set_adapter(["default", "second"])
    randomise(model.eval())
    assert_same_text(model, Decoder(model), plain)


@pytest.mark.parametrize("step", ["loop", pytest.param("recorded", marks=pytest.mark.slow)])
def test_adapters_that_come_and_go(step: str, plain: Tensor) -> None:
    base = tiny_llama()
    target = Target(base)
    decoder = Decoder(target, "heads", heads=noise_heads(target, depth=2), tree_size=6, step=step)
    decoder.generate(PROMPT, **LENGTH)
    model = get_peft_model(base, lora()).eval()
    randomise(model)
    assert_same_text(model, decoder, plain)
    model.merge_adapter()
    assert_same_text(model, decoder, plain)
    model.unmerge_adapter()
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)
    assert_same_text(model, decoder, plain)
    merged = model.merge_and_unload()
    expected = merged.generate(PROMPT, **LENGTH)
    assert new_tokens(decoder.generate(PROMPT, **LENGTH)) == new_tokens(expected)


def test_an_adapter_of_the_output_matrix_needs_a_new_decoder() -> None:
    base = tiny_llama()
    decoder = Decoder(base)
    model = get_peft_model(base, lora(target_modules=["lm_head"])).eval()
    randomise(model)
    with pytest.raises(MedheadError, match="make a new Decoder"):
        decoder.generate(PROMPT, **LENGTH)
    assert_same_text(model, Decoder(model))
