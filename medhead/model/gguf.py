"""GGUF files as models: a check of the file with errors of one line, and loading through transformers, which dequantises.

transformers 5.17 gives tokenizers the wrong end token, and no version of it sets all special tokens of the model's
configuration, so they are taken from the file's header here.
"""

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

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from medhead.errors import MedheadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9  # types of metadata values; the others have a fixed number of bytes
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MAX_DIMENSIONS = 8
SPECIAL_TOKENS = {  # field of the header: attribute of tokenizer and configuration, without `_id`
    "tokenizer.ggml.bos_token_id": "bos_token",
    "tokenizer.ggml.eos_token_id": "eos_token",
    "tokenizer.ggml.unknown_token_id": "unk_token",
    "tokenizer.ggml.padding_token_id": "pad_token",
    "tokenizer.ggml.eot_token_id": "eot_token",  # ends a turn of a chat, where that is another token
}


class GgufHeader(NamedTuple):
    """What the beginning of a GGUF file says: the model's architecture, its number of weights and its special tokens."""

    architecture: str
    weights: int
    special_tokens: dict[str, int]


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


def load_gguf(path: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a GGUF file as an ordinary model on the CPU, its weights dequantised.

    `options` are those of `from_pretrained`. Returns the model and transformers' loading info.
    """
    tokens = dict(read_header(path).special_tokens)
    if hasattr(transformers, "GgufConfig"):  # without it, transformers keeps the blocks where it has kernels
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with progress_on_terminals():
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, output_loading_info=True, **options
        )
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):  # else it cannot be saved or trained
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ends = [tokens[name] for name in ("eos_token", "eot_token") if name in tokens]
    for config in (model.config, model.generation_config):
        for name in ("bos_token", "pad_token"):
            if name in tokens:
                setattr(config, f"{name}_id", tokens[name])
        if ends:
            config.eos_token_id = ends[0] if len(set(ends)) == 1 else ends
    model.config.name_or_path = model.name_or_path = str(path)
    return model, info


def load_gguf_tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF file; `options` are those of `from_pretrained`."""
    tokens = read_header(path).special_tokens
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **options)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if name in tokens:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(tokens[name]))
    tokenizer.clean_up_tokenization_spaces = False  # 5.17 sets it, which loses spaces
    return tokenizer


def progress_on_terminals() -> contextlib.AbstractContextManager[Any]:
    """Return a context that hides transformers' progress bars, which cannot be switched off, unless there is a terminal."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


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
    cursor, architecture, alignment, special = _Cursor(data, len(MAGIC)), "", 32, {}
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
        elif key in SPECIAL_TOKENS:
            (special[SPECIAL_TOKENS[key]],) = cursor.read("I")
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
    return GgufHeader(architecture, weights, special), start + end


def _tensor_bytes(count: int, kind: int, name: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise MedheadError(f"{name} has weights of the type {kind}, which the package gguf does not know") from None
    return count // block * size
