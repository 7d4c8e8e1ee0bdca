"""GGUF files as models: a check of the file with errors of one line, and loading through transformers, which dequantises."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from medhead.errors import MedheadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9  # types of metadata values; the others have a fixed number of bytes
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MAX_DIMENSIONS = 8


class GgufHeader(NamedTuple):
    """What the beginning of a GGUF file says: the model's architecture and the number of its weights."""

    architecture: str
    weights: int


def is_gguf(name: str | Path) -> bool:
    """Return whether a model's name is that of a GGUF file: it ends with `.gguf`, or the file begins like one."""
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, a model on the hub, or a file that may not be read
        return False


def require_gguf() -> None:
    """Raise a MedheadError unless the package `gguf` is installed, which transformers reads GGUF files with."""
    if find_spec("gguf") is None:
        raise MedheadError("GGUF files need the package gguf: pip install 'medhead[gguf]'")


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, without its weights.

    A file that is missing, is not a GGUF file, or is shorter than its header says raises a `MedheadError`.
    """
    name = f"GGUF file {str(path)!r}"
    if not path.is_file():
        raise MedheadError(f"{name} does not exist")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise MedheadError(f"{str(path)!r} is not a GGUF file; give a model folder, a hub id or a GGUF file")
            require_gguf()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header, end = _parse(data, name)
                size = len(data)
    except MedheadError:
        raise
    except OSError as error:
        raise MedheadError(f"{name} cannot be read: {error.strerror or error}") from None
    except (struct.error, ValueError, OverflowError, LookupError):
        raise MedheadError(f"{name} is truncated or damaged; download it again") from None
    if size < end:
        raise MedheadError(f"{name} is truncated: it has {size:,} of {end:,} bytes; download it again")
    return header


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a GGUF file whose header was read as an ordinary model on the CPU, its weights dequantised to `dtype`."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.24 transformers would keep the blocks where it has kernels
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # transformers' bar cannot be switched off
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):  # else it cannot be saved or trained
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = model.name_or_path = str(path)
    return model


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def read(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def read_string(self) -> str:
        (length,) = self.read("Q")
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8")

    def skip(self, kind: int) -> None:
        """Skip a metadata value of a type."""
        if kind == STRING:
            (length,) = self.read("Q")
            self.position += length
        elif kind == ARRAY:
            kind, count = self.read("IQ")
            if kind in VALUE_BYTES:
                self.position += count * VALUE_BYTES[kind]
            else:
                for _ in range(count):
                    self.skip(kind)
        else:
            self.position += VALUE_BYTES[kind]


def _parse(data: mmap.mmap, name: str) -> tuple[GgufHeader, int]:
    """Return the header, and the number of bytes that the file must have."""
    cursor, architecture, alignment = _Cursor(data, len(MAGIC)), "", 32
    (version,) = cursor.read("I")
    if version not in VERSIONS:
        raise MedheadError(
            f"{name} has version {version} of the format; versions {VERSIONS[0]} and {VERSIONS[1]} are read"
        )
    tensors, fields = cursor.read("QQ")
    for _ in range(fields):
        key, (kind,) = cursor.read_string(), cursor.read("I")
        if key == "general.architecture":
            architecture = cursor.read_string()
        elif key == "general.alignment":
            (alignment,) = cursor.read("I")
        else:
            cursor.skip(kind)
    weights = end = 0
    for _ in range(tensors):
        cursor.read_string()
        (dimensions,) = cursor.read("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError
        count = math.prod(cursor.read(f"{dimensions}Q"))
        kind, offset = cursor.read("IQ")
        weights, end = weights + count, max(end, offset + _tensor_bytes(count, kind, name))
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(architecture, weights), start + end


def _tensor_bytes(count: int, kind: int, name: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise MedheadError(f"{name} has weights of the type {kind}, which the package gguf does not know") from None
    return count // block * size
