"""Products of few rows with a matrix: as usual, transposed, and with packed copies."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from medhead_kernels import skinny_gemm as skinny_gemm
from medhead_kernels.skinny_gemm import PackedLinear

OUT, SIZE = 256, 128
PACKS = skinny_gemm.can_pack(torch.ones(OUT, SIZE))
needs_packing = pytest.mark.skipif(not PACKS, reason="this PyTorch or CPU has no oneDNN")


@pytest.mark.parametrize("helps", [True, False])
def test_linear_is_linear(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    """Any number of rows, leading dimensions, types, views and a bias; always contiguous, gradients included."""
    shapes = []
    way, transposed = "transposed" if helps else "usual", skinny_gemm.transposed
    monkeypatch.setattr(skinny_gemm, "fastest", lambda *args: way)
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
    """Every copy that is made, by its shape."""
    made: list[tuple[int, ...]] = []
    pack = skinny_gemm._pack
    monkeypatch.setattr(skinny_gemm, "fastest", lambda *args: "packed" if args[-1] else "usual")
    monkeypatch.setattr(skinny_gemm, "_pack", lambda weight: made.append(tuple(weight.shape)) or pack(weight))
    return made


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool) -> None:
    """The usual numbers, for any rows and views; one copy for all of them, none beyond the most rows."""
    weight = torch.randn(OUT, SIZE, dtype=dtype)
    if not skinny_gemm.can_pack(weight):
        pytest.skip(f"this CPU packs no {dtype}")
    made = _always_packed(monkeypatch)
    offset = torch.randn(OUT, dtype=dtype) if bias else None
    matrix = PackedLinear(weight, offset)
    with torch.no_grad():
        for shape in ((1, SIZE), (2, 3, SIZE), (64, SIZE), (0, SIZE), (skinny_gemm.MOST_ROWS + 1, SIZE)):
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
    """At once where PyTorch counts the change, after `recheck` where it does not; unchanged ones are not packed again."""
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
        weight.neg_()  # counted: nobody has to look at the weights
        torch.testing.assert_close(matrix(x), F.linear(x, weight))
        assert len(made) == 3
        weight.data[OUT - 1, 7] += 1e-3  # not counted
        matrix.recheck()
        torch.testing.assert_close(matrix(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
        assert len(made) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [512, 516])
def test_structured_changes_have_another_stamp(dtype: torch.dtype, columns: int) -> None:
    """Signs, powers of two and the order of columns, all rows alike; and every single bit of a row."""
    weight = torch.randn(4, columns, dtype=dtype)
    stamp = skinny_gemm._stamp(weight)
    assert torch.equal(skinny_gemm._stamp(weight.clone()), stamp)
    order = torch.arange(columns).roll(4)
    for changed in (-weight, 2 * weight, 0.25 * weight, weight[:, order], weight.flip(1), weight.flip(0)):
        assert bool((skinny_gemm._stamp(changed.contiguous()) != stamp).all())
    bits = weight[:1].view(torch.int64).repeat(64, 1)
    bits[:, 5] ^= torch.tensor([1 << bit if bit < 63 else -(1 << 63) for bit in range(64)])
    flipped = skinny_gemm._stamp(bits.view(dtype))
    assert stamp[0] not in flipped
    assert len(set(flipped.tolist())) == 64


@needs_packing
def test_gradients_and_recording_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed product has no gradient, and its copy must not become part of a recorded step."""
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
def test_a_copy_of_its_holder_has_no_matrix() -> None:
    """A module that is copied must not go on multiplying with the weights of the first one."""
    layer = torch.nn.Linear(SIZE, OUT)
    layer.matrix = PackedLinear(layer.weight.detach())  # type: ignore[assignment]
    assert copy.deepcopy(layer).matrix is None


@needs_packing
def test_matrices_that_follow_each_other_are_packed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what all of them take: one that is slower packed alone does not make two libraries take turns."""
    large, small = (skinny_gemm.PackedLinear(torch.randn(rows, SIZE)) for rows in (OUT, 2 * OUT))
    assert large.packs
    assert small.packs
    seconds = {
        OUT: {"usual": 9.0, "transposed": 8.0, "packed": 4.0},
        2 * OUT: {"usual": 1.0, "transposed": 2.0, "packed": 2.0},
    }

    def measured(out: int, size: int, dtype: torch.dtype, class_: int, threads: int) -> dict[str, float]:
        return {way: took * (2 if way == "packed" and class_ == 1 else 1) for way, took in seconds[out].items()}

    monkeypatch.setattr(skinny_gemm, "_measured", measured)
    assert not small._packs(2)
    for matrix in (large, small):
        matrix.recheck()
    together = skinny_gemm.PackGroup([large, small])
    assert [together.packs(class_) for class_ in (0, 1, 2)] == [True, False, True]
    with torch.inference_mode():
        for matrix in (large, small):
            x = torch.randn(24, SIZE)
            torch.testing.assert_close(matrix(x), F.linear(x, matrix.weight))
    assert large.nbytes > 0
    assert small.nbytes > 0
    assert not skinny_gemm.PackGroup([]).packs(2)


def test_measured_seconds_are_those_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many copies, or how small a part of it, stand for it: with a second for every row, as many seconds as rows."""
    monkeypatch.setattr(skinny_gemm, "_seconds", lambda product, weights, x: sum(len(weight) for weight in weights))
    monkeypatch.setattr(skinny_gemm, "_packs", lambda dtype: False)
    for out, size in ((128, 256), (OUT, SIZE), (4096, 1024), (3000, 2048)):
        assert skinny_gemm._measured.__wrapped__(out, size, torch.float32, 2, 1)["usual"] == pytest.approx(out)


def test_which_is_fastest_is_measured_once() -> None:
    """For every size, type, class of rows and number of threads; small matrices are not worth it."""
    skinny_gemm._measured.cache_clear()
    for rows_class in range(3):
        for _ in range(2):
            assert skinny_gemm.fastest(torch.ones(OUT, SIZE), rows_class, PACKS) in ("usual", "transposed", "packed")
            assert skinny_gemm.fastest(torch.ones(OUT, SIZE), rows_class, False) in ("usual", "transposed")
    assert skinny_gemm._measured.cache_info().misses == 3
    assert skinny_gemm.fastest(torch.ones(16, 16), 1, True) == "usual"
    assert skinny_gemm._measured.cache_info().misses == 3


def test_what_cannot_be_packed() -> None:
    """Other types, views, odd sizes, small ones, more dimensions."""
    ones = torch.ones
    for weight in (ones(OUT, SIZE).double(), ones(SIZE, OUT).t(), ones(OUT, SIZE + 1), ones(4, 4), ones(2, OUT, SIZE)):
        assert not skinny_gemm.can_pack(weight)
