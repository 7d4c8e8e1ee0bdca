"""Muon for the matrices, AdamW for embeddings, norms and biases, behind one small pair."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def muon_and_adamw(
    named: Iterable[tuple[str, nn.Parameter]], muon_lr: float, adamw_lr: float
) -> list[torch.optim.Optimizer]:
    """Two optimisers: Muon for the 2-D weights that are not embeddings, AdamW for the rest."""
    named = [(name, p) for name, p in named if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    others = [p for name, p in named if not any(p is m for m in matrices)]
    pair: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ]
    if others:
        pair.append(torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0))
    for optimizer in pair:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return pair


def set_learning_rate(pair: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's peak learning rate."""
    for optimizer in pair:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
