"""Queries that a layer scales by their position, as Llama 4 does in layers without rotary positions.

The layer takes the cache's length and a token's place in the pass for its position. For nodes of a tree and for rows of
different length that is wrong, so here queries are scaled by what the true position asks for instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from medhead.model.attention import TreePass


def query_scale_floor(model: nn.Module) -> int | None:
    """Return the position from which on a layer of the model scales its queries; None if no layer does."""
    floors = [int(module.floor_scale) for module in model.modules() if _scales(module)]  # type: ignore[arg-type]
    return min(floors, default=None)


def rescale_query(module: Any, query: Tensor, current: TreePass) -> Tensor:
    """Return queries `[batch, heads, nodes, dim]` of a layer with the scale of the nodes' positions."""
    if not _scales(module):
        return query
    nodes = torch.arange(query.shape[2], device=query.device)[None]
    start = torch.tensor([current.max_length]) if current.lengths is None else current.lengths
    positions = start.to(query.device)[:, None] + current.depth.to(query.device)
    ratio = _scale(module, positions) / _scale(module, nodes + current.cache_length)  # `[batch or 1, nodes]`
    return (query * ratio[:, None, :, None]).to(query.dtype)


def _scales(module: Any) -> bool:
    tuned = getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale")
    return bool(tuned and hasattr(module, "attn_scale") and not getattr(module, "use_rope", True))


def _scale(module: Any, positions: Tensor) -> Tensor:
    """The formula of Llama 4, as `Llama4TextAttention` has it."""
    return torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
