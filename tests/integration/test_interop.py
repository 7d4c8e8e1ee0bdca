"""Heads read from other projects' formats compute the published formulas, in training and in decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from checkpoint_formulas import Formula, V
from checkpoint_makers import MAKERS, TEXT, logits_in_training, make_eagle
from medhead import Decoder, MedheadError
from medhead.core.lengths import Lengths
from medhead.heads import Heads, load_heads
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsExpander, HeadsProposer


@pytest.fixture(params=MAKERS)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Formula]:
    make, fields = MAKERS[request.param]
    return tmp_path / "heads", make(tmp_path / "heads", **fields)


def logits_in_decoding(heads: Heads, target: Target, text: list[int], path: list[int]) -> list[Tensor]:
    """Return log-probabilities over the vocabulary at every depth, as decoding computes them: prefill, then a path."""
    proposer = HeadsProposer(target, heads, dtype=torch.float32)
    with torch.no_grad(), target.active(proposer.feature_layers):
        cache = target.new_cache(1, 64)
        whole = [*text, path[0]]
        lengths = Lengths.of([0])
        draft_cache = proposer.new_draft_cache(lengths, 64)
        proposer.begin(target, [whole])

        def on_chunk(features: Tensor, start: int) -> None:
            proposer.on_prefill(draft_cache, [whole], features, start)
            lengths.advance(torch.tensor([features.shape[1]]))

        features = target.prefill(cache, [text], on_chunk)
        state = DecodeState(target, [whole], torch.tensor([path[0]]), features)
        view = None if draft_cache is None else draft_cache.view()
        expander = HeadsExpander(proposer.output_head, state, view, V, len(path), None)
        node, found = expander.start(), []
        for depth, token in enumerate(path):
            node, logp, children = expander.expand(node, torch.tensor([[token]]), depth)
            full = torch.full((V,), float("-inf"))
            found.append(full.scatter(0, children[0, 0], logp[0, 0]))
    return found


def test_training_computes_the_published_formula(
    deep: PreTrainedModel, deep_target: Target, foreign: tuple[Path, Formula]
) -> None:
    folder, formula = foreign
    heads = load_heads(folder, deep_target)
    found = logits_in_training(heads, deep_target, TEXT)
    assert {anchor for anchor, _, _ in found} == set(range(len(TEXT) - 2))
    for anchor in (0, 1, 4, 8, len(TEXT) - 3):
        path = TEXT[anchor + 1 : anchor + 1 + heads.config.depth]
        expected = formula(deep, TEXT[: anchor + 1], path + [0] * (heads.config.depth - len(path)))
        given = {depth: logits for at, depth, logits in found if at == anchor}
        assert len(given) == min(heads.config.depth, len(TEXT) - 2 - anchor)
        for depth, logits in given.items():
            torch.testing.assert_close(logits, expected[depth], rtol=2e-4, atol=2e-4)


def test_decoding_computes_the_published_formula(
    deep: PreTrainedModel, deep_target: Target, foreign: tuple[Path, Formula]
) -> None:
    folder, formula = foreign
    heads = load_heads(folder, deep_target)
    for length in (1, 7, len(TEXT)):
        path = [19, 44, 2, 2, 57, 30, 6, 12][: heads.config.depth]
        expected = formula(deep, TEXT[:length], path)
        for depth, logp in enumerate(logits_in_decoding(heads, deep_target, TEXT[:length], path)):
            torch.testing.assert_close(logp, expected[depth].log_softmax(-1), rtol=2e-4, atol=2e-4)


def test_decoding_gives_the_targets_text(deep: PreTrainedModel, foreign: tuple[Path, Formula]) -> None:
    decoder = Decoder(deep, heads=foreign[0], tree_size=12)
    ids = torch.tensor([TEXT[:6], [0, 0, *TEXT[2:6]]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = deep.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(decoder.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False), expected)
    assert decoder.proposer.name == "hybrid"


def test_stored_types_become_the_targets(deep_target: Target, tmp_path: Path) -> None:
    make_eagle(tmp_path / "heads")
    path = tmp_path / "heads" / "model.safetensors"
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(path).items()}, path)
    heads = load_heads(tmp_path / "heads", deep_target)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    assert not heads.training


def test_tensors_in_several_files(deep_target: Target, tmp_path: Path) -> None:
    make_eagle(tmp_path / "one")
    make_eagle(tmp_path / "two")
    whole = load_file(tmp_path / "two" / "model.safetensors")
    (tmp_path / "two" / "model.safetensors").unlink()
    where = {}
    for part, names in enumerate((sorted(whole)[:6], sorted(whole)[6:])):
        file = f"model-{part}.safetensors"
        save_file({name: whole[name] for name in names}, tmp_path / "two" / file)
        where.update(dict.fromkeys(names, file))
    index = tmp_path / "two" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    one, two = (load_heads(tmp_path / name, deep_target).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../one/model.safetensors"}}))
    with pytest.raises(MedheadError, match="names no files of this folder"):
        load_heads(tmp_path / "two", deep_target)
