"""Captured steps with fake CUDA tensors: a step reads nothing on the host, and no tensor of the host takes part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as lp

from conftest import HEADS, noise_heads, tiny_llama
from fake_cuda import CUDA, OnlyCuda, default_dtype, fake_cuda, needs_fake_cuda
from families import ACCEPTED, exists, tiny
from medhead.bench.captured_steps import loop_buffers
from medhead.compile.backends import fixed_step
from medhead.config import SamplingParams
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise
from medhead.core.sampling import SamplingBatch, is_local, reads_nothing
from medhead.model.target import Target
from medhead.proposers.base import PlainProposer, Proposer
from medhead.proposers.heads import HeadsProposer

pytestmark = needs_fake_cuda
PARAMS = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.1, seed=3)
SHAPE = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit kernel is chosen by trying it, and its launch needs real tensors."""
    monkeypatch.setattr("medhead.model.kv_cache.use_triton_commit", lambda device: True)
    monkeypatch.setattr("medhead_kernels.commit.move", lambda *given: None)


def launches(
    make: Callable[[], PreTrainedModel], heads: str | None = "recurrent", params: SamplingParams | None = None,
    processors: Callable[[], list[Any]] = list, attention: str = "auto", batch: int = 2, **options: Any,
) -> list[str]:  # fmt: skip
    """Run a step as a capture does, after one that makes tables, and return what it launches; greedy without `params`."""
    with fake_cuda():
        with CUDA:
            target = Target(make(), probe=False, attention=attention)
            proposer: Proposer = PlainProposer()
            if heads is not None:
                with default_dtype(target.dtype):
                    made = noise_heads(target, heads)
                proposer = HeadsProposer(target, made, **{"tree_size": 12, **options})
        with target.active(proposer.feature_layers):
            proposer.begin(target, [[0] * 5] * batch)
            like = loop_buffers(target, batch, 64, proposer)
            others = LogitsProcessorList(processors())
            assert is_local(others)
            params = params or SamplingParams()
            like.sampling = SamplingBatch.of([params] * batch, range(batch), others, CUDA)
            buffers = StepBuffers.allocate(like, batch, 256, proposer.steps)
            step = fixed_step(target, proposer, GumbelNoise(target.vocab_size, CUDA))
            step(buffers)
            with OnlyCuda() as captured:
                step(buffers)
    return captured.names


@pytest.mark.parametrize("sampling", [None, PARAMS], ids=["greedy", "sampled"])
@pytest.mark.parametrize("heads", [None, *sorted(HEADS)])
def test_every_kind_of_heads(heads: str | None, sampling: SamplingParams | None) -> None:
    names = launches(tiny_llama, heads, sampling)
    assert names.count("medhead.tree_attention.default") == 2


@pytest.mark.parametrize("name", sorted(name for name in ACCEPTED if exists(name)))
def test_every_family(name: str) -> None:
    def run() -> list[str]:
        return launches(lambda: tiny(name, ACCEPTED[name], dtype=torch.bfloat16))

    # transformers makes a rotary table or an index on the host in every pass; the capture says so in one line
    if name in ("falcon", "phimoe"):
        with pytest.raises(AssertionError, match="works on the host"):
            run()
    else:
        assert run()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_every_attention(attention: str) -> None:
    assert launches(tiny_llama, attention=attention)


def test_static_trees_and_draft_vocabularies() -> None:
    assert launches(tiny_llama, shape=SHAPE)


PROCESSORS: dict[str, Callable[[], list[Any]]] = {
    "suppressed": lambda: [lp.SuppressTokensLogitsProcessor([3, 4], device=CUDA), lp.LogitNormalization()],
    "typical": lambda: [lp.TypicalLogitsWarper(0.9)],
    "epsilon": lambda: [lp.EpsilonLogitsWarper(0.1)],
    "finite": lambda: [lp.InfNanRemoveLogitsProcessor()],
    "warpers": lambda: [lp.TemperatureLogitsWarper(0.5), lp.TopKLogitsWarper(5), lp.TopPLogitsWarper(0.9)],
}
LEFT: dict[str, Callable[[], list[Any]]] = {
    "suppressed on the host": lambda: [lp.SuppressTokensLogitsProcessor([3, 4])],
    "top-h": lambda: [lp.TopHLogitsWarper(0.4)],
    "eta": lambda: [lp.EtaLogitsWarper(0.1, device=CUDA)],
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_local_processor(name: str) -> None:
    with fake_cuda():
        assert reads_nothing(PROCESSORS[name](), CUDA)
    assert launches(tiny_llama, None, PARAMS, PROCESSORS[name])


@pytest.mark.parametrize("name", LEFT)
def test_processors_that_the_host_takes_part_in_are_left_to_the_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the check of a distribution is what reads; importing PyTorch's compiler switches it off for the whole process
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    with fake_cuda():
        assert not reads_nothing(LEFT[name](), CUDA)
    with pytest.raises((AssertionError, DataDependentOutputException)):  # what the capture would fail with
        launches(tiny_llama, None, PARAMS, LEFT[name])
