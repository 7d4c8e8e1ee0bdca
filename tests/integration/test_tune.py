"""The tuner and the benchmark of the budget, small."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import noise_heads
from medhead.bench import budget
from medhead.cli import tune as command
from medhead.heads import load_heads, save_heads
from medhead.heads.config import read_config
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.proposers.lookahead import LookaheadProposer
from medhead.proposers.lookahead_sizes import DEFAULTS, Sizes, store_sizes, tuned_sizes
from medhead.scheduling.cost_model import CostModel, costs_batch, known_costs
from medhead.tune import trees, windows
from medhead.tune.search import coordinate_search
from medhead.tune.trees import Tree

START = Tree(16, 4, 4, 6)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Costs are kept in a folder of the test's own."""
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_costs_are_stored_where_generations_look(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure_costs", lambda target, batch: CostModel({1: 1e-3 * batch, 8: 2e-3 * batch}))
    options = ["--model", str(DEMO_MODEL), "--batch-sizes", "3", "4", "1"]
    assert command.main(options) == 0
    assert capsys.readouterr().out.count("a pass over") == 2
    with torch.inference_mode():
        target = Target(load_model(DEMO_MODEL, torch.device("cpu"), torch.float32))
        assert [known_costs(target, costs_batch(rows))(1) for rows in (1, 3, 4)] == [1e-3, 4e-3, 4e-3]  # type: ignore[misc]


def test_settings_share_what_heads_hold(target: Target) -> None:
    """Tables and packed copies of the same heads are kept once, until their weights change."""
    heads = noise_heads(target, "recurrent", depth=4)
    one, other = (build_proposer("heads", target, heads=heads, tree_size=size) for size in (4, 8))
    assert one.output_head is other.output_head
    assert build_proposer("heads", target, heads=heads, dtype=torch.bfloat16).output_head is not one.output_head
    with torch.no_grad():
        next(heads.parameters()).add_(1)
    assert build_proposer("heads", target, heads=heads).output_head is not one.output_head


def test_search_finds_the_peak() -> None:
    """One dimension after the other, each from the best so far, the start always among them."""
    asked: list[list[Tree]] = []

    def rate(tried: list[Tree]) -> list[float]:
        asked.append(tried)
        return [-abs(t.tree_size - 12) - abs(t.tree_width - 2) - abs(t.tree_depth - 4) + 0.0 for t in tried]

    said: list[str] = []
    best = coordinate_search(START, trees.dimensions(8), rate, said.append)
    assert best == Tree(12, 2, 3, 4)
    assert all(
        any(replace(tree) == known for known in tried)
        for tried, tree in zip(asked[1:], [Tree(12, 4, 4, 6), Tree(12, 2, 3, 6)], strict=True)
    )
    assert len(said) == sum(map(len, asked))
    assert max(tree.tree_depth for tried in asked for tree in tried) == 8


def test_the_tree_is_kept_with_the_heads(target: Target, tmp_path: Path) -> None:
    """And is what decoding uses from then on; everything else in the configuration stays."""
    save_heads(noise_heads(target, "recurrent"), target.model, tmp_path)
    before = read_config(tmp_path)
    trees.save_tree(tmp_path, Tree(7, 3, 2, 2))
    after = read_config(tmp_path)
    assert replace(before, tree_size=7, tree_width=3, tree_branching=2, tree_depth=2) == after
    from medhead.proposers.heads import HeadsProposer

    proposer = HeadsProposer(target, load_heads(tmp_path, target))
    assert (proposer.tree_size, proposer.width, proposer.branching, proposer.max_depth) == (7, 3, 2, 2)


def test_tuning_the_demo(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run writes nothing; a real one keeps costs and tree."""
    monkeypatch.setattr(trees, "SIZES", (4, 8))
    monkeypatch.setattr(trees, "FRONTIERS", ((2, 2),))
    folder = tmp_path / "heads"
    shutil.copytree(DEMO_HEADS, folder)
    before = (folder / "medhead_config.json").read_text()
    options = ["--heads", str(folder), "--num-prompts", "1", "--max-new-tokens", "8", "--repeats", "1"]
    assert command.main([*options, "--dry-run"]) == 0
    assert not cache.exists()
    assert (folder / "medhead_config.json").read_text() == before
    assert command.main([*options, "--batch-sizes", "1", "2"]) == 0
    assert len(list(cache.glob("*.json"))) == 2
    out = capsys.readouterr().out
    assert "a pass over 2 rows" in out
    chosen = json.loads((folder / "medhead_config.json").read_text())
    assert f"fastest: {chosen['tree_size']} nodes, width {chosen['tree_width']}" in out


def test_budget_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and picture; the texts are plain decoding's."""
    options = ["--num-prompts", "1", "--max-new-tokens", "12", "--repeats", "1", "--tree-sizes", "4"]
    assert budget.main([*options, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["identical"] for row in found] == ["1/1"] * 4
    assert [row["adversarial"] for row in found] == [False, False, True, True]
    assert "| random heads, greedy |" in capsys.readouterr().out
    assert (tmp_path / "out" / "budget.png").stat().st_size > 1000


def test_random_heads(target: Target) -> None:
    """Same shapes, other numbers, the given heads untouched."""
    heads = noise_heads(target, "block")
    before = {name: p.clone() for name, p in heads.named_parameters()}
    noise = budget.random_heads(heads, 1)
    for name, p in noise.named_parameters():
        assert p.shape == before[name].shape
        assert not torch.equal(p, before[name])
    assert all(torch.equal(p, before[name]) for name, p in heads.named_parameters())


@pytest.mark.parametrize(
    ("main", "options", "says"),
    [
        (command.main, ["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (command.main, ["--batch-sizes", "0"], "--batch-sizes must be at least 1"),
        (command.main, ["--heads", "nowhere"], "does not exist"),
        (command.main, ["--proposer", "lookahead", "--heads", "x"], "--heads goes with --proposer heads"),
        (command.main, ["--proposer", "heads", "--model", "x"], "needs --heads FOLDER"),
        (budget.main, ["--repeats", "0"], "--repeats must be at least 1"),
        (budget.main, ["--heads", "nowhere"], "does not exist"),
        (budget.main, ["--output", __file__], "is a file"),
    ],
)
def test_wrong_input(main: object, options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2  # type: ignore[operator]
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_sizes_of_lookahead_are_tuned_and_found_again(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run writes nothing; later proposers for this model have what a real one found, unless told otherwise."""
    monkeypatch.setattr(windows, "NGRAMS", (3,))
    monkeypatch.setattr(windows, "WINDOWS", (2, 200))  # 200 columns are too many nodes
    monkeypatch.setattr(windows, "GUESS_SETS", (4,))

    def rate(tried: list[Sizes]) -> list[float]:
        return [-abs(s.window - 2) - abs(s.ngram - 3) - abs(s.guess_set - 4.0) for s in tried]

    monkeypatch.setattr(command, "throughput", lambda *args: rate)
    options = ["--proposer", "lookahead", "--num-prompts", "1"]
    assert command.main([*options, "--dry-run"]) == 0
    assert not cache.exists()
    assert command.main(options) == 0
    assert "fastest: W 2, N 3, G 4 (12 nodes)" in capsys.readouterr().out
    target = Target(load_model(DEMO_MODEL, torch.device("cpu"), torch.float32))
    assert tuned_sizes(target) == (2, 3, 4)
    proposer = LookaheadProposer(target)
    assert (proposer.window, proposer.ngram, proposer.guess_set) == (2, 3, 4)
    assert LookaheadProposer(target, window=7).window == 7
    assert LookaheadProposer(target, tree_size=30).window == DEFAULTS.window
    assert LookaheadProposer().window == DEFAULTS.window


def test_sizes_are_measured(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, small."""
    for name, sizes in (("NGRAMS", (2,)), ("WINDOWS", (1,)), ("GUESS_SETS", (1,))):
        monkeypatch.setattr(windows, name, sizes)
    options = ["--proposer", "lookahead", "--num-prompts", "1", "--max-new-tokens", "6", "--repeats", "1"]
    assert command.main(options) == 0
    out = capsys.readouterr().out
    assert out.count("tokens/s") >= 5
    assert len(list(cache.glob("*-lookahead.json"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1, 2]",
        '{"window": 0, "ngram": 3, "guess_set": 1}',
        '{"window": 99, "ngram": 9, "guess_set": 99}',
        '{"window": 2}',
    ],
)
def test_damaged_sizes_are_left_alone(target: Target, cache: Path, text: str) -> None:
    """And that is said."""
    file = store_sizes(target, DEFAULTS)
    assert file is not None
    file.write_text(text)
    with pytest.warns(UserWarning, match="is damaged .* lookahead uses its default sizes"):
        assert LookaheadProposer(target).window == DEFAULTS.window
