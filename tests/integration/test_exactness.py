"""The promise: whatever guesses, whatever the options, the text is the one that plain decoding gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from conftest import HEADS, noise_heads, tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder, Proposer, TokenTree, TypicalAcceptance
from medhead.core.lengths import Lengths
from medhead.heads.draft_cache import TensorDraftCache
from medhead.model.target import Target
from medhead.proposers import DecodeState, build_proposer
from medhead.scheduling.cost_model import CostModel
from scripted import OracleProposer, RandomProposer

PROMPTS = [
    [5, 9, 13, 5, 9],
    [7],
    [20, 21, 22, 23, 24, 25, 26, 27, 28],
    [3, 4],
    [11, 12, 11, 12, 11],
    [40] * 7,
    [50, 3],
    [8, 8],
]
CHEAP = CostModel({1: 1e-3, 8: 1.1e-3, 32: 1.3e-3})  # trees pay unless nothing is accepted


def hybrid_members(target: Target) -> list[str | Proposer]:
    """Heads that look back, and what the target said before."""
    return [build_proposer("heads", target, heads=noise_heads(target, "block")), "recycling"]


STATIC = [[0], [1], [0, 0], [1, 1], [1, 0], [1, 0, 2]]
MAKERS: dict[str, Callable[[Target], Proposer]] = {
    "ngram": lambda t: build_proposer("ngram", t),
    "lookahead": lambda t: build_proposer("lookahead", t),
    "recycling": lambda t: build_proposer("recycling", t),
    "medusa": lambda t: build_proposer("heads", t, heads=noise_heads(t, "medusa")),
    "recurrent": lambda t: build_proposer("heads", t, heads=noise_heads(t, "recurrent"), tree_size=24),
    "static": lambda t: build_proposer("heads", t, heads=noise_heads(t, "recurrent"), shape=STATIC),
    "random": lambda t: RandomProposer(64),
    "hybrid": lambda t: build_proposer("hybrid", t, members=hybrid_members(t), costs=CHEAP),
    "hybrid of 12": lambda t: build_proposer("hybrid", t, members=hybrid_members(t), tree_size=12),
}  # fmt: skip


def padded(batch: int) -> dict[str, Tensor]:
    """The first prompts, padded on the left."""
    prompts = PROMPTS[:batch]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def oracle(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> OracleProposer:
    """The oracle for a batch: it reads the plain text first."""
    sequences = Decoder(model, "none").generate(**inputs, **options)
    skip = (inputs["attention_mask"] == 0).sum(1).tolist()
    repeats = len(sequences) // len(skip)
    texts = [row[skip[index // repeats] :] for index, row in enumerate(sequences.tolist())]
    return OracleProposer(texts, model.config.vocab_size)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("name", [*MAKERS, "oracle"])
def test_greedy_text_is_that_of_transformers(model: PreTrainedModel, target: Target, name: str, batch: int) -> None:
    inputs = padded(batch)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs, **options)
    proposer = oracle(model, inputs, **options) if name == "oracle" else MAKERS[name](target)
    decoder = Decoder(model, proposer)
    assert torch.equal(decoder.generate(**inputs, **options), expected)
    if name == "oracle":
        assert decoder.statistics.accepted_length > 2.5
    assert sum(decoder.statistics.lengths) >= decoder.statistics.new_tokens  # a pass is cut where its row ends
    assert len(decoder.statistics.lengths) == decoder.statistics.passes


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("name", [*MAKERS, "oracle"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95}, {"min_p": 0.05, "typical_p": 0.9}]
)
def test_seeded_sampling_is_that_of_plain_decoding(
    model: PreTrainedModel, target: Target, name: str, batch: int, sampling: dict[str, Any]
) -> None:
    inputs = padded(batch)
    options = {"max_new_tokens": 24, "do_sample": True, "top_k": 0, "seed": 11} | sampling
    expected = Decoder(model, "none").generate(**inputs, **options)
    proposer = oracle(model, inputs, **options) if name == "oracle" else MAKERS[name](target)
    assert torch.equal(Decoder(model, proposer).generate(**inputs, **options), expected)


@cache
def plain(model: PreTrainedModel, alone: bool, sample: bool) -> Tensor:
    """Text of one token or of three prompts: of transformers when greedy, of plain decoding when sampling."""
    inputs = ONE if alone else padded(3)
    if sample:
        return Decoder(model, "none").generate(**inputs, **MANY_ENDS, do_sample=True, top_k=0, seed=7)
    return model.generate(**inputs, **MANY_ENDS, do_sample=False)


ONE = {"input_ids": torch.tensor([[27]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
MANY_ENDS: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": [2, 33]}


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_every_kind_change_no_token(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, target: Target, name: str, sample: bool
) -> None:
    """Three rows that end at different times, prompts of several chunks; a prompt of one token with a static tree."""
    monkeypatch.setattr("medhead.model.target.PREFILL_CHUNK", 3)
    options = MANY_ENDS | ({"do_sample": True, "top_k": 0, "seed": 7} if sample else {"do_sample": False})
    proposer = build_proposer("heads", target, heads=noise_heads(target, name), tree_size=20)
    assert torch.equal(Decoder(model, proposer).generate(**padded(3), **options), plain(model, False, sample))
    heads = noise_heads(target, name, depth=3, draft_vocab=20)
    for shape in (None, STATIC):
        proposer = build_proposer("heads", target, heads=heads, shape=shape)
        assert torch.equal(Decoder(model, proposer).generate(**ONE, **options), plain(model, True, sample))


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", ["ngram", "lookahead", "recycling"])
def test_rows_that_end_leave_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, target: Target, name: str, sample: bool
) -> None:
    """Three rows that end at different times, and a prompt of one token."""
    monkeypatch.setattr("medhead.model.target.PREFILL_CHUNK", 3)
    options = MANY_ENDS | ({"do_sample": True, "top_k": 0, "seed": 7} if sample else {"do_sample": False})
    decoder = Decoder(model, MAKERS[name](target))
    for alone, inputs in ((False, padded(3)), (True, ONE)):
        assert torch.equal(decoder.generate(**inputs, **options), plain(model, alone, sample))


def test_rows_of_these_texts_end_at_different_times(model: PreTrainedModel) -> None:
    for sample in (False, True):
        lengths = (plain(model, False, sample)[:, 9:] != 0).sum(1).tolist()
        assert len(set(lengths)) > 1
        assert max(lengths) > 12
        assert plain(model, True, sample).shape[1] > 12


@pytest.mark.parametrize("name", ["attention", "block_recurrent"])
def test_memory_grows_with_the_text(model: PreTrainedModel, target: Target, name: str) -> None:
    """Two times from one page of rows on, at different lengths in each row."""
    prompts = [[5, 9, 13] * 12, [7], [20, 21, 22] * 4]
    ids = torch.tensor([[0] * (36 - len(p)) + p for p in prompts])
    mask = (torch.arange(36) >= torch.tensor([[36 - len(p)] for p in prompts])).long()
    options: dict[str, Any] = {"max_new_tokens": 110, "do_sample": False, "eos_token_id": None}
    heads: Any = noise_heads(target, name)
    stores = []

    def small(dtype: torch.dtype, lengths: Lengths, capacity: int) -> TensorDraftCache:
        stores.append(TensorDraftCache(heads.cache_entry_size, dtype, lengths, 1))
        return stores[-1]

    heads.new_draft_cache = small
    found = Decoder(model, build_proposer("heads", target, heads=heads)).generate(ids, attention_mask=mask, **options)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **options))
    assert [store.rows.shape[1] for store in stores] == [256]


def test_the_seed_is_the_text(model: PreTrainedModel) -> None:
    def text(**seed: int) -> list[list[int]]:
        return Decoder(model, "none").generate(**padded(8), max_new_tokens=24, do_sample=True, top_k=0, **seed).tolist()

    assert text(seed=1) == text(seed=1) != text(seed=2)
    torch.manual_seed(3)
    first, second = text(), text()
    torch.manual_seed(3)
    assert text() == first != second


GREEDY_OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[24], [17, 9]]},
    "forced_bos_eos": {"forced_eos_token_id": 2},
    "suppress_tokens": {"suppress_tokens": [5, 24, 7, 9], "begin_suppress_tokens": [20, 49]},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(20, 40))},
    "min_length": {"min_length": 14, "eos_token_id": list(range(20, 40))},
    "several_eos": {"eos_token_id": [2, 9, 17, 33, 41, 50]},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.5)},
    "sequence_bias": {"sequence_bias": {(10,): 2.0, (9, 30): 9.0, (24,): -4.0, (17, 9): -20.0}},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.1},
    "remove_invalid_values": {"remove_invalid_values": True},
    "max_length": {"max_new_tokens": None, "max_length": 21},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.4, "bias": 3.0, "seeding_scheme": "lefthash"}},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GREEDY_OPTIONS))
@pytest.mark.parametrize("proposer", ["recycling", "oracle"])
def test_every_option_gives_the_text_of_transformers(
    model: PreTrainedModel, target: Target, name: str, proposer: str
) -> None:
    inputs = padded(3)
    options = {"max_new_tokens": 30, "do_sample": False} | GREEDY_OPTIONS[name]
    if "watermarking_config" in options:
        from transformers import WatermarkingConfig

        options["watermarking_config"] = WatermarkingConfig(**options["watermarking_config"])
    expected = model.generate(**inputs, **options)
    guesser = oracle(model, inputs, **options) if proposer == "oracle" else MAKERS[proposer](target)
    assert torch.equal(Decoder(model, guesser).generate(**inputs, **options), expected)


def test_options_change_the_text(model: PreTrainedModel) -> None:
    """Otherwise the test above would show nothing."""
    inputs, base = padded(3), {"max_new_tokens": 30, "do_sample": False}
    plain = model.generate(**inputs, **base)
    changed = 0
    for options in GREEDY_OPTIONS.values():
        if "watermarking_config" not in options:
            other = model.generate(**inputs, **(base | options))
            changed += other.shape != plain.shape or not torch.equal(other, plain)
    assert changed >= 12  # all but remove_invalid_values, which finds nothing to remove


def test_number_of_return_sequences(model: PreTrainedModel, target: Target) -> None:
    options = {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3, "seed": 4, "top_k": 0}
    expected = Decoder(model, "none").generate(**padded(2), **options)
    assert expected.shape[0] == 6
    assert len({tuple(row) for row in expected.tolist()}) == 6  # every sequence has noise of its own
    for proposer in (MAKERS["recurrent"](target), oracle(model, padded(2), **options)):
        assert torch.equal(Decoder(model, proposer).generate(**padded(2), **options), expected)


def test_scores_and_logits_are_those_of_transformers(model: PreTrainedModel) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 16,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    inputs = padded(3)
    expected = model.generate(**inputs, **options)
    guesser = oracle(
        model, inputs, **{key: options[key] for key in ("max_new_tokens", "do_sample", "repetition_penalty")}
    )
    found = Decoder(model, guesser).generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(found.logits) == len(expected.scores)
    ended = (expected.sequences[:, inputs["input_ids"].shape[1] :] == 2).cumsum(1) > 0
    for at, (score, logit) in enumerate(zip(found.scores, found.logits, strict=True)):
        running = ~ended[:, at - 1] if at else torch.ones(3, dtype=torch.bool)
        torch.testing.assert_close(score[running], expected.scores[at][running], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logit[running], expected.logits[at][running], rtol=1e-4, atol=1e-4)


class Counting(LogitsProcessor):
    """A processor with a state: forbids every third token's best choice, and remembers what it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += [tuple(row) for row in input_ids.tolist()]
        if len(self.calls) % 3 == 0:
            scores = scores.clone()
            scores[:, scores.argmax(-1)] = -torch.inf
        return scores


def test_custom_processors_see_what_plain_decoding_shows_them(model: PreTrainedModel) -> None:
    inputs = padded(1)
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False}
    theirs, ours = Counting(), Counting()
    expected = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([theirs]))
    guesser = OracleProposer(expected.tolist(), 64)
    found = Decoder(model, guesser).generate(**inputs, **options, logits_processor=LogitsProcessorList([ours]))
    assert torch.equal(found, expected)
    assert ours.calls == theirs.calls


class EndsAfter(StoppingCriteria):
    """Ends a row when its last two tokens add up to a multiple of seven; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.calls += 1
        return (input_ids[:, -1] + input_ids[:, -2]) % 7 == 0


def test_custom_criteria_end_a_row_where_plain_decoding_ends(model: PreTrainedModel) -> None:
    inputs = padded(3)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([EndsAfter()]))
    assert expected.shape[1] < 9 + 40
    found = Decoder(model, oracle(model, inputs, **options)).generate(
        **inputs, **options, stopping_criteria=StoppingCriteriaList([EndsAfter()])
    )
    assert torch.equal(found, expected)
    single, seen = EndsAfter(), EndsAfter()
    model.generate(**padded(1), **options, stopping_criteria=StoppingCriteriaList([single]))
    Decoder(model, oracle(model, padded(1), **options)).generate(
        **padded(1), **options, stopping_criteria=StoppingCriteriaList([seen])
    )
    assert seen.calls == single.calls


def test_allowed_tokens_are_asked_per_row(model: PreTrainedModel, target: Target) -> None:
    def allowed(row: int, text: Tensor) -> list[int]:
        return [t for t in range(3, 64) if t % 3 == row]

    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    expected = model.generate(**padded(3), **options)
    found = Decoder(model, MAKERS["recycling"](target)).generate(**padded(3), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["random", "recurrent", "lookahead", "ngram", "oracle"])
@pytest.mark.parametrize("prompt", [100, 117, 118, 119])
def test_text_ends_at_the_context(name: str, prompt: int) -> None:
    """Never past the model's positions: the tree shrinks as it nears the end."""
    model = tiny_llama(context=120, eos_token_id=None)
    inputs = {
        "input_ids": torch.arange(prompt)[None] % 60 + 3,
        "attention_mask": torch.ones(1, prompt, dtype=torch.long),
    }
    options: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False}
    guesser = oracle(model, inputs, **options) if name == "oracle" else MAKERS[name](Target(model))
    longest = []
    seen = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: longest.append(kwargs.get("position_ids")), with_kwargs=True
    )
    decoder = Decoder(model, guesser)
    decoder.target.max_length = 120  # as if the model had a table of positions
    found = decoder.generate(**inputs, **options)
    seen.remove()
    assert found.shape[1] == 120
    assert max(int(ids.max()) for ids in longest if ids is not None) == 118
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=120 - prompt, do_sample=False))


def test_a_fast_row_near_the_context_beside_a_slow_one() -> None:
    """The row with most text decides how deep a tree may be."""
    model = tiny_llama(context=120, eos_token_id=None)
    long, short = (torch.arange(100) % 60 + 3).tolist(), [5, 6]
    ids = torch.tensor([long, [0] * 98 + short])
    mask = torch.tensor([[1] * 100, [0] * 98 + [1] * 2])
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    expected = Decoder(model, "none").generate(ids, **options)
    positions = []
    seen = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs.get("position_ids")), with_kwargs=True
    )
    guesser = OracleProposer([expected[0].tolist(), [0] * 22], 64, depth=8, lie=0.0)
    decoder = Decoder(model, guesser, probe=False)
    decoder.target.max_length = 120  # as if the model had a table of positions
    found = decoder.generate(ids, **options)
    seen.remove()
    assert torch.equal(found, expected)
    assert max(int(ids.max()) for ids in positions if ids is not None) == 118


FAMILIES = ["gemma2", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "gpt2", "qwen3_moe", "opt", "olmo3"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sample", [False, True])
def test_other_families(name: str, sample: bool) -> None:
    if not exists(name):
        pytest.skip(f"this version of transformers has no {name}")
    model = tiny(name, ACCEPTED[name])
    inputs = padded(3)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": sample, "eos_token_id": None}
    seeded = options | ({"seed": 3, "top_k": 0} if sample else {})
    expected = Decoder(model, "none").generate(**inputs, **seeded)
    if not sample:
        assert torch.equal(expected, model.generate(**inputs, **options))
    for guesser in (oracle(model, inputs, **seeded), RandomProposer(99, 14), "recycling"):
        assert torch.equal(Decoder(model, guesser).generate(**inputs, **seeded), expected)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    prompts=st.lists(st.lists(st.integers(3, 63), min_size=1, max_size=12), min_size=1, max_size=5),
    nodes=st.integers(2, 30),
    lie=st.floats(0, 1),
    sample=st.booleans(),
    right=st.booleans(),
)
def test_any_prompt_any_tree(
    model: PreTrainedModel, seed: int, prompts: list[list[int]], nodes: int, lie: float, sample: bool, right: bool
) -> None:
    """Random batches, padded on either side, random trees."""
    width = max(map(len, prompts))
    pads = [[0] * (width - len(p)) for p in prompts]
    ids = [p + z if right else z + p for p, z in zip(prompts, pads, strict=True)]
    ones = [[1] * len(p) for p in prompts]
    mask = [o + z if right else z + o for o, z in zip(ones, pads, strict=True)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    options = {"max_new_tokens": 15, "do_sample": sample} | ({"seed": seed, "top_k": 0} if sample else {})
    expected = Decoder(model, "none").generate(**inputs, **options)
    texts = [p + row[width:] for p, row in zip(prompts, expected.tolist(), strict=True)]
    for guesser in (OracleProposer(texts, 64, depth=5, lie=lie, seed=seed), RandomProposer(64, nodes, seed)):
        assert torch.equal(Decoder(model, guesser).generate(**inputs, **options), expected)


def test_sampling_follows_the_distribution(model: PreTrainedModel, target: Target) -> None:
    """Seeded draws with speculation are draws from the target's distribution (chi-square over 64 tokens)."""
    inputs = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        p = (model(inputs).logits[0, -1] / 1.5).softmax(-1)
    decoder = Decoder(model, MAKERS["recurrent"](target))
    rows = decoder.generate(
        inputs, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=0, num_return_sequences=4000, seed=5
    )
    counts = torch.bincount(rows[:, -1], minlength=64).double()
    common = p > 5 / 4000
    expected = torch.cat([4000 * p[common], 4000 * p[~common].sum()[None]]).double()
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    statistic = float(((found - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_typical_acceptance_is_lossy_but_bounded(model: PreTrainedModel) -> None:
    """Off by default; on, it may change the text but never the limits."""
    decoder = Decoder(model, RandomProposer(64, 20), typical=TypicalAcceptance(0.001, 0.001))
    found = decoder.generate(**padded(3), max_new_tokens=30, do_sample=True, top_k=0, seed=1, eos_token_id=None)
    assert found.shape == (3, 9 + 30)
    exact = Decoder(model, "none").generate(
        **padded(3), max_new_tokens=30, do_sample=True, top_k=0, seed=1, eos_token_id=None
    )
    assert not torch.equal(found, exact)
    assert decoder.statistics.accepted_length > 1.05


def test_looking_at_the_noise_finds_what_sampling_draws() -> None:
    """A proposer that knows the distribution but not the draw, with and without the noise of the coming position."""
    model, twin = (tiny_llama(initializer_range=0.12, eos_token_id=None) for _ in range(2))

    class NextToken(Proposer):
        """Four guesses below the root from the true distribution."""

        max_depth, tree_size = 1, 5

        def __init__(self, look: bool) -> None:
            self.uses_noise = look

        def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
            if max_depth < 1:
                return TokenTree.root(state.roots)
            logits = twin(torch.tensor(state.texts), use_cache=False).logits[:, -1]
            if self.uses_noise:
                assert state.noise is not None
                logits = logits + state.noise.at(0)
            tokens = torch.cat([state.roots[:, None], logits.topk(4).indices], 1)
            return TokenTree.from_parents(tokens, torch.zeros(5, dtype=torch.long))

    lengths = {}
    for look in (False, True):
        decoder = Decoder(model, NextToken(look))
        decoder.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=60, do_sample=True, top_k=0, seed=2)
        lengths[look] = decoder.statistics.accepted_length
    assert lengths[True] > 1.9  # the draw is known: one guess would do
    assert lengths[False] < 1.6
