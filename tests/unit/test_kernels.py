"""Kernels inside decoders: attention, layers with their own masks, commits, compilation for absent GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import one_by_one, random_tree
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

import medhead.model.attention
import medhead.model.kv_cache
from conftest import tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder, MedheadError
from medhead.model.attention import mask_window
from medhead.model.target import Target
from medhead_kernels import backends
from medhead_kernels.backends import BACKENDS
from triton_here import interpreted, needs_triton

KERNELS = [pytest.param("triton", marks=[needs_triton, interpreted]), "flash"]


class Spy:
    """Records the windows that a backend is called with, and counts dense masks."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[int | None] = []
        self.dense = 0
        attention, bias = BACKENDS[name].attention, medhead.model.attention.TreePass.bias

        def counted(query: Tensor, key: Tensor, value: Tensor, tree: Any, params: Any) -> Tensor:
            self.windows.append(params.window)
            return attention(query, key, value, tree, params)

        def made(current: Any, *args: Any) -> Tensor | None:
            self.dense += current.backend is not None
            return bias(current, *args)

        monkeypatch.setattr(BACKENDS[name], "attention", counted)
        monkeypatch.setattr(medhead.model.attention.TreePass, "bias", made)


@torch.inference_mode()
def verify_twice(target: Target) -> None:
    """Two passes over random trees of six nodes behind five tokens."""
    generator = torch.Generator().manual_seed(0)
    with target.active():
        for _ in range(2):
            cache = target.new_cache(1, 16)
            target.prefill(cache, [[5, 6, 7, 8, 9]])
            target.verify(cache, random_tree(1, 6, 99, generator))


# ---------------------------------------------------------------- whole decoders


@pytest.mark.parametrize(
    ("name", "sampling"),
    [pytest.param("triton", False, marks=[needs_triton, interpreted]), ("flash", False), ("flash", True)],
)
def test_text_is_that_of_sdpa(name: str, sampling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with ragged rows and trees."""
    ids = torch.tensor([[0, 0, 5, 9, 13, 5, 9], [7, 8, 7, 8, 7, 8, 7]])
    mask = (ids > 0).long()
    options = {"max_new_tokens": 6, "do_sample": sampling, "attention_mask": mask} | ({"seed": 3} if sampling else {})
    texts = {}
    for attention in ("sdpa", name):
        decoder = Decoder(tiny_llama(), "recycling", tree_size=9, attention=attention)
        spy = Spy(name, monkeypatch) if attention == name else None
        texts[attention] = decoder.generate(ids, **options)
        decoder.close()
    assert torch.equal(texts["sdpa"], texts[name])
    assert spy is not None
    assert spy.windows
    assert spy.dense == 0  # no mask of nodes by keys was made


# transformers' SDPA leaves soft-capping out, so the reference is its eager attention, with a cap that changes the scores
CAPPED = {"gemma2": {"attn_logit_softcapping": 0.5}}
FAMILIES = ["mistral", "gemma2", "gpt_oss", "llama4_text", "cohere2", "deepseek_v3", "gpt2", "qwen2"]


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:attention .* cannot serve some layers")
def test_families_with_their_own_masks(family: str, attention: str) -> None:
    """Windows, chunks, soft-capping, sinks and other value sizes give correct logits, by the kernel or a dense mask."""
    if family not in ACCEPTED or not exists(family):
        pytest.skip(f"no {family} here")
    model = tiny(family, ACCEPTED[family] | CAPPED.get(family, {}))
    model.set_attn_implementation("eager")
    try:
        target = Target(model, probe=False, attention=attention)
    except MedheadError as error:
        assert "one head size" in str(error)  # noqa: PT017
        return
    generator = torch.Generator().manual_seed(1)
    prefixes = [torch.randint(3, 99, (n,), generator=generator).tolist() for n in (3, 11)]
    tree = random_tree(2, 10, 99, generator)
    expected = one_by_one(model, tree, prefixes)
    with torch.inference_mode(), target.active():
        cache = target.new_cache(2, 16)
        target.prefill(cache, prefixes)
        logits, _ = target.verify(cache, tree)
    assert float((logits - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


@needs_triton
@interpreted
def test_a_window_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel receives Mistral's sliding window of 4, and no dense mask is made."""
    target = Target(tiny("mistral", ACCEPTED["mistral"]), attention="triton")
    spy = Spy("triton", monkeypatch)
    verify_twice(target)
    assert spy.windows == [4] * 6
    assert spy.dense == 0


def test_an_unsupported_layer_warns_once() -> None:
    medhead.model.attention.warn_dense_fallback.cache_clear()
    target = Target(tiny("gemma2", ACCEPTED["gemma2"]), probe=False, attention="flash")
    with pytest.warns(UserWarning, match="'flash' cannot serve some layers") as said:
        verify_twice(target)
    reasons = [str(one.message) for one in said]
    assert len(reasons) == len(set(reasons)) <= 2  # soft-capping; window


# ---------------------------------------------------------------- choosing


def test_mask_functions_are_recognised_or_fall_back_to_the_dense_mask() -> None:
    window, chunks = sliding_window_causal_mask_function(7), chunked_causal_mask_function(7, torch.zeros(1))
    assert mask_window(causal_mask_function) == 0
    assert mask_window(window) == 7
    assert mask_window(chunks) is None
    assert mask_window(and_masks(window, causal_mask_function)) is None
    assert mask_window(and_masks(lambda *_: True, causal_mask_function)) is None
    assert mask_window(lambda *_: True) is None
    assert mask_window(torch.nn.Identity()) is None


@needs_triton
def test_triton_without_a_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_is_interpreted", lambda: False)
    with pytest.raises(
        MedheadError, match="'triton' cannot serve this model: it needs a CUDA device, not cpu"
    ) as refusal:
        Target(tiny_llama(), attention="triton")
    assert "\n" not in str(refusal.value)


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MedheadError, match=r"the package triton is not installed \(pip install triton\)"):
        Target(tiny_llama(), attention="triton")


def test_an_unknown_name() -> None:
    with pytest.raises(MedheadError, match="attention must be one of auto, sdpa, reference, triton, flash, got 'fast'"):
        Target(tiny_llama(), attention="fast")


def test_auto_gives_way_to_sdpa_when_the_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails on this GPU is found by the probe, which warns and falls back to sdpa."""

    broken = replace(BACKENDS["flash"], attention=lambda query, *_: query.transpose(1, 2) * float("nan"))
    monkeypatch.setattr(medhead.model.attention, "select_backend", lambda *_: broken)
    with pytest.warns(UserWarning, match="'flash' fails with this model, so it is 'sdpa'"):
        assert Target(tiny_llama(), attention="auto").backend.name == "sdpa"
    with pytest.raises(MedheadError, match=r"with attention 'flash' \(try 'sdpa'\): .*cannot verify a token tree"):
        Target(tiny_llama(), attention="flash")


# ---------------------------------------------------------------- commit


def random_paths(batch: int, nodes: int, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Return increasing paths from node 0 with their counts; entries after a count are any node."""
    counts = torch.randint(1, nodes + 1, (batch,), generator=generator).tolist()
    path = torch.randint(0, nodes, (batch, max(counts)), generator=generator)
    for row, count in enumerate(counts):
        path[row, 0] = 0
        path[row, 1:count] = 1 + torch.randperm(nodes - 1, generator=generator)[: count - 1].sort().values
    return path, counts


def moved_rows(buffer: Tensor, path: Tensor, lengths: Tensor) -> Tensor:
    """Copy row `length + path[d]` to `length + d`, one by one."""
    out = buffer.clone()
    for row, length in enumerate(lengths.tolist()):
        for step, node in enumerate(path[row].tolist()):
            out[:, row, :, length + step] = buffer[:, row, :, length + node]
    return out


@needs_triton
@interpreted
@settings(max_examples=10)
@given(st.integers(0, 10_000), st.sampled_from([(torch.float32, 8), (torch.bfloat16, 80), (torch.float16, 64)]))
def test_commit_moves_what_the_plain_one_moves(seed: int, kind: tuple[torch.dtype, int]) -> None:
    from medhead_kernels.commit import move

    generator = torch.Generator().manual_seed(seed)
    dtype, dim = kind
    batch, nodes = int(torch.randint(1, 3, (), generator=generator)), int(torch.randint(2, 9, (), generator=generator))
    lengths = torch.randint(0, 12, (batch,), generator=generator)
    store = torch.randn(2, batch, 2, 24, dim, generator=generator).to(dtype)
    store[..., 22:, :] = float("nan")  # never read, never written
    path, counts = random_paths(batch, nodes, generator)
    expected, free, exact = moved_rows(store, path, lengths), store.clone(), store.clone()
    move(free, path, lengths)
    move(exact, path, lengths, torch.tensor(counts))
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts, strict=True)):
        kept = slice(0, length + count)
        assert torch.equal(free[:, row, :, kept], expected[:, row, :, kept])
        assert torch.equal(exact[:, row, :, kept], expected[:, row, :, kept])
        behind = slice(length + count, 22)
        assert torch.equal(exact[:, row, :, behind], store[:, row, :, behind])
    assert bool(free[..., 22:, :].isnan().all())


@needs_triton
@interpreted
@pytest.mark.parametrize(("apart", "launches"), [(False, 1), (True, 3)])
def test_layers_of_one_storage_are_moved_by_one_launch(
    apart: bool, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medhead_kernels import cache_ops, commit

    calls, move = [], commit.move
    monkeypatch.setattr(commit, "move", lambda *given: (calls.append(1), move(*given)))
    buffer, lengths = torch.randn(3, 2, 2, 16, 8), torch.tensor([3, 0])
    path, counts = torch.tensor([[0, 2, 3], [0, 1, 4]]), torch.tensor([3, 3])
    expected, plain = moved_rows(buffer, path, lengths), [layer.clone() for layer in buffer]
    layers = [layer.clone() for layer in buffer] if apart else list(buffer.unbind())
    cache_ops.move_layers(layers, path, lengths, counts, True)
    cache_ops.move_layers(plain, path, lengths, counts, False)
    assert torch.equal(torch.stack(layers), expected)
    assert torch.equal(torch.stack(plain), expected)
    assert len(calls) == launches


@needs_triton
@interpreted
def test_a_cache_that_commits_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that commits by the kernel gives the same text."""
    ids = torch.tensor([[5, 9, 13, 5, 9], [7, 8, 7, 8, 7]])
    plain = Decoder(tiny_llama(), "recycling").generate(ids, max_new_tokens=12)
    launches = []
    monkeypatch.setattr(medhead.model.kv_cache, "use_triton_commit", lambda device: launches.append(device) or True)
    assert torch.equal(plain, Decoder(tiny_llama(), "recycling").generate(ids, max_new_tokens=12))
    assert launches


@needs_triton
@interpreted
def test_a_commit_kernel_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert medhead.model.kv_cache.selftest_commit(cpu)
    monkeypatch.setattr("medhead_kernels.commit.move", lambda *_: None)
    with pytest.warns(UserWarning, match=r"does not work on cpu \(rows 0 to 3 became"):
        assert not medhead.model.kv_cache.selftest_commit(cpu)
    monkeypatch.setattr("medhead_kernels.commit.move", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not medhead.model.kv_cache.selftest_commit(cpu)
    assert not medhead.model.kv_cache.use_triton_commit(cpu)


# ---------------------------------------------------------------- GPUs


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here() -> None:
    """Dtypes and sizes, which Triton's interpreter does not check, for sm_80 and sm_90."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "medhead_kernels.compile_check", "--quick"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "sm_80 split bf16" in done.stdout
    assert "sm_90 split fp32" in done.stdout
    assert "sm_90 path span bf16" in done.stdout
    assert "all compiled" in done.stdout
