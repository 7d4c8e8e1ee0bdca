"""Checkpoints of other projects: heads read from, and written in, the layouts that serving engines load.

| layout | projects | kind here |
|---|---|---|
| `medusa` | FasterDecoding/Medusa, TGI (with and without output matrices of its own) | `medusa` |
| `vllm-medusa` | vLLM | `medusa` |
| `mlp_speculator` | vLLM, TGI, IBM's accelerators | `sequential` |
| `eagle3` | EAGLE-3: vLLM, SGLang, TensorRT-LLM, speculators | `attention` |
| `dflash` | DFlash, JetSpec: vLLM, SGLang | `block` |

Each layout is one file with three functions: `matches` looks at names, `read` makes heads of tensors, `write` is its
inverse. Tensors are taken by name and shape; one that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medhead.errors import MedheadError
from medhead.heads.base import Heads
from medhead.heads.formats import dflash, eagle3, medusa, mlp_speculator, vllm_medusa
from medhead.heads.formats.export import Exported
from medhead.heads.formats.source import CONFIG_FILE, Source

if TYPE_CHECKING:
    from medhead.model.target import Target

__all__ = ["LAYOUTS", "Exported", "Layout", "export_heads", "import_heads", "is_foreign"]


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        matches: whether a checkpoint is in it.
        read: makes heads of a checkpoint.
        write: makes a checkpoint of heads.
    """

    matches: Callable[[Source], bool]
    read: Callable[[Source, Target], Heads]
    write: Callable[[Heads, Target], Exported]


LAYOUTS = {
    "vllm-medusa": Layout(vllm_medusa.matches, vllm_medusa.read, vllm_medusa.write),
    "medusa": Layout(medusa.matches, medusa.read, medusa.write),
    "mlp_speculator": Layout(mlp_speculator.matches, mlp_speculator.read, mlp_speculator.write),
    "dflash": Layout(dflash.matches, dflash.read, dflash.write),
    "eagle3": Layout(eagle3.matches, eagle3.read, eagle3.write),
}


def is_foreign(folder: str | Path) -> bool:
    """Whether a folder may hold heads in another project's layout: it has a configuration, but none of medhead's."""
    folder = Path(folder)
    return (folder / CONFIG_FILE).is_file() and not (folder / "medhead_config.json").exists()


def import_heads(folder: str | Path, target: Target) -> Heads:
    """Heads from a folder in another project's layout, in the types they are stored in.

    Raises:
        MedheadError: the layout is unknown, something of it is not supported, or it does not fit the target.
    """
    source = Source(Path(folder))
    for layout in LAYOUTS.values():
        if layout.matches(source):
            return layout.read(source, target)
    raise source.error(
        f"holds no medhead_config.json, and its config.json and tensor names are of none of the layouts {', '.join(LAYOUTS)}"
    )


def export_heads(heads: Heads, target: Target, layout: str) -> Exported:
    """Heads in another project's layout, exactly.

    Raises:
        MedheadError: the layout is unknown, or cannot express what these heads compute.
    """
    if layout not in LAYOUTS:
        raise MedheadError(f"no layout is called {layout!r}; known layouts: {', '.join(LAYOUTS)}")
    return LAYOUTS[layout].write(heads, target)
