"""ALiBi: a bias that grows with the order of keys, which a model adds to its scores by its own code, as BLOOM does.

The nodes of a tree are stored in their order, so there a key's place is not its position. The mask of a pass over a tree adds
what is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def alibi_slopes(model: Any) -> Tensor | None:
    """Return the slope `[heads]` of every head; None if no module of the model makes a table of ALiBi."""
    device = model.get_input_embeddings().weight.device
    for module in model.modules():
        if callable(build := getattr(module, "build_alibi_tensor", None)):
            table = build(torch.ones(1, 2, dtype=torch.long, device=device), module.num_heads, torch.float32)
            return table[:, 0, 1] - table[:, 0, 0]
    return None


def place_bias(slopes: Tensor, lengths: Tensor, depth: Tensor, num_keys: int) -> Tensor:
    """Return what is missing for every key, `[batch or 1, heads, 1, keys]`: its slope times its position less its place.

    Args:
        slopes: `[heads]`.
        lengths: `[batch or 1]` committed tokens, whose places are their positions.
        depth: `[batch or 1, nodes]` of the nodes that follow them.
        num_keys: tokens of the longest row and nodes.
    """
    depth, slopes = depth.to(lengths.device), slopes.to(lengths.device)
    nodes = torch.arange(depth.shape[1], device=depth.device)
    batch = max(len(lengths), len(depth))
    places = (lengths[:, None] + nodes).expand(batch, -1)
    found = torch.zeros(batch, num_keys, device=depth.device)
    found.scatter_(1, places, (depth - nodes).float().expand(batch, -1))
    return slopes[:, None, None] * found[:, None, None]
