"""The CPU kernel for linear layers: products, kinds of weights, copies, and machines that cannot compile it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medhead_kernels import block_linear, native
from medhead_kernels.block_linear import KINDS, Blocks
from medhead_kernels.cache_ops import write_rows
from medhead_kernels.packed_linear import PackedLinear, can_pack, row_checksums

OUT, SIZE = 256, 128
WORKS = block_linear.unavailable() is None
needs_kernel = pytest.mark.skipif(not WORKS, reason=f"{block_linear.unavailable()}")


def made(out: int, size: int, kind: str, seed: int = 0) -> Blocks:
    weight = torch.randn(out, size, generator=torch.Generator().manual_seed(seed))
    if kind in ("int8", "int4"):
        return block_linear.round_to(weight, kind)
    if kind in ("uint8", "int8 by 16"):
        groups = -(-size // 32) * (1 if kind == "uint8" else 2)
        levels = (weight * 40).round() if kind != "uint8" else (weight * 40 + 128).round().clamp(0, 255)
        scales = torch.rand(out, groups, generator=torch.Generator().manual_seed(seed)) / 40
        return block_linear.from_levels(levels, scales, -128 * scales if kind == "uint8" else torch.empty(0), kind)
    return block_linear.store(weight.to(getattr(torch, kind)))


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(1, 200),
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.booleans(),
)
def test_products(out: int, size: int, rows: int, kind: str, threads: int, shuffled: bool) -> None:
    """Within rounding of float64; bit for bit the same alone and beside other rows, with any number of threads."""
    blocks = made(out, size, kind)
    weight = block_linear.rows(blocks).double()
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(1))
    found = block_linear.linear(x, blocks)
    bound = (
        x.abs().double().sum(1, keepdim=True) * weight.abs().max() + 1
    )  # scale * q + minimum may cancel in each weight
    assert ((found - x.double() @ weight.t()).abs() <= 1e-6 * bound * max(1, size / 16)).all()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        picked = torch.randperm(rows)[: 1 + rows // 3] if shuffled else torch.tensor([rows // 2])
        assert torch.equal(block_linear.linear(x[picked], blocks), found[picked])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_shapes_and_types() -> None:
    """Leading dimensions, no rows, views, and activations of half types, whose sums are in float32."""
    blocks = made(OUT, SIZE, "bfloat16")
    weight = block_linear.rows(blocks)
    for shape in ((SIZE,), (2, 3, SIZE), (0, SIZE), (1, 0, SIZE)):
        x = torch.randn(shape)
        torch.testing.assert_close(block_linear.linear(x, blocks), F.linear(x, weight), atol=1e-4, rtol=1e-5)
    view = torch.randn(SIZE, 6).t()
    assert torch.equal(block_linear.linear(view, blocks), block_linear.linear(view.contiguous(), blocks))
    half = torch.randn(5, SIZE, dtype=torch.bfloat16)
    assert torch.equal(block_linear.linear(half, blocks), block_linear.linear(half.float(), blocks).bfloat16())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_smallest_kind_without_loss_is_stored(kind: str) -> None:
    weight = torch.randn(70, 45).to(getattr(torch, kind)).float()
    blocks = block_linear.store(weight)
    assert blocks.kind == kind
    assert torch.equal(block_linear.rows(blocks), weight)
    assert torch.equal(block_linear.rows(blocks, torch.tensor([69, 3])), weight[[69, 3]])


@pytest.mark.parametrize(("kind", "levels"), [("int8", 254), ("int4", 15)])
@pytest.mark.parametrize("size", [96, 45, 1])
def test_rounding_is_within_half_a_level(kind: str, levels: int, size: int) -> None:
    weight = torch.randn(70, size)
    weight[5] = 0
    found = block_linear.rows(block_linear.round_to(weight, kind))
    for start in range(0, size, 32):
        part = weight[:, start : start + 32]
        spread = 2 * part.abs().amax(1) if kind == "int8" else part.amax(1) - part.amin(1)
        assert ((found[:, start : start + 32] - part).abs() <= (0.5001 * spread / levels + 1e-6)[:, None]).all()
    assert not found[5].any()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_to_a_cache(dtype: torch.dtype) -> None:
    """The operator of the kernel's library does what the one of PyTorch's operations does; a row outside is refused."""
    keys, values = torch.zeros(2, 2, 3, 20, 8, dtype=dtype)
    new = torch.randn(2, 2, 5, 3, 8).transpose(2, 3)
    rows = torch.stack([torch.randperm(20)[:5] for _ in range(2)])[:, None, :, None]
    expected = [
        cache.scatter(2, rows.expand_as(part), part.to(dtype)) for cache, part in zip((keys, values), new, strict=True)
    ]
    write_rows(keys, values, *new, rows)
    assert all(map(torch.equal, (keys, values), expected))
    with pytest.raises(RuntimeError, match="row 20 of 20"):
        write_rows(keys, values, *new, rows + 20 - rows.max())


@needs_kernel
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_copy(bias: bool) -> None:
    weight, offset = torch.randn(OUT, SIZE), torch.randn(OUT) if bias else None
    matrix, x = PackedLinear(weight, offset), torch.randn(2, 3, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(matrix(x), F.linear(x, weight, offset), atol=1e-4, rtol=1e-5)
    assert matrix.nbytes == weight.nbytes
    matrix.clear()
    assert matrix.nbytes == 0


@needs_kernel
def test_a_rounded_copy_multiplies_by_eight_bits() -> None:
    weight, x = torch.randn(OUT, SIZE), torch.randn(3, SIZE)
    exact, rounded = PackedLinear(weight), PackedLinear(weight, rounded=True)
    with torch.inference_mode():
        assert torch.equal(rounded(x), block_linear.linear(x, block_linear.round_to(weight, "int8")))
        assert not torch.equal(rounded(x), exact(x))
    assert rounded.nbytes * 32 == exact.nbytes * 9


@needs_kernel
def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted changes are seen at once, others after `recheck`; unchanged weights are not packed again."""
    copies, store = [], block_linear.store
    monkeypatch.setattr(block_linear, "store", lambda weight: copies.append(1) or store(weight))
    weight, x = torch.randn(OUT, SIZE), torch.randn(5, SIZE)
    matrix = PackedLinear(weight)

    def check(number: int) -> None:
        torch.testing.assert_close(matrix(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)
        assert len(copies) == number

    with torch.no_grad():
        check(1)
        weight[3] += 1
        check(2)
        matrix.recheck()
        check(2)
        weight.neg_()  # counted by PyTorch
        check(3)
        weight.data[OUT - 1, 7] += 1  # not counted by PyTorch
        matrix.recheck()
        check(4)


@needs_kernel
def test_gradients_and_tracing_use_linear() -> None:
    """A product of the kernel has no gradient; a traced one reads a copy that exists, and makes none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, x = torch.randn(OUT, SIZE, requires_grad=True), torch.randn(5, SIZE, requires_grad=True)
    matrix = PackedLinear(weight)
    matrix(x).sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    for copied in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            assert matrix(fake.from_tensor(x.detach())).shape == (5, OUT)
        assert (matrix.nbytes > 0) == copied
        matrix.copy()


def test_a_copied_module_has_no_packed_linear() -> None:
    layer = torch.nn.Linear(SIZE, OUT)
    layer.matrix = PackedLinear(layer.weight.detach())  # type: ignore[assignment]
    assert copy.deepcopy(layer).matrix is None


def test_weights_that_are_not_packed() -> None:
    """Other dtypes, views, odd and small sizes, three dimensions."""
    ones = torch.ones
    assert can_pack(ones(OUT, SIZE))
    for weight in (ones(OUT, SIZE).double(), ones(SIZE, OUT).t(), ones(OUT, SIZE + 1), ones(4, 4), ones(2, OUT, SIZE)):
        assert not can_pack(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [512, 516])
def test_structured_changes_change_the_checksums(dtype: torch.dtype, columns: int) -> None:
    """Signs, powers of two, the order of columns, and every single bit of a row change the checksum."""
    weight = torch.randn(4, columns, dtype=dtype)
    checksums = row_checksums(weight)
    assert torch.equal(row_checksums(weight.clone()), checksums)
    order = torch.arange(columns).roll(4)
    for changed in (-weight, 2 * weight, 0.25 * weight, weight[:, order], weight.flip(1), weight.flip(0)):
        assert bool((row_checksums(changed.contiguous()) != checksums).all())
    bits = weight[:1].view(torch.int64).repeat(64, 1)
    bits[:, 5] ^= torch.tensor([1 << bit if bit < 63 else -(1 << 63) for bit in range(64)])
    flipped = row_checksums(bits.view(dtype))
    assert checksums[0] not in flipped
    assert len(set(flipped.tolist())) == 64


def compiler(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("exit 3", "exit code 3"),
        (None, "no C++"),
    ],
)
def test_why_the_kernel_cannot_be_compiled(
    script: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and no library is left behind."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        monkeypatch.setenv("CXX", compiler(tmp_path / "broken", script))
    else:
        monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "unavailable", native.unavailable.__wrapped__)
    line = native.unavailable("cpu_ops")
    assert line is not None
    assert reason in line
    assert "\n" not in line
    assert not [file for file in tmp_path.rglob("*.so") if file.is_file()]
