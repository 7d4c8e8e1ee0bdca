"""Every attention backend against brute-force loops; Triton's kernels run interpreted where there is no GPU.

conftest.py sets TRITON_INTERPRET=1 before Triton is imported, so without a GPU `triton` is the same source run in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead_kernels.attn_metadata import AttnParams, TreeMetadata
from medhead_kernels.backends import BACKENDS, AttnSpec, BackendError, cached_unsupported_reason, select_backend
from triton_here import needs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KERNELS = [pytest.param("triton", marks=needs_triton), "flash", "sdpa", "reference"]


@dataclass
class Problem:
    """Random tensors of one pass, NaN after a row's nodes. The tree is random, or `back` interleaved chains."""

    query: Tensor
    key: Tensor
    value: Tensor
    tree: TreeMetadata
    source: TokenTree

    @classmethod
    def random(
        cls, lengths: list[int], nodes: int, kv_heads: int = 2, group: int = 2, dim: int = 16,
        value_dim: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, back: int = 0,
    ) -> Problem:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        batch, columns = len(lengths), max(lengths) + nodes

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        parents = torch.zeros(batch, nodes, dtype=torch.long)
        for node in range(1, nodes):
            parents[:, node] = max(0, node - back) if back else torch.randint(0, node, (batch,), generator=generator)
        source = TokenTree.from_parents(torch.zeros(batch, nodes), parents)
        store = [normal(batch, kv_heads, columns + 7, size) for size in (dim, value_dim or dim)]
        for tensor in store:
            for row, length in enumerate(lengths):
                tensor[row, :, length + nodes :] = float("nan")
        key, value = (
            tensor.to(DEVICE)[:, :, :columns] for tensor in store
        )  # views into a longer store, as in the cache
        tree = TreeMetadata(
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            tuple(lengths),
            source.ancestor_bitmask.to(DEVICE),
            source.depth.to(DEVICE),
        )
        query = normal(batch, nodes, kv_heads * group, dim).to(DEVICE).transpose(1, 2)  # as projections leave it
        return cls(query, key, value, tree, source)

    def expected(self, params: AttnParams) -> Tensor:
        """Compute attention in float64 by loops over rows, nodes and heads."""
        query, key, value = (t.double().cpu() for t in (self.query, self.key, self.value))
        batch, heads, nodes, _ = query.shape
        group = heads // key.shape[1]
        out = torch.empty(batch, nodes, heads, value.shape[3], dtype=torch.float64)
        for row, length in enumerate(self.tree.host_lengths):
            depth = self.source.depth[row].tolist()
            for node in range(nodes):
                at, path = node, [node]
                while at:
                    at = int(self.source.parents[row, at])
                    path.append(at)
                seen = [(column, column) for column in range(length)] + [(length + n, length + depth[n]) for n in path]
                position = length + depth[node]
                columns = [c for c, p in seen if params.window is None or p > position - params.window]
                for head in range(heads):
                    scores = key[row, head // group, columns] @ query[row, head, node] * params.scale
                    if params.softcap is not None:
                        scores = params.softcap * torch.tanh(scores / params.softcap)
                    extra = torch.zeros(0) if params.sinks is None else params.sinks[head].double().cpu()[None]
                    weights = torch.cat([scores, extra]).softmax(0)[: len(columns)]
                    out[row, node, head] = weights @ value[row, head // group, columns]
        return out


def check(name: str, problem: Problem, **options: Any) -> None:
    """Compare the backend with brute force; new tensors are filled with NaN first."""
    params = AttnParams(problem.query.shape[3] ** -0.5, **options)
    backend, dtype = BACKENDS[name], problem.query.dtype
    reason = backend.unsupported_reason(AttnSpec.of(problem.query, problem.value, params))
    if reason is not None:
        pytest.skip(reason)
    key, value = problem.key, problem.value
    if (
        backend.needs_dense_mask
    ):  # a masked key has weight 0, and 0 * NaN is NaN: dense backends need finite numbers there
        key, value = key.nan_to_num(0.0), value.nan_to_num(0.0)
    with poisoned():
        out = backend.attention(problem.query, key, value, problem.tree, params)
    expected = problem.expected(params)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    difference = float((out.double().cpu() - expected).abs().max())
    assert difference <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max())), f"off by {difference:.3g}"


class poisoned:
    """Make `new_empty` return NaN, so that elements which were never written are found."""

    def __enter__(self) -> None:
        self.plain = Tensor.new_empty

        def new_empty(*args: Any, **kwargs: Any) -> Tensor:
            fresh = self.plain(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        Tensor.new_empty = new_empty  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Tensor.new_empty = self.plain  # type: ignore[method-assign]


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=6)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 90), min_size=1, max_size=3), st.integers(1, 20))
def test_random_trees_and_ragged_lengths(name: str, seed: int, lengths: list[int], nodes: int) -> None:
    check(name, Problem.random(lengths, nodes, kv_heads=1, seed=seed))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_groups(name: str, group: int) -> None:
    check(name, Problem.random([33, 5], 7, kv_heads=2, group=group))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (24, 16)])
def test_head_sizes(name: str, dim: int, value_dim: int) -> None:
    check(name, Problem.random([40], 5, kv_heads=1, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types(name: str, dtype: torch.dtype) -> None:
    check(name, Problem.random([70, 3], 9, dtype=dtype))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("nodes", [63, 64, 65, 130, 256])
def test_more_than_one_bitmask_element(name: str, nodes: int) -> None:
    """The tree begins in the middle of a block, so a block's columns lie in two elements."""
    check(name, Problem.random([37], nodes, kv_heads=1, group=1))


@pytest.mark.parametrize("name", KERNELS)
def test_a_chain_is_causal_text(name: str) -> None:
    check(name, Problem.random([10, 10], 12, back=1))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "options",
    [{"window": 5}, {"window": 30}, {"softcap": 1.5}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 4.0], device=DEVICE)},
     {"window": 9, "softcap": 2.0, "sinks": torch.ones(4, device=DEVICE)}],
    ids=["window", "wide window", "softcap", "sinks", "all"],
)  # fmt: skip
def test_options(name: str, options: dict[str, Any]) -> None:
    check(name, Problem.random([75, 4], 12), **options)


@pytest.mark.parametrize("name", KERNELS)
def test_a_window_counts_positions_not_columns(name: str) -> None:
    """Two chains of eight, node by node in turn: a node's position is its depth, which is half of its column.

    The first column that a row's root sees is the last one of a block.
    """
    check(name, Problem.random([65, 33, 2], 16, back=2), window=3)


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    """Also with more splits than blocks; empty splits have weight 0."""
    from medhead_kernels import tree_attention

    problem, params = Problem.random([130, 0], 5), AttnParams(0.25, sinks=torch.zeros(4, device=DEVICE))
    with poisoned():
        args = (problem.query, problem.key, problem.value, problem.tree, params)
        out, again = (tree_attention.attention(*args, splits) for _ in range(2))
    assert torch.equal(out, again)  # deterministic
    torch.testing.assert_close(out.double().cpu(), problem.expected(params), atol=2e-5, rtol=2e-5)


@needs_triton
@pytest.mark.parametrize("window", [None, 5])
def test_splits_of_which_a_node_sees_nothing(window: int | None) -> None:
    """The first nodes see no key of a split inside the tree; with a window, deep nodes see none of the first split."""
    from medhead_kernels import tree_attention

    problem = Problem.random([20], 100, kv_heads=1, group=1, back=int(window is not None))
    params = AttnParams(0.25, window)
    with poisoned():
        out = tree_attention.attention(problem.query, problem.key, problem.value, problem.tree, params, splits=3)
    torch.testing.assert_close(out.double().cpu(), problem.expected(params), atol=2e-5, rtol=2e-5)


@needs_triton
def test_large_scores_do_not_overflow() -> None:
    problem = Problem.random([50], 6)
    problem.query *= 300
    check("triton", problem)
    check("triton", problem, softcap=30.0)


def test_the_dense_mask_is_the_tree() -> None:
    problem = Problem.random([3, 0], 5)
    seen = problem.tree.bias(8, None, torch.float32).cpu()[:, 0] == 0
    assert torch.equal(problem.tree.visible.cpu(), problem.source.visible)
    assert torch.equal(seen[0, :, 3:], problem.source.visible[0])
    assert bool(seen[0, :, :3].all())
    assert torch.equal(seen[1, :, :5], problem.source.visible[1])
    assert not bool(seen[1, :, 5:].any())


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        ("flash", AttnSpec("cpu", torch.float32, 64, 64, window=True), "sliding window"),
        ("flash", AttnSpec("cpu", torch.float32, 64, 64, softcap=True), "soft-capping"),
        ("flash", AttnSpec("cuda", torch.float32, 64, 64), "float32"),
        ("flash", AttnSpec("cuda", torch.float16, 576, 576), "576"),
        ("flash", AttnSpec("cpu", torch.float32, 192, 128), "192 and 128"),
        ("flash", AttnSpec("cpu", torch.float32, 64, 64, nodes=257), "257"),
        ("flash", AttnSpec("mps", torch.float32, 64, 64), "mps"),
        ("sdpa", AttnSpec("cpu", torch.float32, 64, 64, softcap=True), "soft-capping"),
        ("sdpa", AttnSpec("cpu", torch.float32, 64, 64, sinks=True), "sinks"),
        pytest.param("triton", AttnSpec(DEVICE.type, torch.float32, 576, 512), "576", marks=needs_triton),
        pytest.param("triton", AttnSpec(DEVICE.type, torch.float64, 64, 64), "float64", marks=needs_triton),
        pytest.param("triton", AttnSpec(DEVICE.type, torch.float32, 64, 64, nodes=300), "300", marks=needs_triton),
    ],
)
def test_unsupported_reasons(name: str, spec: AttnSpec, says: str) -> None:
    reason = BACKENDS[name].unsupported_reason(spec)
    assert reason is not None
    assert says in reason
    assert "\n" not in reason
    assert cached_unsupported_reason(name, spec) == reason


def test_select_backend() -> None:
    spec = AttnSpec("cpu", torch.float32, 64, 64)
    assert select_backend("auto", [spec]).name == "sdpa"
    assert select_backend("flash", [spec]).name == "flash"
    with pytest.raises(BackendError, match="auto, sdpa, reference, triton, flash; got 'fast'"):
        select_backend("fast", [spec])
    with pytest.raises(BackendError, match=r"'flash' cannot serve this model: .*192 and 128"):
        select_backend("flash", [AttnSpec("cpu", torch.float32, 192, 128)])


@needs_triton
def test_auto_on_a_gpu() -> None:
    assert select_backend("auto", [AttnSpec("cuda", torch.bfloat16, 128, 128)]).name == "triton"
    with pytest.warns(UserWarning, match="'sdpa', which is slower, because 'triton' cannot serve: .* not 576"):
        assert select_backend("auto", [AttnSpec("cuda", torch.bfloat16, 576, 512)]).name == "sdpa"
    assert select_backend("auto", [AttnSpec("mps", torch.float16, 128, 128)]).name == "sdpa"


def test_nan_in_the_answer_would_be_seen() -> None:
    """NaN never passes the comparison."""
    problem = Problem.random([3], 2)
    problem.value[:] = math.nan
    with pytest.raises(AssertionError):
        check("sdpa", problem)
