"""All nodes of a tree at once through layers that hold states: dense forms of convolution, gated delta rule and Mamba-2.

The state after a node is the row's committed state and one term for each node of the path, each weighted by the decay along the
path. So the outputs of all nodes are products with the mask of ancestors, no state of a node is made, and the state of the last
accepted node is computed at the commit. Notation: `G` is the sum of a node's log-decays along its path, `D_ij` is
`exp(G_i - G_j)` if j is i or an ancestor of i, else 0.

A layer's own forward runs with its functions of the sequence dimension replaced (`dense_forward`); layers that use others run
depth by depth (`state_layers`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from medhead.model.attention import running_states
from medhead.model.state_cache import DenseCall
from medhead.model.state_groups import Ancestors

Advance = Callable[[Tensor], Tensor]  # from a node of each row, `[batch]`, to the state after it


def tree_convolution(
    tree: Ancestors, state: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Advance]:
    """Return a causal depthwise convolution `[batch, channels, nodes]` along every path, and how its state advances.

    Args:
        tree: the tree.
        state: `[batch, channels, width]`, the last committed inputs.
        inputs: `[batch, channels, nodes]`.
        weight: `[channels, taps]`, at most `width` taps.
        bias: `[channels]`.
    """
    width, taps = state.shape[-1], weight.shape[-1]
    places = tree.windows(width).to(inputs.device)
    rows = tree.rows.to(inputs.device)[:, None]
    known = torch.cat([state.to(inputs.dtype), inputs], -1).transpose(1, 2)  # [batch, width + nodes, channels]
    exact, tap_weights = _wide(known), _wide(weight)
    out = torch.zeros((), dtype=exact.dtype, device=exact.device) if bias is None else _wide(bias)
    for tap in range(taps):
        out = out + exact[rows, places[..., width - taps + tap]] * tap_weights[:, tap]

    def advance(node: Tensor) -> Tensor:
        return known[rows, places[rows[:, 0], node.to(rows.device)]].transpose(1, 2)

    return out.transpose(1, 2), advance


def tree_delta_rule(
    tree: Ancestors, state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Advance]:
    """Return the outputs of the gated delta rule `[batch, heads, nodes, value]`, and how its state advances.

    The updates `U` solve `(I + A) U = beta (V - e^G K S)`, `A_ij = beta_i (k_i . k_j) D_ij` for ancestors j of i, which is unit
    triangular because a parent comes before its child. The outputs are `e^G Q S + (D * Q K^T) U`.

    Args:
        tree: the tree.
        state: `[batch, heads, key, value]`, after the committed tokens.
        query: `[batch, key heads, nodes, key]`; a key head serves `heads / key heads` heads.
        key: like `query`.
        value: `[batch, heads, nodes, value]`.
        log_decay: `[batch, heads, nodes]`.
        beta: like `log_decay`.
    """
    nodes, share = key.shape[2], value.shape[1] // key.shape[1]
    both = torch.cat([key, query], 2)
    dots = (both @ key.transpose(-1, -2)).repeat_interleave(share, 1)
    past = both.repeat_interleave(share, 1) @ state
    grown, between = tree.decays(log_decay)
    triangle = beta[..., None] * dots[:, :, :nodes] * between  # its diagonal is not read
    wanted = beta[..., None] * (value - grown * past[:, :, :nodes])
    updates = torch.linalg.solve_triangular(triangle, wanted, upper=False, unitriangular=True)
    out = grown * past[:, :, nodes:] + (dots[:, :, nodes:] * between) @ updates

    def advance(node: Tensor) -> Tensor:
        at = tree.rows.to(state.device), slice(None), node.to(state.device)
        weighted = key.repeat_interleave(share, 1) * between[at][..., None]
        return grown[at][..., None] * state + weighted.transpose(-1, -2) @ updates

    return out, advance


def tree_mamba2(
    tree: Ancestors, state: Tensor, inputs: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Advance]:
    """Return the outputs of Mamba-2 `[batch, heads, nodes, size]` without its skip, and how its state advances.

    They are `e^G C S + (D * C B^T) (step * x)`, with the log-decay `step * a`.

    Args:
        tree: the tree.
        state: `[batch, heads, size, state]`, after the committed tokens.
        inputs: `x`, `[batch, heads, nodes, size]`.
        step: `[batch, heads, nodes]`, positive.
        a: `[heads]`, negative.
        b: `[batch, groups, nodes, state]`; a group serves `heads / groups` heads.
        c: like `b`.
    """
    share = inputs.shape[1] // b.shape[1]
    grown, between = tree.decays(step * a[:, None])
    updates = step[..., None] * inputs
    dots = (c @ b.transpose(-1, -2)).repeat_interleave(share, 1)
    past = c.repeat_interleave(share, 1) @ state.transpose(-1, -2)
    out = grown * past + (dots * between) @ updates

    def advance(node: Tensor) -> Tensor:
        at = tree.rows.to(state.device), slice(None), node.to(state.device)
        weighted = updates * between[at][..., None]
        return grown[at][..., None] * state + weighted.transpose(-1, -2) @ b.repeat_interleave(share, 1)

    return out, advance


# ---------------------------------------------------------------- in place of the functions of modeling files


def _call() -> DenseCall:
    call = running_states().running
    assert isinstance(call, DenseCall), "a dense form runs inside a call of its layer"
    return call


def _convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """See `causal_conv1d_fn` of modeling files."""
    call = _call()
    key, state = call.asked("conv")
    out, advance = tree_convolution(call.tree, state, hidden_states, weight, bias)
    call.advances[key] = advance
    return (out if activation is None else ACT2FN[activation](out)).to(hidden_states.dtype)


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor,
    use_qk_l2norm_in_kernel: bool = False, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `torch_chunk_gated_delta_rule` of modeling files; tensors are `[batch, nodes, heads, ...]`."""
    call = _call()
    parts = (_wide(part.transpose(1, 2)) for part in (query, key, value, g, beta))
    queries, keys, values, log_decay, beta = parts
    if use_qk_l2norm_in_kernel:
        queries, keys = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (queries, keys))
    place, state = call.asked("recurrent")
    queries = queries * queries.shape[-1] ** -0.5
    out, advance = tree_delta_rule(call.tree, _wide(state, queries.dtype), queries, keys, values, log_decay, beta)
    call.advances[place] = advance
    return out.transpose(1, 2).contiguous().to(query.dtype), initial_state


def _mamba2(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """See `mamba2_chunk_scan` of modeling files; the step size is not limited, as in their decoding of one token."""
    call = _call()
    step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = F.softplus(step) if dt_softplus else step
    inputs, b, c, step = (_wide(part.transpose(1, 2)) for part in (hidden_states, B, C, step))
    place, state = call.asked("recurrent")
    out, advance = tree_mamba2(call.tree, _wide(state, inputs.dtype), inputs, step, _wide(A, inputs.dtype), b, c)
    call.advances[place] = advance
    if D is not None:
        out = out + inputs * D.to(out.dtype)[:, None, None]
    return out.transpose(1, 2).contiguous().to(hidden_states.dtype), None


def _wide(part: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return part.to(dtype or (torch.float64 if part.dtype == torch.float64 else torch.float32))


_RECURRENCES = {"torch_chunk_gated_delta_rule": _delta_rule, "mamba2_chunk_scan": _mamba2}


def dense_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return a module's own forward over all nodes of a tree; None if it uses functions that have no dense form here.

    It is the forward of the module's class with other global names, so the modeling file is not changed. Modules whose weights
    are moved by accelerate's hooks have none.
    """
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType) or "forward" in vars(module):
        return None
    used = set(forward.__code__.co_names)
    recurrences = used & _RECURRENCES.keys()
    if "causal_conv1d_fn" not in used or len(recurrences) != ("get_recurrent_state" in used):
        return None
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        return None
    scope = (
        forward.__globals__ | {name: _RECURRENCES[name] for name in recurrences} | {"causal_conv1d_fn": _convolution}
    )
    dense = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    dense.__kwdefaults__ = forward.__kwdefaults__
    return partial(dense, module)
