"""The gated delta rule over token trees: its outputs for all nodes at once, and the state after a path.

The state after a node is the row's committed state and one term for each node of the path, each weighted by the decay along the
path. `G` is the sum of a node's log-decays along its path, and `D_ij` is `exp(G_i - G_j)` if j is i or an ancestor of i, else 0.
The updates `U` solve `(I + A) U = beta (V - e^G K S)`, where `A_ij = beta_i (k_i . k_j) D_ij` for ancestors j of i, which is unit
triangular because a parent comes before its child. The outputs are `e^G Q S + (D * Q K^T) U`, and the state after node n is
`e^G_n S + (D_n * K)^T U` (Gated DeltaNet, Yang et al. 2024, whose chunks are the case of a chain).

`reference` computes this in plain PyTorch; `tree_delta_rule` has a Triton kernel for it.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_NODES = 64  # of the kernel: one word of the ancestor bitmask
MAX_KEY = 128  # of the kernel: size of a key


class DeltaRuleOutput(NamedTuple):
    """What the gated delta rule gives for the nodes of a tree.

    Attributes:
        out: `[batch, heads, nodes, value]`, the outputs.
        updates: `U`, like `out`.
        total: `G`, `[batch, heads, nodes, 1]`, or of every channel of a key, `[batch, heads, nodes, key]`.
    """

    out: Tensor
    updates: Tensor
    total: Tensor


def reference(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, visible: Tensor
) -> DeltaRuleOutput:
    """Compute the gated delta rule of every node after its ancestors; all tensors but `visible` have one floating-point type.

    Args:
        query: `[batch, key heads, nodes, key]`; a key head serves `heads / key heads` heads.
        key: like `query`.
        value: `[batch, heads, nodes, value]`.
        log_decay: `[batch, heads, nodes]`.
        beta: like `log_decay`.
        state: `[batch, heads, key, value]`, after the committed tokens.
        visible: `[batch or 1, nodes, nodes]` bool, node i sees node j.
    """
    nodes, share = key.shape[2], value.shape[1] // key.shape[1]
    both = torch.cat([key, query], 2)
    dots = _shared(both @ key.transpose(-1, -2), share)
    past = _shared(both, share) @ state
    total, between = path_decays(log_decay, visible)
    grown = total.exp()
    triangle = beta[..., None] * dots[:, :, :nodes] * between  # its diagonal is not read
    wanted = beta[..., None] * (value - grown * past[:, :, :nodes])
    updates = torch.linalg.solve_triangular(triangle, wanted, upper=False, unitriangular=True)
    out = grown * past[:, :, nodes:] + (dots[:, :, nodes:] * between) @ updates
    return DeltaRuleOutput(out, updates, total)


def channel_reference(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, visible: Tensor
) -> DeltaRuleOutput:
    """Compute `reference` where every channel of a key decays on its own, as in Kimi Delta Attention (2025).

    Decays stay in the products of keys as differences, because `e^-G` alone overflows.

    Args:
        query: `[batch, heads, nodes, key]`.
        key: like `query`.
        value: `[batch, heads, nodes, value]`.
        log_decay: like `query`.
        beta: `[batch, heads, nodes]`.
        state: `[batch, heads, key, value]`, after the committed tokens.
        visible: `[batch or 1, nodes, nodes]` bool, node i sees node j.
    """
    total = visible[:, None].to(log_decay.dtype) @ log_decay
    between = (total[..., None, :] - total[..., None, :, :]).masked_fill_(~visible[:, None, ..., None], float("-inf"))
    decayed = between.exp_().mul_(key[:, :, None])  # [batch, heads, nodes, nodes, key]
    dots, weights = (decayed @ torch.stack([key, query], -1)).unbind(-1)
    grown = total.exp()
    wanted = beta[..., None] * (value - (grown * key) @ state)
    updates = torch.linalg.solve_triangular(beta[..., None] * dots, wanted, upper=False, unitriangular=True)
    return DeltaRuleOutput((grown * query) @ state + weights @ updates, updates, total)


def path_decays(log_decay: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Return `G` `[batch, heads, nodes, 1]` and `D` `[batch, heads, nodes, nodes]` of log-decays; arguments as in `reference`."""
    total = visible[:, None].to(log_decay.dtype) @ log_decay[..., None]
    return total, (total - total.transpose(-1, -2)).masked_fill(~visible[:, None], float("-inf")).exp()


def state_after(state: Tensor, key: Tensor, updates: Tensor, total: Tensor, path: Tensor, counts: Tensor) -> Tensor:
    """Return the state after the first `counts[row]` nodes of `path` `[batch, steps]`, which begin at the root.

    Args:
        state: `[batch, heads, key, value]`, after the committed tokens.
        key: `[batch, key heads, nodes, key]`.
        updates: of a `DeltaRuleOutput`.
        total: of a `DeltaRuleOutput`.
        path: `[batch, steps]` int64; what follows the first `counts` nodes is not read.
        counts: `[batch]` int64, at least 1.
    """
    rows, share = torch.arange(len(path), device=path.device)[:, None], updates.shape[1] // key.shape[1]
    keys, terms, totals = (
        part.transpose(1, 2)[rows, path] for part in (key, updates, total)
    )  # [batch, steps, heads, ...]
    last = totals[rows, counts[:, None] - 1]  # [batch, 1, heads, 1 or key]
    ended = torch.arange(path.shape[1], device=path.device) >= counts[:, None]
    weights = (last - totals).masked_fill(ended[..., None, None], float("-inf")).exp().transpose(1, 2)
    weighted = _shared(keys.transpose(1, 2), share) * weights  # [batch, heads, steps, key]
    decayed = (last[:, 0, ..., None].exp() * state).flatten(0, 1)
    decayed.baddbmm_(weighted.transpose(-1, -2).flatten(0, 1), terms.transpose(1, 2).flatten(0, 1))
    return decayed.unflatten(0, state.shape[:2])


def _shared(part: Tensor, share: int) -> Tensor:
    """Repeat the key heads for the heads that they serve."""
    return part if share == 1 else part.repeat_interleave(share, 1)


# ---------------------------------------------------------------- the Triton kernel


def use_triton(device: torch.device, nodes: int, key_size: int, value_size: int, exact: bool = True) -> bool:
    """Return whether the kernel is used: on CUDA, where Triton is installed and this form of it passes `selftest`.

    Args:
        device: of the tensors.
        nodes: of the tree; the kernel's form is that of the next power of two.
        key_size: of a key.
        value_size: of a value.
        exact: that of the kernel.
    """
    if nodes > MAX_NODES or key_size > MAX_KEY:
        return False
    return _works(device, max(16, 1 << (nodes - 1).bit_length()), key_size, value_size, exact)


@lru_cache(maxsize=64)
def _works(device: torch.device, nodes: int, key_size: int, value_size: int, exact: bool) -> bool:
    """Try a form of the kernel where there is one, once."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return selftest(device, nodes, key_size, value_size, exact)


@torch.no_grad()
def selftest(device: torch.device, nodes: int, key_size: int, value_size: int, exact: bool) -> bool:
    """Compare the kernel with `reference` on a binary tree; warn and return False if it fails or differs."""
    try:
        from medhead_kernels.tree_delta_rule import delta_rule

        random = torch.Generator().manual_seed(0)
        query, key = torch.nn.functional.normalize(torch.randn(2, 1, 1, nodes, key_size, generator=random), dim=-1)
        value = torch.randn(1, 2, nodes, value_size, generator=random)
        state = torch.randn(1, 2, key_size, value_size, generator=random)
        log_decay, beta = -torch.rand(1, 2, nodes, generator=random), torch.rand(1, 2, nodes, generator=random)
        visible = torch.eye(nodes, dtype=torch.bool)
        for node in range(1, nodes):
            visible[node] |= visible[(node - 1) // 2]
        bitmask = (visible.long() << torch.arange(nodes)).sum(-1)[None, :, None]
        expected = reference(query, key, value, log_decay, beta, state, visible[None])
        query, key, value, log_decay, beta, state, bitmask = (
            part.to(device) for part in (query, key, value, log_decay, beta, state, bitmask)
        )
        found = delta_rule(query, key, value, log_decay, beta, state, bitmask, nodes.bit_length() - 1, exact)
        difference = max(float((a.cpu() - b).abs().max()) for a, b in zip(found, expected, strict=True))
        if difference <= 1e-3:
            return True
        reason = f"its outputs differ by {difference:.3g}"
    except Exception as error:  # whatever Triton throws, PyTorch works
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    warnings.warn(
        f"the kernel of the gated delta rule does not work on {device} ({reason}); PyTorch computes it, which is slower",
        stacklevel=2,
    )
    return False
