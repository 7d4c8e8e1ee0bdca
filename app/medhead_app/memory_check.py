"""Check that a model fits the free memory before it is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from medhead.errors import MedheadError
from medhead.model.gguf import is_gguf, read_header

GIB = 2**30
OVERHEAD = 1.1  # memory needed per byte of weights; the rest is cache and activations


def check_memory(name: str | Path, device: torch.device, dtype: torch.dtype) -> None:
    """Raise an error if the weights of a model (a folder, hub id or GGUF file) are larger than the free memory of a device.

    Models that are not on this machine yet, and quantised models in safetensors, are not checked.
    """
    weights, free = count_weights(name), free_bytes(device)
    if weights is None or free is None:
        return
    needed = weights * torch.finfo(dtype).bits // 8 * OVERHEAD
    if needed > free:
        memory = "memory" if device.type == "cpu" else f"memory of {device}"
        smaller = "--dtype bfloat16, " if dtype == torch.float32 else ""
        raise MedheadError(
            f"the model {str(name)!r} needs about {needed / GIB:.1f} GiB as {str(dtype).removeprefix('torch.')}, but only "
            f"{free / GIB:.1f} GiB of {memory} are free; try {smaller}another --device or a smaller model"
        )


def count_weights(name: str | Path) -> int | None:
    """Return the number of weights in a model's GGUF file or safetensors files; None if they are absent or quantised."""
    if is_gguf(name):
        return read_header(Path(name)).weights
    folder = _local_folder(name)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    counts = [_count_file(file) for file in files]
    return sum(count for count in counts if count) if counts and None not in counts else None


def free_bytes(device: torch.device) -> int | None:
    """Return a device's free memory in bytes; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _local_folder(name: str | Path) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), local_files_only=True))
    except (OSError, ValueError):  # it is not on this machine, or not a hub id
        return None


def _count_file(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        if any(not entry["dtype"].startswith(("F", "BF")) for entry in tensors):
            return None
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, KeyError, AttributeError, MemoryError):
        return None  # loading the file reports the error
