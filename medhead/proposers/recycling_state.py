"""The learnt matrix of Token Recycling as a safetensors file: the successors of every token and their log-probabilities."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medhead.errors import MedheadError

FORMAT = "medhead recycling 1"


def save_state(tokens: Tensor, logp: Tensor, path: str | Path) -> None:
    """Write the matrices `[vocab, successors]`; the file is replaced atomically.

    Raises:
        MedheadError: the file exists and holds something else, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        _read(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"tokens": tokens.to("cpu", torch.int32), "logp": logp.to("cpu", torch.float32)}
    try:
        save_file(content, scratch, metadata={"format": FORMAT})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise MedheadError(f"{str(path)!r} cannot be written: {_reason(error)}") from None
    finally:
        scratch.unlink(missing_ok=True)


def load_state(path: str | Path, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return tokens (int64) and log-probabilities (float32), each `[vocab_size, successors]`.

    Raises:
        MedheadError: the file is missing or damaged, it holds something else, or it is of another vocabulary.
    """
    tokens, logp = _read(Path(path))
    tokens, logp, name = tokens.long(), logp.float(), f"the recycling state {str(path)!r}"
    if tokens.ndim != 2 or tokens.shape != logp.shape or not tokens.numel():
        raise MedheadError(
            f"{name} holds matrices of {list(tokens.shape)} and {list(logp.shape)}, expected two of [vocabulary, "
            "successors]; delete it and start a new one"
        )
    if len(tokens) != vocab_size:
        raise MedheadError(
            f"{name} was learnt from a model with {len(tokens)} tokens, this one has {vocab_size}; "
            "give each model a file of its own"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size or bool((logp > 0).any() | logp.isnan().any()):
        raise MedheadError(f"{name} is damaged: a token or a log-probability is out of range; delete it")
    return tokens, logp


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Return the tensors of a recycling state, unchecked.

    Raises:
        MedheadError: the file is no recycling state.
    """
    if not path.is_file():
        raise MedheadError(f"the recycling state {str(path)!r} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT and set(file.keys()) == {"tokens", "logp"}:
                return file.get_tensor("tokens"), file.get_tensor("logp")
    except (OSError, SafetensorError) as error:
        raise MedheadError(f"{str(path)!r} is no recycling state, or truncated or damaged: {_reason(error)}") from None
    raise MedheadError(f"{str(path)!r} is not a recycling state of medhead, but a safetensors file of something else")


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:100]
