"""Attention by blocks: equal to dense attention in float64, and for every node bit for bit what its path alone gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medhead_kernels import path_attention

HEADS, KV_HEADS, DIM, VALUE_DIM, SCALE = 6, 2, 24, 16, 0.2
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if reason := path_attention.unavailable():
        pytest.skip(reason)


def random_paths(nodes: int, generator: torch.Generator) -> list[list[int]]:
    """The nodes from the root to every node of a tree with long paths and many branches."""
    paths = [[0]]
    for node in range(1, nodes):
        parent = int(torch.randint(max(0, node - 4), node, (1,), generator=generator))
        paths.append([*paths[parent], node])
    return paths


def dense(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of one query `[heads, dim]` to all keys `[kv_heads, keys, dim]` in float64."""
    group = HEADS // KV_HEADS
    key, value = (part.double().repeat_interleave(group, 0) for part in (key, value))
    scores = (key @ query.double()[:, :, None])[..., 0] * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    every = scores if sinks is None else torch.cat([scores, sinks.double()[:, None]], 1)
    return (every.softmax(-1)[:, None, : key.shape[1]] @ value)[:, 0]


@pytest.mark.parametrize("lengths", [[0], [5, 64], [513, 100], [1023]])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("softcap", "with_sinks", "window"), [(None, False, None), (3.0, True, 90), (None, True, 7)])
def test_every_node_is_its_path_alone(
    dtype: torch.dtype, lengths: list[int], softcap: float | None, with_sinks: bool, window: int | None
) -> None:
    generator, batch, nodes = torch.Generator().manual_seed(sum(lengths)), len(lengths), 21
    sizes = max(lengths) + nodes + 2
    query = torch.randn(batch, HEADS, nodes, DIM, generator=generator).to(dtype)
    key = torch.randn(batch, KV_HEADS, sizes, DIM, generator=generator).to(dtype)
    value = torch.randn(batch, KV_HEADS, sizes, VALUE_DIM, generator=generator).to(dtype)
    sinks = torch.randn(HEADS, generator=generator) if with_sinks else None
    paths = [random_paths(nodes, generator) for _ in lengths]
    depth = torch.tensor([[len(path) - 1 for path in row] for row in paths])
    path = torch.zeros(batch, nodes, int(depth.max()) + 1, dtype=torch.long)
    for row, found in enumerate(paths):
        for node, one in enumerate(found):
            path[row, node, : len(one)] = torch.tensor(one)
    committed = torch.tensor(lengths)
    first = None if window is None else (committed[:, None] + depth - window + 1).clamp(min=0)

    out = path_attention.attention(query, key, value, committed, depth, path, SCALE, first, sinks, softcap)

    zero = torch.zeros(1, 1, dtype=torch.long)
    for row, length in enumerate(lengths):
        for node in range(0, nodes, 4):
            places = torch.tensor([*range(length), *(length + at for at in paths[row][node])])
            keys, values, start = key[row, :, places], value[row, :, places], 0
            alone = path_attention.attention(
                query[row : row + 1, :, node : node + 1], keys[None], values[None], torch.tensor([len(places) - 1]), zero,
                zero[None], SCALE, None if first is None else first[row : row + 1, node : node + 1].contiguous(), sinks, softcap,
            )  # fmt: skip
            assert torch.equal(alone[0, 0], out[row, node])
            start = 0 if first is None else int(first[row, node])
            expected = dense(query[row, :, node], keys[:, start:], values[:, start:], softcap, sinks)
            assert (out[row, node] - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before, length, zero = torch.get_num_threads(), 1500, torch.zeros(1, 1, dtype=torch.long)
    query, key, value = (
        torch.randn(1, heads, size, DIM) for heads, size in ((HEADS, 1), (KV_HEADS, 1501), (KV_HEADS, 1501))
    )
    given = query, key, value, torch.tensor([length]), zero, zero[None], SCALE
    try:
        torch.set_num_threads(threads)
        found = path_attention.attention(*given)
        torch.set_num_threads(2)
        assert torch.equal(path_attention.attention(*given), found)
    finally:
        torch.set_num_threads(before)


def test_wrong_sizes_are_refused() -> None:
    zero = torch.zeros(1, 1, dtype=torch.long)
    query, key = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="4 \\+ 1 of 4 keys"):
        path_attention.attention(query, key, key, torch.tensor([4]), zero, zero[None], 1.0)
    with pytest.raises(RuntimeError, match="depth 1 of 1"):
        path_attention.attention(query, key, key, torch.tensor([3]), zero + 1, zero[None], 1.0)
    with pytest.raises(RuntimeError, match="node 2 of 1"):
        path_attention.attention(query, key, key, torch.tensor([3]), zero, zero[None] + 2, 1.0)
    with pytest.raises(RuntimeError, match="the tree does not fit the queries"):
        path_attention.attention(query, key, key, torch.tensor([3, 3]), zero, zero[None], 1.0)
    with pytest.raises(RuntimeError, match="dimensions 7 and 7 are no multiples of 8"):
        path_attention.attention(query[..., :7], key[..., :7], key[..., :7], torch.tensor([3]), zero, zero[None], 1.0)
