"""Checkpoints of other projects: heads read from, and written in, the formats that serving engines load.

| format | projects | kind here |
|---|---|---|
| `medusa` | FasterDecoding/Medusa, TGI (with and without output matrices of its own) | `medusa` |
| `vllm-medusa` | vLLM | `medusa` |
| `mlp_speculator` | TGI, IBM's accelerators, vLLM before it removed them | `sequential` |
| `eagle3` | EAGLE-3: vLLM, SGLang, TensorRT-LLM | `attention` |
| `speculators` | EAGLE-3 under the configuration of speculators: vLLM | `attention` |
| `dflash` | DFlash, JetSpec: vLLM, SGLang | `block` |

Each format is a `CheckpointFormat`. Tensors are taken by name and shape; one that is missing, left over or
of another shape is an error.
"""

from __future__ import annotations

from pathlib import Path

from medhead.errors import MedheadError
from medhead.heads import config
from medhead.heads.base import Heads
from medhead.heads.formats.base import CheckpointFormat, ExportedCheckpoint
from medhead.heads.formats.dflash import DFlash
from medhead.heads.formats.eagle3 import Eagle3, Speculators
from medhead.heads.formats.medusa import Medusa, VllmMedusa
from medhead.heads.formats.mlp_speculator import MlpSpeculator
from medhead.heads.formats.reader import CONFIG_FILE, CheckpointReader
from medhead.model.target import Target

__all__ = [
    "FORMATS",
    "CheckpointFormat",
    "ExportedCheckpoint",
    "export_heads",
    "formats_table",
    "import_heads",
    "is_third_party",
]

_ALL: list[CheckpointFormat] = [VllmMedusa(), Medusa(), MlpSpeculator(), DFlash(), Speculators(), Eagle3()]
FORMATS = {checkpoint_format.name: checkpoint_format for checkpoint_format in _ALL}


def is_third_party(folder: str | Path) -> bool:
    """Return whether a folder may hold heads in another project's format: it has a `config.json`, but none of medhead's."""
    folder = Path(folder)
    return (folder / CONFIG_FILE).is_file() and not (folder / config.CONFIG_FILE).exists()


def import_heads(folder: str | Path, target: Target) -> Heads:
    """Return the heads of a folder in another project's format, in the types they are stored in.

    A format that is unknown, not supported in some part, or does not fit the target raises a `MedheadError`.
    """
    reader = CheckpointReader(Path(folder))
    for checkpoint_format in FORMATS.values():
        if checkpoint_format.matches(reader):
            return checkpoint_format.read(reader, target)
    raise reader.error(
        f"holds no {config.CONFIG_FILE}, and its config.json and tensor names are of none of the formats {', '.join(FORMATS)}"
    )


def export_heads(heads: Heads, target: Target, format_name: str) -> ExportedCheckpoint:
    """Return heads in another project's format; one that cannot compute exactly the same raises a `MedheadError`."""
    if format_name not in FORMATS:
        raise MedheadError(f"checkpoint format must be one of {', '.join(FORMATS)}, got {format_name!r}")
    checkpoint_format, kind = FORMATS[format_name], heads.config.kind
    if kind != checkpoint_format.kind:
        fitting = [one.name for one in FORMATS.values() if one.kind == kind]
        raise MedheadError(
            f"the format {format_name!r} holds heads of kind {checkpoint_format.kind!r}, these are of kind {kind!r}: "
            + (f"give one of {', '.join(fitting)}" if fitting else "no format holds them")
        )
    return checkpoint_format.write(heads, target)


def formats_table() -> str:
    """Return which heads each format holds and which programs load it, one line a format."""
    rows = [("format", "kind of heads", "needs", "loaded by")]
    rows += [(one.name, one.kind, one.needs, one.loaded_by) for one in sorted(FORMATS.values(), key=lambda f: f.name)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{width}s}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)
