"""Muon for matrices and AdamW for embeddings, norms and biases in one optimiser.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix by a few Newton-Schulz steps. `torch.optim.Muon` computes
them in bfloat16, which is 10 times slower than float32 on a CPU without bfloat16 instructions; here they are in float32 there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan's quintic: steep at 0, near 1 for singular values in (0, 1]


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return a matrix with about the same singular vectors as `matrix` `[rows, columns]` and singular values near 1."""
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=_B, alpha=_C), wide, beta=_A)
    return (wide if x.shape[0] <= x.shape[1] else wide.T).to(matrix.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon=True` hold matrices and are updated by Muon instead."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all groups once."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"] if group.get("muon") else []:
                if parameter.grad is not None:
                    self._update_matrix(parameter, group)
                    parameter.grad = None  # so that AdamW skips it
        super().step()
        return loss

    def _update_matrix(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one in every state
            state["momentum"] = torch.zeros_like(parameter)
        momentum, beta = state["momentum"], group["momentum"]
        momentum.lerp_(parameter.grad, 1 - beta)
        update = orthogonalise(parameter.grad.lerp(momentum, beta))  # Nesterov
        scale = 0.2 * max(parameter.shape) ** 0.5  # as large as AdamW's updates are
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon updates a parameter: it is two-dimensional, and no embedding or output matrix."""
    return parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "output_matrices"))


def muon_and_adamw(
    named: Iterable[tuple[str, nn.Parameter]], muon_lr: float, adamw_lr: float, weight_decay: float = 0.01
) -> MuonAdamW:
    """Return one optimiser for named parameters: Muon for the matrices, AdamW for the rest."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    matrices = [p for name, p in trained if is_matrix(name, p)]
    others = [p for name, p in trained if not is_matrix(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": muon_lr, "weight_decay": weight_decay, "muon": True, "momentum": 0.95},
        {"params": others, "lr": adamw_lr, "weight_decay": 0.0, "muon": False},
    ]
    optimizer = MuonAdamW([group for group in groups if group["params"]], lr=adamw_lr, betas=(0.9, 0.98))
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
