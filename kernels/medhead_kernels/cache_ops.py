"""Changes of a key/value cache as PyTorch operators that say what they change: a compiled step then copies no cache.

A compiler makes a tensor that ordinary operations change anew. What an operator changes stays where it is.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


@torch.library.custom_op("medhead::write_rows", mutates_args=("keys", "values"))
def write_rows(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, rows: Tensor) -> None:
    """Write the nodes' keys and values `[batch, heads, nodes, dim]` of one layer to its cache `[batch, heads, tokens, dim]`.

    `rows` is `[batch, 1, nodes, 1]` int64, the row of the cache of every node.
    """
    for cache, new in ((keys, new_keys), (values, new_values)):
        cache.scatter_(2, rows.expand_as(new), new.to(cache.dtype))


@write_rows.register_fake
def _(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, rows: Tensor) -> None:
    return None


@torch.library.custom_op("medhead::move_layers", mutates_args=("layers",))
def move_layers(layers: list[Tensor], path: Tensor, lengths: Tensor, counts: Tensor, by_kernel: bool) -> None:
    """Keep the accepted path in caches `[batch, heads, tokens, dim]` of one shape; arguments as in `commit.move`.

    `by_kernel` chooses the Triton kernel, which is launched once where the caches lie at equal distances in one storage.
    """
    for buffer in _joined(layers) if by_kernel else [layer[None] for layer in layers]:
        if by_kernel:
            from medhead_kernels import commit

            commit.move(buffer, path, lengths, counts)
        else:
            move_rows(buffer, path, lengths)


@move_layers.register_fake
def _(layers: list[Tensor], path: Tensor, lengths: Tensor, counts: Tensor, by_kernel: bool) -> None:
    return None


def move_rows(buffer: Tensor, path: Tensor, lengths: Tensor) -> None:
    """Copy the rows `length + path[d]` of a buffer `[layers, batch, heads, tokens, dim]` to `length + d`."""
    batch, steps = path.shape
    shape = (buffer.shape[0], batch, buffer.shape[2], steps, buffer.shape[4])
    source = (lengths[:, None] + path)[None, :, None, :, None].expand(shape)
    target = (lengths[:, None] + torch.arange(steps, device=path.device))[None, :, None, :, None].expand(shape)
    buffer.scatter_(3, target, buffer.gather(3, source))


def _joined(layers: list[Tensor]) -> list[Tensor]:
    """Return caches of one shape as one buffer `[layers, ...]` where they lie at equal distances, else each for itself."""
    first, offsets = layers[0], [layer.storage_offset() for layer in layers]
    steps = {later - earlier for earlier, later in pairwise(offsets)}
    alike = {(layer.untyped_storage().data_ptr(), layer.shape, layer.stride()) for layer in layers}
    if len(alike) == 1 and len(steps) == 1 and min(steps) > 0:
        return [first.as_strided((len(layers), *first.shape), (*steps, *first.stride()), offsets[0])]
    return [layer[None] for layer in layers]
