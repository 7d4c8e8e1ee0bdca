"""The gated delta rule over trees: the form for all nodes against one step for each token, and the Triton kernel against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_conformance import path_to, random_tree
from torch import Tensor

from families import HAS_5_24, tiny_stateful
from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead_kernels import delta_rule
from triton_here import interpreted, needs_triton


def problem(
    nodes: int,
    batch: int = 2,
    key_heads: int = 1,
    share: int = 2,
    key: int = 16,
    value: int = 16,
    dtype: Any = torch.float32,
) -> tuple[TokenTree, list[Tensor]]:
    """Return a random tree, and the arguments of `reference` but the last; all are views with strides of their own."""
    random = torch.Generator().manual_seed(nodes)
    tree = random_tree(batch, nodes, 99, random)
    heads = key_heads * share

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, nodes, *shape, generator=random, dtype=torch.float64).to(dtype).transpose(1, 2)

    query, keys = (torch.nn.functional.normalize(normal(key_heads, key), dim=-1) for _ in range(2))
    state = torch.randn(batch, heads, key, value, generator=random, dtype=torch.float64).to(dtype)
    return tree, [query, keys, normal(heads, value), -normal(heads).abs(), normal(heads).sigmoid(), state]


def by_token(arguments: list[Tensor], tree: TokenTree, row: int, node: int) -> tuple[Tensor, Tensor]:
    """Return the output `[heads, value]` of a node, and the state after it, by one step for each token of its path."""
    query, key, value, log_decay, beta, state = (part[row] for part in arguments)
    share = len(value) // len(key)
    out = value[:, 0]
    for at in path_to(tree, row, node):
        q, k = (part[:, at].repeat_interleave(share, 0) for part in (query, key))
        state = log_decay[:, at].exp().view(len(value), -1, 1) * state
        change = beta[:, at, None] * (value[:, at] - (k[:, :, None] * state).sum(1))
        state = state + k[:, :, None] * change[:, None]
        out = (q[:, :, None] * state).sum(1)
    return out, state


@pytest.mark.parametrize("by_channel", [False, True])
def test_all_nodes_at_once_are_one_step_for_each_token(by_channel: bool) -> None:
    """Outputs of all nodes, and states after paths of different length, whose ends are padded with anything."""
    tree, arguments = problem(12, share=1 if by_channel else 2, dtype=torch.float64)
    if by_channel:  # some channels forget everything at once
        arguments[3] = (
            -40 * torch.randn(arguments[1].shape, generator=torch.Generator().manual_seed(1)).double().abs() ** 4
        )
    compute = delta_rule.channel_reference if by_channel else delta_rule.reference
    found = compute(*arguments, tree.visible)
    for row in range(2):
        for node in range(12):
            torch.testing.assert_close(found.out[row, :, node], by_token(arguments, tree, row, node)[0])
    ends = [11, 0]
    paths = [path_to(tree, row, node) for row, node in enumerate(ends)]
    path, counts = torch.tensor([(one + [3] * 12)[:12] for one in paths]), torch.tensor([len(one) for one in paths])
    states = delta_rule.state_after(arguments[5], arguments[1], found.updates, found.total, path, counts)
    for row, node in enumerate(ends):
        torch.testing.assert_close(states[row], by_token(arguments, tree, row, node)[1])


@needs_triton
@interpreted
@pytest.mark.parametrize(
    ("nodes", "sizes"),
    [
        (1, {}),
        (7, {"key_heads": 2, "share": 1}),
        (33, {"key": 24, "value": 40}),
        (64, {"batch": 1, "key_heads": 2, "key": 128}),
    ],
)
def test_the_kernel_equals_the_reference(nodes: int, sizes: dict[str, int]) -> None:
    from medhead_kernels.tree_delta_rule import delta_rule as kernel

    tree, arguments = problem(nodes, **sizes)
    expected = delta_rule.reference(*arguments, tree.visible)
    found = kernel(*arguments, tree.ancestor_bitmask, tree.max_depth)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_triton
@interpreted
def test_the_kernel_reads_half_precision_and_one_tree_for_all_rows() -> None:
    from medhead_kernels.tree_delta_rule import delta_rule as kernel

    tree, arguments = problem(9, dtype=torch.bfloat16)
    bitmask, visible = tree.ancestor_bitmask[:1], tree.visible[:1]
    expected = delta_rule.reference(*(part.float() for part in arguments), visible)
    found = kernel(*arguments, bitmask, tree.max_depth, exact=False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_triton
@interpreted
@pytest.mark.skipif(not HAS_5_24, reason="needs transformers 5.24")
@torch.inference_mode()
def test_a_target_that_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a tree, and of another one after a commit, equal those without the kernel."""
    target = Target(tiny_stateful("qwen3_5_text"), probe=False)
    random = torch.Generator().manual_seed(1)
    first, second = (random_tree(2, 8, 99, random) for _ in range(2))
    path, counts = torch.tensor([[*path_to(first, row, 0), 1] for row in range(2)]), torch.tensor([1, 1])
    found = []
    for use in (False, True):
        monkeypatch.setattr(delta_rule, "use_triton", lambda *form, use=use: use)
        with target.active():
            cache = target.new_cache(2, 32)
            target.prefill(cache, [[5, 6, 7], [8]])
            logits, _ = target.verify(cache, first)
            cache.commit(path, counts)
            cache.lengths.advance(counts)
            found.append((logits, target.verify(cache, second)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@needs_triton
@interpreted
def test_a_kernel_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    form = cpu, 16, 32, 16, True
    assert not delta_rule.use_triton(*form)
    assert delta_rule.selftest(*form)
    own = delta_rule.reference
    monkeypatch.setattr(delta_rule, "reference", lambda *given: own(*given)._replace(updates=torch.zeros(())))
    with pytest.warns(UserWarning, match="does not work on cpu .its outputs differ by"):
        assert not delta_rule.selftest(*form)
    monkeypatch.setattr("medhead_kernels.tree_delta_rule.delta_rule", lambda *given, **options: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not delta_rule.selftest(*form)


@needs_triton
@interpreted
def test_the_largest_form_passes_its_selftest() -> None:
    assert delta_rule.selftest(torch.device("cpu"), 64, 128, 128, False)


@needs_triton
def test_every_form_of_the_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that fails is left to PyTorch, and the others stay."""
    device, tried = torch.device("cuda", 99), []
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(delta_rule, "selftest", lambda *form: tried.append(form) or form[1] < 64)
    for _ in range(2):
        used = [delta_rule.use_triton(device, nodes, 128, 24, nodes == 5) for nodes in (1, 5, 9, 16, 17, 33, 64, 65)]
        assert used == [True] * 5 + [False] * 3
    assert not delta_rule.use_triton(device, 5, 256, 24)
    assert tried == [(device, nodes, 128, 24, exact) for nodes, exact in
                     ((16, False), (16, True), (32, False), (64, False))]  # fmt: skip
