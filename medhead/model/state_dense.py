"""All nodes of a tree at once through layers that hold states: convolutions, gated delta rule, Mamba-1, Mamba-2 and RG-LRU.

In the gated delta rule and Mamba-2 the state after a node is the row's committed state and one term for each node of the path,
each weighted by the decay along the path (see `medhead_kernels.delta_rule`). So the outputs of all nodes are products with the
mask of ancestors, no state of a node is made, and the state after the accepted path is computed at the commit. `state_scan` has
the recurrences of Mamba-1 and RG-LRU.

A layer's own forward runs with its functions of the sequence dimension replaced (`dense_forward`); layers that use others run
depth by depth (`state_layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from medhead.model.attention import running_states
from medhead.model.own_code import global_names, replaced_forwards, with_globals
from medhead.model.state_cache import DenseCall
from medhead.model.state_groups import Ancestors
from medhead.model.state_scan import Advance, tree_lru, tree_mamba1
from medhead_kernels import delta_rule


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
    known = torch.cat(
        [state.to(inputs.dtype).transpose(1, 2), inputs.transpose(1, 2)], 1
    )  # [batch, width + nodes, channels]
    flat, offsets = _wide(known).flatten(0, 1), rows * known.shape[1]
    out = flat.new_zeros(()) if bias is None else _wide(bias)
    for tap, tap_weight in enumerate(_wide(weight).T.contiguous()):
        found = flat.index_select(0, (offsets + places[..., width - taps + tap]).flatten())
        out = found.mul_(tap_weight).add_(out)

    def advance(path: Tensor, counts: Tensor) -> Tensor:
        last = path.to(rows.device).gather(1, counts.to(rows.device)[:, None] - 1)
        return known[rows, places[rows, last][:, 0]].transpose(1, 2)

    return out.unflatten(0, (len(rows), -1)).transpose(1, 2), advance


def tree_delta_rule(
    tree: Ancestors, state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor,
    exact: bool = True,
) -> tuple[Tensor, Advance]:  # fmt: skip
    """Return the outputs of the gated delta rule `[batch, heads, nodes, value]`, and how its state advances.

    Arguments are those of `delta_rule.reference`, or of `delta_rule.channel_reference` if every channel has its log-decay.
    `exact` is that of the Triton kernel, which serves CUDA.
    """
    device = value.device
    if log_decay.ndim == 4:
        out, updates, total = delta_rule.channel_reference(
            query, key, value, log_decay, beta, state, tree.visible.to(device)
        )
    elif delta_rule.use_triton(device, value.shape[2], key.shape[3], value.shape[3], exact):
        from medhead_kernels import tree_delta_rule as kernel

        bitmask = tree.bitmask.to(device)
        out, updates, total = kernel.delta_rule(
            query, key, value, log_decay, beta, state, bitmask, tree.max_depth, exact
        )
    else:
        out, updates, total = delta_rule.reference(query, key, value, log_decay, beta, state, tree.visible.to(device))

    def advance(path: Tensor, counts: Tensor) -> Tensor:
        return delta_rule.state_after(state, key, updates, total, path.to(device), counts.to(device))

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
    share, device = inputs.shape[1] // b.shape[1], inputs.device
    total, between = delta_rule.path_decays(step * a[:, None], tree.visible.to(device))
    updates = step[..., None] * inputs
    dots = (c @ b.transpose(-1, -2)).repeat_interleave(share, 1)
    past = c.repeat_interleave(share, 1) @ state.transpose(-1, -2)
    out = total.exp() * past + (dots * between) @ updates

    def advance(path: Tensor, counts: Tensor) -> Tensor:
        before = state.transpose(-1, -2)
        return delta_rule.state_after(before, b, updates, total, path.to(device), counts.to(device)).transpose(-1, -2)

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


def _convolution_update(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """See `causal_conv1d_update` of modeling files, for one token; PyTorch's convolution is slow in bfloat16 on many CPUs."""
    return _convolution(hidden_states, weight, bias, activation)


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor,
    use_qk_l2norm_in_kernel: bool = False, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention` of modeling files.

    Tensors are `[batch, nodes, heads, ...]`.
    """
    call, dtype = _call(), _wide_dtype(query.dtype)
    parts = (part.transpose(1, 2).to(dtype) for part in (query, key, value, g, beta))
    queries, keys, values, log_decay, beta = parts
    if use_qk_l2norm_in_kernel:
        queries, keys = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (queries, keys))
    place, state = call.asked("recurrent")
    queries = queries * queries.shape[-1] ** -0.5
    exact = query.dtype == torch.float32
    out, advance = tree_delta_rule(call.tree, state.to(dtype), queries, keys, values, log_decay, beta, exact)
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


def _mamba2_update(
    state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    dt_bias: Tensor | None = None, z: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """See `mamba2_selective_state_update` of modeling files, for one token; what a head has is repeated for its channels."""
    skip, bias = (None if part is None else part[:, 0] for part in (D, dt_bias))
    inputs, step, b, c = (part[:, None] for part in (hidden_states, dt[..., 0], B, C))
    out = _mamba2(inputs, step, A[:, 0, 0], b, c, D=skip, dt_bias=bias, **kwargs)[0][:, 0]
    return out if z is None else out * F.silu(z)


def _mamba1(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mamba_selective_scan` of modeling files; tensors are `[batch, channels or size, nodes]`.

    Zamba calls it for one head after another.
    """
    call = _call()
    step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
    step = F.softplus(step) if delta_softplus else step
    inputs, step, b, c = (_wide(part.transpose(1, 2)) for part in (hidden_states, step, B, C))
    place, state = call.asked("recurrent")
    heads = call.heads.setdefault(place, [])
    own = state if state.ndim == 3 else state[:, len(heads)]
    out, advance = tree_mamba1(call.tree, _wide(own, inputs.dtype), inputs, step, _wide(A, inputs.dtype), b, c)
    heads.append(advance)
    call.advances[place] = advance if state.ndim == 3 else partial(_stacked, heads)
    if D is not None:
        out = out + inputs * D.to(out.dtype)
    out = out.transpose(1, 2)
    return (out if z is None else out * F.silu(_wide(z))).to(hidden_states.dtype), state.new_empty(0)


def _mamba1_update(
    state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, z: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """See `mamba_selective_state_update` of modeling files, for one token."""
    inputs, step, b, c = (part[..., None] for part in (hidden_states, dt, B, C))
    gate = None if z is None else z[..., None]
    return _mamba1(inputs, step, A, b, c, D, gate, dt_bias, dt_softplus)[0][..., 0]


def _stacked(heads: list[Advance], path: Tensor, counts: Tensor) -> Tensor:
    return torch.stack([advance(path, counts) for advance in heads], 1)


def _lru(*, hidden_states: Tensor, recurrent_gate: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See `_rnn_scan` of RecurrentGemma; tensors are `[batch, nodes, channels]`, and nodes are at no beginning of a text."""
    call, inputs = _call(), _wide(hidden_states)
    place, state = call.asked("recurrent_states")
    out, advance = tree_lru(call.tree, _wide(state, inputs.dtype), inputs, _wide(recurrent_gate, inputs.dtype))
    call.advances[place] = advance
    return out.to(hidden_states.dtype), state


def _lru_convolution(convolution: nn.Conv1d, inputs: Tensor) -> Tensor:
    """See `conv_1d` of RecurrentGemma's blocks, whose state has one input less than there are taps."""
    call = _call()
    place, state = call.asked("conv1d_state")
    known, weight = F.pad(state, (1, 0)), convolution.weight[:, 0]
    out, advance = tree_convolution(call.tree, known, inputs, weight, convolution.bias)
    call.advances[place] = lambda path, counts: advance(path, counts)[..., 1:]
    return out.to(inputs.dtype)


def _lru_forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a block of RecurrentGemma, whose states are attributes, by its own forward over all nodes."""
    block.rg_lru._rnn_scan = _lru
    try:
        with replaced_forwards({block.conv_1d: partial(_lru_convolution, block.conv_1d)}):
            return type(block).forward(block, *args, **kwargs)
    finally:
        del block.rg_lru._rnn_scan


def _wide(part: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return part.to(dtype or _wide_dtype(part.dtype))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_CONVOLUTIONS = {"causal_conv1d_fn": _convolution, "causal_conv1d_update": _convolution_update}
_RECURRENCES = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba1,
}
_SINGLE = {  # one token
    "torch_recurrent_gated_delta_rule": _delta_rule,
    "recurrent_kimi_delta_attention": _delta_rule,
    "mamba2_selective_state_update": _mamba2_update,
    "mamba_selective_state_update": _mamba1_update,
}


def serves_single(module: nn.Module) -> bool:
    """Return whether the dense form of a module serves one node too, which goes through other functions."""
    used = global_names(module)
    return "causal_conv1d_update" in used and ("get_recurrent_state" not in used or bool(used & _SINGLE.keys()))


def dense_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return a module's own forward over all nodes of a tree; None if it uses functions that have no dense form here.

    It is the forward of the module's class with other global names, so the modeling file is not changed. Modules whose weights
    are moved by accelerate's hooks have none.
    """
    if _is_changed(module):
        return None
    used = global_names(module)
    recurrences = used & _RECURRENCES.keys()
    if "causal_conv1d_fn" not in used or len(recurrences) != ("get_recurrent_state" in used):
        return None
    return with_globals(module, _RECURRENCES | _SINGLE | _CONVOLUTIONS)


def lru_forward(block: nn.Module) -> Callable[..., Any] | None:
    """Return such a forward of a block of RecurrentGemma; None for other modules, whose states are attributes too."""
    lru, convolution = getattr(block, "rg_lru", None), getattr(block, "conv_1d", None)
    if not isinstance(lru, nn.Module) or not isinstance(convolution, nn.Conv1d) or _is_changed(block):
        return None
    own = "forward" in vars(lru) or "forward" in vars(convolution) or "_rnn_scan" in vars(lru)
    known = "conv1d_state" in global_names(block) and "_rnn_scan" in global_names(lru)
    return partial(_lru_forward, block) if known and not own else None


def _is_changed(module: nn.Module) -> bool:
    """Return whether other code runs in place of a module's forward, or moves its weights."""
    return "forward" in vars(module) or any(hasattr(part, "_hf_hook") for part in module.modules())
