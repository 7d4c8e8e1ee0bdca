"""The properties of a model that a target reads once, and the check that they are still the same."""

from __future__ import annotations

from typing import Any

from torch import nn

from medhead.errors import MedheadError
from medhead.model.layout import output_matrix


def model_form(model: Any) -> dict[str, Any]:
    """Return what a target relies on: the modules at both ends with their sizes, types and devices, and the attention layers.

    Weights, and adapters of layers in between, are not part of it: a target reads them in every pass.
    """
    embedding, output = model.get_input_embeddings(), output_matrix(model)
    form: dict[str, Any] = {}
    for name, module in (("input embeddings", embedding), ("output matrix", output)):
        form[name] = module
        form[f"rows of the {name}"] = num_rows(module)
        form[f"dtype of the {name}"] = _of_weight(module, "dtype")
        form[f"device of the {name}"] = _of_weight(module, "device")
    attention = ((module.__dict__.get("config"), module.__dict__.get("layer_idx")) for module in model.modules())
    form["attention layers"] = {  # the very configurations, which are kept alive so that their ids stay theirs
        (id(config), index): config for config, index in attention if hasattr(config, "_attn_implementation")
    }
    return form


def check_form(model: Any, before: dict[str, Any]) -> None:
    """Compare a model with its form when a target was made.

    Raises:
        MedheadError: names the first property that changed.
    """
    now = model_form(model)
    name = next((name for name in before if _key(before[name]) != _key(now[name])), None)
    if name is not None:
        was, new = _describe(before[name]), _describe(now[name])
        described = f"{name} changed" if was == new else f"{name} changed from {was} to {new}"
        raise MedheadError(f"the model is not as it was when this decoder was made ({described}); make a new Decoder")


def num_rows(module: Any) -> int:
    """Return the number of tokens that an embedding or an output matrix has rows for, adapters of PEFT looked through."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return int(getattr(base, "num_embeddings", None) or getattr(base, "out_features", None) or len(module.weight))


def _of_weight(module: Any, name: str) -> Any:
    return getattr(getattr(module, "weight", None), name, None)


def _key(value: Any) -> Any:
    return value.keys() if isinstance(value, dict) else value


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return str(len(value))
    return type(value).__name__ if isinstance(value, nn.Module) else str(value)
