"""Penalties, biases, ends and log probabilities of a request: speculation changes none of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from conftest import tiny_llama
from medhead import Decoder, MedheadError
from medhead.config import SamplingParams
from medhead.generation_config import generate_arguments
from medhead.serving import Engine, Request, StepOutput

PROMPT = [30, 31, 30, 31, 30, 31]
OPTIONS: list[dict[str, Any]] = [
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5},
    {"logit_bias": {9: 4.0, 31: -100, 40: 3}},
    {"presence_penalty": -0.5, "frequency_penalty": 1.0, "logit_bias": {20: 5}, "repetition_penalty": 1.2},
    {"logit_bias": {9: 3.0}, "temperature": 0.8, "top_k": 20, "seed": 6},
    {"presence_penalty": 1.0, "temperature": 1.1, "top_p": 0.9, "seed": 7},
]


class Naive(LogitsProcessor):
    """OpenAI's definition, token by token."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores, output = scores.clone(), input_ids[0, len(PROMPT) :].tolist()
        for token, bias in (self.params.logit_bias or {}).items():
            scores[0, token] += bias
        for token in set(output):
            lowered = self.params.presence_penalty + self.params.frequency_penalty * output.count(token)
            scores[0, token] -= lowered
        return scores


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny_llama(seed=5, vocab=len(tokenizer), eos_token_id=1, bos_token_id=None, initializer_range=0.2)


def serve(decoder: Decoder, tokenizer: Any, requests: list[Request]) -> list[list[StepOutput]]:
    with Engine(decoder, tokenizer, max_rows=3) as engine:
        handles = [engine.submit(request) for request in requests]
        return [list(handle) for handle in handles]


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def text_of(outputs: list[StepOutput]) -> str:
    return "".join(output.text for output in outputs)


def expected(decoder: Decoder, params: SamplingParams, tokenizer: Any) -> list[int]:
    """What transformers gives, or plain decoding for a text that is sampled."""
    ids, arguments = torch.tensor([PROMPT]), generate_arguments(decoder.model, params, tokenizer)
    arguments["logits_processor"] = LogitsProcessorList([Naive(params)])
    if params.greedy:
        output = decoder.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    else:
        with decoder.using("none"):
            output = decoder.generate(ids, seed=params.seed, **arguments)
    return output[0, len(PROMPT) :].tolist()


def test_penalties_and_biases_are_openais(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = Decoder(model, "ngram")
    own = [SamplingParams(24, **options) for options in OPTIONS]
    plain = replace(own[0], presence_penalty=0.0)
    found = [tokens_of(one) for one in serve(decoder, tokenizer, [Request(PROMPT, one) for one in [*own, plain]])]
    assert found[:-1] == [expected(decoder, params, tokenizer) for params in own]
    assert all(tokens != found[-1] for tokens in found[:4])  # every option changes this text


def test_a_bias_alone_keeps_all_nodes_together(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from medhead.serving.prepare import SequencePreparer

    preparer = SequencePreparer(Decoder(model, "none"), tokenizer)
    for options, local in (({"logit_bias": {5: 1.0}}, True), ({"presence_penalty": 1.0}, False)):
        sequence = preparer.prepare(preparer.new_sequence(PROMPT, SamplingParams(5, **options)))
        assert sequence.local is local


def test_stop_tokens_end_a_text_and_end_tokens_can_be_ignored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    decoder = Decoder(model, "ngram")
    (whole,) = serve(decoder, tokenizer, [Request(PROMPT, SamplingParams(30))])
    tokens = tokens_of(whole)
    stop = tokens[12]
    first = tokens.index(stop)
    asked = [
        SamplingParams(30, stop_token_ids=(stop,)),
        SamplingParams(30, stop_token_ids=(stop,), min_new_tokens=20),
        SamplingParams(30, stop_token_ids=(stop,), ignore_eos=True),
    ]
    ended, later, ignoring = serve(decoder, tokenizer, [Request(PROMPT, one) for one in asked])
    assert tokens_of(ended) == tokens_of(ignoring) == tokens[: first + 1]
    assert text_of(ended) == tokenizer.decode(tokens[:first], skip_special_tokens=True)
    assert stop not in tokens_of(later)[:19]
    model.generation_config.eos_token_id = stop
    try:
        cut, all_of_it = serve(
            decoder, tokenizer, [Request(PROMPT, SamplingParams(30, ignore_eos=ignore)) for ignore in (False, True)]
        )
    finally:
        model.generation_config.eos_token_id = 1
    assert tokens_of(cut) == tokens[: first + 1]
    assert tokens_of(all_of_it)[: len(tokens)] == tokens
    assert len(tokens_of(all_of_it)) == 30


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3, "top_k": 5}, {"presence_penalty": 2.0}])
def test_log_probabilities_are_the_models_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    params = SamplingParams(20, **options)
    asked = [Request(PROMPT, params, logprobs=4), Request(PROMPT, params), Request(PROMPT, params, logprobs=0)]
    listed, without, chosen_only = serve(Decoder(model, "ngram"), tokenizer, asked)
    tokens = tokens_of(listed)
    assert tokens == tokens_of(without)
    assert not any(output.logprobs for output in without)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    logp = logits.log_softmax(-1)
    found = [one for output in listed for one in output.logprobs]
    assert [one.token for one in found] == tokens
    torch.testing.assert_close(
        torch.tensor([one.logprob for one in found]),
        logp.gather(1, torch.tensor(tokens)[:, None])[:, 0],
        atol=1e-3,
        rtol=0,
    )
    best = logp.topk(4)
    top = torch.tensor([[value for _, value in one.top] for one in found])
    torch.testing.assert_close(top, best.values, atol=1e-3, rtol=0)
    assert all(one.top == [] for output in chosen_only for one in output.logprobs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2, got 2.1"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 must be from -100 to 100"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be a whole number of at least 0, got -1"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "at most 300 token ids"),
        ({"stop_token_ids": (1.5,)}, "a token id of stop_token_ids must be"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MedheadError, match=message):
        SamplingParams(**fields)


def test_token_ids_outside_the_vocabulary_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        for fields in ({"logit_bias": {10**6: 1}}, {"stop_token_ids": (10**6,)}):
            with pytest.raises(MedheadError, match=f"{next(iter(fields))}: token id 1000000 is outside"):
                engine.submit(Request(PROMPT, SamplingParams(**fields)))
    with pytest.raises(MedheadError, match="logprobs must be a whole number from 0 to 20, got 21"):
        Request(PROMPT, logprobs=21)
