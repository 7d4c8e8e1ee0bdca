"""A frozen target spread over several processes, for one that no single device can hold.

Every layer is cut into as many pieces as there are processes (fully sharded data parallel, Zhao et al. 2023) and put together
while it is read. The heads are small: every process has all of them, and their gradients are averaged as usual.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from medhead.errors import MedheadError
from medhead.model.layout import decoder_layers
from medhead.model.target import Target


def check_processes() -> None:
    """Refuse to spread a target over a single process.

    Raises:
        MedheadError: there is one process.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        raise MedheadError(
            "--shard needs several processes: start it with `accelerate launch` or `torchrun`, or leave it out"
        )


def spread_layers(target: Target, whole: nn.Module, device: torch.device) -> tuple[int, int]:
    """Cut the target's layers into pieces on every process's device, and move the rest there.

    Args:
        target: loaded on the CPU; all of it must be frozen.
        whole: what is trained, with the target in it.
        device: of this process.

    Returns:
        How many numbers of the layers are here, and how many there are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    layers = decoder_layers(target.model, target.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole.to(device)
    target.device = device
    pieces = [p for p in layers.parameters() if isinstance(p, DTensor)]
    return sum(p.to_local().numel() for p in pieces), sum(p.numel() for p in pieces)


def leave_to_shards(whole: nn.Module) -> None:
    """Have `DistributedDataParallel` care for what is trained alone: pieces differ from process to process."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, p in whole.named_parameters() if not p.requires_grad]
    names += [name for name, _ in whole.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, names)
