"""Vision-language models: texts after text and image prompts are those of `generate`; what cannot be is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import medhead
from conftest import noise_heads
from families import tiny
from medhead import Decoder
from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model.layout import decoder_layers
from medhead.model.target import Target
from vision_models import VISION, image_prompts, tiny_vision, vision_type_exists

FAST = ("gemma3", "llava", "qwen2_5_vl")
PROPOSERS = ("none", "lookahead", "recycling", "ngram")


def marked(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@cache
def model_of(name: str) -> PreTrainedModel:
    if not vision_type_exists(name):
        pytest.skip(f"this version of transformers has no {name}")
    return tiny_vision(name)


def text_prompts() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_texts(model: PreTrainedModel, prompts: dict[str, Tensor], proposers: tuple[str, ...]) -> Tensor:
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**prompts, **options)
    for proposer in proposers:
        with Decoder(model, proposer) as decoder:
            found = model.generate(**prompts, custom_generate=decoder, **options)
        assert found.tolist() == expected.tolist(), proposer
    return expected


@pytest.mark.parametrize("name", marked(sorted(VISION)))
def test_text_prompts_give_the_text_of_generate(name: str) -> None:
    assert_same_texts(model_of(name), text_prompts(), PROPOSERS if name in FAST else PROPOSERS[:2])


@pytest.mark.parametrize("name", marked(sorted(name for name, images in VISION.items() if images)))
def test_image_prompts_give_the_text_of_generate(name: str) -> None:
    model = model_of(name)
    prompts = image_prompts(name, model)
    found = assert_same_texts(model, prompts, PROPOSERS)
    text = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    blind = model.generate(**text, max_new_tokens=24, do_sample=False)
    assert found.tolist() != blind.tolist(), "the image changes no token, so the test shows nothing"


@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_heads_draft_text_after_an_image(kind: str) -> None:
    model = model_of("qwen2_5_vl")
    target = Target(model)
    prompts = image_prompts("qwen2_5_vl", model)
    expected = model.generate(**prompts, max_new_tokens=24, do_sample=False)
    with Decoder(target, "heads", heads=noise_heads(target, kind), tree_size=8) as decoder:
        assert decoder.generate(**prompts, max_new_tokens=24, do_sample=False).tolist() == expected.tolist()


def test_layers_are_those_of_the_decoder() -> None:
    model = model_of("llava")
    encoder = next(one for one in model.model.vision_tower.modules() if isinstance(one, torch.nn.ModuleList))
    assert decoder_layers(model, 3) is model.get_decoder().layers
    model.get_decoder().layers = model.get_decoder().layers[: len(encoder)]
    try:
        assert decoder_layers(model, len(encoder)) is model.get_decoder().layers
    finally:
        model_of.cache_clear()


def test_sampled_text_after_an_image_is_that_of_plain_decoding() -> None:
    model = model_of("qwen2_5_vl")
    prompts = image_prompts("qwen2_5_vl", model)
    found = []
    for proposer in ("none", "recycling"):
        with Decoder(model, proposer) as decoder:
            found.append(decoder.generate(**prompts, max_new_tokens=24, do_sample=True, seed=3).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_token_types_of_text_ask_for_nothing(name: str) -> None:
    model = model_of("gemma3" if name == "token_type_ids" else "qwen2_5_vl")
    prompts = text_prompts()
    assert_same_texts(model, prompts | {name: torch.zeros_like(prompts["input_ids"])}, ("recycling",))


def test_an_image_for_a_text_model_is_refused() -> None:
    llama = tiny("llama", {})
    with pytest.raises(MedheadError, match=r"pixel_values cannot be used with medhead: Llama.* reads text"):
        Decoder(llama)(llama, torch.tensor([[5, 6]]), pixel_values=torch.zeros(1, 3, 28, 28))


def test_images_that_do_not_fit_the_prompt_are_refused_in_one_line() -> None:
    model = model_of("llava")
    prompts = image_prompts("llava", model)
    prompts["input_ids"] = torch.full_like(prompts["input_ids"], 7)
    with Decoder(model, "none") as decoder, pytest.raises(MedheadError, match="cannot read a prompt with") as refusal:
        decoder.generate(**prompts, max_new_tokens=4)
    assert "\n" not in str(refusal.value)


def test_a_model_that_reads_images_in_every_pass_is_refused() -> None:
    model = model_of("llava")
    prompts = image_prompts("llava", model)
    own = model.prepare_inputs_for_generation

    def again(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given = {name: kwargs[name] for name in ("mm_encoder_outputs", "pixel_values") if kwargs.get(name) is not None}
        return own(*args, **kwargs) | given

    model.prepare_inputs_for_generation = again
    try:
        with Decoder(model, "none") as decoder, pytest.raises(UnsupportedTargetError, match="in every pass"):
            decoder.generate(**prompts, max_new_tokens=4)
    finally:
        del model.prepare_inputs_for_generation


def test_a_prompt_that_is_read_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2_5_vl")
    monkeypatch.setattr(
        "medhead.model.prompt_inputs.PromptInputs.without_padding",
        lambda self: type(self)(**vars(self) | {"position_ids": None}),
    )
    prompts = image_prompts("qwen2_5_vl", model)
    with Decoder(model, "none") as decoder, pytest.raises(UnsupportedTargetError, match="cannot decode after a prompt"):
        decoder.generate(**prompts, max_new_tokens=4)


def test_a_checkpoint_of_images_and_text_loads(tmp_path: Path) -> None:
    model = model_of("llava")
    model.save_pretrained(tmp_path)
    loaded = medhead.load_model(tmp_path, device="cpu")
    assert type(loaded) is type(model)
    assert_same_texts(loaded, text_prompts(), ("recycling",))
