"""A training step of heads on a frozen target of the shape of a real model: parts of the step, peak memory, top kernels."""

from __future__ import annotations

import torch
from measure import DEVICE, ON_GPU, TINY, attempt, kernels, milliseconds, say, target

from medhead.heads import build_heads
from medhead.heads.adapter import unwrap, wrap
from medhead_training.objective.builders import make_heads_config
from medhead_training.objective.module import HeadsModule
from medhead_training.objective.unroll import PackedBatch
from medhead_training.trainer.optim import muon_and_adamw
from medhead_training.trainer.options import TrainOptions

ROWS, LENGTH = (2, 32) if TINY else (8, 1024)


def measure(kind: str) -> None:
    """Print the times of one kind of heads."""
    options = TrainOptions(model="x", data=["x"], output="x", kind=kind, random_depth=False)
    trainable = {name: parameter.requires_grad for name, parameter in frozen.model.named_parameters()}
    wrapped, heads = wrap(frozen.model, build_heads(make_heads_config(options, frozen, 0)).to(DEVICE))
    module = HeadsModule(wrapped, frozen, heads, options).train()
    optimizer = muon_and_adamw(dict(heads.named_parameters()).items(), 1e-4, 1e-4)
    ids = torch.randint(frozen.vocab_size, (ROWS, LENGTH), device=DEVICE)
    batch = PackedBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))
    order = torch.arange(LENGTH, device=DEVICE).expand_as(ids)

    def target_only() -> None:
        with torch.no_grad():
            module.target_states(batch, order)

    def forward() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return module(batch.ids, batch.mask, batch.document, order, seed=1)["loss"]

    def both() -> None:
        forward().backward()

    def step() -> None:
        both()
        optimizer.step()

    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    for name, part in (("target", target_only), ("forward", forward), ("and backward", both), ("and optimizer", step)):
        attempt(name, lambda part=part: {"ms": milliseconds(part, 3, 1)}, kind=kind, tokens=ids.numel())
    if ON_GPU:
        say(kind=kind, peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1))
    kernels(both, f"train {kind}", 12)
    unwrap(frozen.model, wrapped, trainable)


frozen = target()
for kind in ("block", "recurrent"):
    measure(kind)
