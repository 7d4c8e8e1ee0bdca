"""Token Recycling: what is remembered of every node, and the file that keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_ngram import state
from torch import Tensor

from conftest import tiny_llama
from medhead import Decoder, MedheadError, TokenTree
from medhead.core.acceptance import accept_drawn
from medhead.core.gumbel import LazyGumbel
from medhead.model.target import Target
from medhead.proposers import VerifyOutput, build_proposer
from medhead.proposers.recycling import RecyclingProposer

IDS = torch.tensor([[5, 9, 13]])


def verified(tokens: Tensor, logits: Tensor) -> VerifyOutput:
    tree = TokenTree.from_parents(tokens, torch.zeros_like(tokens))
    accepted = accept_drawn(tree, logits.argmax(-1))
    return VerifyOutput(tree, logits, logits, accepted, accepted.counts.tolist())


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 3))
def test_every_node_is_remembered(target: Target, seed: int, nodes: int, batch: int) -> None:
    """The matrices hold, for every token of the tree, the best successors at one of its nodes, and nothing else changes."""
    generator = torch.Generator().manual_seed(seed)
    proposer = RecyclingProposer(target, successors=3)
    before = proposer.tokens.clone()
    tokens = torch.randint(0, 10, (batch, nodes), generator=generator)
    logits = torch.randn(batch, nodes, 64, generator=generator)
    proposer.update(verified(tokens, logits))
    for token in range(64):
        places = (tokens == token).nonzero().tolist()
        if not places:
            assert torch.equal(proposer.tokens[token], before[token])
            continue
        seen = [sorted(enumerate(logits[b, n].tolist()), key=lambda pair: -pair[1])[:3] for b, n in places]
        names = [[name for name, _ in best] for best in seen]
        assert proposer.tokens[token].tolist() in names
        b, n = places[names.index(proposer.tokens[token].tolist())]
        torch.testing.assert_close(proposer.logp[token], logits[b, n].log_softmax(-1)[proposer.tokens[token]])


def test_candidates_have_the_targets_probabilities(target: Target) -> None:
    """What was never seen is impossible."""
    proposer = RecyclingProposer(target, successors=2, tree_size=6, max_depth=3)
    proposer.tokens[5], proposer.logp[5] = torch.tensor([6, 7]), torch.tensor([0.6, 0.3]).log()
    proposer.tokens[6], proposer.logp[6] = torch.tensor([8, 5]), torch.tensor([0.5, 0.2]).log()
    found = proposer.candidates(state(target, [[1, 5], [1, 40]]), 3)
    assert found is not None
    assert found.top_probs(5)[0].tolist() == pytest.approx([0.6, 0.3, 0.3, 0.12, 0.072], rel=1e-3)
    assert float(found.top_probs(1)[1]) == 0
    tree = proposer.propose(state(target, [[1, 5]]), 3)
    nodes = {tuple(path[:n]) for path in tree.paths(0) for n in range(1, len(path) + 1)}
    assert nodes == {(6,), (7,), (6, 8), (6, 5), (6, 5, 6)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_given_the_noise_leave_room_for_other_tokens(target: Target, temperature: float) -> None:
    """The known successors are drawn as often as estimated at temperature 1, and never much less often."""
    proposer = RecyclingProposer(target, successors=2, max_depth=1)
    probs = torch.cat([torch.tensor([0.3, 0.2]), torch.full((62,), 0.5 / 62)])
    proposer.tokens[5], proposer.logp[5] = torch.tensor([0, 1]), probs[:2].log()
    given = replace(state(target, [[1, 5]] * 4000), temperature=temperature)
    noise = -torch.empty(4000, 1, 64).exponential_(generator=torch.Generator().manual_seed(0)).log()
    found = proposer.candidates(replace(given, noise=LazyGumbel.of(noise)), 1)
    assert found is not None
    drawn = (probs.log() / temperature + noise[:, 0]).argmax(-1)
    seen = float((drawn < 2).float().mean())
    estimated = float(found.scores.exp().sum(1).mean())
    assert estimated < seen + 0.03
    assert temperature != 1 or estimated == pytest.approx(seen, abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["recycling", "hybrid"])
def test_tokens_without_evidence_are_not_drafted(name: str, temperature: float) -> None:
    """The first pass of a new decoder after a prompt without repetition is over the root alone."""
    decoder = Decoder(tiny_llama(), name, tree_size=None if name == "recycling" else 32)
    nodes: list[int] = []
    update = decoder.proposer.update
    decoder.proposer.update = lambda output: (nodes.append(output.tree.nodes), update(output))[1]  # type: ignore[method-assign]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    decoder.generate(IDS, seed=3, max_new_tokens=12, **sampling)
    assert nodes[0] == 1
    assert max(nodes) > 1


def test_unseen_tokens_of_older_files_are_not_drafted(target: Target, tmp_path: Path) -> None:
    """Files of earlier versions hold -20 for a successor that was never seen."""
    content = {"tokens": torch.arange(8, dtype=torch.int32).repeat(64, 1), "logp": torch.full((64, 8), -20.0)}
    save_file(content, tmp_path / "old", metadata={"format": "medhead recycling 1"})
    proposer = RecyclingProposer(target, state=tmp_path / "old")
    assert proposer.propose(state(target, [[1, 5]]), 3).nodes == 1


def test_what_was_saved_warms_another_run(tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.2, eos_token_id=None)  # what it says depends on the last token most
    target = Target(model)
    path = tmp_path / "state.safetensors"
    first = Decoder(model, "recycling")
    plain = first.generate(IDS, max_new_tokens=60, do_sample=False)
    cold = first.statistics.accepted_length
    assert isinstance(first.proposer, RecyclingProposer)
    first.proposer.save(path)
    first.proposer.save(path)  # over itself
    second = Decoder(model, "recycling", state=path)
    assert isinstance(second.proposer, RecyclingProposer)
    assert torch.equal(second.proposer.tokens, first.proposer.tokens)
    assert torch.equal(second.proposer.logp, first.proposer.logp)
    content = path.read_bytes()
    assert torch.equal(second.generate(IDS, max_new_tokens=60, do_sample=False), plain)
    assert second.statistics.accepted_length > cold
    assert path.read_bytes() == content  # nothing is written unasked
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    for successors in (3, 12):
        other = RecyclingProposer(target, successors=successors, state=path)
        known = min(successors, 8)
        assert torch.equal(other.tokens[:, :known], first.proposer.tokens[:, :known])
        found = Decoder(model, other).generate(IDS, max_new_tokens=60, do_sample=False)
        assert torch.equal(found, plain)


def damage(path: Path, how: str) -> None:
    """Make a file of `save` wrong in one way."""
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "text":
        path.write_text("these are no matrices")
    elif how == "foreign":
        save_file({"tokens": torch.zeros(2), "logp": torch.zeros(2)}, path)
    else:
        content = load_file(path)
        if how == "shape":
            content["logp"] = content["logp"][:, :2].contiguous()
        elif how == "token":
            content["tokens"][3, 0] = 64
        elif how == "nan":
            content["logp"][3, 0] = float("nan")
        save_file(content, path, metadata={"format": "medhead recycling 1"})


WRONG = {
    "missing": "does not exist",
    "folder": "is no file",
    "truncated": "truncated or damaged",
    "text": "no recycling state",
    "foreign": "not a recycling state of medhead",
    "shape": r"matrices of \[64, 8\] and \[64, 2\]",
    "token": "damaged: a token",
    "nan": "damaged: a token",
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_files_get_one_line(target: Target, tmp_path: Path, how: str) -> None:
    path = tmp_path / "state.safetensors"
    RecyclingProposer(target).save(path)
    damage(path, how)
    with pytest.raises(MedheadError, match=WRONG[how]) as refusal:
        build_proposer("recycling", target, state=path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("how", ["folder", "text", "foreign"])
def test_nothing_else_is_overwritten(target: Target, tmp_path: Path, how: str) -> None:
    path = tmp_path / "state.safetensors"
    RecyclingProposer(target).save(path)
    damage(path, how)
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(MedheadError, match=WRONG[how]):
        RecyclingProposer(target).save(path)
    assert before is None or path.read_bytes() == before
    with pytest.raises(MedheadError, match="cannot be written"):
        RecyclingProposer(target).save(tmp_path / "nowhere" / "state")


def test_another_vocabulary(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    RecyclingProposer(Target(tiny_llama(vocab=80))).save(path)
    with pytest.raises(MedheadError, match="a model with 80 tokens, this one has 64"):
        RecyclingProposer(target, state=path)


@pytest.mark.parametrize("options", [{"successors": 0}, {"max_depth": 0}, {"width": -1}])
def test_wrong_numbers(target: Target, options: dict[str, Any]) -> None:
    with pytest.raises(MedheadError, match="must be at least 1"):
        build_proposer("recycling", target, **options)
