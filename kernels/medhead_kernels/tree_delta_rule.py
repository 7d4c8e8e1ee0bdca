"""The gated delta rule over token trees in Triton: one program for each row, head and block of value columns.

The mathematics and the words are those of `delta_rule`. The updates of a node depend on those of its ancestors alone, so
`max_depth` sweeps `U = W - A U` give exactly what the triangular solve gives: after d sweeps all nodes down to depth d are
final. Columns of values are independent of each other, so they are split among programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medhead_kernels.delta_rule import DeltaRuleOutput

COLUMNS = 32  # values of a program


@triton.jit
def _tile(base, stride, rows, columns, real, used):  # type: ignore[no-untyped-def]
    """Load `[rows, columns]` in float32, with zeros outside."""
    at = base + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=real[:, None] & used[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["nodes", "max_depth"])
def delta_rule_kernel(query, key, value, log_decay, beta, state, bitmask, out, updates, total, nodes, max_depth, heads,  # type: ignore[no-untyped-def]
                      q_batch, q_head, q_node, k_batch, k_head, k_node, v_batch, v_head, v_node, g_batch, g_head, g_node,
                      b_batch, b_head, b_node, s_batch, s_head, s_key, m_batch, m_node,
                      SHARE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (batch * heads, blocks of values): outputs, updates and sums of log-decays of all nodes."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // heads, row_head % heads
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real, wide, inside = n < nodes, d < KEY, v < VALUE

    word = tl.load(bitmask + row * m_batch + n * m_node, mask=real, other=0)  # surplus nodes see nothing
    visible = ((word[:, None] >> n.to(tl.int64)[None, :]) & 1) != 0
    decay = tl.load(log_decay + row * g_batch + head * g_head + n * g_node, mask=real, other=0.0).to(tl.float32)
    rate = tl.load(beta + row * b_batch + head * b_head + n * b_node, mask=real, other=0.0).to(tl.float32)
    sums = tl.sum(tl.where(visible, decay[None, :], 0.0), 1)
    between = tl.exp(tl.where(visible, sums[:, None] - sums[None, :], float("-inf")))
    grown = tl.exp(sums)[:, None]

    keys = _tile(key + row * k_batch + head // SHARE * k_head, k_node, n, d, real, wide)
    past = _tile(state + row * s_batch + head * s_head, s_key, d, v, wide, inside)
    values = _tile(value + row * v_batch + head * v_head, v_node, n, v, real, inside)
    wanted = rate[:, None] * (values - grown * tl.dot(keys, past, input_precision=PRECISION))
    dots = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    triangle = tl.where(n[:, None] > n[None, :], rate[:, None] * dots * between, 0.0)
    update = wanted
    for _ in range(max_depth):
        update = wanted - tl.dot(triangle, update, input_precision=PRECISION)

    queries = _tile(query + row * q_batch + head // SHARE * q_head, q_node, n, d, real, wide)
    weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * between
    found = grown * tl.dot(queries, past, input_precision=PRECISION)
    found += tl.dot(weights, update, input_precision=PRECISION)
    place = (row_head * nodes + n)[:, None] * VALUE + v[None, :]
    tl.store(out + place, found, mask=real[:, None] & inside[None, :])
    tl.store(updates + place, update, mask=real[:, None] & inside[None, :])
    if tl.program_id(1) == 0:
        tl.store(total + row_head * nodes + n, sums, mask=real)


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, bitmask: Tensor,
    max_depth: int, exact: bool = True,
) -> DeltaRuleOutput:  # fmt: skip
    """Compute `delta_rule.reference` in float32 for tensors of any strides whose last dimension is contiguous.

    Args:
        query: `[batch, key heads, nodes, key]` of any floating-point type, as are the following.
        key: like `query`.
        value: `[batch, heads, nodes, value]`.
        log_decay: `[batch, heads, nodes]`.
        beta: like `log_decay`.
        state: `[batch, heads, key, value]`.
        bitmask: `[batch or 1, nodes, 1]` int64, the ancestor bitmask; at most 64 nodes.
        max_depth: at least the largest depth of a node.
        exact: products in float32; else in three products of TF32, which are faster and lose the last bits.
    """
    batch, heads, nodes, size = value.shape
    query, key, value, state = (
        part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value, state)
    )
    constants = delta_rule_constants(nodes, heads // key.shape[1], key.shape[3], size, exact)
    out, updates = (value.new_empty(value.shape, dtype=torch.float32) for _ in range(2))
    total = value.new_empty(batch, heads, nodes, dtype=torch.float32)
    with torch.cuda.device_of(value):
        delta_rule_kernel[batch * heads, triton.cdiv(size, constants["BLOCK_V"])](
            query, key, value, log_decay, beta, state, bitmask, out, updates, total, nodes, max_depth, heads,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *log_decay.stride(), *beta.stride(),
            *state.stride()[:3], bitmask.stride(0) if bitmask.shape[0] > 1 else 0, bitmask.stride(1),
            **constants, **launch_options(nodes),
        )  # fmt: skip
    return DeltaRuleOutput(out, updates, total[..., None])


def delta_rule_constants(nodes: int, share: int, key: int, value: int, exact: bool) -> dict[str, Any]:
    """Return the compile-time values of `delta_rule_kernel`."""
    return {
        "SHARE": share, "KEY": key, "VALUE": value, "BLOCK_N": max(16, triton.next_power_of_2(nodes)),
        "BLOCK_K": max(16, triton.next_power_of_2(key)),
        "BLOCK_V": max(16, min(triton.next_power_of_2(value), COLUMNS)), "PRECISION": "ieee" if exact else "tf32x3",
    }  # fmt: skip


def launch_options(nodes: int) -> dict[str, int]:
    """Return the warps and stages of a program."""
    return {"num_warps": 4 if nodes <= 16 else 8, "num_stages": 1}
