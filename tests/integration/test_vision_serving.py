"""Prompts with images in the engine: each text is that of `generate` alone, beside texts of others."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_serving import tokens_of
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny
from medhead import Decoder
from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.generation_config import end_tokens
from medhead.model.prompt_inputs import why_no_images
from medhead.serving import Engine, EngineError, QueueFullError, Request
from vision_models import image_rows, tiny_vision

NAMES = ("gemma3", "llava", "qwen2_5_vl")
TEXT = [7, 9, 11, 13, 15, 17, 19]
GREEDY = SamplingParams(max_new_tokens=20)
SEEDED = SamplingParams(max_new_tokens=14, temperature=1.0, seed=5)


@cache
def model_of(name: str) -> PreTrainedModel:
    return tiny_vision(name)


def request_of(row: dict[str, Tensor], params: SamplingParams = GREEDY, **fields: Any) -> Request:
    given = {name: value for name, value in row.items() if name not in ("input_ids", "attention_mask")}
    return Request(row["input_ids"][0].tolist(), params, model_inputs=given, **fields)


def alone(model: PreTrainedModel, tokenizer: Any, request: Request) -> list[int]:
    """What `generate` gives for a request by itself."""
    params, options = request.params, {}
    if not params.greedy:
        options = {"temperature": params.temperature, "seed": params.seed, "top_k": 0}
    ids = torch.tensor([request.prompt])
    with Decoder(model, "none") as decoder:
        found = decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_new_tokens,
            do_sample=not params.greedy,
            eos_token_id=end_tokens(model, tokenizer),
            **request.model_inputs,
            **options,
        )
    return found[0, len(request.prompt) :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_images_and_text_in_one_batch_get_the_texts_of_generate(name: str, tokenizer: Any) -> None:
    model = model_of(name)
    first, second = image_rows(name, model)
    asked = [Request(TEXT, SamplingParams(max_new_tokens=30)), request_of(first), request_of(second, SEEDED)]
    asked += [Request(TEXT[:4], SEEDED), request_of(first, proposer="none")]
    with Engine(Decoder(model, "recycling", tree_size=8), tokenizer, max_rows=3, prefill_chunk=4) as engine:
        found = [tokens_of(handle) for handle in [engine.submit(one) for one in asked]]
    assert found == [alone(model, tokenizer, one) for one in asked]
    assert found[1] == found[4]


def test_another_image_for_the_same_ids_gives_another_text(tokenizer: Any) -> None:
    model = model_of("llava")
    row = image_rows("llava", model)[0]
    other = row | {"pixel_values": -row["pixel_values"]}
    blind = Request(row["input_ids"][0].tolist(), GREEDY)
    asked = [request_of(row), request_of(other), blind, request_of(row)]
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        handles = []
        for one in asked:  # one after the other, so that each could use what those before it have left
            handles.append(engine.submit(one))
            handles[-1].wait()
        again = engine.submit(blind)
        again.wait()
    found = [handle.result for handle in handles]
    texts = [alone(model, tokenizer, one) for one in asked]
    assert len({tuple(text) for text in texts}) == 3
    assert [one.new_tokens for one in found] == [len(text) for text in texts]
    assert [one.cached_tokens for one in found] == [0] * 4
    assert again.result.cached_tokens > 0  # texts without images go on as ever


def test_a_prompt_that_cannot_be_read_ends_alone(tokenizer: Any) -> None:
    model = model_of("llava")
    row = image_rows("llava", model)[0]
    wrong = request_of(row | {"input_ids": torch.full_like(row["input_ids"], 7)})
    shapeless = request_of(row | {"pixel_values": torch.zeros(1, 3, 5)})
    asked = [Request(TEXT, SamplingParams(max_new_tokens=40)), request_of(row)]
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        handles = [engine.submit(one) for one in (asked[0], wrong, shapeless, asked[1])]
        for refused in handles[1:3]:
            with pytest.raises(EngineError, match=r"Llava\w* cannot read a prompt with .*: ") as refusal:
                refused.wait()
            assert "\n" not in str(refusal.value)
        assert [tokens_of(handle) for handle in (handles[0], handles[3])] == [
            alone(model, tokenizer, one) for one in asked
        ]


def test_what_cannot_be_served_is_refused_at_once(tokenizer: Any) -> None:
    llama = tiny("llama", {})
    blind = Request(TEXT, GREEDY, model_inputs={"pixel_values": torch.zeros(1, 3, 28, 28)})
    refusal = pytest.raises(MedheadError, match=r"pixel_values cannot be used: Llama\w* reads text only")
    with Engine(Decoder(llama, "none"), tokenizer) as engine, refusal:
        engine.submit(blind)
    with pytest.raises(MedheadError, match="model_inputs must not hold attention_mask and input_ids"):
        Request(TEXT, model_inputs={"input_ids": 1, "attention_mask": 1})
    target: Any = SimpleNamespace(name="Tiny", model=model_of("llava"), state_layers=None)
    target.length_rope = SimpleNamespace(rereads_at=None)
    assert why_no_images(target) is None
    target.length_rope.rereads_at = 65
    assert "anew at 65 tokens" in str(why_no_images(target))
    target.state_layers = object()
    assert "its layers hold states" in str(why_no_images(target))


def test_images_are_freed_once_they_are_read(tokenizer: Any) -> None:
    model = model_of("llava")
    row = image_rows("llava", model)[0]
    copied = weakref.ref(pixels := row["pixel_values"].clone())
    asked = request_of(row | {"pixel_values": pixels}, SamplingParams(max_new_tokens=60, ignore_eos=True))
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        handle = engine.submit(asked)
        del asked, pixels
        outputs = iter(handle)
        tokens = next(outputs).tokens
        assert not handle.done
        assert copied() is None
        assert handle.request.model_inputs == {}
        tokens += [token for output in outputs for token in output.tokens]
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        again = engine.submit(request_of(row, SamplingParams(max_new_tokens=60, ignore_eos=True)))
        assert tokens_of(again) == tokens


def test_the_images_that_wait_are_bounded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava")
    first, second = (request_of(row) for row in image_rows("llava", model))
    size = sum(value.nbytes for value in first.model_inputs.values())
    monkeypatch.setattr("medhead.serving.engine.MAX_WAITING_BYTES", size)
    with Engine(Decoder(model, "none"), tokenizer, max_rows=1) as engine:
        running = engine.submit(Request(TEXT, SamplingParams(max_new_tokens=100, ignore_eos=True)))
        next(iter(running))
        handles = [engine.submit(one) for one in (first, replace(first), Request(TEXT, GREEDY))]
        with pytest.raises(QueueFullError, match=f"the requests that wait may hold {size:,} bytes of images"):
            engine.submit(second)
        running.cancel()
        for handle in handles:
            handle.wait()
        assert tokens_of(engine.submit(second)) == alone(model, tokenizer, second)


def test_types_of_text_ask_for_nothing(tokenizer: Any) -> None:
    model = model_of("qwen2_5_vl")
    plain = Request(TEXT, GREEDY)
    typed = Request(TEXT, GREEDY, model_inputs={"mm_token_type_ids": torch.zeros(1, len(TEXT), dtype=torch.long)})
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        assert engine.submit(plain).wait() == engine.submit(typed).wait()
