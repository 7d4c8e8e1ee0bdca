"""Losses against their definitions, sums over chunks against the whole computation, in value, gradient and memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medhead.bench.memory import PeakMemory
from medhead.errors import MedheadError
from medhead_training.objective import losses
from medhead_training.objective.chunked import (
    chunk_bytes,
    chunked_loss,
    mean_output,
    positions_per_chunk,
    soft_by_mean,
)
from medhead_training.objective.losses import LOSSES

CHUNKS = [1, 3, 7, 100, None]  # of 7 positions


def definition(name: str, p: list[float], q: list[float], label: int) -> float:
    """The loss of one position, as in a book."""
    if name == "hard":
        return -math.log(q[label])
    if name == "soft":
        return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    if name == "kl":
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if name == "reverse_kl":
        return definition("kl", q, p, label)
    if name == "js":
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (definition("kl", p, middle, label) + definition("kl", q, middle, label)) / 2
    alpha = sum(min(a, b) for a, b in zip(p, q, strict=True))
    if name == "tv":
        return 1 - alpha
    if name == "lk":
        return -math.log(alpha)
    share = math.exp(-3 * alpha)
    return share * definition("kl", p, q, label) + (1 - share) * (1 - alpha)


def softmax(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


def case(seed: int = 0, n: int = 7, vocab: int = 11, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What `chunked_loss` takes; the teacher's hidden size is not the features'."""
    torch.manual_seed(seed)
    given = {
        "features": torch.randn(n, 5), "weight": torch.randn(vocab, 5), "bias": torch.randn(vocab),
        "teacher_hidden": torch.randn(n, 6), "teacher_weight": torch.randn(vocab, 6),
        "teacher_bias": torch.randn(vocab), "weights": torch.rand(n),
    }  # fmt: skip
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    given["features"].requires_grad_()
    return {**given, "labels": torch.randint(0, vocab, (n,))}


def whole(name: str, c: dict[str, Any]) -> Tensor:
    """`chunked_loss` in three lines."""
    logits = c["features"] @ c["weight"].T + c["bias"]
    teacher = c["teacher_hidden"] @ c["teacher_weight"].T + c["teacher_bias"]
    return (c["weights"] * LOSSES[name](logits, teacher, c["labels"])).sum()


def slope(loss: Tensor, c: dict[str, Any]) -> Tensor:
    return torch.autograd.grad(2.5 * loss, c["features"], retain_graph=True)[0]  # backward must scale


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


# --- one position ---


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_loss_is_its_definition(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    draft, teacher = torch.randn(6, 9).mul(2).to(dtype), torch.randn(6, 9).mul(2).to(dtype)
    labels = torch.randint(0, 9, (6,))
    found = LOSSES[name](draft, teacher, labels)
    expected = [
        definition(name, softmax(t), softmax(d), label)
        for d, t, label in zip(draft.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    ]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "hybrid_lk"])
def test_gradients_of_the_losses(name: str) -> None:
    """Against finite differences, and none for the teacher."""
    torch.manual_seed(2)
    draft = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (4,))
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher.detach(), labels), draft)
    LOSSES[name](draft, teacher, labels).sum().backward()
    assert teacher.grad is None


def test_the_blend_of_hybrid_lk_has_no_gradient() -> None:
    torch.manual_seed(3)
    draft, teacher = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, 7, dtype=torch.float64)
    share = torch.exp(-3 * (1 - losses.tv(draft, teacher))).detach()
    expected = share * losses.kl(draft, teacher) + (1 - share) * losses.tv(draft, teacher)
    found = losses.hybrid_lk(draft, teacher)
    for a, b in zip(*(torch.autograd.grad(x.sum(), draft)[0] for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0, 30))
def test_identities(seed: int, vocab: int, spread: float) -> None:
    torch.manual_seed(seed)
    draft, teacher = torch.randn(5, vocab).double() * spread, torch.randn(5, vocab).double() * spread
    labels = torch.randint(0, vocab, (5,))
    value = {name: f(draft, teacher, labels) for name, f in LOSSES.items()}
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    torch.testing.assert_close(value["kl"], value["soft"] - entropy, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(value["tv"], 1 - torch.exp(-value["lk"]))
    torch.testing.assert_close(value["js"], losses.js(teacher, draft))
    torch.testing.assert_close(value["reverse_kl"], losses.kl(teacher, draft))
    for name in ("soft", "kl", "reverse_kl", "js", "tv", "lk", "hybrid_lk"):
        assert torch.isfinite(value[name]).all()
        assert (value[name] >= -1e-12).all()
        if name != "soft":
            assert LOSSES[name](draft, draft, labels).abs().max() < 1e-12  # zero exactly where the two agree
    assert (value["tv"] <= 1).all()
    assert (value["js"] <= math.log(2) + 1e-12).all()
    assert (value["tv"] <= (value["kl"] / 2).clamp(min=0).sqrt() + 1e-7).all()  # Pinsker; KL has an error of 1e-16


@pytest.mark.parametrize("excluded", [-1e4, -math.inf])
def test_a_teacher_that_is_sure(excluded: float) -> None:
    """For a point mass `lk`, `soft` and `kl` are the cross-entropy with the label; -inf makes nothing NaN."""
    torch.manual_seed(4)
    draft, labels = torch.randn(5, 8, requires_grad=True), torch.randint(0, 8, (5,))
    teacher = torch.full((5, 8), excluded).scatter(1, labels[:, None], 0.0)
    expected = losses.hard(draft, None, labels)
    (expected_slope,) = torch.autograd.grad(expected.sum(), draft)
    for name in ("lk", "soft", "kl"):
        found = LOSSES[name](draft, teacher, labels)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), draft)[0], expected_slope)
    for name in ("js", "tv", "hybrid_lk"):
        found = LOSSES[name](draft, teacher, labels)
        assert torch.isfinite(found).all()
        assert torch.isfinite(torch.autograd.grad(found.sum(), draft)[0]).all()


def test_no_overlap_still_has_a_gradient() -> None:
    """Where `tv` is flat, `lk` pulls with full strength (arXiv 2602.23881)."""
    draft = torch.tensor([[200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 200.0]])
    assert torch.autograd.grad(losses.tv(draft, teacher).sum(), draft)[0].abs().max() < 1e-6
    assert losses.lk(draft, teacher).item() == pytest.approx(200 - math.log(2))
    assert torch.autograd.grad(losses.lk(draft, teacher).sum(), draft)[0].abs().min() > 0.4


# --- sums over chunks ---


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_give_the_value_and_the_gradient_of_the_whole(name: str, chunk: int | None) -> None:
    c = case()
    expected = whole(name, c)
    found = chunked_loss(name, **c, chunk=chunk)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope(found, c), slope(expected, c))


@pytest.mark.parametrize("name", LOSSES)
def test_plain_arguments_in_float32(name: str) -> None:
    """Without bias and weights; labels only where they are needed, and a teacher only where it is."""
    c = case(5, n=9, vocab=30, dtype=torch.float32)
    zero, one = torch.zeros(30), torch.ones(9)
    expected = whole(name, {**c, "bias": zero, "teacher_bias": zero, "weights": one})
    needed = ("labels",) if name == "hard" else ("teacher_hidden", "teacher_weight")
    found = chunked_loss(name, c["features"], c["weight"], **{key: c[key] for key in needed}, chunk=4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope(found, c), slope(expected, c))


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_soft_by_mean_is_soft(seed: int, n: int, vocab: int, chunk: int, with_bias: bool) -> None:
    torch.manual_seed(seed)
    features, hidden, weight = (torch.randn(rows, 5, dtype=torch.float64) for rows in (n, n, vocab))
    bias = torch.randn(vocab, dtype=torch.float64) if with_bias else None
    zero = torch.zeros(vocab, dtype=torch.float64)
    weights = torch.rand(n, dtype=torch.float64)
    c = {
        "features": features.requires_grad_(), "weight": weight, "bias": zero if bias is None else bias,
        "teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": zero if bias is None else bias,
        "weights": weights, "labels": None,
    }  # fmt: skip
    expected = whole("soft", c)
    mean = mean_output(hidden, weight, bias, chunk)
    p = torch.softmax(hidden @ weight.T + c["bias"], -1)
    torch.testing.assert_close(mean, p @ weight)
    bias_mean = None if bias is None else p @ bias
    found = soft_by_mean(features, mean, weight, bias=bias, bias_mean=bias_mean, weights=weights, chunk=chunk)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope(found, c), slope(expected, c))
    if bias_mean is not None:  # left out, the gradient stays and the value is off by what the features do not change
        shifted = soft_by_mean(features, mean, weight, bias=bias, weights=weights, chunk=chunk)
        torch.testing.assert_close(shifted, expected + (weights * bias_mean).sum())
        torch.testing.assert_close(slope(shifted, c), slope(expected, c))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_soft_by_mean_in_float32(chunk: int | None) -> None:
    c = case(6, dtype=torch.float32)
    mean = mean_output(c["features"].detach() + 1, c["weight"], chunk=chunk)
    logits = c["features"] @ c["weight"].T
    expected = (logits.logsumexp(-1) - (c["features"] * mean).sum(-1)).sum()
    found = soft_by_mean(c["features"], mean, c["weight"], chunk=chunk)
    assert mean.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope(found, c), slope(expected, c))


def test_large_logits_do_not_overflow() -> None:
    weight = torch.eye(4) * 300
    features = torch.eye(4).requires_grad_()
    mean = mean_output(features, weight)
    torch.testing.assert_close(mean, weight)
    assert soft_by_mean(features, mean, weight).item() == pytest.approx(0)
    for name in LOSSES:
        found = chunked_loss(
            name, features, weight, teacher_hidden=features.detach(), teacher_weight=weight, labels=torch.arange(4)
        )
        assert found.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", [*LOSSES, "soft_by_mean"])
def test_sixteen_bit_and_autocast(name: str) -> None:
    """Autocast is the same as a matrix in its type; both are near float32, and the gradient has the features' type."""
    c = case(7, n=12, vocab=40, dtype=torch.float32)

    def run(c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if name == "soft_by_mean":
            mean = mean_output(c["features"].detach() - 1, c["weight"], c["bias"], 5)
            assert mean.dtype == c["features"].dtype
            loss = soft_by_mean(c["features"], mean, c["weight"], bias=c["bias"], weights=c["weights"], chunk=5)
        else:
            loss = chunked_loss(name, **c, chunk=5)
        assert loss.dtype == torch.float32
        return loss.detach(), torch.autograd.grad(loss, c["features"])[0]

    exact = run(c)
    low = {k: v.bfloat16() if k in ("weight", "bias", "teacher_weight", "teacher_bias") else v for k, v in c.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = run(c)
    for found, same, expected in zip(automatic, run(low), exact, strict=True):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    all_low = {k: v if k == "labels" else v.detach().bfloat16() for k, v in c.items()}
    all_low["features"].requires_grad_()
    value, gradient = run(all_low)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, exact[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(gradient.float(), exact[1], rtol=0.05, atol=0.05)


def test_no_positions() -> None:
    c = case(n=0)
    for name in LOSSES:
        loss = chunked_loss(name, **c)
        assert loss.item() == 0
        assert slope(loss, c).shape == (0, 5)
    loss = soft_by_mean(c["features"], mean_output(c["features"], c["weight"]), c["weight"])
    assert loss.item() == 0
    assert slope(loss, c).shape == (0, 5)


def test_a_label_outside_the_draft_vocabulary_counts_nothing() -> None:
    c = case()
    c["labels"][2] = -100
    kept = torch.arange(7) != 2
    left = {k: v[kept] if k in ("features", "weights", "labels", "teacher_hidden") else v for k, v in c.items()}
    found = chunked_loss("hard", **c, chunk=2)
    torch.testing.assert_close(found, chunked_loss("hard", **left))
    gradient = slope(found, c)
    assert gradient[2].abs().max() == 0
    assert gradient[kept].abs().min(1).values.min() > 0


# --- what it costs ---


@pytest.mark.parametrize("name", [*LOSSES, "soft_by_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk(name: str, dtype: torch.dtype) -> None:
    """Of loss and backward: at most twelve arrays of a chunk's logits, and the whole has 64 times as many."""
    n, vocab, chunk = 512, 1024, 8
    torch.manual_seed(0)
    features, hidden = torch.randn(n, 16).requires_grad_(), torch.randn(n, 16)
    weight, labels = torch.randn(vocab, 16).to(dtype), torch.randint(0, vocab, (n,))
    logits_of_a_chunk, of_the_rest = 4 * chunk * vocab, 4 * 4 * n * 16
    with PeakMemory() as memory:
        if name == "soft_by_mean":
            loss = soft_by_mean(features, mean_output(hidden, weight, chunk=chunk), weight, chunk=chunk)
        else:
            teacher = {} if name == "hard" else {"teacher_hidden": hidden, "teacher_weight": weight}
            loss = chunked_loss(name, features, weight, **teacher, labels=labels, chunk=chunk)
        loss.backward()
    most = 2 if name == "soft_by_mean" else 12
    assert logits_of_a_chunk / 2 <= memory.peak <= most * logits_of_a_chunk + of_the_rest
    assert memory.peak < 4 * n * vocab / 4
    with PeakMemory() as memory:
        LOSSES["soft"](features @ weight.float().T, hidden @ weight.float().T).sum().backward()
    assert memory.peak > 4 * 4 * n * vocab  # what the check above would have seen


def test_what_autograd_keeps_is_one_gradient() -> None:
    c, kept = case(n=64, vocab=50), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        soft_by_mean(c["features"], c["features"].detach(), c["weight"], chunk=8)
    assert kept == [(64, 5)]


def test_the_default_chunk_fits_the_budget() -> None:
    assert positions_per_chunk(128_000) == 131
    assert 4 * 128_000 * positions_per_chunk(128_000) <= 64 * 2**20
    assert positions_per_chunk(10**9) == 1
    assert positions_per_chunk(100, budget=4000) == 10
    cuda = torch.device("cuda")
    assert [chunk_bytes(device, arrays) for device in (cuda, torch.device("cpu")) for arrays in (1, 7)] == [
        2**30, 2**28, 2**26, 2**26,
    ]  # fmt: skip


def test_two_products_for_a_chunk_and_one_without_gradient() -> None:
    c = case()
    mean = mean_output(c["features"], c["weight"])
    with Products() as products:
        soft_by_mean(c["features"], mean, c["weight"], bias=c["bias"], chunk=3).backward()
    assert products.count == 3 * 2
    with Products() as products:
        assert not soft_by_mean(c["features"].detach(), mean, c["weight"], chunk=3).requires_grad
    assert products.count == 3
    with torch.no_grad(), Products() as products:
        value = chunked_loss("kl", **c, chunk=3)
    assert products.count == 3 * 2  # draft and teacher
    assert not value.requires_grad
    torch.testing.assert_close(value, whole("kl", c).detach())


def test_backward_twice_and_a_longer_graph() -> None:
    """The gradient is scaled, not changed, by backward; it goes on to what made the features."""
    c, source = case(), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    c["features"] = source.tanh()
    loss = chunked_loss("kl", **c, chunk=2)
    first, second = (torch.autograd.grad(loss, source, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(whole("kl", {**c, "features": source.tanh()}), source)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu(name: str) -> None:
    c = {k: v.detach().cuda() for k, v in case(8, n=64, vocab=300, dtype=torch.float32).items()}
    c["features"].requires_grad_()
    found, expected = chunked_loss(name, **c, chunk=10), whole(name, c)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(slope(found, c), slope(expected, c), rtol=1e-2, atol=1e-2)


# --- what a depth counts ---


def test_depth_weights() -> None:
    assert depth_list(3, 0.5) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert depth_list(4, 1.0) == pytest.approx([0.25] * 4)
    assert depth_list(3, 0.0) == [1, 0, 0]
    with pytest.raises(MedheadError, match="depth is 0"):
        losses.depth_weights(0, 0.9)


def depth_list(depth: int, decay: float) -> list[float]:
    weights = losses.depth_weights(depth, decay)
    assert weights.shape == (depth,)
    return weights.tolist()


# --- wrong input ---


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(MedheadError) as error:
        chunked_loss("cross_entropy", torch.zeros(1, 2), torch.zeros(3, 2))
    assert str(error.value) == (
        "no loss is called 'cross_entropy': choose one of hard, soft, kl, reverse_kl, js, tv, lk, hybrid_lk"
    )
    assert losses.get_loss("lk") is losses.lk


def test_other_wrong_input() -> None:
    c = case()
    with pytest.raises(MedheadError, match=r"'hard' needs labels"):
        chunked_loss("hard", c["features"], c["weight"])
    with pytest.raises(MedheadError, match=r"'kl' needs teacher_hidden and teacher_weight"):
        chunked_loss("kl", c["features"], c["weight"], labels=c["labels"])
    with pytest.raises(MedheadError, match="teacher_weight has 10 rows where 11 were expected"):
        chunked_loss("kl", **{**c, "teacher_weight": c["teacher_weight"][1:]})
    with pytest.raises(MedheadError, match="weights has 6 rows where 7 were expected"):
        chunked_loss("kl", **{**c, "weights": c["weights"][1:]})
    with pytest.raises(MedheadError, match="mean has 6 rows"):
        soft_by_mean(c["features"], c["features"][1:], c["weight"])
    for call in (
        lambda: chunked_loss("kl", **c, chunk=0),
        lambda: soft_by_mean(c["features"], c["features"].detach(), c["weight"], chunk=0),
        lambda: mean_output(c["features"], c["weight"], chunk=0),
    ):
        with pytest.raises(MedheadError, match="chunk is 0"):
            call()


@pytest.mark.parametrize("name", ["weight", "bias", "weights", "teacher_hidden", "teacher_weight", "teacher_bias"])
def test_a_constant_that_wants_a_gradient_is_refused(name: str) -> None:
    c = case()
    c[name].requires_grad_()
    with pytest.raises(MedheadError, match=rf"^{name} requires a gradient.*pass {name}\.detach\(\)$"):
        chunked_loss("kl", **c)
    with torch.no_grad():
        chunked_loss("kl", **c)  # nothing can be missing
    if name in ("weight", "bias", "weights"):
        with pytest.raises(MedheadError, match=rf"^{name} requires a gradient"):
            soft_by_mean(c["features"], c["features"].detach(), c["weight"], bias=c["bias"], weights=c["weights"])
