"""Heads as a PEFT adapter: attached to the target, trained, stored and loaded by PEFT, alone or with LoRA on the target.

The heads are the target's submodule `medhead`, which PEFT handles through `modules_to_save`. With a frozen target, PEFT's
`target_modules` is its dummy value; with a real list the adapter changes the target too, and the text is the adapted
model's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from medhead.errors import MedheadError, one_line
from medhead.heads.base import Heads, build_heads
from medhead.heads.config import CONFIG_FILE, check_fit, read_config, read_json
from medhead.model.target import Target

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILE = "adapter_config.json"
SUBMODULE = "medhead"


def attach(target: nn.Module, heads: Heads) -> None:
    """Make heads a submodule of the target, which PEFT needs before it can load or train them."""
    target.add_module(SUBMODULE, heads)


def detach(target: nn.Module) -> None:
    """Remove the heads from the target."""
    target._modules.pop(SUBMODULE, None)


def wrap(target: PreTrainedModel, heads: Heads, lora: dict[str, Any] | None = None) -> tuple[Any, Heads]:
    """Return a PEFT model around a frozen target with heads, and its trainable copy of the heads.

    `lora` holds fields of PEFT's `LoraConfig` to adapt the target with (`target_modules` among them); None adapts nothing.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    attach(target, heads)
    config = LoraConfig(modules_to_save=[SUBMODULE], **(lora or {"target_modules": DUMMY_TARGET_MODULES}))
    with _quiet():
        wrapped = get_peft_model(target, config)
    return wrapped, heads_of(wrapped)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide PEFT's warning about a name that transformers 5.24 deprecates: users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def unwrap(target: PreTrainedModel, wrapped: Any, trainable: dict[str, bool]) -> None:
    """Undo `wrap`: remove adapter and heads, and restore which parameters require gradients."""
    wrapped.unload()
    detach(target)
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    if hasattr(target, "peft_config"):
        del target.peft_config


def heads_of(wrapped: Any) -> Heads:
    """Return the heads that a PEFT model uses."""
    module = wrapped.get_base_model()._modules[SUBMODULE]
    return module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module


def save_adapter(wrapped: Any, heads: Heads, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a PEFT model's adapter and the heads' configuration to a folder; weights keep their type if `dtype` is None."""
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in get_peft_model_state_dict(wrapped).items():
        cast = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        weights[name] = cast.detach().cpu().contiguous().clone()
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = wrapped.peft_config["default"]
    inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = inference
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(heads.config), indent=2) + "\n", encoding="utf-8")


def adapts_target(folder: str | Path) -> bool:
    """Return whether a checkpoint holds LoRA weights for the target beside the heads."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        return False
    return read_json(path).get("target_modules") not in (DUMMY_TARGET_MODULES, [DUMMY_TARGET_MODULES], None, [])


def load_adapted(model: PreTrainedModel, folder: str | Path) -> Any:
    """Return the model with a checkpoint's LoRA weights and heads, as a `PeftModel`: its text is the adapted model's.

    Give the result and `heads_of(result)` to a `Decoder`; inside `result.disable_adapter()` the model is the original one.
    A checkpoint that is missing, damaged, or made for another model raises a `MedheadError`.
    """
    from peft import PeftModel, get_peft_model_state_dict

    config, path = read_config(folder), Path(folder) / WEIGHTS_FILE
    check_fit(config, Target(model, probe=False), folder)
    attach(model, build_heads(config))
    try:
        with _quiet():
            wrapped = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        detach(model)
        if isinstance(error, KeyError):  # PEFT looks for a tensor of the heads
            raise MedheadError(f"{path} is incomplete: {error.args[0]} is missing") from None
        raise MedheadError(f"the adapter in {str(folder)!r} cannot be loaded: {one_line(error, 160)}") from None
    with safe_open(path, "pt") as file:  # PEFT leaves missing tensors random
        missing = sorted(get_peft_model_state_dict(wrapped).keys() - file.keys())
    if missing:
        raise MedheadError(f"{path} is incomplete: {missing[0]} is missing ({len(missing)} tensors)")
    heads_of(wrapped).to(device=model.device, dtype=model.dtype)
    return wrapped.eval()
