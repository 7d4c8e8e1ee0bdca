"""Head accuracy on held-out text against a count anchor by anchor; trees against enumeration and real decoding."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conftest import read
from medhead import Decoder, MedheadError
from medhead.heads import Heads, HeadsConfig, build_heads
from medhead.heads.draft_cache import DraftCacheView
from medhead.model.target import Target
from medhead_training.objective import measure as module
from medhead_training.objective.measure import measure_accuracy
from medhead_training.objective.tree_eval import UNREACHED, DecodingSimulation, HeadAccuracy, summarize_ranks
from medhead_training.trainer.report import plot_accuracy, write_card

RANKS = 20
KINDS: dict[str, dict[str, Any]] = {
    "medusa": {"kind": "medusa"},
    "medusa parent": {"kind": "medusa", "correction": "parent", "draft_vocab_size": 40},
    "recurrent": {"kind": "recurrent"},
    "sequential": {"kind": "sequential"},
    "sequential own": {"kind": "sequential", "own_embedding": True, "own_output": True, "tie_weights": True},
    "attention": {"kind": "attention", "feature_layers": [0, 1], "draft_vocab_size": 48, "own_output": True},
    "block": {"kind": "block", "correction": "recurrent", "num_layers": 2, "feature_layers": [1]},
    "block parent": {"kind": "block", "correction": "parent", "causal": False, "root_slot_predicts": False},
}


def tiny_heads(target: Target, depth: int = 3, seed: int = 5, **fields: Any) -> Heads:
    """Random heads that draft roughly what the target emits next, so that some draft tokens are right."""
    torch.manual_seed(seed)
    sizes = {"inner_size": 20, "correction_size": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = HeadsConfig(
        depth=depth, hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_target_layers=target.layers,
        **(sizes | fields),
    )  # fmt: skip
    heads = build_heads(config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if heads.draft_tokens is not None:
        heads.draft_tokens.copy_(torch.randperm(target.vocab_size)[: config.draft_vocab_size])  # in no order
    return heads.eval()


def some_texts(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of three texts: one the model's own, one of two turns, one of three tokens."""
    own = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    turns = torch.randint(3, 64, (23,), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(23, dtype=torch.bool)
    mask[4:9] = mask[10:23] = True  # a gap shorter than a path
    return [(own, torch.arange(len(own)) >= 3), (turns, mask), (turns[:3], torch.ones(3, dtype=torch.bool))]


@torch.no_grad()
def ranks_at(heads: Heads, target: Target, ids: torch.Tensor, at: int, depth: int) -> list[int]:
    """Ranks of the `depth` tokens from `at + 2` on, from passes over this text alone, one anchor and node at a time."""
    with target.active(heads.config.feature_layers):
        features = read(target, ids[None, : at + 2])[1]

    def token(where: slice, level: int) -> torch.Tensor:
        own = heads.own_embedding(level)
        return heads.encode(target.embed(ids[None, where]) if own is None else own[ids[None, where]], level)

    memory = None
    if heads.cache_entry_size:
        positions = torch.arange(at + 1)[None]
        rows = heads.encode_cache_entry(features[:, : at + 1], token(slice(1, at + 2), 0), positions, at + 1)
        memory = DraftCacheView(rows, torch.tensor([[at + 1]]), full=True)
    root, found = token(slice(at + 1, at + 2), 0), []
    state, context = heads.init_state(features[:, at : at + 1], root, memory, heads.config.depth)
    names = list(range(target.vocab_size)) if heads.draft_tokens is None else heads.draft_tokens.tolist()
    for level in range(depth):
        state, drafted = heads.step(state, token(slice(at + 1 + level, at + 2 + level), level), level, context)
        output = heads.own_output(level)
        logits = drafted[0, 0] @ (target.output.weight[names] if output is None else output).T
        best = [names[column] for column in logits.argsort(descending=True).tolist()]
        truth = int(ids[at + 2 + level])
        found.append(best.index(truth) if truth in best[:RANKS] else -1)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_ranks_are_those_counted_one_by_one(
    model: PreTrainedModel, target: Target, name: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "MAX_ATTENTION_SCORES", 20_000)  # anchors of heads that look back come in several parts
    heads, texts = tiny_heads(target, **KINDS[name]), some_texts(model)
    hits, reached = torch.zeros(3, RANKS), [0, 0, 0]
    paths: Counter[tuple[int, ...]] = Counter()
    for ids, mask in texts:
        for at in range(len(ids) - 2):
            depth = next((d for d in range(3) if at + 2 + d >= len(ids) or not mask[at + 2 + d]), 3)
            if depth == 0:
                continue
            ranks = ranks_at(heads, target, ids, at, depth)
            for level, rank in enumerate(ranks):
                reached[level] += 1
                if rank >= 0:
                    hits[level, rank] += 1
            paths[tuple(itertools.takewhile(lambda rank: rank >= 0, ranks))] += 1
    assert sum(count for path, count in paths.items() if len(path) > 1) > 0  # the test sees more than misses
    heads.train()
    found = measure_accuracy(heads, target, texts, RANKS)
    assert heads.training
    assert found.paths == paths
    assert found.reached == reached
    assert found.anchors == sum(paths.values()) == 40 + 18 + 1
    assert torch.allclose(torch.tensor(found.accuracies), hits / torch.tensor(reached)[:, None], atol=1e-5)
    assert HeadAccuracy.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("name", ["medusa", "recurrent", "attention", "block"])
def test_simulated_decoding_predicts_real_decoding_to_the_pass(
    model: PreTrainedModel, target: Target, name: str
) -> None:
    heads, limit = tiny_heads(target, depth=4, **KINDS[name]), 32
    prompts = [[5, 9, 13], [20, 21]]
    texts = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        text = model.generate(given, max_new_tokens=limit, do_sample=False)[0]
        texts.append((text, torch.arange(len(text)) >= len(prompt)))
    found = measure_accuracy(heads, target, texts)
    assert max(map(len, found.paths)) > 1
    for nodes in ("8", "32"):
        assert 1 < len(found.trees[nodes]) < int(nodes)
        decoder = Decoder(target, heads=heads, shape=found.trees[nodes], dtype=torch.float32)
        passes = 0
        for prompt, (text, _) in zip(prompts, texts, strict=True):
            output = decoder.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False)
            assert torch.equal(output[0], text)  # the text of transformers
            passes += decoder.statistics.passes
        assert found.accepted_lengths[nodes] == found.anchors / passes > 1


def random_accuracy(seed: int, anchors: int = 300, depth: int = 3, ranks: int = 3) -> HeadAccuracy:
    """Ranks in which depths depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-1, ranks, (anchors, depth), generator=generator)
    found[:, 1] = torch.where(found[:, 0] == 0, 0, found[:, 1])
    found[: anchors // 10, -1] = UNREACHED
    return summarize_ranks(found, torch.arange(anchors) % 10 == 9, ranks)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_tree_is_the_best_of_all(seed: int) -> None:
    found = random_accuracy(seed, depth=2)
    every = [path for depth in (1, 2) for path in itertools.product(range(3), repeat=depth)]
    for path in every:
        count = sum(n for ranks, n in found.paths.items() if ranks[: len(path)] == path)
        assert found.value(path) == count / found.anchors
    for nodes in (2, 3, 5, 7):
        best = max(
            found.mean_length(tree)
            for tree in itertools.combinations(every, nodes - 1)
            if all(path[:1] in tree for path in tree)
        )
        tree = found.best_tree(nodes)
        assert len(tree) == nodes - 1
        assert all(path[:-1] in [[], *tree] for path in tree)
        assert found.mean_length(tree) == pytest.approx(best)
        assert found.mean_length(tree) >= found.mean_length(found.independent(nodes)[0]) - 1e-9
    assert found.chain_length() == pytest.approx(1 + found.value([0]) + found.value([0, 0]))


def test_equal_paths_are_taken_in_a_fixed_order() -> None:
    paths = {(1, 0): 2, (0, 0): 2, (): 4}
    for order in itertools.permutations(paths.items()):
        found = HeadAccuracy(8, 2, [8, 8], [[0.25, 0.25], [0.5, 0.0]], dict(order))
        assert [found.best_tree(nodes) for nodes in (2, 3, 4, 9)] == [
            [[0]], [[0], [1]], [[0], [1], [0, 0]], [[0], [1], [0, 0], [1, 0]],
        ]  # fmt: skip
    assert found.prefix_counts == {(): 8, (0,): 2, (0, 0): 2, (1,): 2, (1, 0): 2}
    assert HeadAccuracy(3, 2, [3, 3], [[0.0, 0.0]] * 2, {(): 3}).best_tree(16) == [[0]]
    with pytest.raises(MedheadError, match="at least 2 nodes, got 1"):
        found.best_tree(1)


def test_trees_are_searched_where_decoding_has_its_passes() -> None:
    """Ten anchors where the top-1 tokens are right four deep, then five where the second or third is, repeatedly.

    Before them is an anchor of its own, for the prompt's pass drafts nothing.
    """
    period = [[0, 0, 0, 0]] * 10 + [[1, -1, -1, -1], [2, -1, -1, -1]] * 2 + [[1, -1, -1, -1]]
    ranks = torch.tensor([[-1, -1, -1, -1], *period * 20])
    chain = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]
    found = summarize_ranks(ranks, torch.arange(301) == 300, 3)
    assert found.best_tree(5) == chain
    assert found.mean_length(chain) == pytest.approx(1 + 4 * 200 / 301)
    paths = [(0, 0, 0, 0), (1,), (2,), ()]
    decoding = DecodingSimulation(
        paths, [paths.index(tuple(rank for rank in row if rank >= 0)) for row in ranks.tolist()], [301] * 301
    )
    assert decoding.passes(chain)[:9] == [0, 1, 6, 11, 12, 13, 14, 15, 16]
    assert decoding.accepted_length(chain) == found.accepted_lengths["chain"] == pytest.approx(301 / 141)
    every = [*map(tuple, chain), (1,), (2,)]
    trees = [tree for tree in itertools.combinations(every, 4) if all(path[:-1] in ((), *tree) for path in tree)]
    tree, length = decoding.search_tree(chain, 5)
    assert length == decoding.accepted_length(tree) == max(map(decoding.accepted_length, trees)) > 2.5
    assert found.trees["8"] == [[0], [1], [2], [0, 0], [0, 0, 0], [0, 0, 0, 0]]


def test_independence_is_right_where_depths_are_independent() -> None:
    """Every combination of ranks equally often; a tenth of the texts ends before the second depth."""
    ranks = torch.tensor(list(itertools.product((0, 0, 1, -1), repeat=2)) * 9)
    ends = torch.tensor([[rank, UNREACHED] for rank in (0, 0, 1, -1) * 4])
    found = summarize_ranks(torch.cat([ranks, ends]), torch.ones(160, dtype=torch.bool), 2)
    assert found.reached == [160, 144]
    assert found.accuracies == [[0.5, 0.25], [0.5, 0.25]]
    for nodes in (2, 4, 7):
        tree, length = found.independent(nodes)
        assert length == pytest.approx(found.mean_length(tree))
        assert length == pytest.approx(found.mean_length(found.best_tree(nodes)))
    assert found.chain_length() == pytest.approx(1 + 0.5 + 0.5 * 0.5 * 0.9)


def test_the_measurement_ends_and_refuses(model: PreTrainedModel, target: Target) -> None:
    heads, texts = tiny_heads(target, kind="recurrent"), some_texts(model)
    assert measure_accuracy(heads, target, itertools.repeat(texts[0]), 2, 50).anchors == 50
    with pytest.raises(MedheadError, match="no token to predict"):
        measure_accuracy(heads, target, [(torch.ones(9, dtype=torch.long), torch.zeros(9, dtype=torch.bool))])
    with pytest.raises(MedheadError, match="at least 1, got 0"):
        measure_accuracy(heads, target, [], ranks=0)


def test_heads_in_float32_on_a_target_in_bfloat16(model: PreTrainedModel) -> None:
    import copy

    target = Target(copy.deepcopy(model).to(torch.bfloat16))
    heads = tiny_heads(target, **KINDS["block"]).float()
    found = measure_accuracy(heads, target, some_texts(model))
    assert found.anchors == 59
    assert next(heads.parameters()).dtype == torch.float32


def facts(**more: Any) -> dict[str, Any]:
    """The facts of a training run."""
    return {"model": "tiny/llama", "recipe": "heads", "loss": "soft", "steps": 1200, "minutes": 3.5, "documents": 70,
            "tokens": 12345, "parameters": 6789, **more}  # fmt: skip


def test_the_card_holds_the_known_facts(tmp_path: Path) -> None:
    config = HeadsConfig("recurrent", 3, 32, 64, 2, draft_vocab_size=40)
    found = random_accuracy(0, ranks=5)
    text = write_card(tmp_path, config, facts(), found).read_text(encoding="utf-8")
    assert text.startswith('---\nlibrary_name: peft\nbase_model: "tiny/llama"\n')
    for part in ("6,789", "1,200", "12,345 tokens", "40 of 64", "`soft`", "3.5", "not its text", "top-1", "top-5",
                 f"--heads {tmp_path}", f"{found.chain_length():.2f}", f"{found.accepted_lengths['16']:.2f}"):  # fmt: skip
        assert part in text
    assert "\n\n\n" not in text
    for recipe in ("joint", "qlora"):
        text = write_card(tmp_path, config, facts(recipe=recipe, resumed=True), found).read_text(encoding="utf-8")
        assert "text of the *adapted* model" in text
        assert "not its text" not in text
        assert "since the run was last started" in text
    assert "No text was held out" in write_card(tmp_path, config, {}, None).read_text(encoding="utf-8")


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_accuracy(tmp_path / "accuracy.png", random_accuracy(0, ranks=5))
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot_accuracy(tmp_path / "none.png", random_accuracy(0))
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "none.png").exists()
