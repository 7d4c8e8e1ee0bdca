"""Losses that train draft heads, one value per position.

Each function takes draft logits `[n, V]`, teacher logits `[n, V]` and labels `[n]` and returns `[n]` nats. Below, p is the
teacher's distribution and q the draft's. The teacher gets no gradient, and only `hard` reads the labels. All compute in
float32 (float64 stays float64), whatever the dtype of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.errors import MedheadError

HYBRID_ETA = 3.0  # the best value of arXiv 2602.23881


def to_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _log_q(draft_logits: Tensor) -> Tensor:
    return F.log_softmax(to_float32(draft_logits), -1)


def _log_p(teacher_logits: Tensor) -> Tensor:
    log_p = F.log_softmax(to_float32(teacher_logits.detach()), -1)
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)  # never -inf, so that 0 log 0 is 0


def _log_acceptance(draft_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return log alpha `[n]`, where alpha = sum min(p, q) is the probability that speculative sampling accepts."""
    return torch.minimum(_log_p(teacher_logits), _log_q(draft_logits)).logsumexp(-1).clamp(max=0)


def hard(draft_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
    """Return the cross-entropy with the label, 0 for a label of -100 (Medusa, arXiv 2401.10774)."""
    return F.cross_entropy(to_float32(draft_logits), labels, reduction="none")


def soft(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the cross-entropy with the teacher, -sum p log q (Hinton et al., arXiv 1503.02531)."""
    return -(_log_p(teacher_logits).exp_() * _log_q(draft_logits)).sum(-1)


def kl(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return KL(p || q): `soft` minus the teacher's entropy, with the same gradient and a minimum of 0."""
    log_p = _log_p(teacher_logits)
    return (log_p.exp() * (log_p - _log_q(draft_logits))).sum(-1)


def reverse_kl(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return KL(q || p), which is mode-seeking (MiniLLM, arXiv 2306.08543) and infinite where p is 0 and q is not."""
    log_q = _log_q(draft_logits)
    return (log_q.exp() * (log_q - _log_p(teacher_logits))).sum(-1)


def js(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the Jensen-Shannon divergence, KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, at most log 2."""
    log_p, log_q = _log_p(teacher_logits), _log_q(draft_logits)
    log_2m = torch.logaddexp(log_p, log_q)
    twice = log_p.exp() * (log_p - log_2m) + log_q.exp() * (log_q - log_2m)
    return twice.sum(-1) / 2 + math.log(2)


def tv(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the total variation 1 - alpha, the rejection rate of speculative sampling (DistillSpec, arXiv 2310.08461)."""
    return -torch.expm1(_log_acceptance(draft_logits, teacher_logits))


def lk(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return -log alpha, whose gradient does not vanish while alpha is small (arXiv 2602.23881)."""
    return -_log_acceptance(draft_logits, teacher_logits)


def hybrid_lk(draft_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return w `kl` + (1 - w) `tv` with the constant w = exp(-3 alpha), so that KL leads while alpha is small (2602.23881)."""
    distance = tv(draft_logits, teacher_logits)
    weight = torch.exp(-HYBRID_ETA * (1 - distance.detach()))
    return weight * kl(draft_logits, teacher_logits) + (1 - weight) * distance


Loss = Callable[[Tensor, Any, Any], Tensor]  # draft logits [n, V], teacher logits [n, V], labels [n] -> [n]
LOSSES: dict[str, Loss] = {f.__name__: f for f in (hard, soft, kl, reverse_kl, js, tv, lk, hybrid_lk)}


def get_loss(name: str) -> Loss:
    """Return the loss of that name; raise a `MedheadError` that lists all names if there is none."""
    if name not in LOSSES:
        raise MedheadError(f"no loss is called {name!r}: choose one of {', '.join(LOSSES)}")
    return LOSSES[name]


def depth_weights(depth: int, decay: float) -> Tensor:
    """Return weights `[depth]` proportional to decay ** d that sum to 1 (Medusa, arXiv 2401.10774, uses 0.8)."""
    if depth < 1 or decay < 0:
        raise MedheadError(f"depth is {depth} and decay {decay}: at least 1 and at least 0 were expected")
    weights = torch.tensor([decay**d for d in range(depth)], dtype=torch.float64)
    return (weights / weights.sum()).float()
