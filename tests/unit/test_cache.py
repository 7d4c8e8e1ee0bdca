from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from medhead.model.kv_cache import CacheLayout, KVSpec, TreeCache, compact_order

CPU = torch.device("cpu")
LAYOUT = CacheLayout(
    {
        0: (KVSpec(2, 4, torch.float32, CPU), KVSpec(2, 4, torch.float32, CPU)),
        1: (KVSpec(1, 6, torch.float32, CPU), KVSpec(1, 3, torch.float32, CPU)),
    }
)


@given(st.integers(0, 100_000), st.integers(1, 4))
def test_cache_behaves_like_lists(seed: int, batch: int) -> None:
    """Passes, commits of random paths, growth, dropped and joining rows, against plain Python lists."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    cache = TreeCache(LAYOUT, batch, capacity=8)
    kept: dict[tuple[int, int], list[list[torch.Tensor]]]
    kept = {(layer, kv): [[] for _ in range(batch)] for layer in LAYOUT.layers for kv in (0, 1)}
    for _ in range(8):
        nodes = number(1, 20)
        cache.begin(nodes)
        wrote = {}
        for layer, pair in LAYOUT.layers.items():
            new = [torch.randn(batch, spec.heads, nodes, spec.dim, generator=generator) for spec in pair]
            seen = cache.update(new[0], new[1], layer)
            for kv in (0, 1):
                wrote[layer, kv] = new[kv]
                for row, length in enumerate(cache.lengths.host):
                    expected = [*kept[layer, kv][row], *new[kv][row].unbind(1)]
                    assert torch.equal(seen[kv][row, :, : length + nodes], torch.stack(expected, 1))
        counts = [number(1, nodes + 1) for _ in range(batch)]
        steps = max(counts)
        if number(0, 2):
            path = torch.zeros(batch, steps, dtype=torch.long)
            for row, count in enumerate(counts):
                path[row, 1:count] = 1 + torch.randperm(nodes - 1, generator=generator)[: count - 1].sort().values
            cache.commit(path, torch.tensor(counts))
        else:
            path = torch.arange(steps).expand(batch, steps)
        cache.lengths.advance(torch.tensor(counts), counts)
        for key, new in wrote.items():
            for row, count in enumerate(counts):
                kept[key][row] += [new[row, :, int(node)] for node in path[row, :count]]
        assert cache.lengths.host == cache.lengths.device.tolist() == [len(rows) for rows in kept[0, 0]]
        if batch > 1 and number(0, 4) == 0:
            rows = torch.randperm(batch, generator=generator)[: batch - 1].tolist()
            rows = [sorted(rows), compact_order(sorted(rows)), rows][number(0, 3)]
            cache.keep_rows(rows)
            cache.lengths.keep_rows(rows)
            kept = {key: [value[row] for row in rows] for key, value in kept.items()}
            batch -= 1
        if number(0, 4) == 0:
            newcomer, length = TreeCache(LAYOUT, 1, capacity=8), number(1, 90)
            newcomer.begin(length)
            for layer, pair in LAYOUT.layers.items():
                new = [torch.randn(1, spec.heads, length, spec.dim, generator=generator) for spec in pair]
                newcomer.update(new[0], new[1], layer)
                for kv in (0, 1):
                    kept[layer, kv].append(list(new[kv][0].unbind(1)))
            newcomer.lengths.advance(torch.tensor([length]))
            cache.join(newcomer)
            cache.lengths.join(newcomer.lengths)
            batch += 1
            assert cache.lengths.host == cache.lengths.device.tolist() == [len(rows) for rows in kept[0, 0]]


def test_the_storage_holds_what_was_generated() -> None:
    cache = TreeCache(LAYOUT, 2, capacity=70)
    assert cache.capacity == 128  # pages of 64
    assert cache.nbytes() == 2 * 128 * LAYOUT.bytes_per_token()
    cache.begin(200)
    assert cache.capacity >= 200


def test_what_a_long_row_needed_is_given_back() -> None:
    """A cache whose rows come and go for hours is no larger than its rows need."""
    cache, newcomer = TreeCache(LAYOUT, 2, capacity=70), TreeCache(LAYOUT, 1, capacity=70)
    for joining in (cache, newcomer):
        joining.begin(20)
        joining.lengths.advance(torch.tensor([20] * joining.batch_size))
    cache.begin(1000)
    cache.lengths.advance(torch.tensor([1000, 1]))
    assert cache.capacity >= 1020
    cache.keep_rows([1])
    cache.lengths.keep_rows([1])
    cache.join(newcomer)
    assert cache.capacity == newcomer.capacity == 128
    assert cache.nbytes() == 2 * 128 * LAYOUT.bytes_per_token()


def test_dropped_rows_move_few_and_are_given_back_in_time() -> None:
    cache = TreeCache(LAYOUT, 8, capacity=60)
    cache.begin(1)
    cache.lengths.advance(torch.ones(8, dtype=torch.long))
    whole, before = cache.nbytes(), [part.data_ptr() for part in cache.per_layer]
    rows = compact_order([0, 2, 3, 4, 5, 7])
    cache.keep_rows(rows)
    cache.lengths.keep_rows(rows)
    assert [part.data_ptr() for part in cache.per_layer] == before
    assert cache.nbytes() == whole
    cache.keep_rows(compact_order([1, 3, 5]))
    assert cache.nbytes() == whole * 3 // 8


@given(st.integers(1, 20).flatmap(lambda rows: st.sets(st.integers(0, rows - 1))))
def test_gaps_are_closed_from_behind(places: set[int]) -> None:
    closed = compact_order(sorted(places))
    assert set(closed) == places
    assert all(row == place or row >= len(closed) for place, row in enumerate(closed))


def test_offsets_of_positions_go_with_the_rows_that_have_them() -> None:
    spec = KVSpec(1, 2, torch.float32, torch.device("cpu"))
    layout = CacheLayout({0: (spec, spec)})

    def cache_of(offset: list[list[int]] | None) -> TreeCache:
        cache = TreeCache(layout, 2, 8)
        cache.lengths.set([3, 4])
        cache.position_offset = None if offset is None else torch.tensor(offset)
        return cache

    cache = cache_of(None)
    cache.join(cache_of([[0, -2], [0, -5]]))
    assert cache.position_offset is not None
    assert cache.position_offset.tolist() == [[0, 0, 0, -2], [0, 0, 0, -5]]
    cache.lengths.set([3, 4, 3, 4])
    cache.keep_rows([0, 3])
    cache.lengths.keep_rows([0, 3])
    assert cache.position_offset.tolist() == [[0, -2], [0, -5]]
    cache.keep_rows([0])
    assert cache.position_offset is None  # a position is an index again
