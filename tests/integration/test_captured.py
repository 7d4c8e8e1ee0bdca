"""Captured steps: the same text as plain decoding, from a step that reads nothing and whose shapes never change.

`recorded` plays back what was written down once, as a CUDA graph does, so it stands for one on machines without a GPU.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given as given_tries
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from conftest import HEADS, noise_heads, tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder, MedheadError, TypicalAcceptance
from medhead.compile import backends, graph_cache
from medhead.compile.async_output import CopiedOutput
from medhead.compile.captured import CapturedSteps
from medhead.compile.graph_cache import GraphCache, columns_for, rows_for
from medhead.config import SamplingParams
from medhead.core.buffers import StepBuffers
from medhead.core.continuous import decode_stream
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker
from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.candidates import candidates_from_tries
from medhead.proposers.heads import HeadsProposer
from medhead.proposers.host_drafts import DEPTH, pack_tries, unpack_drafts
from medhead.proposers.trie import DraftTrie
from medhead.serving import Engine, Request

SAMPLED = {"do_sample": True, "seed": 5, "temperature": 0.7, "top_k": 20}
MIXTURES = {name for name, changes in ACCEPTED.items() if any("expert" in field for field in changes)}


def prompts(vocab: int = 64, rows: int = 3) -> dict[str, Tensor]:
    """A ragged batch, padded before the text."""
    generator = torch.Generator().manual_seed(7)
    ids, mask = torch.randint(3, vocab, (rows, 9), generator=generator), torch.ones(rows, 9, dtype=torch.long)
    mask[1:2, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decoders(target: Target, name: str, way: str, **options: Any) -> tuple[Decoder, Decoder]:
    """The same heads in captured steps, and in the ordinary loop."""
    heads = noise_heads(target, name)
    captured = Decoder(target, "heads", heads=heads, step=way, probe=False, **options)
    return captured, Decoder(target, "heads", heads=heads, probe=False, **options)


def plain_text(target: Target, **arguments: Any) -> Tensor:
    return Decoder(target, "none", step="loop", probe=False).generate(**arguments)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        *((name, {}) for name in sorted(HEADS)),
        ("block_recurrent", SAMPLED),
        ("attention", SAMPLED),
        ("medusa", SAMPLED),
    ],
)
def test_every_kind_of_heads_writes_plain_decodings_text(target: Target, name: str, sampling: dict[str, Any]) -> None:
    captured, loop = decoders(target, name, "recorded", tree_size=12)
    given = {**prompts(), "max_new_tokens": 24, **sampling}
    assert torch.equal(captured.generate(**given), plain_text(target, **given))
    assert captured.statistics.captured_steps > 0
    assert captured.statistics.captured_steps == captured.statistics.steps
    loop.generate(**given)
    # trees of the ordinary loop shrink near the limit, and equal scores may be ranked the other way round
    assert abs(captured.statistics.passes - loop.statistics.passes) <= 3


@pytest.mark.parametrize("name", sorted(name for name in ACCEPTED if exists(name)))
def test_every_family(name: str) -> None:
    target = Target(tiny(name, ACCEPTED[name]), probe=False)
    captured, _ = decoders(target, "recurrent", "eager" if name in MIXTURES else "recorded", tree_size=8)
    given = {**prompts(90, 2), "max_new_tokens": 20, "eos_token_id": None}
    assert torch.equal(captured.generate(**given), plain_text(target, **given))
    assert captured.statistics.captured_steps > 0


def test_a_mixture_of_experts_is_recorded_in_bfloat16() -> None:
    """PyTorch's product of groups has no shape rule for float32 in 2.13, so bfloat16 shows that nothing is read."""
    target = Target(tiny("qwen3_moe", ACCEPTED["qwen3_moe"]).to(torch.bfloat16), probe=False)
    given = {**prompts(90, 1), "max_new_tokens": 12, "eos_token_id": None}
    recorded, _ = decoders(target, "recurrent", "recorded", tree_size=8)
    eager, _ = decoders(target, "recurrent", "eager", tree_size=8)
    assert torch.equal(recorded.generate(**given), eager.generate(**given))


@pytest.mark.parametrize(
    ("proposer", "heads", "way", "sampling"),
    [
        ("hybrid", "recurrent", "eager", {}),
        ("hybrid", "attention", "recorded", SAMPLED),
        ("hybrid", None, "recorded", {}),
        ("ngram", None, "eager", SAMPLED),
        ("recycling", None, "recorded", {}),
    ],
)
def test_what_the_host_proposes_is_part_of_a_captured_step(
    target: Target, proposer: str, heads: str | None, way: str, sampling: dict[str, Any]
) -> None:
    """Its draft tokens reach the step, and sequences that end early take their text's memory with them."""
    given = {**prompts(), "max_new_tokens": 30, "eos_token_id": list(range(2, 6)), **sampling}
    options = {} if heads is None else {"heads": noise_heads(target, heads)}
    captured = Decoder(target, proposer, step=way, probe=False, **options)
    expected = plain_text(target, **given)
    for _ in range(2):
        assert torch.equal(captured.generate(**given), expected)
    statistics = captured.statistics
    assert statistics.captured_steps == statistics.steps > 0
    assert statistics.passes < statistics.new_tokens


def test_text_that_repeats_is_copied_by_captured_steps(target: Target) -> None:
    given = {"input_ids": torch.tensor([[7, 8, 9, 10] * 4]), "max_new_tokens": 60, "eos_token_id": None}
    captured = Decoder(target, "ngram", step="recorded", probe=False)
    loop = Decoder(target, "ngram", step="loop", probe=False)
    assert torch.equal(captured.generate(**given), loop.generate(**given))
    assert captured.statistics.passes <= 1.2 * loop.statistics.passes + 2


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured by default, as on CUDA."""
    monkeypatch.setattr(graph_cache, "automatic_backend", lambda device: "eager")


def test_steps_are_captured_by_default(target: Target, automatic: None) -> None:
    decoder, given = Decoder(target, probe=False), {**prompts(), "max_new_tokens": 24}
    assert torch.equal(decoder.generate(**given), plain_text(target, **given))
    assert decoder.statistics.captured_steps == decoder.statistics.steps > 0
    for options in ({"step": "loop"}, {"proposer": "lookahead"}, {"profile": True}):
        loop = Decoder(target, probe=False, **options)
        assert torch.equal(loop.generate(**given), plain_text(target, **given))
        assert loop.statistics.captured_steps == 0


def test_what_cannot_be_captured_is_left_to_the_ordinary_loop_once(
    target: Target, automatic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fails(*given: Any) -> None:
        tries.append(given)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(backends.BACKENDS, "eager", fails)
    decoder, given = Decoder(target, probe=False), {**prompts(), "max_new_tokens": 24}
    with pytest.warns(UserWarning, match="the ordinary loop decodes, which is slower: .* not permitted"):
        assert torch.equal(decoder.generate(**given), plain_text(target, **given))
    assert torch.equal(decoder.generate(**given), plain_text(target, **given))
    assert (len(tries), decoder.statistics.captured_steps) == (1, 0)


def test_served_requests_are_captured(target: Target, automatic: None, tokenizer: Any) -> None:
    """Requests that come and go, one of them cancelled: every one gets the text that it gets alone."""
    ids = prompts()["input_ids"].tolist()
    steps = []
    decoder = Decoder(target, probe=False)
    assert decoder.graphs is not None
    run = CapturedSteps.step
    with pytest.MonkeyPatch.context() as patch, Engine(decoder, tokenizer, max_rows=3) as engine:
        patch.setattr(CapturedSteps, "step", lambda self: steps.append(self) or run(self))
        limits = (9, 30, 17, 25, 40)
        wanted = [(ids[place % 3], SamplingParams(max_new_tokens=limit)) for place, limit in enumerate(limits)]
        handles = [engine.submit(Request(prompt=prompt, params=params)) for prompt, params in wanted]
        handles[4].cancel()
        found = [[token for output in handle for token in output.tokens] for handle in handles[:4]]
    for (prompt, params), tokens in zip(wanted, found, strict=False):
        given = {"input_ids": torch.tensor([prompt]), "max_new_tokens": params.max_new_tokens}
        expected = plain_text(target, **given)[0, len(prompt) :].tolist()
        assert tokens == [token for token in expected if token != 2]
    assert steps


@given_tries(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(3, 9), st.floats(0.01, 1)), max_size=40), min_size=1)
)
def test_the_layout_of_drafts_keeps_the_most_probable_paths(rows: list[list[tuple[int, int, float]]]) -> None:
    tries = []
    for nodes in rows:
        trie = DraftTrie(1)
        for above, token, prob in nodes:
            trie.add(max(0, len(trie) - 1 - above), token, prob * trie.probs[max(0, len(trie) - 1 - above)])
        tries.append(trie)
    found = unpack_drafts(pack_tries(tries), DEPTH)
    whole = [candidates_from_tries([trie]) for trie in tries]
    for row, known in enumerate(whole):
        paths, all_paths = found.paths(row), {} if known is None else known.paths(0)
        assert all(score == pytest.approx(all_paths[path], abs=2e-5) for path, score in paths.items())
        assert all(path[:-1] in paths for path in paths if len(path) > 1)
        best = max(all_paths, key=lambda path: (all_paths[path], -len(path)), default=())
        assert best == () or best in paths


def test_plain_decoding_is_captured_too(target: Target) -> None:
    given = {**prompts(), "max_new_tokens": 30, **SAMPLED}
    decoder = Decoder(target, "none", step="recorded", probe=False)
    assert torch.equal(decoder.generate(**given), plain_text(target, **given))
    assert decoder.statistics.captured_steps > 0


def test_static_trees_are_captured_too(target: Target) -> None:
    given = {**prompts(), "max_new_tokens": 30}
    shape = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]
    decoder = Decoder(target, "heads", heads=noise_heads(target), shape=shape, step="recorded", probe=False)
    assert torch.equal(decoder.generate(**given), plain_text(target, **given))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_host_may_lag(target: Target, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended run on until the host has read it, and nothing of that is seen."""
    queued = []
    post = CopiedOutput.post

    def count(self: CopiedOutput) -> None:
        post(self)
        queued.append(len(self))

    monkeypatch.setattr(CopiedOutput, "post", count)
    captured, loop = decoders(target, "block_recurrent", "recorded", tree_size=10)
    assert captured.graphs is not None
    captured.graphs.lag = lag
    given = {**prompts(), "max_new_tokens": 60, "eos_token_id": list(range(2, 12))}
    assert torch.equal(captured.generate(**given), loop.generate(**given))
    assert max(queued) == lag + 1
    assert captured.statistics.passes == sum(map(bool, captured.statistics.lengths)) == len(captured.statistics.lengths)


def test_every_sequence_of_a_stream_is_handed_on(target: Target) -> None:
    """Those too that end while others join, when the host reads what captured steps still have."""
    captured, loop = decoders(target, "block_recurrent", "recorded", tree_size=10)
    assert captured.graphs is not None
    captured.graphs.lag = 2
    given = [Sequence([7, 8 + n], [7, 8 + n], StopChecker(n)) for n in (2, 13, 3, 4, 2, 5, 3, 2, 9, 6)]
    with target.active(captured.proposer.feature_layers):
        ended = list(decode_stream(captured.new_loop(), iter(given), 2))
    assert sorted(map(id, ended)) == sorted(map(id, given))
    for one in given:
        ids = torch.tensor([one.prompt_ids])
        assert one.output_ids == loop.generate(ids, max_new_tokens=one.stop_checker.limit)[0, 2:].tolist()


@pytest.mark.parametrize("name", ["recurrent", "block_recurrent", "attention"])
def test_a_text_outgrows_its_plan(target: Target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for few tokens at a time: the batch moves to a larger plan, with what the heads keep of it."""
    monkeypatch.setattr(graph_cache, "MIN_COLUMNS", 32)
    monkeypatch.setattr("medhead.compile.graph_cache._ROOM", 8)
    captured, loop = decoders(target, name, "recorded", tree_size=10)
    given = {**prompts(), "max_new_tokens": 100, "eos_token_id": None}
    assert torch.equal(captured.generate(**given), loop.generate(**given))
    assert captured.graphs is not None
    assert len(captured.graphs) >= 2
    assert captured.statistics.captured_steps == captured.statistics.steps


def test_the_end_of_the_context_belongs_to_the_ordinary_loop(target: Target) -> None:
    captured, _ = decoders(target, "block", "recorded", tree_size=10)
    given = {**prompts(), "max_new_tokens": 500, "eos_token_id": None}
    out = captured.generate(**given)
    assert torch.equal(out, plain_text(target, **given))
    assert captured.statistics.captured_steps > 0
    assert captured.statistics.captured_steps < captured.statistics.steps


class Never(StoppingCriteria):
    """A criterion that has to see every token."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **arguments: Any) -> Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"stopping_criteria": StoppingCriteriaList([Never()])},
        {"do_sample": True, "seed": 3, "eta_cutoff": 0.01},
        {"do_sample": True, "seed": 3, "top_h": 0.5},
    ],
    ids=["text", "scores", "logits", "criteria", "eta", "top-h"],
)
def test_what_the_host_has_to_see_is_left_to_the_ordinary_loop(target: Target, changes: dict[str, Any]) -> None:
    captured, _ = decoders(target, "recurrent", "recorded", tree_size=8)
    given = {**prompts(), "max_new_tokens": 20, **changes}
    out, expected = captured.generate(**given), plain_text(target, **given)
    if "return_dict_in_generate" in changes:
        out, expected = out.sequences, expected.sequences
    assert torch.equal(out, expected)
    assert captured.statistics.captured_steps == 0


def test_typical_acceptance_is_left_to_the_ordinary_loop(target: Target) -> None:
    heads, rule = noise_heads(target), TypicalAcceptance()
    given = {**prompts(), "max_new_tokens": 20, "do_sample": True, "seed": 1}
    captured = Decoder(target, "heads", heads=heads, typical=rule, step="recorded", probe=False)
    loop = Decoder(target, "heads", heads=heads, typical=rule, probe=False)
    assert torch.equal(captured.generate(**given), loop.generate(**given))
    assert captured.statistics.captured_steps == 0


def test_a_captured_step_serves_the_next_generation(target: Target) -> None:
    """Other prompts, seeds and values of parameters need no new capture; other parameters and another batch do."""
    captured, _ = decoders(target, "block_recurrent", "recorded", tree_size=8)
    assert captured.graphs is not None
    cases: list[tuple[int, dict[str, Any], int]] = [
        (3, {"seed": 1, "temperature": 0.7, "top_k": 0}, 1),
        (3, {"seed": 2, "temperature": 0.9, "top_k": 0}, 1),
        (3, {"seed": 2, "temperature": 0.9, "top_k": 20}, 2),
        (3, {"seed": 2, "temperature": 1.9, "top_k": 17}, 2),
        (2, {"seed": 2, "temperature": 0.9, "top_k": 20}, 2),  # the step of three serves two
    ]
    for rows, sampling, expected in cases:
        given = {**prompts(rows=rows), "max_new_tokens": 20, "do_sample": True, **sampling}
        assert torch.equal(captured.generate(**given), plain_text(target, **given))
        assert len(captured.graphs) == expected
    captured.close()
    assert len(captured.graphs) == 0


def test_few_plans_are_kept(target: Target) -> None:
    captured, _ = decoders(target, "recurrent", "eager", tree_size=4)
    for rows in range(1, 8):
        captured.generate(
            **prompts(rows=rows) if rows > 1 else {"input_ids": prompts()["input_ids"][:1]}, max_new_tokens=4
        )
    assert captured.graphs is not None
    assert len(captured.graphs) == graph_cache.MAX_STEPS


def test_an_adapter_that_is_switched_off_is_noticed() -> None:
    model: PreTrainedModel = tiny_llama(seed=5)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    target = Target(adapted)
    captured, loop = decoders(target, "recurrent", "recorded", tree_size=8)
    given = {**prompts(), "max_new_tokens": 20}
    on = captured.generate(**given)
    assert torch.equal(on, loop.generate(**given))
    with adapted.disable_adapter():
        off = captured.generate(**given)
        assert torch.equal(off, loop.generate(**given))
    assert not torch.equal(on, off)


def test_other_proposers_for_a_while_use_the_ordinary_loop(target: Target) -> None:
    captured, _ = decoders(target, "recurrent", "recorded", tree_size=8)
    with captured.using("ngram"):
        captured.generate(**prompts(), max_new_tokens=10)
        assert captured.statistics.captured_steps == 0
    assert captured.check(prompts()["input_ids"], max_new_tokens=10).identical


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for a CPU with g++, which is not installed")
def test_compiled() -> None:
    target = Target(tiny_llama(num_hidden_layers=1), probe=False)
    heads = noise_heads(target, depth=2)
    captured = Decoder(target, "heads", heads=heads, tree_size=4, probe=False)
    captured.graphs = GraphCache(target, captured.proposer, "compiled")  # which a decoder does on a GPU alone
    given = {**prompts(rows=2), "max_new_tokens": 20}
    text, code = run_and_get_code(captured.generate, **given)
    assert torch.equal(text, plain_text(target, **given))
    assert captured.statistics.captured_steps > 0
    assert captured.statistics.capture_seconds > 0
    assert captured.graphs is not None
    layer = next(iter(captured.graphs)).buffers.cache.per_layer[0]
    assert not any(f"empty_strided_cpu({tuple(layer.shape)}" in part for part in code)  # no copy of a layer's cache


@pytest.mark.parametrize(
    ("proposer", "options", "said"),
    [
        ("heads", {"step": "fast"}, "step must be one of loop, eager, recorded, compiled, graph; got 'fast'"),
        ("lookahead", {"step": "recorded"}, "'lookahead' works on the host"),
        ("heads", {"step": "graph"}, "needs a CUDA device"),
        ("heads", {"step": "eager", "attention": "flash"}, "does not go with attention 'flash'"),
    ],
)
def test_wrong_input_in_one_line(target: Target, proposer: str, options: dict[str, Any], said: str) -> None:
    if proposer == "heads":
        options = {**options, "heads": noise_heads(target)}
    with pytest.raises(MedheadError, match=said) as caught:
        Decoder(target.model, proposer, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("proposer", ["none", "ngram"])
@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rotary_scaling_by_length_is_refused(rope: str, proposer: str) -> None:
    long = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    scaling = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0, **(long if rope == "longrope" else {})}
    with pytest.raises(MedheadError, match=f"rotary scaling '{rope}' changes with the length") as caught:
        Decoder(tiny_llama(rope_parameters=scaling), proposer, step="compiled")
    assert "\n" not in str(caught.value)


def test_a_step_that_reads_on_the_host_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    before = HeadsProposer.propose

    def reads(self: HeadsProposer, state: DecodeState, max_depth: int) -> TokenTree:
        assert int(state.lengths.max()) >= 0
        return before(self, state, max_depth)

    monkeypatch.setattr(HeadsProposer, "propose", reads)
    captured, _ = decoders(target, "recurrent", "recorded")
    with pytest.raises(MedheadError, match=r"cannot be recorded .*decode with step='loop'"):
        captured.generate(**prompts(), max_new_tokens=4)


@pytest.mark.parametrize("where", ["buffers", "capture"])
def test_a_step_that_does_not_fit_in_memory(target: Target, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary loop decodes batches of that size, tried once; smaller ones are captured."""
    allocate, record, tries = StepBuffers.allocate, backends.BACKENDS["recorded"], []

    def run_out(rows: int) -> None:
        tries.append(rows)
        if rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    def allocated(like: StepBuffers, rows: int, *given: Any) -> StepBuffers:
        run_out(rows)
        return allocate(like, rows, *given)

    def recorded(step: Any, buffers: StepBuffers, device: torch.device) -> Any:
        run_out(len(buffers.roots))
        return record(step, buffers, device)

    if where == "buffers":
        monkeypatch.setattr(StepBuffers, "allocate", allocated)
    else:
        monkeypatch.setitem(backends.BACKENDS, "recorded", recorded)
    captured, _ = decoders(target, "recurrent", "recorded", tree_size=8)
    assert captured.graphs is not None
    with pytest.raises(MedheadError, match=r"CUDA out of memory.*decode with step='loop'") as caught:
        captured.generate(**prompts(), max_new_tokens=4)
    assert "\n" not in str(caught.value)
    captured.graphs.optional = True  # as where no step is named
    tries.clear()
    slower = pytest.warns(UserWarning, match="the ordinary loop decodes, which is slower: .*CUDA out of memory")
    for at, rows in enumerate((1, 3, 3, 1)):
        given = {**prompts(rows=rows), "max_new_tokens": 12}
        with slower if at == 1 else nullcontext():  # what is kept is freed, and a second try fails
            text = captured.generate(**given)
        assert torch.equal(text, plain_text(target, **given))
    assert captured.statistics.captured_steps > 0
    assert tries.count(3) == 2


@pytest.mark.parametrize(
    ("room", "columns"), [(1, 256), (256, 256), (257, 512), (2048, 2048), (2049, 4096), (5000, 6144)]
)
def test_columns(room: int, columns: int) -> None:
    assert columns_for(room) == columns


@pytest.mark.parametrize(("sequences", "rows"), [(1, 1), (3, 3), (4, 4), (5, 8), (8, 8), (9, 12)])
def test_rows(sequences: int, rows: int) -> None:
    assert rows_for(sequences) == rows


def test_captured_steps_need_one_device(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "device", torch.device("meta"))
    proposer = Decoder(target, "none", probe=False).proposer
    with pytest.raises(MedheadError, match="the whole model on one device"):
        GraphCache(target, proposer, "eager")
