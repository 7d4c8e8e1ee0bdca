"""Path attention in Triton: for every node bit for bit what its path alone gives, and close to dense attention.

Without a GPU the kernels are interpreted, with smaller blocks and spans, so that short texts cross them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from test_path_attention import random_paths
from torch import Tensor

from medhead_kernels import reference
from triton_here import needs_triton, row_products

pytestmark = needs_triton
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BLOCK, SPAN = 16, 32  # interpreted


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    from medhead_kernels import tree_path_attention as paths
    from medhead_kernels.tree_attention import Tile

    if DEVICE.type == "cuda":
        yield
        return
    tile = Tile(paths.ROWS, BLOCK, 4, 1)
    with patch.object(paths, "SPAN", SPAN), patch.object(paths, "tile_for", lambda *given: tile):
        yield


@dataclass
class Nodes:
    """Random queries, keys and values of trees after prefixes; what follows a row's nodes is NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: list[int]
    paths: list[list[list[int]]]
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def random(
        cls, lengths: list[int], nodes: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, dim: int = 16,
        with_sinks: bool = False, window: int | None = None, softcap: float | None = None,
    ) -> Nodes:  # fmt: skip
        generator, batch, columns = torch.Generator().manual_seed(nodes), len(lengths), max(lengths) + nodes

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        query = normal(batch, nodes, heads, dim).transpose(1, 2)
        key, value = (normal(batch, kv_heads, columns + 5, size) for size in (dim, dim // 2))
        for part in (key, value):
            for row, length in enumerate(lengths):
                part[row, :, length + nodes :] = float("nan")
        sinks = normal(heads).float().to(DEVICE) if with_sinks else None
        paths = [random_paths(nodes, generator) for _ in lengths]
        query, key, value = query.to(DEVICE), key.to(DEVICE)[:, :, :columns], value.to(DEVICE)[:, :, :columns]
        return cls(query, key, value, lengths, paths, window, sinks, softcap)

    def attend(self) -> Tensor:
        """Attention of all nodes by the kernel."""
        from medhead_kernels import tree_path_attention

        depth = torch.tensor([[len(path) - 1 for path in row] for row in self.paths])
        path = torch.zeros(*depth.shape, int(depth.max()) + 1, dtype=torch.long)
        for row, found in enumerate(self.paths):
            for node, one in enumerate(found):
                path[row, node, : len(one)] = torch.tensor(one)
        committed = torch.tensor(self.lengths)
        first = None
        if self.window is not None:
            first = (committed[:, None] + depth - self.window + 1).clamp(min=0).to(DEVICE)
        tree = (part.to(DEVICE) for part in (committed, depth, path))
        return tree_path_attention.attention(
            self.query, self.key, self.value, *tree, 0.3, first, self.sinks, self.softcap
        )

    def alone(self, row: int, node: int) -> Nodes:
        """A node whose ancestors are committed, in a cache of another size."""
        length = self.lengths[row]
        places = torch.tensor([*range(length), *(length + at for at in self.paths[row][node])], device=DEVICE)
        key, value = self.key[row : row + 1, :, places], self.value[row : row + 1, :, places]
        query = self.query[row : row + 1, :, node : node + 1]
        return Nodes(query, key, value, [len(places) - 1], [[[0]]], self.window, self.sinks, self.softcap)

    def expected(self) -> Tensor:
        """Dense attention of one node `[heads, dim]` in float32."""
        start = 0 if self.window is None else max(0, self.key.shape[2] - self.window)
        query, key, value = (part.float() for part in (self.query, self.key[:, :, start:], self.value[:, :, start:]))
        return reference.attention(query, key, value, None, 0.3, self.softcap, self.sinks)[0, 0]


# lengths, nodes, heads, heads of keys, window, soft-capping, sinks; prefixes end at, before and after edges of blocks and spans
CASES = [
    ([0], 64, 2, 1, None, None, False),
    ([31], 33, 3, 1, None, 3.0, True),
    ([40, 63], 9, 2, 1, 21, None, True),
    ([96, 5], 2, 4, 2, 50, None, False),
    ([15], 1, 2, 2, None, None, False),
]


@pytest.mark.parametrize(("lengths", "nodes", "heads", "kv_heads", "window", "softcap", "with_sinks"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE.type == "cpu" else list(TOLERANCE))
def test_every_node_is_its_path_alone(
    dtype: torch.dtype, lengths: list[int], nodes: int, heads: int, kv_heads: int, window: int | None,
    softcap: float | None, with_sinks: bool,
) -> None:  # fmt: skip
    tree = Nodes.random(lengths, nodes, dtype, heads, kv_heads, 16, with_sinks, window, softcap)
    with row_products() if DEVICE.type == "cpu" else nullcontext():
        out = tree.attend()
        for row in range(len(lengths)):
            for node in {nodes // 3, nodes - 1}:
                alone = tree.alone(row, node)
                assert torch.equal(alone.attend()[0, 0], out[row, node])
                assert float((out[row, node] - alone.expected()).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_it_is_close_to_dense_attention(dtype: torch.dtype) -> None:
    """By the products that numpy or the GPU computes."""
    tree = Nodes.random([37], 6, dtype, heads=6, dim=24, window=30, with_sinks=True)
    out = tree.attend()
    for node in range(0, 6, 2):
        assert float((out[0, node].float() - tree.alone(0, node).expected()).abs().max()) < TOLERANCE[dtype]


def test_nothing_that_depends_on_a_pass_is_compiled_in() -> None:
    """Triton compiles again for arguments that are 1 or multiples of 16, unless it is told not to."""
    from medhead_kernels import tree_path_attention as paths

    tile = paths.tile_for(paths.ROWS, 16, torch.float32)
    fixed = {"kv_heads", *paths.span_constants(tile, 1, 16, 16, torch.float32, None, False)}
    tensors = {"query", "key", "value", "lengths", "depth", "path", "first", "partial", "largest", "total"}
    names = set(paths.span_kernel.arg_names) - fixed - tensors - {"scale", "softcap"}
    code = (
        "from medhead_kernels import tree_path_attention as paths\n"
        "for kernel in (paths.span_kernel, paths.add_kernel): print(*[p.name for p in kernel.params if p.do_not_specialize])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    spans, adds = (set(line.split()) for line in done.stdout.splitlines())
    assert spans == names
    assert adds == {"nodes", "spans"}
