"""The user's cache folder: measurements of this machine as small JSON files, and models that were converted.

A file that cannot be read gives a warning and the measurement is repeated; without a writable folder no measurement is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers

from medhead.model.block_weights import BlockLinear

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
        _storage(target.model),
        target.device.type,
        torch.cuda.get_device_name(target.device)
        if on_cuda
        else f"{platform.node()} {platform.machine()} {os.cpu_count()}",
        target.backend.name
        + kind
        + (f", {target.bitwise.exact}, {target.bitwise.by_blocks}" if target.bitwise is not None else ""),
        target.kept_passes,
        batch,
        torch.get_num_threads(),
        torch.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _storage(model: torch.nn.Module) -> list[str]:
    """Return the names of the types of modules and weights, and how blocks are stored, which tell quantised models apart."""
    kinds = {part.kind for part in model.modules() if isinstance(part, BlockLinear)}
    return sorted(kinds | {type(part).__name__ for part in (*model.modules(), *model.parameters())})


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


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Create a folder atomically: `build` fills an empty one beside it, which is then renamed.

    `build` may use the parent of the folder that it is given for temporary files. Of several processes that build the same
    folder at once, the first to finish keeps its own. Errors of the file system are not caught.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        work = Path(scratch) / folder.name
        work.mkdir()
        build(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
