"""Shard a frozen target over several processes (FSDP, Zhao et al. 2023), if it does not fit on one device.

Every process has all of the small heads, whose gradients are averaged as usual.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from medhead.errors import MedheadError
from medhead.model.layout import decoder_layers
from medhead.model.target import Target


def check_processes() -> None:
    """Raise a `MedheadError` if there is only one process."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        raise MedheadError(
            "--shard needs several processes: start it with `accelerate launch` or `torchrun`, or leave it out"
        )


def shard_layers(target: Target, whole: nn.Module, device: torch.device) -> tuple[int, int]:
    """Shard the layers of a frozen target on the CPU, and move the rest of `whole`, target and heads, to this device.

    Return the number of the layers' parameters in this process, and in all.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    layers = decoder_layers(target.model, target.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole.to(device)
    target.follow_model(device)
    shards = [p for p in layers.parameters() if isinstance(p, DTensor)]
    return sum(p.to_local().numel() for p in shards), sum(p.numel() for p in shards)


def exclude_frozen_from_ddp(whole: nn.Module) -> None:
    """Make `DistributedDataParallel` ignore what is not trained: shards differ between processes."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, p in whole.named_parameters() if not p.requires_grad]
    names += [name for name, _ in whole.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, names)
