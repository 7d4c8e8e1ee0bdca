"""What was measured on this computer and is worth keeping: small JSON files in the user's cache folder.

A file that cannot be read is measured again, and that is said; a folder that cannot be written costs a measurement each time.
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
    """Where it is kept: `$MEDHEAD_CACHE`, or `medhead` in the user's cache folder, or nowhere for a user without a home."""
    if given := os.environ.get("MEDHEAD_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medhead"
    except RuntimeError:  # no home
        return Path(os.devnull) / "medhead"


def fingerprint(target: Target, batch: int) -> str:
    """Everything that decides what a pass over `batch` rows costs."""
    computer = f"{platform.node()} {platform.machine()} {os.cpu_count()}"
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else computer
    config = json.dumps(target.config.to_dict(), sort_keys=True, default=str)
    parts = [
        config,
        str(target.dtype),
        str(target.device.type),
        device,
        target.backend.name + (", compiled" if target.compiles else ", packed" if target.packed_weights.on else ""),
        batch,
        torch.get_num_threads(),
    ]
    versions = [torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([*parts, *versions]).encode()).hexdigest()[:24]


def read(file: Path, parse: Callable[[Any], T], what: str) -> T | None:
    """What a file holds; None if it is not there, or damaged.

    Args:
        file: in the cache folder.
        parse: turns JSON into what is wanted; raises ValueError, TypeError or AttributeError if that cannot be.
        what: happens now that it is damaged, for people.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{file} cannot be read ({error}); {what}", stacklevel=3)
        return None
    try:
        return parse(json.loads(text))
    except (ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"{file} is damaged ({error}); {what}", stacklevel=3)
        return None


def write(file: Path, content: Any) -> bool:
    """Keep something; returns whether that worked."""
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
