"""Measurements of this machine, kept as small JSON files in the user's cache folder.

A file that cannot be read gives a warning and the measurement is repeated; without a writable folder nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers

if TYPE_CHECKING:
    from medhead.model.target import Target

T = TypeVar("T")


def cache_folder() -> Path:
    """Return `$MEDHEAD_CACHE`, or `medhead` in the user's cache folder, or an unwritable path without a home folder."""
    if given := os.environ.get("MEDHEAD_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medhead"
    except RuntimeError:  # no home folder
        return Path(os.devnull) / "medhead"


def fingerprint(target: Target, batch: int) -> str:
    """Return a hash of everything that determines the cost of a pass over `batch` rows."""
    on_cuda = target.device.type == "cuda"
    kind = ", compiled" if target.compiles else ", packed" if target.packed_weights.enabled else ""
    parts = [
        json.dumps(target.config.to_dict(), sort_keys=True, default=str),
        str(target.dtype),
        target.device.type,
        torch.cuda.get_device_name(target.device)
        if on_cuda
        else f"{platform.node()} {platform.machine()} {os.cpu_count()}",
        target.backend.name + kind,
        batch,
        torch.get_num_threads(),
        torch.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def read(file: Path, parse: Callable[[Any], T], consequence: str) -> T | None:
    """Return the parsed content of a file, or None when it is missing or damaged.

    Args:
        file: a file in the cache folder.
        parse: converts JSON; raises ValueError, TypeError or AttributeError for unexpected content.
        consequence: what happens without the file, for the warning.
    """
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"{file} cannot be read or is damaged ({error}); {consequence}", stacklevel=3)
        return None


def write(file: Path, content: Any) -> bool:
    """Write JSON to a file atomically; return whether that succeeded."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
