"""What Token Recycling has learnt, as a safetensors file: the successors of every token and their log-probabilities."""

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
    """Write the matrices `[vocab, successors]`; the file is replaced as a whole.

    Raises:
        MedheadError: the file is there and holds something else, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        _check_format(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"tokens": tokens.to("cpu", torch.int32), "logp": logp.to("cpu", torch.float32)}
    try:
        save_file(content, scratch, metadata={"format": FORMAT})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise MedheadError(f"{str(path)!r} cannot be written: {_said(error)}") from None
    finally:
        scratch.unlink(missing_ok=True)


def load_state(path: str | Path, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens (int64) and log-probabilities (float32), each `[vocab_size, successors]`.

    Raises:
        MedheadError: there is no such file, it is damaged, it holds something else, or it is of another vocabulary.
    """
    path = Path(path)
    _check_format(path)
    try:
        with safe_open(path, "pt") as file:
            tokens, logp = file.get_tensor("tokens").long(), file.get_tensor("logp").float()
    except (OSError, SafetensorError) as error:
        raise MedheadError(f"the recycling state {str(path)!r} cannot be read: {_said(error)}") from None
    if tokens.ndim != 2 or tokens.shape != logp.shape or not tokens.numel():
        raise MedheadError(
            f"the recycling state {str(path)!r} holds matrices of {list(tokens.shape)} and {list(logp.shape)}, expected "
            "two of [vocabulary, successors]; delete it and start a new one"
        )
    if len(tokens) != vocab_size:
        raise MedheadError(
            f"the recycling state {str(path)!r} was learnt from a model with {len(tokens)} tokens, this one has "
            f"{vocab_size}; give each model a file of its own"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size or bool((logp > 0).any() | logp.isnan().any()):
        raise MedheadError(
            f"the recycling state {str(path)!r} is damaged: a token or log-probability in it cannot be; delete it"
        )
    return tokens, logp


def _check_format(path: Path) -> None:
    """Refuse what is no recycling state.

    Raises:
        MedheadError: says what it is instead.
    """
    if not path.is_file():
        raise MedheadError(f"the recycling state {str(path)!r} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (OSError, SafetensorError) as error:
        raise MedheadError(
            f"{str(path)!r} is no recycling state, or it is truncated or damaged: {_said(error)}"
        ) from None
    if metadata.get("format") != FORMAT or names != {"tokens", "logp"}:
        raise MedheadError(
            f"{str(path)!r} is not a recycling state of medhead, but a safetensors file of something else"
        )


def _said(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:100]
