"""The pass over the prompts gives the first tokens: plain decoding calls the model exactly as often as transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from conftest import noise_heads, tiny_llama
from families import HAS_5_24, tiny_stateful
from medhead import Decoder
from medhead.config import SamplingParams
from medhead.model.target import Target
from medhead.serving import Engine, Request

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [9, 11, 12, 8, 4], [0, 0, 0, 0, 13]])
MASK = (PROMPTS > 0).long()
NAMES = ["llama", *(["qwen3_5_text", "lfm2", "mamba"] if HAS_5_24 else [])]


def model_of(name: str) -> PreTrainedModel:
    model = tiny_llama(eos_token_id=None) if name == "llama" else tiny_stateful(name)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def count_calls(model: PreTrainedModel) -> list[int]:
    """The tokens of every row in each call of the model from now on."""
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [1, 6])
def test_plain_decoding_calls_the_model_as_often_as_transformers(name: str, limit: int) -> None:
    model = model_of(name)
    with Decoder(model, "none") as decoder:
        given = {"attention_mask": MASK, "max_new_tokens": limit, "do_sample": False}
        calls = count_calls(model)
        found = decoder.generate(PROMPTS, **given)
        assert calls == [5] + [1] * (limit - 1)
        calls.clear()
        expected = model.generate(PROMPTS, **given)
        assert calls == [5] + [1] * (limit - 1)
    assert torch.equal(found, expected)
    assert (decoder.statistics.steps, decoder.statistics.passes) == (limit - 1, 3 * limit)
    assert decoder.statistics.accepted_length == 1
    assert decoder.statistics.cache_bytes > 0


def test_one_token_needs_no_pass_of_an_engine_but_the_prompts(tokenizer) -> None:
    """A prompt in chunks, and the same again, of which one token is read."""
    prompt = list(range(3, 23))
    model = tiny_llama(eos_token_id=None)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)[0, 20:].tolist()
    with Engine(Decoder(model, "recycling", tree_size=4), tokenizer, prefill_chunk=8) as engine:
        calls = count_calls(model)
        outputs = [list(engine.submit(Request(prompt, SamplingParams(1), trace=True))) for _ in range(2)]
    assert calls == [20, 1]
    for (output,) in outputs:
        assert (output.tokens, output.sources, output.tree.accepted) == (expected, ["bonus"], [0])


@pytest.mark.parametrize("kind", ["recurrent", "attention", "medusa"])
def test_the_first_tree_is_the_one_of_the_same_text_whose_prompt_was_shorter(kind: str) -> None:
    """Heads read the features of the prompt's last token, and their draft cache has the entries of a token that was emitted."""
    target = Target(tiny_llama(eos_token_id=None), probe=False)
    with Decoder(target, "heads", heads=noise_heads(target, kind)) as decoder:
        trees: list[tuple[int, list[int]]] = []  # tokens emitted before, nodes
        seen = 0

        def see(output) -> None:
            nonlocal seen
            trees.append((seen, output.tree.tokens[0].tolist()))
            seen += output.counts[0]

        decoder.on_output = see
        text = decoder.generate(PROMPTS[1:2], max_new_tokens=24, do_sample=False)
        assert [nodes[0] for _, nodes in trees] == [int(text[0, 4 + at]) for at, _ in trees]  # the roots were verified
        before, trees, seen = [one for one in trees if one[0] == 2], [], 0  # not within an accepted path
        decoder.generate(text[:, :6], max_new_tokens=23, do_sample=False)
    assert trees[0] == (0, [int(text[0, 5])])
    assert len(before) == 1
    assert trees[1] == (1, before[0][1])
    assert len(before[0][1]) > 4
