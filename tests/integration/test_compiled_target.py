"""Compiled pieces for proposers that work on the host: one pass for trees of all sizes, and the text of plain decoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_captured import SAMPLED, plain_text, prompts
from torch import Tensor

from conftest import noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.compile import CompiledTarget
from medhead.compile.trace import compile_graph, trace
from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead.scheduling.cost_model import measure_costs

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="PyTorch compiles for a CPU with g++, which is not installed"
)


@pytest.fixture(scope="module")
def compiled() -> CompiledTarget:
    return CompiledTarget(tiny_llama(num_hidden_layers=1, context=400), probe=False)


def same_pass(compiled: CompiledTarget, lengths: list[int], trees: TokenTree, again: bool) -> None:
    """The compiled pass finds what the ordinary one does; `again` forbids that anything is compiled for it."""
    found = []
    for target in (Target(compiled.model, probe=False), compiled):
        with torch.inference_mode(), target.active():
            cache = target.new_cache(len(lengths), max(lengths) + trees.nodes)
            target.prefill(cache, [[7 + token % 40 for token in range(length)] for length in lengths])
            with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
                found.append(target.verify(cache, trees))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@needs_compiler
def test_one_pass_serves_all_sizes(compiled: CompiledTarget) -> None:
    """Trees of every size, texts of every length, caches that grow: logits of the ordinary pass, compiled once."""
    said: list[str] = []
    compiled.on_progress = said.append
    for length, nodes in ((5, 4), (9, 1), (70, 9), (62, 2), (128, 33), (63, 1)):
        trees = TokenTree.from_parents(torch.arange(3, 3 + nodes), (torch.arange(nodes) - 1).clamp(min=0) // 2)
        same_pass(compiled, [length], trees, again=len(said) == 2)
    assert len(said) == 2  # trees, one node


@pytest.mark.slow
@needs_compiler
def test_one_pass_serves_all_batches(compiled: CompiledTarget) -> None:
    """Batches of two, three and five ragged texts, with trees that differ from row to row."""
    said: list[str] = []
    compiled.on_progress = said.append
    for lengths, nodes in (([5, 9], 4), ([3, 70, 20], 6), ([1, 2, 3, 64, 5], 3)):
        parents = torch.stack([(torch.arange(nodes) - 1 - row % 2).clamp(min=0) for row in range(len(lengths))])
        trees = TokenTree.from_parents(torch.arange(3, 3 + nodes).expand(len(lengths), -1), parents)
        same_pass(compiled, lengths, trees, again=bool(said))
    assert len(said) == 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_plain_decodings(compiled: CompiledTarget, sampling: dict[str, Any]) -> None:
    heads = noise_heads(compiled, depth=2)
    decoder = Decoder(compiled.model, "hybrid", heads=heads, step="compiled", tree_size=9)
    decoder.compiled_target = compiled  # which has compiled some of it
    assert decoder.graphs is None
    given = {**prompts(rows=1), "max_new_tokens": 40, "eos_token_id": None, **sampling}
    assert torch.equal(decoder.generate(**given), plain_text(Target(compiled.model, probe=False), **given))


def test_trees_reach_the_compiled_pass_in_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a larger tensor would be compiled for its own strides, which are two to three times as slow."""
    layouts = set()

    def compile_open(run: Callable[..., Any], *_: object) -> Callable[..., Any]:
        def passes(*given: torch.Tensor) -> Any:
            layouts.update(
                (part.stride() == torch.empty(part.shape).stride(), part.storage_offset()) for part in given[:3]
            )
            return run(*given)

        return passes

    monkeypatch.setattr("medhead.compile.compiled_target.compile_open", compile_open)
    target = Decoder(tiny_llama(seed=5), "ngram", step="compiled").compiled_target
    assert target is not None
    large = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 1, 1, 2], [0, 1, 2, 2, 3]])[:, None, :4]
    with torch.inference_mode(), target.active():
        cache = target.new_cache(1, 40)
        target.prefill(cache, [[3, 4, 5]])
        target.verify(cache, TokenTree(*large.unbind(), max_depth=2))
    assert layouts == {(True, 0)}


def test_a_pass_is_compiled_for_the_adapters_that_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = get_peft_model(tiny_llama(seed=5), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    monkeypatch.setattr("medhead.compile.compiled_target.compile_open", lambda run, *_: run)
    ids = prompts(rows=1)["input_ids"]
    decoder = Decoder(adapted, "ngram", step="compiled")
    target = decoder.compiled_target
    assert target is not None
    decoder.generate(ids, max_new_tokens=6)
    made = len(target._passes)
    with adapted.disable_adapter():
        decoder.generate(ids, max_new_tokens=6)
    assert len(target._passes) == 2 * made
    decoder.generate(ids, max_new_tokens=6)
    assert len(target._passes) == 2 * made


@needs_compiler
def test_costs_do_not_count_the_compiling(compiled: CompiledTarget) -> None:
    with torch.inference_mode(), compiled.active():
        assert measure_costs(compiled, 1, 8)(1) < 0.1


@pytest.mark.parametrize("proposer", ["ngram", "none"])
def test_on_a_cpu_the_pass_is_compiled(proposer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every proposer; what it is compared with, plain decoding, is the ordinary one."""
    monkeypatch.setattr("medhead.compile.compiled_target.compile_open", lambda run, *_: run)
    model, ids = tiny_llama(), prompts(rows=1)["input_ids"]
    decoder = Decoder(model, proposer, step="compiled")
    assert decoder.graphs is None
    assert decoder.compiled_target is not None
    with decoder.using("none"):
        decoder.generate(ids, max_new_tokens=4)
    assert not decoder.compiled_target._passes
    decoder.generate(ids, max_new_tokens=4)
    assert decoder.compiled_target._passes
    decoder.close()
    assert not decoder.compiled_target._passes


def test_a_pass_that_asks_the_host_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_llama(), "ngram", step="compiled")
    target = decoder.compiled_target
    assert target is not None
    before = target.verify_nodes

    def asks(cache: Any, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        assert int(tokens.max()) >= 0
        return before(cache, tokens, *rest)

    monkeypatch.setattr(target, "verify_nodes", asks)
    with pytest.raises(MedheadError, match=r"the pass of LlamaForCausalLM cannot be compiled .*step='loop'"):
        decoder.generate(**prompts(), max_new_tokens=4)


@needs_compiler
def test_what_nobody_uses_does_not_confuse_the_packing() -> None:
    """The store's parts are arguments that change; a dead look at the store itself would make weights change places."""
    weights, store = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(2)], torch.zeros(2, 3, 16)

    def run(x: Tensor, first: Tensor, second: Tensor) -> None:
        store.unbind()
        first.copy_(x @ weights[0].t())
        second.copy_(first @ weights[1].t())

    given = [torch.randn(3, 16), *store.unbind()]
    with torch.no_grad():
        compile_graph(trace(run, given, "fake"), given, dynamic=False)
        torch.testing.assert_close(store[1], given[0] @ weights[0].t() @ weights[1].t())


def test_a_constant_that_changes_is_refused() -> None:
    store = torch.zeros(2, 3)

    def run(first: Tensor, second: Tensor) -> None:
        first.copy_(store[1] + second)

    given = list(store.unbind())
    with torch.no_grad(), pytest.raises(ValueError, match="shares memory with an argument"):
        compile_graph(trace(run, given, "fake"), given, dynamic=False)
