"""Products of few rows with a weight: F.linear, transposed and packed."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from medhead_kernels import skinny_gemm
from medhead_kernels.skinny_gemm import PackedLinear

OUT, SIZE = 256, 128
PACKS = skinny_gemm.can_pack(torch.ones(OUT, SIZE))
needs_packing = pytest.mark.skipif(not PACKS, reason="this PyTorch or CPU has no oneDNN")


@pytest.mark.parametrize("helps", [True, False])
def test_linear_is_linear(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    """Any number of rows, leading dimensions, dtypes, views and a bias; contiguous, with gradients."""
    shapes = []
    way, transposed = "transposed" if helps else "linear", skinny_gemm.transposed
    monkeypatch.setattr(skinny_gemm, "fastest_method", lambda *args: way)
    monkeypatch.setattr(skinny_gemm, "transposed", lambda *args: shapes.append(args[0].shape) or transposed(*args))
    for shape, dtype, bias in product(((1, 7), (5, 7), (2, 3, 7), (257, 7)), (torch.float32, torch.float64), (0, 1)):
        x = torch.randn(*shape, dtype=dtype)
        weight = torch.randn(11, 14, dtype=dtype)[:, ::2].requires_grad_()
        offset = torch.randn(11, dtype=dtype) if bias else None
        found, expected = skinny_gemm.linear(x, weight, offset), F.linear(x, weight, offset)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), weight)[0] for y in (found, expected)))
    assert set(shapes) == ({(5, 7), (2, 3, 7)} if helps else set())


def _always_packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Always choose packing; return the list of the copies' shapes."""
    made: list[tuple[int, ...]] = []
    pack = skinny_gemm.pack
    monkeypatch.setattr(skinny_gemm, "fastest_method", lambda *args: "packed" if args[-1] else "linear")
    monkeypatch.setattr(skinny_gemm, "pack", lambda weight: made.append(tuple(weight.shape)) or pack(weight))
    return made


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool) -> None:
    """Packed products are right for any rows and views, with one copy, and without it above MAX_ROWS."""
    weight = torch.randn(OUT, SIZE, dtype=dtype)
    if not skinny_gemm.can_pack(weight):
        pytest.skip(f"this CPU packs no {dtype}")
    made = _always_packed(monkeypatch)
    offset = torch.randn(OUT, dtype=dtype) if bias else None
    matrix = PackedLinear(weight, offset)
    with torch.no_grad():
        for shape in ((1, SIZE), (2, 3, SIZE), (64, SIZE), (0, SIZE), (skinny_gemm.MAX_ROWS + 1, SIZE)):
            x = torch.randn(*shape, dtype=dtype)
            torch.testing.assert_close(
                matrix(x), F.linear(x, weight, offset), rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 0.2
            )
        x = torch.randn(SIZE, 6, dtype=dtype).t()
        torch.testing.assert_close(
            matrix(x), F.linear(x, weight, offset), rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 0.2
        )
    assert made == [(OUT, SIZE)]
    assert matrix.nbytes == weight.numel() * weight.element_size()
    matrix.clear()
    assert matrix.nbytes == 0


@needs_packing
def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted changes are seen at once, others after `recheck`; unchanged weights are not packed again."""
    made = _always_packed(monkeypatch)
    weight, x = torch.randn(OUT, SIZE), torch.randn(5, SIZE)
    matrix = PackedLinear(weight)
    with torch.no_grad():
        matrix(x)
        weight[3] += 1
        torch.testing.assert_close(matrix(x), F.linear(x, weight))
        assert len(made) == 2
        matrix.recheck()
        matrix(x)
        assert len(made) == 2
        weight.neg_()  # counted by PyTorch
        torch.testing.assert_close(matrix(x), F.linear(x, weight))
        assert len(made) == 3
        weight.data[OUT - 1, 7] += 1e-3  # not counted by PyTorch
        matrix.recheck()
        torch.testing.assert_close(matrix(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
        assert len(made) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [512, 516])
def test_structured_changes_change_the_checksums(dtype: torch.dtype, columns: int) -> None:
    """Signs, powers of two, the order of columns, and every single bit of a row change the checksum."""
    weight = torch.randn(4, columns, dtype=dtype)
    checksums = skinny_gemm.row_checksums(weight)
    assert torch.equal(skinny_gemm.row_checksums(weight.clone()), checksums)
    order = torch.arange(columns).roll(4)
    for changed in (-weight, 2 * weight, 0.25 * weight, weight[:, order], weight.flip(1), weight.flip(0)):
        assert bool((skinny_gemm.row_checksums(changed.contiguous()) != checksums).all())
    bits = weight[:1].view(torch.int64).repeat(64, 1)
    bits[:, 5] ^= torch.tensor([1 << bit if bit < 63 else -(1 << 63) for bit in range(64)])
    flipped = skinny_gemm.row_checksums(bits.view(dtype))
    assert checksums[0] not in flipped
    assert len(set(flipped.tolist())) == 64


@needs_packing
def test_gradients_and_tracing_use_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed product has no gradient, and its copy must not become part of a traced step."""
    made = _always_packed(monkeypatch)
    weight, x = torch.randn(OUT, SIZE, requires_grad=True), torch.randn(5, SIZE, requires_grad=True)
    matrix = PackedLinear(weight)
    matrix(x).sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        assert matrix(fake.from_tensor(x.detach())).shape == (5, OUT)
    assert made == []


@needs_packing
def test_a_copied_module_has_no_packed_linear() -> None:
    """A copied module must not multiply by the weights of the original."""
    layer = torch.nn.Linear(SIZE, OUT)
    layer.matrix = PackedLinear(layer.weight.detach())  # type: ignore[assignment]
    assert copy.deepcopy(layer).matrix is None


@needs_packing
def test_a_group_is_packed_by_its_total_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that alone is slower packed is packed when the group is faster."""
    large, small = (skinny_gemm.PackedLinear(torch.randn(rows, SIZE)) for rows in (OUT, 2 * OUT))
    assert large.packable
    assert small.packable
    seconds = {
        OUT: {"linear": 9.0, "transposed": 8.0, "packed": 4.0},
        2 * OUT: {"linear": 1.0, "transposed": 2.0, "packed": 2.0},
    }

    def measured(out: int, size: int, dtype: torch.dtype, bucket: int, threads: int) -> dict[str, float]:
        return {way: took * (2 if way == "packed" and bucket == 1 else 1) for way, took in seconds[out].items()}

    monkeypatch.setattr(skinny_gemm, "measure", measured)
    assert not small.uses_packed(2)
    for matrix in (large, small):
        matrix.recheck()
    group = skinny_gemm.PackGroup([large, small])
    assert [group.is_packed(bucket) for bucket in (0, 1, 2)] == [True, False, True]
    with torch.inference_mode():
        for matrix in (large, small):
            x = torch.randn(24, SIZE)
            torch.testing.assert_close(matrix(x), F.linear(x, matrix.weight))
    assert large.nbytes > 0
    assert small.nbytes > 0
    assert not skinny_gemm.PackGroup([]).is_packed(2)


def test_measured_seconds_are_those_of_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one second per row, a weight takes as many seconds as it has rows, whatever part of it was measured."""
    monkeypatch.setattr(
        skinny_gemm, "time_products", lambda product, weights, x: sum(len(weight) for weight in weights)
    )
    monkeypatch.setattr(skinny_gemm, "supports_packing", lambda dtype: False)
    for out, size in ((128, 256), (OUT, SIZE), (4096, 1024), (3000, 2048)):
        assert skinny_gemm.measure.__wrapped__(out, size, torch.float32, 2, 1)["linear"] == pytest.approx(out)


def test_methods_are_measured_once() -> None:
    """Once for every size, dtype, bucket and number of threads; small weights are never measured."""
    skinny_gemm.measure.cache_clear()
    for bucket in range(3):
        for _ in range(2):
            assert skinny_gemm.fastest_method(torch.ones(OUT, SIZE), bucket, PACKS) in (
                "linear",
                "transposed",
                "packed",
            )
            assert skinny_gemm.fastest_method(torch.ones(OUT, SIZE), bucket, False) in ("linear", "transposed")
    assert skinny_gemm.measure.cache_info().misses == 3
    assert skinny_gemm.fastest_method(torch.ones(16, 16), 1, True) == "linear"
    assert skinny_gemm.measure.cache_info().misses == 3


def test_unpackable_weights() -> None:
    """Other dtypes, views, odd and small sizes, three dimensions."""
    ones = torch.ones
    for weight in (ones(OUT, SIZE).double(), ones(SIZE, OUT).t(), ones(OUT, SIZE + 1), ones(4, 4), ones(2, OUT, SIZE)):
        assert not skinny_gemm.can_pack(weight)
