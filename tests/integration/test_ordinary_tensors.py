"""What leaves the library are ordinary tensors, and a model trains after a generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel

from conftest import noise_heads, tiny_llama
from medhead import Decoder
from medhead.config import SamplingParams
from medhead.core.sequence import Sequence
from medhead.heads import load_heads
from medhead.model.loading import load_tokenizer
from medhead.model.target import Target
from medhead.serving import Engine, Request

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, in containers and attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, (Sequence, nn.Module)):
        yield from tensors_in([value.__dict__, list(value.children()) if isinstance(value, nn.Module) else []])


def assert_trains(model: PreTrainedModel) -> None:
    """One step of training, and a change of the buffers in place."""
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    for buffer in model.buffers():
        buffer.mul_(1)
    model.eval()


class Seen:
    """Keeps what callbacks are given, and fails if they run in inference mode."""

    def __init__(self, inference: bool = False) -> None:
        self.inference, self.given = inference, dict[str, list[Any]]()

    def see(self, name: str, *values: Any) -> None:
        assert torch.is_inference_mode_enabled() == self.inference, name
        self.given.setdefault(name, []).append((values, torch.ones(1)))  # what a callback makes is kept too

    def put(self, value: Tensor) -> None:
        self.see("streamer", value)

    def end(self) -> None:
        self.see("end")

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.see("processor", ids, scores)
        scores[:, 3] += 1  # transformers' scores may be changed in place
        return scores

    def stop(self, ids: Tensor, scores: Tensor | None, **options: Any) -> Tensor:
        self.see("criterion", ids, scores)
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("step", ["loop", "eager"])
@pytest.mark.parametrize("sample", [False, True])
def test_results_may_be_changed_and_differentiated(sample: bool, step: str) -> None:
    model = tiny_llama(eos_token_id=None)
    target = Target(model)
    decoder = Decoder(target, "heads", heads=noise_heads(target, "attention"), step=step)
    out = decoder.generate(IDS, **(OPTIONS | {"do_sample": sample}))
    for tensor in tensors_in([out.sequences, out.scores, out.logits]):
        assert not tensor.is_inference()
        tensor += 1
    factor = torch.ones((), requires_grad=True)
    (torch.stack(out.scores).exp() * factor).mean().backward()
    assert factor.grad is not None
    ids = decoder.generate(IDS, max_new_tokens=12, do_sample=sample)  # captured steps record no scores
    ids[:, 0] = 3
    assert decoder.statistics.captured_steps > 0 or step == "loop"
    assert_trains(model)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("proposer", ["hybrid", "lookahead", "none"])
def test_callbacks_get_ordinary_tensors_in_the_callers_mode(proposer: str, inference: bool) -> None:
    model = tiny_llama(eos_token_id=None)
    decoder = Decoder(model, proposer)
    for processes in (False, True):
        seen = Seen(inference)
        decoder.on_pass = lambda sequence, tokens: seen.see("on_pass", sequence, tokens)  # noqa: B023
        given: dict[str, Any] = {"stopping_criteria": [seen.stop], **OPTIONS}
        given |= {"logits_processor": LogitsProcessorList([seen.process])} if processes else {}
        for streamed in (False, True):
            ids = IDS[:1] if streamed else IDS
            given |= {"streamer": seen} if streamed else {}
            with torch.inference_mode(inference):
                out = decoder.generate(ids, **given)
            assert not any(tensor.is_inference() for tensor in tensors_in([out.sequences, out.scores, out.logits]))
        wanted = {"streamer", "end", "criterion", "on_pass"} | ({"processor"} if processes else set())
        assert set(seen.given) == wanted
        assert inference or not any(tensor.is_inference() for tensor in tensors_in(seen.given))
    assert_trains(model)


class CachesTables(nn.Module):
    """As modeling files in checkpoints do: a table that is made in `forward` and kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.table = layer, torch.ones(1)
        self.register_buffer("rows", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < 2:
            self.table, self.rows = torch.ones(2, x.shape[-1]), torch.ones(2, x.shape[-1])
        return self.layer(x * self.table[1] * self.rows[1])


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
ROPES = {"dynamic": {"factor": 2.0}, "longrope": {"factor": 2.0, **LONG}}


@pytest.mark.parametrize("rope", [*ROPES, "tables"])
def test_a_model_that_keeps_tensors_in_forward_trains_after_a_generation(rope: str) -> None:
    changes: dict[str, Any] = {"max_position_embeddings": 32, "eos_token_id": None}
    if rope in ROPES:
        changes["rope_parameters"] = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    model: Any = tiny_llama(**changes)
    if rope == "tables":
        model.model.layers[0].mlp.up_proj = CachesTables(model.model.layers[0].mlp.up_proj)
    decoder = Decoder(model, "ngram", probe=False)
    decoder.target.context = 100  # beyond the length that the model was trained with
    ids = torch.arange(3, 11)[None]
    decoder.generate(ids, max_new_tokens=40, do_sample=False)
    assert not any(tensor.is_inference() for tensor in tensors_in(model))
    assert_trains(model)
    decoder.warmup()
    assert not any(tensor.is_inference() for tensor in tensors_in(model))


def test_heads_that_are_loaded_in_inference_mode_train(folders: dict[str, Path]) -> None:
    from medhead.model.loading import load_model

    model = load_model(str(folders["model"]), torch.device("cpu"), torch.float32)
    for kind in ("medusa", "recurrent", "attention"):
        with torch.inference_mode():
            target = Target(model)
            heads = load_heads(folders[kind], target)
            decoder = Decoder(target, heads=heads)
            decoder.generate(IDS, max_new_tokens=8)
        assert not any(tensor.is_inference() for tensor in tensors_in([model, heads]))
        for parameter in heads.parameters():
            parameter.requires_grad_().mul(2).sum().backward()
            assert parameter.grad is not None


def test_an_engine_leaves_ordinary_tensors(folders: dict[str, Path]) -> None:
    from medhead.model.loading import load_model

    model = load_model(str(folders["model"]), torch.device("cpu"), torch.float32)
    modes: list[bool] = []
    engine = Engine(Decoder(model, heads=str(folders["recurrent"])), load_tokenizer(str(folders["model"])))
    engine.listeners.append(lambda request, result: modes.append(torch.is_inference_mode_enabled()))
    with engine:
        requests = [Request([5, 6, 7], SamplingParams(8, temperature=t, seed=1), trace=True) for t in (0.0, 1.0)]
        outputs = [output for request in requests for output in engine.submit(request)]
    assert outputs
    assert not any(tensor.is_inference() for output in outputs for tensor in tensors_in(vars(output)))
    assert modes == [False, False]
    assert not any(tensor.is_inference() for tensor in tensors_in(model))
    assert_trains(model)
