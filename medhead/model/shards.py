"""Models whose weights are not all in the memory of one device: tensor parallelism over processes, and offloading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medhead.core.tree import TokenTree


class ShardGroup:
    """The processes that hold a model's shards; the first one decides what all of them verify.

    Every process drafts on its own, and measured choices and rounding may make its tree another one. A pass over different
    trees would mix them up in the sums over processes.
    """

    def __init__(self, mesh: Any) -> None:
        if "tp" in (mesh.mesh_dim_names or ()) and mesh.ndim > 1:
            mesh = mesh["tp"]
        self.group = mesh.get_group()
        self.first = torch.distributed.get_global_rank(self.group, 0)

    def broadcast(self, values: Tensor) -> Tensor:
        """Return the first process's values; all processes give as many, of one type."""
        values = values.contiguous().clone()
        torch.distributed.broadcast(values, self.first, self.group)
        return values

    def tree(self, tree: TokenTree) -> TokenTree:
        """Return the first process's tree."""
        size = int(self.broadcast(torch.tensor([tree.nodes], device=tree.tokens.device)))
        content = torch.stack([tree.tokens, tree.parents, tree.depth])
        if size != tree.nodes:
            content = content.new_zeros(3, tree.batch, size)
        tokens, parents, depth = self.broadcast(content)
        return TokenTree(tokens, parents, depth, int(depth.max()))

    def seed(self, seed: int) -> int:
        """Return the first process's seed of 62 bits."""
        return int(self.broadcast(torch.tensor([seed], device="cuda" if self._on_cuda else "cpu")))

    @property
    def _on_cuda(self) -> bool:
        return torch.distributed.get_backend(self.group) == "nccl"


def shard_group(model: Any) -> ShardGroup | None:
    """Return the processes that hold a model's shards, None for a model that is not split by tensor parallelism."""
    mesh = getattr(model, "_device_mesh", None)
    return ShardGroup(mesh) if mesh is not None and (getattr(model, "tp_size", None) or 1) > 1 else None


def placement(model: Any) -> str | None:
    """Return where the weights are, in words, if not all of them are in the memory of one device."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "split over processes"
    devices = {weight.device for weight in model.parameters()}
    if any(device.type == "meta" for device in devices):
        return "offloaded"
    return f"on {len(devices)} devices" if len(devices) > 1 else None
