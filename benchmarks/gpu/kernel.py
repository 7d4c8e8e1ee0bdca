"""The tree kernel beside PyTorch's flash kernel and cuDNN over the same bytes: microseconds, GB/s, TFLOP/s; splits and tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from measure import DEVICE, DTYPE, TINY, attempt, graph_microseconds
from torch import Tensor

from medhead_kernels import tree_attention
from medhead_kernels.attn_metadata import AttnParams, TreeMetadata
from medhead_kernels.bench import AttnShape, random_inputs
from medhead_kernels.tree_attention import Tile

DIM, CARD_BYTES = 16 if TINY else 128, 300_000_000  # inputs of a measurement together exceed every L2 cache
# context, nodes, query heads of a group, KV heads
SIZES = [
    (32768, 64, 4, 8), (2048, 64, 4, 8), (32768, 1, 4, 8), (2048, 1, 4, 8),
    (32768, 16, 4, 8), (8192, 64, 4, 8), (32768, 64, 8, 4), (32768, 1, 8, 4),
]  # fmt: skip
Call = Callable[[Tensor, Tensor, Tensor, TreeMetadata], object]


class NoLaunch:
    """A kernel that is never launched."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


@contextmanager
def tile(size: Tile) -> Iterator[None]:
    """Use one tile for everything."""
    with patch.object(tree_attention, "tile_for", lambda *given: size):
        yield


def tiles_to_try(shape: AttnShape) -> list[Tile]:
    """Return tiles beside the default one, for the sizes that matter most."""
    if shape.group != 4 or shape.context == 8192 or shape.nodes == 16:
        return []
    if shape.nodes == 64:
        return [Tile(64, 64, 4, 2), Tile(128, 128, 8, 2), Tile(128, 64, 4, 3), Tile(64, 128, 4, 2)]
    default = tree_attention.tile_for(shape.nodes * shape.group, DIM, DTYPE, True)
    return [default._replace(columns=128, stages=2), default._replace(stages=2)]


def packed(query: Tensor, kv_heads: int) -> Tensor:
    """Return nodes and query heads of a group in one dimension."""
    return query.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)


def measure(shape: AttnShape) -> None:
    """Print the times of one size."""
    aten, params = torch.ops.aten, AttnParams(DIM**-0.5)
    flops = 4 * shape.kv_heads * shape.group * shape.nodes * shape.context * DIM
    sets = [
        random_inputs(shape, DEVICE.type) for _ in range(1 if TINY else max(2, min(24, CARD_BYTES // shape.nbytes)))
    ]

    def put(name: str, call: Call) -> None:
        def measured() -> dict[str, float]:
            us = graph_microseconds([lambda given=given: call(*given) for given in sets])
            return {"us": us, "gb_s": round(shape.nbytes / us / 1e3), "tflops": round(flops / us / 1e6, 1)}

        attempt(name, measured, context=shape.context, nodes=shape.nodes, group=shape.group)

    def tree(splits: int | None) -> Call:
        return lambda query, key, value, tree: tree_attention.attention(query, key, value, tree, params, splits)

    put("tree kernel", tree(None))
    with patch.object(tree_attention, "merge_kernel", NoLaunch()):
        put("tree kernel without the merge", tree(None))
    for splits in (2,) if TINY else (8, 16, 33) if shape.nodes > 1 else (16, 33, 66):
        put(f"{splits} splits", tree(splits))
    for size in [Tile(16, 16, 4, 1)] if TINY else tiles_to_try(shape):
        with tile(size):
            for splits in (2,) if TINY else (8, 16) if shape.nodes == 64 else (33,):
                put(f"tile {tuple(size)}, {splits} splits", tree(splits))
    options = {"scale": params.scale}
    flash = aten._scaled_dot_product_flash_attention
    if DEVICE.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
    put("torch flash, prefix only", lambda q, k, v, _: flash(packed(q, shape.kv_heads), k, v, **options)[0])
    cudnn = aten._scaled_dot_product_cudnn_attention
    put("cuDNN, prefix only", lambda q, k, v, _: cudnn(packed(q, shape.kv_heads), k, v, None, False, **options)[0])


for context, nodes, group, kv_heads in [(16, 4, 2, 1)] if TINY else SIZES:
    measure(AttnShape(context, nodes, group, 1, kv_heads, DIM, str(DTYPE).removeprefix("torch.")))
