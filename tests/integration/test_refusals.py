"""Wrong input to the library gives one line: what was given, what is allowed, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conftest import noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.model.target import Target
from medhead.proposers import build_proposer

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 4}, "'ngram'"),
        ({"guidance_scale": 2.0}, "guidance"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attention weights"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ({"cache_implementation": "static"}, "its own cache"),
        ({"seed": -1, "do_sample": True}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens|at least 1"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "row 0 is empty"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "hole"),
    ],
)
def test_options_that_cannot_be_honoured(model: PreTrainedModel, options: dict[str, Any], says: str) -> None:
    decoder = Decoder(model, "none")
    with pytest.raises(ValueError, match=says) as refusal:
        decoder.generate(IDS, **({"max_new_tokens": 5} | options))
    if isinstance(refusal.value, MedheadError):
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ids", [torch.tensor([[5, 64]]), torch.tensor([[-1, 5]])])
def test_tokens_of_another_tokenizer(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with pytest.raises(MedheadError, match="outside the model's vocabulary of 64"):
        Decoder(model, "none")(model, ids, generation_config=_config(model))


def test_another_model(model: PreTrainedModel) -> None:
    with pytest.raises(MedheadError, match="another model"):
        tiny_llama().generate(IDS, custom_generate=Decoder(model, "none"), max_new_tokens=4)


def test_unknown_names_name_the_known(model: PreTrainedModel) -> None:
    with pytest.raises(MedheadError, match=r"'oracel'.*heads, hybrid, lookahead, ngram, none, recycling"):
        Decoder(model, "oracel")
    with pytest.raises(MedheadError, match=r"attention must be one of auto, sdpa, reference"):
        Decoder(model, "none", attention="flesh")
    with pytest.raises(MedheadError, match="needs heads"):
        Decoder(model, "heads")
    with pytest.raises(MedheadError, match="tree_size: options go with a proposer's name"):
        Decoder(model, build_proposer("none", Target(model)), tree_size=3)


@pytest.mark.parametrize("size", [0, -3, 257, 2.5])
def test_tree_sizes(target: Target, size: Any) -> None:
    with pytest.raises(MedheadError, match="from 1 to 256"):
        build_proposer("ngram", target, tree_size=size)


def test_a_tree_deeper_than_the_heads(target: Target) -> None:
    heads = noise_heads(target, depth=3)
    with pytest.raises(MedheadError, match=r"4 deep, but these heads predict 3"):
        build_proposer("heads", target, heads=heads, max_depth=4)
    with pytest.raises(MedheadError, match=r"4 deep, but these heads predict 3"):
        build_proposer("heads", target, heads=heads, shape=[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]])


def test_after_a_refusal_the_model_is_as_before(model: PreTrainedModel) -> None:
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    decoder = Decoder(model, "ngram")
    with pytest.raises(MedheadError):
        decoder.generate(IDS, num_beams=2)
    with pytest.raises(RuntimeError, match="broken"):
        decoder.generate(IDS, max_new_tokens=8, logits_processor=[_Broken()])
    assert model.config._attn_implementation != "medhead"
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=8, do_sample=False), expected)


def test_close_leaves_nothing_behind() -> None:
    model = tiny_llama()
    before = dict(model.__dict__)
    hooks = len(model.get_output_embeddings()._forward_pre_hooks)
    with Decoder(model, "ngram") as outer:
        Decoder(model, "none").close()
        outer.generate(IDS, max_new_tokens=8)
    assert model.__dict__.keys() == before.keys()
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks
    assert model.config._attn_implementation == "sdpa"


class _Broken:
    def __call__(self, ids: Any, scores: Any) -> Any:
        raise RuntimeError("broken on purpose")


def _config(model: PreTrainedModel) -> Any:
    from copy import deepcopy

    config = deepcopy(model.generation_config)
    config.max_length = 20
    config.do_sample = False
    return config
