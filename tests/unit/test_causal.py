"""Prompts by flash kernels: a prefix and a causal chunk, merged, are causal attention; on CUDA nothing else is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_llama
from fake_cuda import CUDA, Operations, default_dtype, fake_cuda, needs_fake_cuda
from medhead.model import target as targets
from medhead.model.target import Target
from medhead_kernels import causal, reference, sdpa
from medhead_kernels.attn_metadata import additive_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("start", "tokens"), [(0, 7), (1, 5), (33, 16), (20, 1), (0, 1)])
def test_a_chunk_behind_a_prefix(start: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(start)
    query, key, value = (
        torch.randn(2, heads, count, 16, generator=generator).to(dtype)
        for heads, count in ((4, tokens), (2, start + tokens), (2, start + tokens))
    )
    bias = additive_mask(torch.ones(tokens, start + tokens, dtype=torch.bool).tril(start), torch.float32)
    out = causal.attention(query, key, value, 0.3)
    expected = reference.attention(query.float(), key.float(), value.float(), bias[None, None], 0.3)
    assert out.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@needs_fake_cuda
@pytest.mark.parametrize(("head_dim", "flash"), [(8, True), (12, False)])
def test_a_prompt_is_read_by_flash_kernels_on_cuda(head_dim: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer one causal call for each of three chunks and one for each of two prefixes; no mask, no other kernel."""
    monkeypatch.setattr(targets, "PREFILL_CHUNK", 8)
    with fake_cuda():
        with CUDA, default_dtype(torch.bfloat16):
            target = Target(tiny_llama(head_dim=head_dim), probe=False)
        with target.active(), Operations() as found:
            target.prefill(target.new_cache(1, 32), [[5] * 20])
    attentions = [name for name in found.names if "scaled_dot_product" in name]
    assert set(attentions) == {"aten._scaled_dot_product_flash_attention.default"} or not flash
    assert len(attentions) == 2 * 5 or not flash
    assert not any("cudnn" in name for name in found.names)
    assert any("masked_fill" in name for name in found.names) != flash


@needs_fake_cuda
def test_cudnn_is_not_chosen_where_a_mask_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds a plan for every new number of keys."""
    allowed, shapes = [], []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        shapes.append(key.shape)
        return plain(query, key, value, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with fake_cuda(), CUDA:
        query, key = (torch.zeros(1, heads, 5, 16, dtype=torch.bfloat16) for heads in (4, 2))
        assert sdpa.attention(query, key, key, torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16), 1.0).shape == (
            1,
            5,
            4,
            16,
        )
    assert allowed == [False]
    assert shapes == [(1, 4, 5, 16)]  # groups are spread: no other kernel takes a mask and groups
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
