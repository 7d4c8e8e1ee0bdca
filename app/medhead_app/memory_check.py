"""Whether a model fits the memory, asked before it is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from medhead.errors import MedheadError

GIB = 2**30
ROOM = 1.1  # weights alone do not decode: cache, activations


def check_fits(name: str | Path, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model whose weights are larger than the free memory.

    Says nothing about a model whose files are not on this machine yet, or whose weights are quantised.

    Args:
        name: folder of the model, or its id on the hub.
        device: where it goes.
        dtype: its type there.

    Raises:
        MedheadError: how much is needed, and how much is free.
    """
    weights, free = weights_in(name), free_bytes(device)
    if weights is None or free is None:
        return
    needed = weights * torch.finfo(dtype).bits // 8 * ROOM
    if needed > free:
        place = "memory" if device.type == "cpu" else f"memory of {device}"
        smaller = "--dtype bfloat16, " if dtype == torch.float32 else ""
        raise MedheadError(
            f"the model {str(name)!r} needs about {needed / GIB:.1f} GiB as {str(dtype).removeprefix('torch.')}, but only "
            f"{free / GIB:.1f} GiB of {place} are free; {smaller}another --device or a smaller model may do"
        )


def weights_in(name: str | Path) -> int | None:
    """Numbers in the safetensors files of a model; None if they are not here, or not plain numbers."""
    folder = _folder(name)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    counts = [_count(file) for file in files]
    return sum(count for count in counts if count) if counts and None not in counts else None


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None if that cannot be found out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _folder(name: str | Path) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(str(name), "config.json")
    except ValueError:  # no id of the hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def _count(file: Path) -> int | None:
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        if any(not entry["dtype"].startswith(("F", "BF")) for entry in tensors):
            return None
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, KeyError, AttributeError, MemoryError):
        return None  # loading it will say what is wrong
