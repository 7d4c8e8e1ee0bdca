"""One level of heads as loops over a few rows (`kernels.loops`): what `Heads.step` does, for one row of the batch.

A kind that has it gives a class here. It says the same as the kind's own `advance`, up to rounding; where numba is not
installed, or for a kind that is not here, `advance` is all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medhead.heads.output_head import TABLE_BYTES, OutputHead
from medhead.heads.recurrent import RecurrentHeads
from medhead.heads.sequential import SequentialHeads
from medhead_kernels.loops import Array, array_of, gelu, layer_norm, loop, number, product, silu


class Cell(Protocol):
    """Advances the nodes of a frontier."""

    def advance(self, parents: Array, origin: Array, tokens: Array, count: int, depth: int) -> tuple[Array, Array]:
        """Take one token on every path.

        Args:
            parents: states `[most, state]` that an earlier call or `start` gave.
            origin: `[count]` int64: the row of every node's parent in them.
            tokens: `[count]` int64 of the nodes.
            count: nodes.
            depth: their depth, 0 for the root.

        Returns:
            States of the nodes, overwritten by the next call but one, and features `[most, hidden]`, overwritten by the next.
        """


def _numbers(tensor: Tensor) -> Array:
    """A small tensor as float32."""
    return tensor.detach().float().contiguous().numpy()


class RecurrentCell:
    """`PathCell` and the norm behind it."""

    def __init__(self, output_head: OutputHead, most: int) -> None:
        heads = output_head.heads
        assert isinstance(heads, RecurrentHeads)
        assert output_head.table is not None
        cell, size = heads.cell, heads.config.hidden_size
        self._eps = np.float32(cell.state_norm.eps), np.float32(heads.output_norm.eps)
        self._weights = (
            array_of(output_head.table),
            _numbers(cell.state_norm.weight),
            array_of(cell.of_state.weight),
            array_of(cell.outer.weight),
            _numbers(heads.output_norm.weight),
        )
        self._biases = _numbers(cell.depth_bias)
        self._states = np.zeros((2, most, size), np.float32)
        self._feature = np.zeros((most, size), np.float32)
        self._gates = np.zeros((most, 2 * heads.config.inner_size), np.float32)
        self._inner = np.zeros((most, heads.config.inner_size), np.float32)

    def advance(self, parents: Array, origin: Array, tokens: Array, count: int, depth: int) -> tuple[Array, Array]:
        """See `Cell`."""
        state = self._states[depth % 2]
        buffers = self._gates, self._inner, state, self._feature
        _recurrent(parents, origin, tokens, count, self._weights, self._biases[depth], self._eps, buffers)
        return state, self._feature


@loop
def _recurrent(parents, origin, tokens, count, weights, bias, eps, buffers):
    table, state_norm, of_state, outer, output_norm = weights
    gates, inner, state, feature = buffers
    width = inner.shape[1]
    for r in range(count):
        layer_norm(parents[origin[r]], state_norm, eps[0], feature[r])
    product(of_state, feature, count, gates)
    for r in range(count):
        token = table[tokens[r]]
        for i in range(width):
            gate = gates[r, i] + (number(token[i]) + bias[i])
            up = gates[r, width + i] + (number(token[width + i]) + bias[width + i])
            inner[r, i] = silu(gate) * up
    product(outer, inner, count, state)
    for r in range(count):
        parent = parents[origin[r]]
        for i in range(state.shape[1]):
            state[r, i] += parent[i]
        layer_norm(state[r], output_norm, eps[1], feature[r])


class SequentialCell:
    """`SequentialHeads` with projections of their own, from the target's embedding and into its output matrix."""

    def __init__(self, output_head: OutputHead, most: int) -> None:
        heads: Any = output_head.heads
        size, inner = heads.config.hidden_size, heads.config.inner_size
        self._embeddings = array_of(output_head.embeddings())
        self._scale = np.float32(heads.token_scale)
        self._levels: list[Any] = []
        for depth in range(heads.config.depth):
            project, encode, norm, outer = heads.level(depth)
            weights = [array_of(layer.weight) for layer in (project, encode, outer)]
            self._levels.append((*weights, _numbers(norm.weight), _numbers(norm.bias), np.float32(norm.eps)))
        self._states = np.zeros((2, most, inner), np.float32)
        self._rows = np.zeros((most, max(size, inner)), np.float32)
        self._token, self._parts = np.zeros((most, size), np.float32), np.zeros((most, inner), np.float32)
        self._feature = np.zeros((most, size), np.float32)

    def advance(self, parents: Array, origin: Array, tokens: Array, count: int, depth: int) -> tuple[Array, Array]:
        """See `Cell`."""
        state = self._states[depth % 2]
        buffers = self._rows, self._token, self._parts, state, self._feature
        _sequential(parents, origin, tokens, count, self._levels[depth], self._embeddings, self._scale, buffers)
        return state, self._feature


@loop
def _sequential(parents, origin, tokens, count, level, embeddings, scale, buffers):
    project, encode, outer, weight, bias, eps = level
    rows, token, parts, state, feature = buffers
    size, inner = parents.shape[1], state.shape[1]
    for r in range(count):
        rows[r, :size] = parents[origin[r]]
        stored = embeddings[tokens[r]]
        for i in range(token.shape[1]):
            token[r, i] = number(stored[i])
    product(encode, token, count, parts)
    product(project, rows, count, state)
    for r in range(count):
        squares = np.float32(0)
        for i in range(inner):
            state[r, i] += scale * parts[r, i]
            squares += state[r, i] * state[r, i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(inner) + eps)
        for i in range(inner):
            state[r, i] = gelu(state[r, i] * factor * weight[i] + bias[i])
    product(outer, state, count, feature)


def cell_of(output_head: OutputHead) -> Callable[[int], Cell] | None:
    """How to make the cell of these heads for so many nodes at most; None where `step` is all there is."""
    heads = output_head.heads
    if output_head.weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if type(heads) is RecurrentHeads and output_head.table is not None:
        return partial(RecurrentCell, output_head)
    if type(heads) is SequentialHeads and _plain(heads) and output_head.embeddings_bytes <= TABLE_BYTES:
        return partial(SequentialCell, output_head)
    return None


def _plain(heads: SequentialHeads) -> bool:
    """Whether they have the form in which they are trained here; loaded checkpoints may have others."""
    return heads.encoders is not None and heads.outputs is not None and heads.input_norm is None
