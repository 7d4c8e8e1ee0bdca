"""Logits processors and stopping criteria that look at the whole batch give the text of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_exactness import MAKERS, padded
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor
from transformers.generation.stopping_criteria import ConfidenceCriteria, EosTokenCriteria

from conftest import tiny_llama
from medhead import Decoder, MedheadError, Proposer
from medhead.model.target import Target
from scripted import OracleProposer

EQUAL = {
    "input_ids": torch.tensor([[5, 9, 13], [7, 8, 30], [20, 21, 22]]),
    "attention_mask": torch.ones(3, 3, dtype=torch.long),
}
BASE: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
WITH_ENDS = BASE | {"eos_token_id": [2, 33, 41]}
WITHOUT_END = BASE | {"eos_token_id": None}
RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
Made = tuple[list[LogitsProcessor], list[StoppingCriteria]]


class Recorded:
    """Keeps the token ids of every call."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []


class Bias(Recorded, LogitsProcessor):
    """Adds a bias of its own to every row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.tolist())
        return scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)) * 3


class BansPerRow(Recorded, LogitsProcessor):
    """Forbids other tokens in every row, in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.tolist())
        for row in range(len(scores)):
            scores[row, row + 3 :: 3] = -torch.inf
        return scores


class Others(Recorded, LogitsProcessor):
    """Prefers what all rows find probable, with a state that counts the calls."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.tolist())
        return scores + scores.mean(0) * (len(self.calls) % 3)


class NoRepeat(NoRepeatNGramLogitsProcessor):
    """A subclass may do anything."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores).roll(int(input_ids[0, -1] % 2), 0)


class Lengths(Recorded, StoppingCriteria):
    """Ends every row at a length of its own."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls.append(input_ids.tolist())
        return torch.tensor([7, 19, 12])[: len(input_ids)] <= len(self.calls)


class Sums(Recorded, StoppingCriteria):
    """Ends a row when the sum of its tokens, kept between calls, is large."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.sums = input_ids[:, -1] + (self.sums if self.calls else 0)
        self.calls.append(input_ids.tolist())
        return self.sums > 350


class Unlikely(Recorded, StoppingCriteria):
    """Ends all rows by one answer that depends on the scores of every position."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.calls.append([[len(scores), *scores[-1].shape]])
        return len(scores) > 6 and float(torch.stack(scores).softmax(-1).amax(-1).min()) < 0.3


class Scoreless(Recorded, StoppingCriteria):
    """Notes whether it is shown scores."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls.append([[int(scores is None)]])
        return torch.zeros(len(input_ids), dtype=torch.bool)


CALLBACKS: dict[str, Callable[[], Made]] = {
    "bias": lambda: ([Bias()], []),
    "bans": lambda: ([BansPerRow()], []),
    "others": lambda: ([Others()], []),
    "subclass": lambda: ([NoRepeat(2)], []),
    "lengths": lambda: ([], [Lengths()]),
    "sums": lambda: ([], [Sums()]),
    "both": lambda: ([Others(), Bias()], [Lengths(), Sums()]),
}


def run(generate: Callable[..., Any], made: Made, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Generate with these callbacks."""
    lists = {"logits_processor": LogitsProcessorList(made[0]), "stopping_criteria": StoppingCriteriaList(made[1])}
    return generate(**inputs, **options, **lists)


def calls(made: Made) -> list[Any]:
    return [one.calls for part in made for one in part if isinstance(one, Recorded)]


def proposers(
    target: Target, inputs: dict[str, Tensor], sequences: Tensor, names: Iterable[str] = ("recycling", "recurrent")
) -> list[Proposer]:
    """Some kinds, and one that knows the text."""
    skip = (inputs["attention_mask"] == 0).sum(1).tolist()
    texts = [row[skip[index % len(skip)] :] for index, row in enumerate(sequences.tolist())]
    return [*(MAKERS[name](target) for name in names), OracleProposer(texts, 64, lie=0.1)]


@pytest.mark.parametrize(("ends", "ragged"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_see_the_batch_as_in_transformers(
    model: PreTrainedModel, target: Target, name: str, ends: bool, ragged: bool
) -> None:
    inputs, options = padded(3) if ragged else EQUAL, WITH_ENDS if ends else WITHOUT_END
    theirs = CALLBACKS[name]()
    expected = run(model.generate, theirs, inputs, **options)
    for proposer in proposers(target, inputs, expected, MAKERS if name == "both" else ("recycling", "recurrent")):
        ours, decoder = CALLBACKS[name](), Decoder(model, proposer)
        assert torch.equal(run(decoder.generate, ours, inputs, **options), expected), proposer.name
        assert calls(ours) == calls(theirs), proposer.name
    assert max(decoder.statistics.lengths) > 1  # the prompts' pass and passes of ended rows have one token each


def test_padding_is_not_counted(model: PreTrainedModel) -> None:
    decoder = Decoder(model, "recycling")
    for end, count in ((63, 7 + 19 + 12), (None, 3 * 19)):
        found = run(decoder.generate, ([], [Lengths()]), EQUAL, **BASE, eos_token_id=end)
        assert 63 not in found
        assert decoder.statistics.new_tokens == count


def test_these_callbacks_change_the_text_of_every_row(model: PreTrainedModel) -> None:
    plain = model.generate(**padded(3), **WITH_ENDS)
    for name, make in CALLBACKS.items():
        changed = run(model.generate, make(), padded(3), **WITH_ENDS)
        assert changed.shape != plain.shape or not torch.equal(changed, plain), name


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", ["both", "sums"])
def test_sampled_text_with_callbacks_is_that_of_plain_decoding(
    model: PreTrainedModel, target: Target, name: str, ends: bool
) -> None:
    options = (WITH_ENDS if ends else WITHOUT_END) | {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 20,
        "num_return_sequences": 2,
        "seed": 4,
    }
    inputs = padded(2)
    made = CALLBACKS[name]()
    made = (made[0], [one for one in made[1] if isinstance(one, Sums)])
    expected = run(Decoder(model, "none").generate, made, inputs, **options)
    assert expected.shape[0] == 4
    for proposer in proposers(target, {k: v.repeat_interleave(2, 0) for k, v in inputs.items()}, expected):
        again = CALLBACKS[name]()
        again = (again[0], [one for one in again[1] if isinstance(one, Sums)])
        assert torch.equal(run(Decoder(model, proposer).generate, again, inputs, **options), expected), proposer.name
        assert calls(again) == calls(made)


@pytest.mark.parametrize("options", [WITH_ENDS, WITHOUT_END])
def test_scores_logits_and_stream_with_callbacks(
    model: PreTrainedModel, target: Target, options: dict[str, Any]
) -> None:
    """Rows that have ended included."""

    class Columns:
        def __init__(self) -> None:
            self.columns: list[list[int]] = []

        def put(self, tokens: Tensor) -> None:
            self.columns.append(tokens.flatten().tolist())

        def end(self) -> None:
            self.columns.append([])

    theirs, ours = ([Bias()], [Sums()]), ([Bias()], [Sums()])
    expected = run(model.generate, theirs, padded(3), **options, **RECORDED)
    found = run(Decoder(model, MAKERS["recycling"](target)).generate, ours, padded(3), **options, **RECORDED)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(found.logits) == len(expected.scores)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    streams = Columns(), Columns()
    run(model.generate, ([], [Lengths()]), padded(3), **options, streamer=streams[0])
    run(Decoder(model, "recycling").generate, ([], [Lengths()]), padded(3), **options, streamer=streams[1])
    assert streams[0].columns == streams[1].columns


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("make", [Unlikely, lambda: ConfidenceCriteria(0.4)])
def test_criteria_see_the_scores_that_transformers_shows(
    model: PreTrainedModel, rows: int, make: Callable[[], StoppingCriteria]
) -> None:
    """A tuple of all positions where they are recorded, else None."""
    theirs, ours = ([], [make(), Scoreless()]), ([], [make(), Scoreless()])
    expected = run(model.generate, theirs, padded(rows), **WITH_ENDS, **RECORDED)
    assert expected.sequences.shape[1] < padded(rows)["input_ids"].shape[1] + 30
    found = run(Decoder(model, "recycling").generate, ours, padded(rows), **WITH_ENDS, **RECORDED)
    assert torch.equal(found.sequences, expected.sequences)
    assert calls(ours) == calls(theirs)
    seen = Scoreless()
    run(Decoder(model, "recycling").generate, ([], [seen]), padded(rows), **WITH_ENDS)
    assert {call[0][0] for call in seen.calls} == {1}


def test_processors_see_no_call_after_a_criterion_ends_the_text(model: PreTrainedModel) -> None:
    """One row: processors with a state, and a function of allowed tokens that keeps one."""
    inputs = {key: value[:1] for key, value in EQUAL.items()}

    def options(asked: list[list[int]]) -> dict[str, Any]:
        def allowed(row: int, text: Tensor) -> list[int]:
            asked.append(text.tolist())
            return [token for token in range(3, 64) if token % 3 != len(asked) % 3]

        return WITH_ENDS | {"prefix_allowed_tokens_fn": allowed}

    for kinds in ([], [Others]):
        asked: dict[str, list[list[int]]] = {"theirs": [], "ours": []}
        theirs, ours = (([kind() for kind in kinds], [Lengths()]) for _ in range(2))
        expected = run(model.generate, theirs, inputs, **options(asked["theirs"]))
        beyond = run(model.generate, ([kind() for kind in kinds], []), inputs, **options([]))
        guesser = OracleProposer(beyond.tolist(), 64, depth=4, lie=0.0)  # the text goes on where the criterion ends it
        assert torch.equal(run(Decoder(model, guesser).generate, ours, inputs, **options(asked["ours"])), expected)
        assert asked["ours"] == asked["theirs"]
        assert calls(ours) == calls(theirs)


def test_known_processors_keep_their_row_after_others_have_ended(model: PreTrainedModel, target: Target) -> None:
    """Rows advance at their own pace: the longest accepted path of a pass is not that of the slowest row."""

    def allowed(row: int, text: Tensor) -> list[int]:
        return [2, *(token for token in range(3, 64) if token % 3 == row)] if len(text) > 10 + 3 * row else [5 + row]

    options = WITH_ENDS | {
        "prefix_allowed_tokens_fn": allowed,
        "repetition_penalty": 1.2,
        "sequence_bias": {(2,): 2.0, (9, 30): 9.0},
        "no_repeat_ngram_size": 9,
    }
    expected = model.generate(**padded(3), **options)
    assert len(set((expected[:, 9:] != 0).sum(1).tolist())) > 1
    for proposer in proposers(target, padded(3), expected):
        decoder = Decoder(model, proposer)
        assert torch.equal(decoder.generate(**padded(3), **options), expected), proposer.name
    assert len(set(decoder.statistics.lengths)) > 2


def test_without_end_tokens_rows_go_on_until_all_have_ended(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop strings end rows at different times; transformers pads them only if it knows an end token."""
    model = tiny_llama(vocab=len(tokenizer), eos_token_id=None, bos_token_id=None, initializer_range=0.4)
    for eos in (None, 2):
        options = BASE | {"eos_token_id": eos, "stop_strings": ["a", "e", "o"], "tokenizer": tokenizer}
        expected = model.generate(**padded(3), **options)
        for name in ("ngram", "recycling", "none"):
            assert torch.equal(Decoder(model, name).generate(**padded(3), **options), expected)


def test_a_length_of_ones_own_replaces_the_limit(model: PreTrainedModel) -> None:
    for rows in (1, 3):
        width = padded(rows)["input_ids"].shape[1]
        for length in (width + 6, width + 38):
            made = [], [MaxLengthCriteria(length)]
            expected = run(model.generate, made, padded(rows), **WITHOUT_END)
            assert torch.equal(run(Decoder(model, "recycling").generate, made, padded(rows), **WITHOUT_END), expected)
        with pytest.raises(MedheadError, match="at least 1"):
            run(Decoder(model, "none").generate, ([], [MaxLengthCriteria(width)]), padded(rows), **BASE)


class LateEnd(EosTokenCriteria):
    """Not an end token before the text is long; a subclass may do anything."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return super().__call__(input_ids, scores) & (input_ids.shape[1] > 20)


@pytest.mark.parametrize("rows", [1, 3])
def test_subclasses_of_known_criteria_are_asked(model: PreTrainedModel, rows: int) -> None:
    made = [], [LateEnd(torch.arange(3, 30))]
    expected = run(model.generate, made, padded(rows), **WITHOUT_END, pad_token_id=0)
    found = run(Decoder(model, "recycling").generate, made, padded(rows), **WITHOUT_END, pad_token_id=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_synthid_watermarks(model: PreTrainedModel, target: Target, rows: int) -> None:
    config = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3, context_history_size=8)
    options = WITH_ENDS | {"watermarking_config": config}
    expected = model.generate(**padded(rows), **options)
    assert not torch.equal(expected, model.generate(**padded(rows), **WITH_ENDS))
    sampled = options | {"do_sample": True, "seed": 3, "top_k": 0}
    plain = Decoder(model, "none").generate(**padded(rows), **sampled)
    for name in ("recycling", "recurrent"):
        decoder = Decoder(model, MAKERS[name](target))
        assert torch.equal(decoder.generate(**padded(rows), **options), expected)
        assert torch.equal(decoder.generate(**padded(rows), **sampled), plain)


def test_the_last_tokens_of_the_context_in_lockstep() -> None:
    model = tiny_llama(context=40)
    expected = run(model.generate, ([Others()], []), padded(3), max_new_tokens=31, do_sample=False, eos_token_id=None)
    for name in ("recycling", "lookahead"):
        decoder = Decoder(model, name)
        decoder.target.max_length = 40  # as if the model had a table of positions
        found = run(decoder.generate, ([Others()], []), padded(3), **(WITHOUT_END | {"max_new_tokens": 60}))
        assert torch.equal(found, expected)
