"""Several threads, nested calls and crashes: every text is right, and the model stays as it was."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import noise_heads, tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder, MedheadError
from medhead.config import SamplingParams
from medhead.model.model_lock import ModelLock
from medhead.model.target import Target
from medhead.proposers import PROPOSERS
from medhead.serving import Engine, Request

PROMPTS = [torch.tensor([[5, 6, 7, 8 + index]]) for index in range(6)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}


def state_of(model: PreTrainedModel) -> list[Any]:
    """What a generation must leave as it was."""
    modules = list(model.modules())
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in modules]
    return [
        model.config._attn_implementation,
        [module.training for module in modules],
        ["forward" in module.__dict__ for module in modules],
        hooks,
    ]


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Let threads take turns much more often than by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_thread(run: Callable[[], Any]) -> Any:
    """Return the result of a function that another thread runs; fail if it waits for this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(timeout=60)


class Streamer:
    """Calls a function with the number of every column of new tokens."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call, self.columns = call, -1

    def put(self, value: Tensor) -> None:
        if self.columns >= 0:  # first comes the prompt
            self.call(self.columns)
        self.columns += 1

    def end(self) -> None:
        pass


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama(eos_token_id=None)


@pytest.fixture
def expected(model: PreTrainedModel) -> list[Tensor]:
    return [model.generate(ids, **OPTIONS) for ids in PROMPTS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_threads_with_one_decoder_with_several_and_with_the_model_alone(attention: str) -> None:
    model = tiny_llama(eos_token_id=None)
    model.set_attn_implementation(attention)
    expected = [model.generate(ids, **OPTIONS) for ids in PROMPTS]
    target = Target(model, packed=True)
    shared = Decoder(target, heads=noise_heads(target, "attention"))
    before = state_of(model)

    def run(index: int) -> None:
        caller = (shared, model, Decoder(model, "lookahead") if index == 2 else shared)[index % 3]
        for _ in range(2):
            assert torch.equal(caller.generate(PROMPTS[index], **OPTIONS), expected[index])

    with frequent_switches(), ThreadPoolExecutor(len(PROMPTS)) as pool:
        list(pool.map(run, range(len(PROMPTS))))
    assert state_of(model) == before


FEW = ["llama", "gpt2", "gemma2", "gpt_oss"]
ALL = pytest.param([name for name in ACCEPTED if name not in FEW], marks=pytest.mark.slow, id="all")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("families", [pytest.param(FEW, id="few"), ALL])
def test_a_plain_call_beside_an_active_target_is_the_models_own(families: list[str], attention: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [20, 3, 20, 4, 20, 5, 90]])
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
    real = padded["attention_mask"].bool()

    def logits(model: Any) -> list[torch.Tensor]:
        return [model(ids).logits, model(ids, **padded).logits[real]]

    for family in filter(exists, families):
        model: Any = tiny(family, ACCEPTED[family])
        try:
            model.set_attn_implementation(attention)
        except ValueError:
            continue  # the family has eager attention alone
        with torch.no_grad():
            before = logits(model)
            with Target(model, probe=False).active():
                during = logits(model)
        # Falcon has code of its own for the name "sdpa", and runs that of "eager" beside an active target
        same = partial(torch.allclose, atol=1e-5) if family == "falcon" else torch.equal
        assert all(map(same, before, during)), family


def test_an_attention_of_the_users_own_beside_an_active_target(model: PreTrainedModel) -> None:
    calls: list[nn.Module] = []

    def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("users_own", own)
    model.set_attn_implementation("users_own")
    ids = PROMPTS[0]
    plain = model(ids).logits
    with Target(model, probe=False).active():
        calls.clear()
        assert torch.equal(model(ids).logits, plain)
        assert len(calls) == 2
    assert model.config._attn_implementation == "users_own"


def test_a_plain_call_in_the_middle_of_a_pass_of_another_thread(model: Any, expected: list[Tensor]) -> None:
    """Neither call sees the features, the selection of rows or the packed weights of the other."""
    target = Target(model, packed=True)
    decoder, plain = Decoder(target, heads=noise_heads(target, "attention")), model(PROMPTS[1]).logits
    thread, found = threading.get_ident(), list[Tensor]()

    def interrupt(*args: Any) -> None:
        if threading.get_ident() == thread:
            found.append(in_thread(lambda: model(PROMPTS[1]).logits))

    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
    try:
        ours = decoder.generate(PROMPTS[0], **OPTIONS)
    finally:
        hook.remove()
    assert torch.equal(ours, expected[0])
    assert found
    assert all(torch.equal(logits, plain) for logits in found)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["streamer", "processor", "on_pass", "criterion"])
def test_crashes_in_two_threads_leave_the_model_as_it_was(
    where: str, error: type[BaseException], model: PreTrainedModel, expected: list[Tensor]
) -> None:
    decoders = [Decoder(model, "lookahead"), Decoder(model)]
    model.train()
    before = state_of(model)

    def crash(*args: Any) -> Any:
        raise error

    def run(index: int) -> None:
        given: dict[str, Any] = {
            "streamer": {"streamer": Streamer(lambda column: crash() if column == 3 else None)},
            "processor": {"logits_processor": [crash]},
            "criterion": {"stopping_criteria": [crash]},
            "on_pass": {},
        }[where]
        decoders[index].on_pass = crash if where == "on_pass" else None
        with pytest.raises(error):
            decoders[index].generate(PROMPTS[index], **OPTIONS, **given)
        decoders[index].on_pass = None

    with frequent_switches(), ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert state_of(model) == before
    for decoder in decoders:
        assert torch.equal(in_thread(lambda: decoder.generate(PROMPTS[2], **OPTIONS)), expected[2])  # noqa: B023
        assert torch.equal(decoder.generate(torch.cat(PROMPTS[:3]), **OPTIONS), torch.cat(expected[:3]))


@pytest.mark.parametrize("proposer", sorted(PROPOSERS))
def test_calls_inside_of_a_generation(proposer: str, model: PreTrainedModel, expected: list[Tensor]) -> None:
    """By the same decoder, another one and the model, from a streamer and from a processor, which is asked within a step."""
    target = Target(model)
    heads = {"heads": noise_heads(target)} if proposer in ("heads", "hybrid") else {}
    decoder, other = Decoder(target, proposer, **heads), Decoder(model, "ngram")
    inner: list[Tensor] = []

    def nested(column: int) -> None:
        if column in (2, 9):
            inner.extend(each.generate(PROMPTS[1], **OPTIONS) for each in (decoder, other, model))

    class Processor:
        calls = 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            nested(self.calls)
            return scores

    before = state_of(model)
    for given in ({"streamer": Streamer(nested)}, {"logits_processor": [Processor()]}):
        inner.clear()
        assert torch.equal(decoder.generate(PROMPTS[0], **OPTIONS, **given), expected[0])
        assert len(inner) == 6
        assert all(torch.equal(text, expected[1]) for text in inner)
    assert decoder.statistics.new_tokens == OPTIONS["max_new_tokens"]
    assert state_of(model) == before


@pytest.mark.parametrize("proposer", sorted(PROPOSERS))
def test_a_proposer_forgets_the_last_generation(proposer: str, model: PreTrainedModel, expected: list[Tensor]) -> None:
    """One that ended, one that crashed, with more rows and with fewer."""
    target = Target(model)
    heads = {"heads": noise_heads(target, "attention")} if proposer in ("heads", "hybrid") else {}
    decoder = Decoder(target, proposer, **heads)

    def crash(column: int) -> None:
        if column == 5:
            raise ZeroDivisionError

    for rows in ([0, 1, 2], [3], [4, 5]):
        ids = torch.cat([PROMPTS[row] for row in rows])
        with pytest.raises(ZeroDivisionError):
            decoder.generate(ids.flip(0), streamer=Streamer(crash), **OPTIONS)
        assert torch.equal(decoder.generate(ids, **OPTIONS), torch.cat([expected[row] for row in rows]))


class FewTokens:
    """Enough of a tokenizer for an engine."""

    eos_token_id = None

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def test_decoders_and_the_model_beside_an_engine_that_serves(model: PreTrainedModel, expected: list[Tensor]) -> None:
    target = Target(model)
    served = Decoder(target, heads=noise_heads(target, "attention"))
    callers = [served, Decoder(model, "lookahead"), Decoder(target, "ngram"), model]
    requests = [Request(ids[0].tolist(), SamplingParams(OPTIONS["max_new_tokens"])) for ids in PROMPTS]
    before = state_of(model)
    with frequent_switches(), Engine(served, FewTokens(), max_rows=2) as engine, ThreadPoolExecutor(4) as pool:

        def serve(index: int) -> list[int]:
            return [token for output in engine.submit(requests[index]) for token in output.tokens]

        answers = [pool.submit(serve, index) for index in range(len(requests))]
        for _ in range(2):
            for caller in callers:
                assert torch.equal(caller.generate(PROMPTS[3], **OPTIONS), expected[3])
        for answer, whole in zip(answers, expected, strict=True):
            assert answer.result(timeout=60) == whole[0, 4:].tolist()
        with pytest.raises(MedheadError, match="serves an engine already; make a Decoder for each engine"):
            Engine(served, FewTokens()).start()
    assert state_of(model) == before
    with Engine(served, FewTokens()) as engine:  # the decoder is free again
        assert engine.submit(requests[0]).wait()


def test_asyncio_and_the_modes_of_the_caller(model: PreTrainedModel, expected: list[Tensor]) -> None:
    decoder = Decoder(model, "ngram")

    async def together() -> list[Tensor]:
        tasks = [asyncio.to_thread(decoder.generate, ids, **OPTIONS) for ids in PROMPTS]
        return await asyncio.gather(*tasks)

    assert all(map(torch.equal, asyncio.run(together()), expected))
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert torch.equal(decoder.generate(PROMPTS[0], **OPTIONS), expected[0])


def test_decoders_open_and_close_in_threads(model: PreTrainedModel) -> None:
    target, plain = Target(model), set(vars(model))

    def run(index: int) -> None:
        for _ in range(50):
            Decoder(target, "none").close()

    with frequent_switches(), ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert set(vars(model)) == plain


def test_a_thread_that_waits_for_the_model_is_next() -> None:
    lock, order = ModelLock(), list[str]()

    def take() -> None:
        with lock, lock:  # re-entrant
            order.append("waiting")

    for _ in range(20):
        order.clear()
        thread = threading.Thread(target=take)
        with lock:
            assert not lock.contended
            thread.start()
            while not lock.contended:
                pass
        with lock:
            order.append("again")
        thread.join(60)
        assert order == ["waiting", "again"]
