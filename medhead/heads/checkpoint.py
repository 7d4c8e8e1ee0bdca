"""Save and load heads as one PEFT checkpoint: `adapter_config.json`, `adapter_model.safetensors`, `medhead_config.json`.

The heads are the target's submodule `medhead`; PEFT saves and loads it through `modules_to_save`. Decoding needs no PEFT
wrapper: `load_heads` reads the same file directly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from medhead.errors import MedheadError, one_line
from medhead.heads.adapter import SUBMODULE, WEIGHTS_FILE, adapts_target, save_adapter, unwrap, wrap
from medhead.heads.base import Heads, build_heads
from medhead.heads.config import CONFIG_FILE, check_fit, read_config
from medhead.heads.formats import import_heads, is_third_party
from medhead.heads.mtp import MTP, load_mtp
from medhead.model.target import Target

_PREFIX = f"base_model.model.{SUBMODULE}."


def save_heads(heads: Heads, target: PreTrainedModel, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write heads as a PEFT checkpoint that `PeftModel.from_pretrained` loads onto the target with heads attached.

    The target is left unchanged. Weights are stored in `dtype`, or the heads' own type if it is None.
    """
    trainable = {name: p.requires_grad for name, p in target.named_parameters()}
    copy = build_heads(heads.config)
    copy.load_state_dict(heads.state_dict())
    wrapped, copy = wrap(target, copy)
    try:
        save_adapter(wrapped, copy, folder, dtype)
    finally:
        unwrap(target, wrapped, trainable)


@torch.inference_mode(False)  # heads may be loaded in a callback of a generation, and trained later
def load_heads(folder: str | Path, target: Target) -> Heads:
    """Load heads for a `Target`, onto its device and in its type; the folder may be in another project's format.

    A checkpoint that is missing, damaged, or made for another model raises a `MedheadError`.
    """
    if folder == MTP:  # a folder of that name is `./mtp`
        return load_mtp(target)
    heads = import_heads(folder, target) if is_third_party(folder) else _load(Path(folder), target)
    return heads.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def _load(folder: Path, target: Target) -> Heads:
    config = read_config(folder)
    check_fit(config, target, folder)
    if adapts_target(folder) and not getattr(target.model, "peft_config", None):
        raise MedheadError(
            f"the heads in {str(folder)!r} were trained together with an adapter of the model itself; load both with "
            "medhead.heads.load_adapted(model, folder)"
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise MedheadError(f"{str(folder)!r} holds no {WEIGHTS_FILE}; the heads checkpoint is incomplete")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise MedheadError(f"{path} is truncated or damaged ({one_line(error, 100)}); copy it again") from None
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items() if name.startswith(_PREFIX)}
    heads = build_heads(config)
    expected = {name: tuple(t.shape) for name, t in heads.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in weights.items()}
    wrong = sorted({name for name, _ in expected.items() ^ given.items()})
    if wrong:
        first = wrong[0]
        raise MedheadError(
            f"{path} does not hold the weights that {CONFIG_FILE} describes: {first} is {given.get(first, 'missing')}, "
            f"expected {expected.get(first, 'nothing')} ({len(wrong)} tensors differ)"
        )
    heads.load_state_dict(weights)
    return heads
