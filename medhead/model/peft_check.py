"""Which adapters of PEFT a target can decode with: those that compute each token's output from that token's input.

`Target` passes token ids to the base model. Prompt learning changes what `PeftModel.generate` passes, and some adapters
depend on the other tokens of a pass, or on arguments of `PeftModel.generate`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from medhead.errors import MedheadError

_UNSUPPORTED = {  # by PEFT type, with the reason
    "LILY": "routes by the mean over all tokens of a pass",
    "POLY": "needs task_ids in every pass",
    "SHADOW": "keeps a state outside the key/value cache",
    "XLORA": "computes its scalings from the whole text in every pass",
}
_PER_CALL = ("adapter_names", "alora_offsets", "scalings")  # arguments that PEFT adds to layers by hooks
_REMEDY = "decode with PeftModel.generate alone"


def unwrap_peft(model: Any) -> Any:
    """Return the model inside a `PeftModel` or `PeftMixedModel`, or the model itself where it is neither.

    Raises:
        MedheadError: `generate` of the `PeftModel` passes other inputs to the base model than token ids.
    """
    if hasattr(model, "get_base_model"):
        check_wrapper(model)
        return model.get_base_model()
    return model.base_model.model if type(model).__name__ == "PeftMixedModel" else model


def check_wrapper(model: Any) -> None:
    """Refuse a `PeftModel` whose `generate` passes other inputs to the base model than token ids."""
    for config in model.peft_config.values():
        if getattr(config, "is_prompt_learning", False):
            raise MedheadError(
                f"{_method(config)} is prompt learning: PeftModel.generate adds virtual tokens or cached keys that medhead does "
                f"not see; {_REMEDY}, or give the decoder model.get_base_model() to decode without the prompt"
            )
        if _method(config) == "XLORA":  # its layers carry the names of its experts
            raise MedheadError(f"the adapter method XLORA {_UNSUPPORTED['XLORA']}; {_REMEDY}")


def check_adapters(model: Any) -> None:
    """Refuse adapters that are active in a model of transformers and cannot be decoded with.

    Raises:
        MedheadError: names the method or the argument, and what to do.
    """
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    caller = getattr(prepare, "__self__", None)
    if caller is not model and hasattr(caller, "peft_config"):  # `PeftModel.generate` of prompt learning is running
        check_wrapper(caller)
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    per_call = _drop_arguments(model)
    if per_call:
        raise MedheadError(f"{per_call}: medhead decodes all rows with the same adapters; {_REMEDY}")
    layers = (layer for layer in model.modules() if hasattr(type(layer), "active_adapters"))
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    for name in sorted(configs.keys() & active):
        reason = _unsupported_reason(configs[name])
        if reason is not None:
            raise MedheadError(f"the adapter {name!r} {reason}; {_REMEDY}, or disable the adapter")


def _drop_arguments(model: Any) -> str:
    """Return the name of an argument that PEFT's hooks give to layers; remove them, as PEFT itself does not after an error."""
    found = ""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            given = [name for name in _PER_CALL if name in hook.keywords] if isinstance(hook, partial) else []
            if given:
                found = given[0]
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return found


def _unsupported_reason(config: Any) -> str | None:
    if getattr(config, "alora_invocation_tokens", None):
        return "is an activated LoRA, which is inactive before its invocation tokens"
    reason = _UNSUPPORTED.get(_method(config))
    return None if reason is None else f"({_method(config)}) {reason}"


def _method(config: Any) -> str:
    method = getattr(config, "peft_type", None)
    return str(getattr(method, "value", method))
