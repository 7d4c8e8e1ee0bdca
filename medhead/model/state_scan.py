"""Recurrences whose channels decay on their own, over trees: Mamba-1 and RG-LRU.

A state is `decay * parent's state + update`. With a decay for every channel and size of the state, products between nodes
would take `nodes` times the work, so the states follow each other depth by depth. Only the
recurrence runs depth by depth, and it keeps the states of one depth; projections and norms run once for all nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medhead.model.state_groups import Ancestors

Advance = Callable[[Tensor, Tensor], Tensor]  # from an accepted path and its numbers of nodes to the state after it


def tree_mamba1(
    tree: Ancestors, state: Tensor, inputs: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Advance]:
    """Return the outputs of Mamba-1 `[batch, nodes, channels]` without its skip, and how its state advances.

    Args:
        tree: the tree.
        state: `[batch, channels, size]`, after the committed tokens.
        inputs: `x`, `[batch, nodes, channels]`.
        step: like `inputs`, positive.
        a: `[channels, size]`, negative.
        b: `[batch, nodes, size]`.
        c: like `b`.
    """
    parts = [part.flatten(0, 1) for part in (step, step * inputs, b)]

    def after(states: Tensor, places: Tensor, ended: Tensor | None = None) -> Tensor:
        steps, updates, keys = (part.index_select(0, places)[..., None] for part in parts)
        if ended is not None:
            steps, updates = (part.masked_fill(ended[:, None, None], 0) for part in (steps, updates))
        return (steps * a).exp_().mul_(states).addcmul_(updates, keys.transpose(1, 2))

    queries, out = c.flatten(0, 1)[..., None], torch.empty_like(parts[0])
    roots = states = after(state, tree.levels[0][0].to(state.device))
    for level, (places, sources) in enumerate(tree.levels):
        places = places.to(state.device)
        if level:
            states = after(states.index_select(0, sources.to(state.device)), places)
        out[places] = (states @ queries[places])[..., 0]

    def advance(path: Tensor, counts: Tensor) -> Tensor:
        reached, offsets = roots, tree.nodes * tree.rows.to(state.device)
        for depth in range(1, path.shape[1]):
            reached = after(reached, offsets + path[:, depth].to(state.device), (depth >= counts).to(state.device))
        return reached

    return out.unflatten(0, step.shape[:2]), advance


def tree_lru(tree: Ancestors, state: Tensor, inputs: Tensor, decay: Tensor) -> tuple[Tensor, Advance]:
    """Return the states of a linear recurrent unit after every node `[batch, nodes, channels]`, and how its state advances.

    Args:
        tree: the tree.
        state: `[batch, channels]`, after the committed tokens.
        inputs: `[batch, nodes, channels]`.
        decay: like `inputs`.
    """
    updates, decays = inputs.flatten(0, 1), decay.flatten(0, 1)
    out, states = torch.empty_like(updates), state
    for places, sources in tree.levels:
        places = places.to(state.device)
        states = torch.addcmul(updates[places], decays[places], states[sources.to(state.device)])
        out[places] = states
    found = out.unflatten(0, inputs.shape[:2])

    def advance(path: Tensor, counts: Tensor) -> Tensor:
        last = path.gather(1, counts[:, None] - 1)[:, 0]
        return found[tree.rows.to(state.device), last.to(state.device)]

    return found, advance
