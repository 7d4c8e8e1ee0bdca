"""The fused kernels against plain PyTorch: rounding, strides, and rows that do not depend on each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from triton_here import needs_triton

pytestmark = needs_triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not round bfloat16, it cuts bits off
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers differ by at most one rounding of their dtype."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    steps = 4 if found.dtype == torch.float32 else 1.01
    return bool(
        ((found - expected).float().abs() <= steps * torch.finfo(found.dtype).eps * expected.float().abs() + 1e-7).all()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_norms_are_those_of_modeling_files(kind: type, dtype: torch.dtype) -> None:
    from medhead_kernels.add_rms_norm import add_rms_norm, reference, rms_norm

    module, offset = kind(40, eps=1e-5).to(DEVICE, dtype), kind is GemmaRMSNorm
    module.weight.data = draw(40, dtype=dtype, seed=1)
    x, residual = draw(2, 5, 40, dtype=dtype), draw(2, 5, 40, dtype=dtype, seed=2)
    assert close(rms_norm(x, module.weight, 1e-5, offset), module(x))
    out, total = add_rms_norm(x, residual, module.weight, 1e-5, offset)
    assert torch.equal(total, residual + x)
    assert close(out, module(residual + x))
    for found, expected in zip((out, total), reference(x, residual, module.weight, 1e-5, offset), strict=True):
        assert close(found, expected)


def test_a_norm_of_heads_inside_of_merged_products() -> None:
    from medhead_kernels.add_rms_norm import rms_norm

    heads = draw(2, 3, 80)[..., 16:64].view(2, 3, 3, 16)
    assert torch.equal(rms_norm(heads, draw(16), 1e-6, False), rms_norm(heads.contiguous(), draw(16), 1e-6, False))


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_do_not_depend_on_their_number(rows: int) -> None:
    from medhead_kernels.act_mul import act_mul
    from medhead_kernels.add_rms_norm import add_rms_norm, rms_norm

    x, y, weight = draw(1, 9, 72), draw(1, 9, 72, seed=1), draw(72)
    for run in (
        lambda a, b: rms_norm(a, weight, 1e-6, True),
        lambda a, b: add_rms_norm(a, b, weight, 1e-6, False)[0],
        lambda a, b: act_mul(a, b, "silu"),
    ):
        assert torch.equal(run(x, y)[:, 2 : 2 + rows], run(x[:, 2 : 2 + rows], y[:, 2 : 2 + rows].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_activations(kind: str, dtype: torch.dtype) -> None:
    from medhead_kernels.act_mul import act_mul, reference

    both = 4 * draw(3, 1, 2 * 1100, dtype=dtype)
    gate, up = both.split(1100, -1)
    found, expected = act_mul(gate, up, kind), reference(gate, up, kind)
    error = (found - expected).float().abs() / (expected.float().abs() + 1e-2)
    assert float(error.max()) <= (5e-4 if dtype == torch.float32 else 2.01 * torch.finfo(dtype).eps)
    edges = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]]).to(DEVICE, dtype)
    assert torch.equal(
        act_mul(edges, torch.ones_like(edges), kind).isnan(), torch.zeros(1, 5, dtype=torch.bool, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_positions_are_written_bit_for_bit(batch: int, dtype: torch.dtype) -> None:
    from medhead_kernels.rope_write import reference, rope_write

    heads, kv_heads, nodes, dim = 4, 2, 3, 20
    merged = draw(batch, nodes, (heads + 2 * kv_heads) * dim, dtype=dtype)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    angles = draw(1 if batch == 1 else batch, nodes, dim // 2, seed=1).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rows = torch.tensor([[4, 5, 6], [0, 1, 2], [7, 8, 9]][:batch], device=DEVICE)
    results = []
    for run in (rope_write, reference):
        query, key, value = (
            part.view(batch, nodes, -1, dim).transpose(1, 2) for part in merged.clone().split(sizes, -1)
        )
        expected = apply_rotary_pos_emb(query, key, cos, sin)
        keys, values = (torch.full((batch, kv_heads, 12, dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
        run(query, key, value, cos, sin, rows, keys, values)
        assert torch.equal(query, expected[0])
        index = rows[:, None, :, None].expand(batch, kv_heads, nodes, dim)
        assert torch.equal(keys.gather(2, index), expected[1])
        assert torch.equal(values.gather(2, index), value)
        results.append((keys, values))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)  # no other row was written
