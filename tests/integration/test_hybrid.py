"""Hybrid trees: calibration, costs, the automatic tree size, and the proposer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_candidates import candidates_from_paths
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import noise_heads, tiny_llama
from families import ACCEPTED, tiny
from medhead import Decoder, MedheadError
from medhead.core.acceptance import Accepted
from medhead.core.gumbel import GumbelNoise, LazyGumbel
from medhead.core.tree import TokenTree
from medhead.model.kv_cache import TreeCache
from medhead.model.target import Target
from medhead.proposers import DecodeState, build_proposer
from medhead.proposers.base import VerifyOutput
from medhead.proposers.calibration import Calibration
from medhead.proposers.candidates import Candidates
from medhead.proposers.heads import HeadsProposer
from medhead.proposers.hybrid import HybridProposer, captured_nodes
from medhead.scheduling.cost_model import CostModel, get_costs, measure_costs
from medhead.scheduling.expert_bytes import ExpertBytes
from medhead.scheduling.tree_size import TreeSizeController
from medhead.user_cache import cache_folder

COSTS = {1: 1.0, 8: 1.2, 32: 2.0}


class FakeClock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedHybrid(HybridProposer):
    """A hybrid whose passes take what the costs say and whose steps take `overhead` seconds more, whatever the machine."""

    def __init__(self, target: Target, costs: CostModel, overhead: float, **options: Any) -> None:
        self.fake = FakeClock()
        super().__init__(target, costs=costs, clock=self.fake, **options)
        self.measured, self.overhead, self.nodes = CostModel(costs.measured), overhead, list[int]()

    def update(self, output: VerifyOutput) -> None:
        self.nodes.append(output.tree.nodes)
        output.seconds = self.measured(output.tree.nodes)
        self.fake.now += output.seconds + self.overhead
        super().update(output)


class PreparingTarget(Target):
    """Its first pass over a tree is loaded while it runs."""

    def verify(self, cache: TreeCache, tree: TokenTree) -> tuple[Tensor, Tensor]:
        self.prepared = max(self.prepared, int(tree.nodes > 1))
        return super().verify(cache, tree)


def test_the_time_to_load_a_pass_is_not_that_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look like a tree that never pays."""
    seen: list[tuple[int, float]] = []

    def update(self: HybridProposer, output: VerifyOutput) -> None:
        seen.append((output.tree.nodes, output.seconds))
        original(self, output)

    original = HybridProposer.update
    monkeypatch.setattr(HybridProposer, "update", update)
    target = PreparingTarget(tiny_llama())
    decoder = Decoder(target, "hybrid", tree_size=4)
    target.prepared = 0  # the probe ran passes too
    decoder.generate(torch.tensor([[5, 9, 3, 5, 9, 3, 5, 9]]), max_new_tokens=12, do_sample=False)
    trees = [seconds for nodes, seconds in seen if nodes > 1]
    assert len(trees) > 1
    assert trees[0] == 0
    assert min(trees[1:]) > 0


# --- costs ---


def test_costs_between_measurements() -> None:
    """Straight lines between, in proportion beyond, and never dearer with fewer nodes."""
    costs = CostModel({1: 1.0, 8: 0.9, 32: 2.0})
    assert [costs(1), costs(8), costs(20), costs(32), costs(64)] == pytest.approx([0.9, 0.9, 1.45, 2.0, 4.0])
    assert costs.max_nodes == 32


def test_costs_follow_the_passes() -> None:
    """A machine that became half as fast makes every size dearer; one outlier does not."""
    costs = CostModel(COSTS)
    costs.update(8, 120.0)
    assert costs(1) < 2
    for _ in range(100):
        costs.update(8, 2.4)
    assert costs(32) == pytest.approx(4.0, rel=1e-3)
    assert 1.4 < costs(1) < 2.0  # trees alone may have become dearer
    for _ in range(900):
        costs.update(8, 2.4)
    assert [costs(1), costs(32)] == pytest.approx([2.0, 4.0], rel=1e-2)


def test_trees_dearer_than_measured_do_not_make_plain_decoding_look_dear() -> None:
    """Ragged batches: passes over trees take longer than measured, passes over one node do not; a busy machine slows both."""
    costs = CostModel({1: 1.0, 8: 2.0})
    for _ in range(30):
        costs.update(8, 2.8)
        costs.update(1, 1.0)
    assert costs(1) == pytest.approx(1.0, abs=0.1)
    assert costs(8) == pytest.approx(2.8, abs=0.3)
    for _ in range(200):
        costs.update(1, 3.0)
    assert costs(1) == pytest.approx(3.0, rel=0.01)
    assert costs(8) == pytest.approx(6.0, rel=0.1)  # and what was so dear back then is forgotten
    for _ in range(50):
        costs.update(8, 600.0)
    assert costs(8) <= 1.01 * 10 * 2.0
    assert costs.tree_factor <= 1.6


def test_costs_are_measured_once(monkeypatch: pytest.MonkeyPatch, target: Target, tmp_path: Path) -> None:
    """Kept by what decides them; a damaged file is measured again and said so; a folder that cannot be is no trouble."""
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path / "kept"))
    measured: list[int] = []
    monkeypatch.setattr(
        "medhead.scheduling.cost_model.measure_costs",
        lambda target, batch: measured.append(batch) or CostModel(dict(COSTS)),
    )
    assert [get_costs(target, 1)(8), get_costs(target, 1)(8)] == [1.2, 1.2]
    assert get_costs(target, 2)(8) == 1.2
    assert measured == [1, 2]
    files = sorted(cache_folder().glob("*.json"))
    assert len(files) == 2
    for damaged in ("{", "[]", '{"2": 1.0}', '{"1": -1}', '{"1": "x"}', '{"one": 1}'):
        for file in files:
            file.write_text(damaged)
        with pytest.warns(UserWarning, match="measured again"):
            assert get_costs(target, 1)(8) == 1.2
    assert json.loads(files[0].read_text()) or json.loads(files[1].read_text())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path / "file"))
    assert get_costs(target, 1)(8) == 1.2


def sparse_target(**changes: int) -> Target:
    fields = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    return Target(tiny("qwen3_moe", ACCEPTED["qwen3_moe"] | fields | changes), probe=False)


def test_experts_that_a_tree_touches_are_counted(
    monkeypatch: pytest.MonkeyPatch, target: Target, tmp_path: Path
) -> None:
    """With equal measured costs and candidates, a sparse model gets a smaller tree, and more rows an even smaller one."""
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "medhead.scheduling.cost_model.measure_costs", lambda target, batch: CostModel({1: 1.0, 64: 1.05})
    )
    sizes = []
    for one, rows in ((target, 1), (sparse_target(), 1), (sparse_target(), 4)):
        hybrid: Any = build_proposer("hybrid", one, members=["ngram"])
        hybrid.begin(one, [[5, 6]] * rows)
        assert get_costs(one, rows).measured == {1: 1.0, 64: 1.05}
        for costs in (hybrid.controller.costs, get_costs(one, rows)):  # measured, and read again
            assert (costs(16) > 1.5) == (one is not target)
        nodes, _ = hybrid.controller.choose([rows * 0.8**node for node in range(1, 64)], rows, 0.0)
        sizes.append(nodes)
    assert sizes[0] > 2 * sizes[1] >= 2
    assert ExpertBytes.of(target.model) is None


def test_bytes_of_experts() -> None:
    """By formula against routers that draw experts, and the weights of a model counted by hand."""
    model: Any = sparse_target().model
    found = ExpertBytes.of(model)
    assert found is not None
    layer = model.model.layers[0]
    expert = sum(weight.nbytes for weight in layer.mlp.experts.parameters()) / 16
    everything = sum(weight.nbytes for weight in model.parameters()) - model.get_input_embeddings().weight.nbytes
    assert found(1) == pytest.approx(everything - 2 * 14 * expert)
    assert found(10_000) == pytest.approx(everything)
    draw = random.Random(0)
    touched = [len({one for _ in range(5) for one in draw.sample(range(16), 2)}) for _ in range(4000)]
    mean = sum(touched) / len(touched)
    assert found(5) == pytest.approx(everything - 2 * (16 - mean) * expert, rel=0.01)
    assert found.growth(1) == 0


def test_captured_trees_of_sparse_models_are_small() -> None:
    dense, sparse = None, ExpertBytes(shared=1, routed=19, experts=128, top_k=8)
    assert [captured_nodes(dense, rows) for rows in (1, 8, 16, 64, 300)] == [32, 32, 16, 4, 1]
    assert captured_nodes(sparse, 1) <= 2
    assert captured_nodes(ExpertBytes(shared=30, routed=19, experts=128, top_k=8), 1) > captured_nodes(sparse, 1)


@torch.inference_mode()
def test_measured_costs(target: Target) -> None:
    """The measurement runs for batches, leaves nothing behind, and knows one node."""
    with target.active():
        costs = measure_costs(target, 2, max_nodes=8)
    assert costs.nodes == [1, 2, 4, 8]
    assert 0 < costs(1) <= costs(8)


def timed_passes(
    monkeypatch: pytest.MonkeyPatch, target: Target, seconds: Callable[[int, int], float]
) -> tuple[list[int], FakeClock]:
    """Let passes take `seconds(nodes, index of the pass)` on the returned clock; also return the nodes of all passes."""
    passes, clock = list[int](), FakeClock()

    def verify(cache: Any, tree: TokenTree) -> None:
        clock.now += seconds(tree.nodes, len(passes))
        passes.append(tree.nodes)

    monkeypatch.setattr(target, "verify", verify)
    return passes, clock


@torch.inference_mode()
def test_slow_models_are_measured_shortly(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Three sizes and one run of each; sizes beyond one that takes too many times as long are left out."""
    passes, clock = timed_passes(monkeypatch, target, lambda nodes, _: 3.0 * nodes)
    assert measure_costs(target, 1, clock=clock).nodes == [1, 16]
    assert passes == [1, 16]
    passes, clock = timed_passes(monkeypatch, target, lambda nodes, _: 3.0 * nodes**0.5)
    assert measure_costs(target, 1, clock=clock).nodes == [1, 16, 64]
    assert passes == [1, 16, 64]


def test_a_busy_moment_does_not_make_a_size_dear(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Every size costs its square root, but 4 passes in a row, some time after the first turns, take ten times as long."""
    _, clock = timed_passes(
        monkeypatch, target, lambda nodes, index: 1e-3 * nodes**0.5 * (10 if 29 <= index < 33 else 1)
    )
    found = measure_costs(target, 1, clock=clock).measured
    assert found == {nodes: pytest.approx(1e-3 * nodes**0.5) for nodes in found}
    assert set(found) == {1, 2, 4, 8, 12, 16, 24, 32, 64}


@torch.inference_mode()
def test_a_busy_second_turn_does_not_make_sizes_dear(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Also where passes take so long that 2 seconds are over after two turns."""
    _, clock = timed_passes(
        monkeypatch, target, lambda nodes, index: 0.04 * nodes**0.5 * (4 if 9 <= index < 18 and nodes > 2 else 1)
    )
    found = measure_costs(target, 1, clock=clock).measured
    assert found == {nodes: pytest.approx(0.04 * nodes**0.5) for nodes in found}


# --- calibration ---


def test_calibration_learns_ratios() -> None:
    """Promises of 0.9 that are kept half of the time are worth half; paths add their depths' corrections up."""
    source = random.Random(0)
    calibration = Calibration()
    named = candidates_from_paths([[([1, 2], [math.log(0.9), math.log(0.81)])]])
    assert named is not None
    for _ in range(3000):
        first, second = source.random() < 0.45, source.random() < 0.9
        calibration.update(named, [[1 if first else 9, 2 if second else 9, 5]], [3])
    assert calibration.ratio(0) == pytest.approx(0.5, abs=0.15)
    assert calibration.ratio(1) == pytest.approx(1.0, abs=0.15)
    found = calibration.correct(named).scores.exp()[0].tolist()
    assert found == pytest.approx([0.9 * calibration.ratio(0), 0.81 * calibration.ratio(0) * calibration.ratio(1)])


def test_calibration_learns_only_what_is_known() -> None:
    """Nothing about depths that the text has not reached or below nodes that were wrong; estimates never exceed one."""
    calibration = Calibration()
    named = candidates_from_paths([[([1, 2, 3], [-0.1, -0.2, -0.3])], []])
    assert named is not None
    calibration.update(named, [[1, 9, 9], [1, 2, 3]], [1, 3])
    assert calibration.ratio(0) > 1
    assert calibration.ratio(1) == 1
    calibration.update(named, [[7, 2, 3], [0, 0, 0]], [3, 3])
    assert calibration.ratio(1) == 1
    for _ in range(500):
        calibration.update(named, [[1, 2, 3], [0, 0, 0]], [3, 3])
    assert bool((calibration.correct(named).scores < 0).all())


# --- the automatic tree size ---


@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_the_chosen_size_is_the_best(seed: int, rows: int, proven: bool) -> None:
    """No size that may be chosen has more expected tokens a second; before speculation has paid once, none is expensive."""
    source = random.Random(seed)
    probs = sorted((rows * source.random() ** 3 for _ in range(31)), reverse=True)
    controller, proposing = TreeSizeController(CostModel(COSTS), 32, batch=2), source.random()
    if proven:
        controller.update(2, 2.0, controller.costs(2), 0.0)
    chosen, _ = controller.choose(probs, rows, proposing)
    sizes = [n for n in controller.sizes if proven or n <= 2 or controller.costs(n) <= 1.5 * controller.costs(1)]
    assert 1 < len(sizes) < len(controller.sizes) or proven
    assert controller.max_depth == max(sizes) - 1
    rates = {n: (rows + sum(probs[: n - 1])) / (proposing + controller.costs(n)) for n in sizes}
    assert rates[chosen] == pytest.approx(max(rates.values()))
    assert controller.sizes[0] == 1
    assert controller.sizes[-1] == 32


def test_probes_are_cheap_again_after_a_pause() -> None:
    probs, controller = (
        [0.9**n for n in range(1, 32)],
        TreeSizeController(CostModel({1: 1.0, 4: 1.5, 32: 4.0}), 32, batch=2),
    )
    assert controller.choose(probs, 1, 0.0)[0] == 4
    controller.update(4, 4.0, 1.5, 0.1)
    assert controller.choose(probs, 1, 0.0)[0] > 4
    while not controller.is_paused:
        controller.update(4, 1.0, 1.5, 1.0)
    skipped = []
    while controller.is_paused:
        skipped.append(controller.may_skip_updates)
        controller.update(1, 1.0, 1.0, 0.0)
    assert skipped == [True] * (len(skipped) - 8) + [False] * 8
    assert controller.choose(probs, 1, 0.0)[0] == 4


def test_plain_passes_prove_nothing() -> None:
    """However long one took: only accepted draft tokens say that speculation pays. The smallest tree can always be tried."""
    controller = TreeSizeController(CostModel({1: 1.0, 2: 1.7, 16: 4.0}), 16, batch=16)
    assert controller.max_depth == 1
    controller.update(1, 1.0, 0.5, 0.0)
    assert controller.max_depth == 1
    controller.update(2, 1.9, 1.7, 0.1)
    assert controller.max_depth == 15


def test_sizes_follow_the_rows() -> None:
    """Sizes that were not worth measuring for many rows are there again for one."""
    controller = TreeSizeController(CostModel({1: 1.0, 16: 7.0}), 64, batch=16)
    assert controller.sizes[-1] == 16
    controller.begin_text(CostModel({1: 1.0, 16: 1.05, 64: 8.0}), 1)
    assert controller.sizes[-1] == 64
    assert controller.max_depth == 63  # one row may try any tree


def test_costs_of_a_short_context(tmp_path: Path) -> None:
    config = GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2)
    target = Target(GPT2LMHeadModel(config).eval())
    with torch.inference_mode(), target.active():
        assert measure_costs(target, 1).max_nodes == 32


def test_failure_pauses_and_success_does_not() -> None:
    """What never helps is asked ever more rarely; what helps is always asked, also after bad luck."""
    costs = {1: 1.0, 8: 1.2}
    noise, good = TreeSizeController(CostModel(costs), 8), TreeSizeController(CostModel(costs), 8)
    asked = 0
    for _ in range(1000):
        paused = noise.is_paused
        asked += not paused
        noise.update(1 if paused else 8, 1, 1.0 if paused else 1.2, 0.0 if paused else 0.8)
    assert asked < 15
    source = random.Random(1)
    asked = 0
    for _ in range(1000):
        paused = good.is_paused
        asked += not paused
        tokens = 1 if paused else source.choice([1, 2, 3, 6])
        good.update(1 if paused else 8, tokens, 1.0 if paused else 1.2, 0.0 if paused else 0.8)
    assert asked > 900


# --- the proposer ---


def test_skippable_members_miss_passes_of_a_pause(target: Target) -> None:
    class Watching(Fixed):
        def update(self, output: VerifyOutput) -> None:
            self.seen = [*getattr(self, "seen", []), output.tree.nodes]

    class Skippable(Watching):
        skippable = True

    members: list[Any] = [Watching(target, []), Skippable(target, [])]
    hybrid = HybridProposer(target, members=members, costs=CostModel({1: 1.0, 8: 1.2}), clock=FakeClock())
    hybrid.begin(target, [[0]])
    assert hybrid.controller is not None
    verified = VerifyOutput(TokenTree.root(torch.tensor([0])), *[torch.zeros(1, 1, 1)] * 2, None, [1], [[0]], 9.0)  # type: ignore[arg-type]
    while not hybrid.controller.is_paused:
        hybrid.update(verified)
    begun = len(members[0].seen)
    while hybrid.controller.is_paused:
        hybrid.update(verified)
    assert len(members[0].seen) > begun + 8
    assert len(members[1].seen) == begun + 8


class Fixed(HeadsProposer):
    """Proposes given paths, whatever the heads."""

    def __init__(self, target: Target, paths: list[tuple[list[int], list[float]]]) -> None:
        super().__init__(target, noise_heads(target, "medusa"))
        self.paths = paths

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        return candidates_from_paths([self.paths for _ in state.texts])


def test_members_are_merged(target: Target) -> None:
    """The most probable of all members' paths, equal ones once; a member may have no candidates."""
    one = Fixed(target, [([1, 2], [-0.1, -0.5]), ([3], [-0.4])])
    two = Fixed(target, [([1, 4], [-0.2, -0.3]), ([1, 2], [-0.2, -0.35])])
    hybrid = build_proposer("hybrid", target, members=[one, two, Fixed(target, [])], tree_size=4)
    state = DecodeState(target, [[0]], torch.tensor([0]), torch.zeros(1, 16))
    tree = hybrid.propose(state, 8)
    assert sorted(map(tuple, tree.paths(0))) == [(1, 2), (1, 4)]
    nothing = build_proposer("hybrid", target, members=[Fixed(target, [])], tree_size=4)
    assert nothing.propose(state, 8).nodes == 1


def test_heads_are_not_asked_where_others_are_certain(target: Target) -> None:
    """Asking takes time: not where a cheap member was right in every pass, but where it is uncertain or has no candidates."""
    clock = FakeClock()

    class Cheap(Fixed):
        is_expensive = False

    class Slow(Fixed):
        asked = 0

        def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
            self.asked += 1
            clock.now += 0.001
            return super().candidates(state, max_depth)

    cheap, slow = Cheap(target, [([1, 2, 3], [-0.01, -0.02, -0.03])]), Slow(target, [([4, 5], [-0.3, -0.6])])
    costs = CostModel({1: 1e-3, 8: 1.2e-3})
    hybrid = HybridProposer(target, members=[slow, cheap], costs=costs, clock=clock)
    hybrid.begin(target, [[0]])
    state = DecodeState(target, [[0]], torch.tensor([0]), torch.zeros(1, 16))
    copied, asked = list(range(1, 8)), []
    for paths in ([], [(copied, [-0.01 * depth for depth in range(1, 8)])], [([1], [-1.2])], []):
        cheap.paths = paths
        before = slow.asked
        for _ in range(6):
            tree = hybrid.propose(state, 8)
            count = 8 if len(paths) == 1 and len(paths[0][0]) > 1 else 2
            emitted, path = torch.tensor([[*copied, 9]]), torch.zeros(1, 8, dtype=torch.long)
            accepted = Accepted(path, torch.tensor([count]), emitted, torch.tensor([0]))
            logits, features = torch.zeros(1, tree.nodes, target.vocab_size), torch.zeros(1, tree.nodes, 16)
            clock.now += 1e-3
            hybrid.update(VerifyOutput(tree, logits, features, accepted, [count], emitted.tolist(), 1e-3))
        asked.append(slow.asked - before)
    assert asked == [6, 0, 6, 6]


@pytest.mark.parametrize("sampling", [False, True])
@torch.inference_mode()
def test_a_given_size_leaves_nothing_of_the_heads_behind(target: Target, sampling: bool) -> None:
    """Before anything was learnt, the tree of heads in a hybrid is the tree of heads alone, however unlikely its nodes."""
    heads = noise_heads(target, "recurrent", depth=4)
    options: dict[str, Any] = {"heads": heads, "tree_size": 24, "width": 6, "branching": 3, "dtype": torch.float32}
    alone = build_proposer("heads", target, **options)
    hybrid = build_proposer("hybrid", target, members=["heads"], **options)
    torch.manual_seed(0)
    noise = LazyGumbel.of(-(-torch.rand(2, 8, target.vocab_size).log()).log()) if sampling else None
    features = torch.randn(2, target.hidden_size)
    state = DecodeState(target, [[5, 9], [13, 7]], torch.tensor([9, 7]), features, noise)
    for proposer in (alone, hybrid):
        proposer.begin(target, state.texts)
    one, other = alone.propose(state, 8), hybrid.propose(state, 8)
    assert one.nodes == other.nodes == 24
    for row in range(2):
        assert sorted(map(tuple, one.paths(row))) == sorted(map(tuple, other.paths(row)))


def test_nothing_is_measured_while_rows_leave(monkeypatch: pytest.MonkeyPatch, target: Target, tmp_path: Path) -> None:
    """Costs for fewer rows are taken from the cache if they are there; else those of before serve on."""
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path))
    asked: list[int] = []

    def measured(_: Target, batch: int) -> CostModel:
        asked.append(batch)
        return CostModel({1: 1e-3 * batch, 8: 2e-3 * batch})

    monkeypatch.setattr("medhead.scheduling.cost_model.measure_costs", measured)
    hybrid: Any = build_proposer("hybrid", target, members=["ngram"])
    get_costs(target, 1)
    hybrid.begin(target, [[5, 6]] * 4)
    hybrid.keep_rows([0, 1])
    assert hybrid.controller.costs(1) == 4e-3
    hybrid.keep_rows([0])
    assert hybrid.controller.costs(1) == 1e-3
    assert asked == [1, 4]


def test_a_pause_is_probed_once_at_the_next_text() -> None:
    """It rests at once if that look fails too, for longer than before, and goes on if it does not."""
    costs = CostModel({1: 1.0, 8: 4.0})
    controller, rests = TreeSizeController(costs, 8), []
    for _ in range(5):
        while not controller.is_paused:
            controller.update(8, 1.0, 4.0, 0.1)
        rest = 0
        while controller.is_paused:
            rest += 1
            controller.update(1, 1.0, 1.0, 0.0)
        rests.append(rest)
    assert rests == [16, 32, 64, 128, 256]
    controller.update(8, 1.0, 4.0, 0.1)  # the next pause has 512 passes
    for _ in range(2):
        for plain in (100, 60):  # some three passes were lost; a look before 155 others would cost more than a fiftieth
            controller.begin_text(costs)
            assert controller.is_paused
            for _ in range(plain):
                controller.update(1, 1.0, 1.0, 0.0)
        controller.begin_text(costs)
        assert not controller.is_paused
        controller.update(8, 1.0, 4.0, 0.1)
    for _ in range(160):
        controller.update(1, 1.0, 1.0, 0.0)
    controller.begin_text(costs)
    for _ in range(40):
        controller.update(8, 6.0, 4.0, 0.1)
        assert not controller.is_paused


def test_warming_measures_before_the_first_text(
    monkeypatch: pytest.MonkeyPatch, target: Target, tmp_path: Path
) -> None:
    """So that a generation is not the one to wait for it."""
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path))
    asked: list[int] = []
    monkeypatch.setattr(
        "medhead.scheduling.cost_model.measure_costs",
        lambda target, batch: asked.append(batch) or CostModel({1: 1e-3, 8: 2e-3}),
    )
    decoder = Decoder(target, "hybrid", members=["ngram"])
    decoder.warmup(3)
    assert sorted(asked) == [1, 2, 4]
    decoder.generate(torch.tensor([[5, 9, 13]]), max_new_tokens=4, do_sample=False)
    assert sorted(asked) == [1, 2, 4]


def test_what_fails_with_many_rows_may_pay_with_few() -> None:
    """Every class of rows has its own backoff, which continues where it was when rows leave and come back."""
    costs, few = CostModel({1: 1.0, 8: 4.0}), CostModel({1: 1.0, 8: 1.5})
    controller = TreeSizeController(costs, 8, 16)
    while not controller.is_paused:
        controller.update(8, 2.0, 4.0, 0.1)
    controller.set_batch(few, 1)
    for _ in range(30):
        assert not controller.is_paused
        controller.update(8, 2.0, 1.5, 0.1)
    controller.set_batch(costs, 16)  # success elsewhere says nothing
    for _ in range(16):
        assert controller.is_paused
        controller.update(1, 1.0, 1.0, 0.0)
    assert not controller.is_paused
    controller.update(8, 2.0, 4.0, 0.1)
    assert controller.is_paused
    for _ in range(40):
        controller.update(1, 1.0, 1.0, 0.0)
    controller.begin_text(costs, 16)  # another text: one look
    assert not controller.is_paused
    controller.update(8, 2.0, 4.0, 0.1)
    assert controller.is_paused
    controller.set_batch(costs, 8)  # never seen: one look is enough
    assert not controller.is_paused
    controller.update(8, 2.0, 4.0, 0.1)
    assert controller.is_paused


def test_no_noise_is_made_for_trees_that_are_not_proposed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a pause a step makes the noise of one position; the text is the same."""
    member = Fixed(target, [([1, 2, 3], [-0.1, -0.2, -0.3])])
    hybrid = TimedHybrid(target, CostModel({1: 1e-3, 8: 4e-3}), 1e-2, members=[member])
    made, gumbel = [], GumbelNoise.gumbel

    def watch(self: GumbelNoise, seeds: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert hybrid.controller is not None
        made.append((hybrid.controller.is_paused, positions.shape[1]))
        return gumbel(self, seeds, rows, positions)

    decoder, ids = Decoder(target, hybrid), torch.tensor([[5, 9, 13]])
    sampling: dict[str, Any] = {"max_new_tokens": 60, "do_sample": True, "top_k": 0, "seed": 4}
    expected = Decoder(target, "none").generate(ids, **sampling)
    monkeypatch.setattr(GumbelNoise, "gumbel", watch)
    assert torch.equal(decoder.generate(ids, **sampling), expected)
    assert {depths for paused, depths in made if paused} == {1}
    assert any(not paused for paused, _ in made)


def test_heads_of_noise_are_left_alone(target: Target) -> None:
    """Draft tokens that take time and are never accepted end in plain decoding."""
    model = tiny_llama()
    member = Fixed(target, [([1, 2, 3], [-0.1, -0.2, -0.3])])
    hybrid = TimedHybrid(target, CostModel({1: 1e-3, 8: 4e-3}), 1e-4, members=[member])
    ids = torch.tensor([[5, 9, 13]])
    text = Decoder(model, hybrid).generate(ids, max_new_tokens=100, do_sample=False)
    assert torch.equal(text, model.generate(ids, max_new_tokens=100, do_sample=False))
    assert len(hybrid.nodes) > 20
    assert hybrid.nodes.count(1) > 0.8 * len(hybrid.nodes)


class Seldom(HeadsProposer):
    """A tree at every third pass only; records what the heads keep of the text after every pass that reads it."""

    passes = 0
    lazy = True
    entries: torch.Tensor | None = None

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        self.passes += 1
        if not self.lazy:
            state.draft_cache.flush()
        if self.passes % 3:
            return TokenTree.root(state.roots)
        view = state.draft_cache.view()
        self.entries, self.ends = view.rows.clone(), view.end[:, 0].tolist()
        return super().propose(state, max_depth)


@pytest.mark.parametrize("name", ["attention", "block"])
@torch.inference_mode()
def test_the_draft_cache_catches_up(target: Target, name: str) -> None:
    """Entries of plain decoding that are written late are those written at once, also when rows end."""
    ids = torch.tensor([[5, 9, 13, 5, 9], [20, 21, 22, 23, 24], [7, 7, 7, 7, 7]])
    sampling = {"do_sample": True, "seed": 3, "top_k": 0, "eos_token_id": [1, 2, 3, 4, 5, 6], "max_new_tokens": 25}
    found = []
    for Seldom.lazy in (True, False):
        proposer = Seldom(target, noise_heads(target, name), dtype=torch.float32)
        Decoder(target, proposer).generate(ids, **sampling)
        assert proposer.entries is not None
        found.append((proposer.ends, proposer.entries))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
    assert max(found[0][0]) > 12


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"members": []}, "at least one member"),
        ({"members": ["none"]}, "gives no candidates"),
        ({"members": ["heads"]}, "needs heads"),
        ({"members": ["recycling"], "tree_size": 0}, "from 1 to 256"),
        ({"members": ["nobody"]}, "no proposer is called"),
    ],
)
def test_refusals(target: Target, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MedheadError, match=says):
        build_proposer("hybrid", target, **options)
