"""Muon and AdamW in one optimiser, against torch's own and against the update in words."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import HEADS, noise_heads
from medhead.model.target import Target
from medhead_training.trainer.optim import MuonAdamW, is_matrix, muon_and_adamw, orthogonalise, set_learning_rate

SHAPES = [(8, 32), (32, 8), (16, 16), (40, 24)]


def quintic(values: Tensor) -> Tensor:
    return 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_changes_singular_values_alone(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = values / values.norm()
    for _ in range(5):
        expected = quintic(expected)
    found = orthogonalise(matrix)
    torch.testing.assert_close(found, left @ expected.diag() @ right, rtol=1e-3, atol=1e-3)
    inner = left.T @ found @ right.T  # in the matrix's own singular vectors: diagonal
    assert float((inner - inner.diag().diag()).abs().max()) < 1e-3
    if shape[0] != shape[1]:  # a square one has values near 0, which take more steps
        assert 0.6 < float(inner.diag().min()) < float(inner.diag().max()) < 1.3
    torch.testing.assert_close(orthogonalise(matrix * 1e3), found, rtol=1e-3, atol=1e-3)
    assert orthogonalise(matrix.bfloat16()).dtype == torch.bfloat16
    assert not orthogonalise(torch.zeros(shape)).any()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.second = nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 4, bias=False)
        self.embed = nn.Embedding(7, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(self.embed(ids)))))


IDS, GOAL = torch.arange(7), torch.eye(7)[:, :4]


def train(module: Small, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = (module(IDS) - GOAL).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_parameter_has_one_place() -> None:
    module = Small()
    module.first.bias.requires_grad_(False)
    optimizer = muon_and_adamw(module.named_parameters(), muon_lr=0.02, adamw_lr=0.003)
    names = {id(p): name for name, p in module.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [["first.weight", "second.weight"], ["norm.weight", "norm.bias", "embed.weight"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert len(muon_and_adamw(module.norm.named_parameters(), 0.1, 0.1).param_groups) == 1
    assert len(muon_and_adamw(module.second.named_parameters(), 0.1, 0.1).param_groups) == 1


@pytest.mark.parametrize("name", HEADS)
def test_matrices_of_heads(target: Target, name: str) -> None:
    """Muon gets the linear layers, and the biases of a cell, one row a depth; nothing with a row for every token or slot."""
    heads = noise_heads(target, name)
    found = {parameter for parameter, p in heads.named_parameters() if is_matrix(parameter, p)}
    linear = {f"{module}.weight" for module, m in heads.named_modules() if isinstance(m, nn.Linear)}
    assert linear
    assert linear <= found
    assert all(parameter.endswith("cell.depth_bias") for parameter in found - linear)


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_adamw_groups_are_torch_adamw() -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3, 4), (2, 3, 4)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
    mine = MuonAdamW([{"params": ours, "muon": False}], **options)
    other = torch.optim.AdamW(theirs, **options)
    for step in range(6):
        for p, q, gradient in zip(ours, theirs, gradients(shapes, step), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_muon_is_its_update_in_words() -> None:
    """Nesterov momentum, orthogonalised, as large as AdamW's updates; weight decay apart from it."""
    matrices = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    plain = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    momenta = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    optimizer = MuonAdamW([{"params": matrices, "muon": True, "momentum": 0.95, "weight_decay": 0.1}], lr=0.02)
    for step in range(5):
        for index, gradient in enumerate(gradients(SHAPES, step)):  # type: ignore[arg-type]
            matrices[index].grad = gradient.clone()
            wide = gradient.double()
            momenta[index] = 0.95 * momenta[index] + 0.05 * wide
            update = orthogonalise(0.05 * wide + 0.95 * momenta[index])
            size = 0.2 * max(wide.shape) ** 0.5
            plain[index] = plain[index] * (1 - 0.02 * 0.1) - 0.02 * size * update
        optimizer.step()
        for found, expected in zip(matrices, plain, strict=True):
            torch.testing.assert_close(found.detach().double(), expected, rtol=1e-4, atol=1e-5)
    assert all(matrix.grad is None for matrix in matrices)


def test_muon_is_about_torch_muon() -> None:
    """Theirs computes in bfloat16."""
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in SHAPES] for _ in range(2))
    mine = MuonAdamW([{"params": ours, "muon": True, "momentum": 0.95, "weight_decay": 0.01}], lr=0.02)
    other = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for p, q, gradient in zip(ours, theirs, gradients(SHAPES, step), strict=True):  # type: ignore[arg-type]
            p.grad, q.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert float((p.detach() - q.detach()).norm() / q.detach().norm()) < 0.03


def test_an_update_is_as_large_as_adamw_makes_it() -> None:
    matrix = nn.Parameter(torch.zeros(64, 256))
    optimizer = MuonAdamW([{"params": [matrix], "muon": True, "momentum": 0.95, "weight_decay": 0.0}], lr=1.0)
    matrix.grad = torch.randn(64, 256)
    optimizer.step()
    assert 0.15 < float(matrix.detach().square().mean().sqrt()) < 0.25


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """From a stored state, exactly, whether parameters had gradients or not."""
    module = Small()
    optimizer = muon_and_adamw(module.named_parameters(), 0.02, 0.003)
    train(module, optimizer, 4)
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = train(module, optimizer, 5)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Small()
    again.load_state_dict(saved["module"])
    other = muon_and_adamw(again.named_parameters(), 0.5, 0.5)  # what is stored decides
    other.load_state_dict(saved["optimizer"])
    assert train(again, other, 5) == expected
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))
    deepcopy(other).step()


def test_it_learns() -> None:
    module = Small()
    losses = train(module, muon_and_adamw(module.named_parameters(), 0.02, 0.01), 60)
    assert losses[-1] < 0.1 * losses[0]


def test_parameters_without_gradients_stay() -> None:
    module = Small()
    optimizer = muon_and_adamw(module.named_parameters(), 0.02, 0.003)
    before = [p.clone() for p in module.parameters()]
    optimizer.step()
    module.second.weight.grad = torch.ones_like(module.second.weight)
    module.norm.bias.grad = torch.ones_like(module.norm.bias)
    optimizer.step()
    moved = [name for (name, p), old in zip(module.named_parameters(), before, strict=True) if not torch.equal(p, old)]
    assert moved == ["norm.bias", "second.weight"]


def test_a_closure_gives_the_loss() -> None:
    module = Small()
    optimizer = muon_and_adamw(module.named_parameters(), 0.02, 0.003)
    seen = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = (module(IDS) - GOAL).square().mean()
        loss.backward()
        seen.append(loss.item())
        return loss.item()

    assert optimizer.step(closure) == seen[0]
    assert len(seen) == 1
    optimizer.step(closure)
    assert seen[1] < seen[0]


def test_schedules() -> None:
    """torch's schedulers, and a factor of the peak."""
    module = Small()
    optimizer = muon_and_adamw(module.named_parameters(), 0.02, 0.004)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([0.02 / (1 + step), 0.004 / (1 + step)])
            before = [p.detach().clone() for p in module.parameters()]
            train(module, optimizer, 1)
            assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
            schedule.step()
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.001]
    set_learning_rate(optimizer, 0.0)
    before = [p.detach().clone() for p in module.parameters()]
    train(module, optimizer, 1)
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
