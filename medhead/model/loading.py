"""Loading of models and tokenizers, with errors of one line that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from medhead.errors import MedheadError, one_line
from medhead.model.block_weights import check_weights, use_blocks
from medhead.model.gguf import is_gguf, load_gguf, load_gguf_tokenizer
from medhead.model.named_models import DEMO_HEADS as DEMO_HEADS
from medhead.model.named_models import DEMO_MODEL as DEMO_MODEL
from medhead.model.named_models import NAMED_MODELS, resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError)


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device of that name, or raise a MedheadError; `auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        reason = one_line(error, 80)
        raise MedheadError(f"device {str(name)!r} is not available ({reason}); use --device cpu or auto") from None
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of that name; `auto` is float32 on a CPU and bfloat16 elsewhere.

    An unknown name, and a type that the device cannot compute in, raise a MedheadError.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise MedheadError(f"--dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    dtype = DTYPES[name]
    try:
        probe = torch.ones(1, 1, 8, 8, dtype=dtype, device=device)
        torch.nn.functional.scaled_dot_product_attention(probe, probe, probe)
        torch.nn.functional.linear(probe, probe[0, 0])
    except RuntimeError:
        raise MedheadError(f"this {device.type} cannot compute in {name}; use --dtype float32") from None
    return dtype


def load_model(
    name_or_path: str | Path | None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    weights: str = "full",
) -> PreTrainedModel:
    """Load a causal language model, or one of images and text; a failure is a `MedheadError` of one line.

    Args:
        name_or_path: a model folder, a hub id (both with weights in safetensors), a GGUF file, whose weights are
            dequantised, `"smollm2"`, which may be downloaded, or `"demo"`. None is the demo model.
        device: where the model is put; `"auto"` is CUDA where there is one, else the CPU.
        dtype: type of the weights; `"auto"` is float32 on a CPU and bfloat16 elsewhere.
        trust_remote_code: run Python code that comes with the model.
        weights: how a CPU keeps the weights of linear layers, see `medhead.model.block_weights`: `"full"` in `dtype`, `"stored"`
            as the checkpoint has them, `"int8"` and `"int4"` rounded, which changes the text.
    """
    device = pick_device(device)
    check_weights(weights, device)
    dtype = pick_dtype(dtype, device)
    name = resolve_model(name_or_path)
    _check_name(name)
    logging.disable_progress_bar()
    try:
        if is_gguf(name):
            model, info = load_gguf(Path(name), dtype=dtype)
        else:
            options = {"use_safetensors": True, "trust_remote_code": trust_remote_code, "output_loading_info": True}
            model, info = _auto_class(name, trust_remote_code).from_pretrained(name, dtype=dtype, **options)
    except SafetensorError as error:
        damage = f"is truncated or damaged ({error}); download it again"
        raise MedheadError(f"a weights file of {str(name)!r} {damage}") from None
    except MedheadError:
        raise
    except LOADING_ERRORS as error:
        raise MedheadError(f"model {str(name)!r} cannot be loaded: {_reason(name, error)}") from None
    finally:
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):  # transformers leaves them random
        number = f"{len(missing)} of its weights are missing ({missing[0]})"
        raise MedheadError(f"model {str(name)!r} cannot be loaded: {number}; download it again")
    model = model.to(device).eval()
    if weights != "full":
        use_blocks(model, weights, Path(name) if is_gguf(name) else None)
    return model


def _auto_class(name: str | Path, trust_remote_code: bool) -> Any:
    """Return transformers' class that loads a checkpoint: for images and text where it is one for both, else for text.

    A checkpoint for both loads as text alone in some families, which leaves the weights of its image encoder out.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    named = set(getattr(config, "architectures", None) or ())
    mapping = AutoModelForImageTextToText._model_mapping
    both = type(config) in mapping and named & {kind.__name__ for kind in _classes(mapping[type(config)])}
    is_text = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    return AutoModelForImageTextToText if both or (type(config) in mapping and not is_text) else AutoModelForCausalLM


def _classes(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def load_tokenizer(
    name_or_path: str | Path | None, trust_remote_code: bool = False, needs_model: bool = True
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, named as for `load_model`; a failure is a `MedheadError` of one line.

    With `needs_model` false a folder may hold a tokenizer alone.
    """
    name = resolve_model(name_or_path)
    if needs_model or not Path(name).is_dir():
        _check_name(name)
    options: dict[str, Any] = {"padding_side": "left", "trust_remote_code": trust_remote_code}
    try:
        if is_gguf(name):
            return load_gguf_tokenizer(Path(name), **options)
        return AutoTokenizer.from_pretrained(name, **options)
    except MedheadError:
        raise
    except LOADING_ERRORS as error:
        raise MedheadError(f"the tokenizer of {str(name)!r} cannot be loaded: {_reason(name, error)}") from None


def load_processor(name_or_path: str | Path | None, tokenizer: Any, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model of images and text, named as for `load_model`; a failure is a `MedheadError`.

    The tokenizer gets the processor's chat template, or the processor the tokenizer's where it has none, so that chats with and
    without images are written alike.
    """
    from transformers import AutoProcessor

    name = resolve_model(name_or_path)
    try:
        if is_gguf(name):
            raise ValueError("a GGUF file holds no processor")
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        if not hasattr(processor, "image_processor"):
            raise ValueError("it has none that reads images")
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if not template:
            raise ValueError("it has no chat template")
    except LOADING_ERRORS as error:
        raise MedheadError(f"the processor of {str(name)!r} cannot be loaded: {_reason(name, error)}") from None
    processor.chat_template = tokenizer.chat_template = template
    return processor


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, raw: bool) -> list[int]:
    """Return the token ids of a prompt, through the chat template if the tokenizer has one and `raw` is false.

    An empty prompt, a system prompt without a chat template, and a chat that the template refuses raise a `MedheadError`.
    """
    if not prompt.strip():
        raise MedheadError("the prompt is empty: give some text with --prompt, --prompt-file or on standard input")
    if raw or not getattr(tokenizer, "chat_template", None):
        if system is not None:
            raise MedheadError("--system needs a tokenizer with a chat template, and no --raw")
        return list(tokenizer(prompt)["input_ids"])
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return apply_template(tokenizer, messages)


def apply_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Return the token ids of a chat up to where the answer begins; a chat that the template refuses is a `MedheadError`."""
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    try:
        found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True, **options)
    except Exception as error:  # a template can raise anything
        reason = one_line(error, 200)
        raise MedheadError(f"the model's chat template refuses these messages: {reason}") from None
    return list(found["input_ids"])


def _check_name(name: str | Path) -> None:
    """Refuse a folder that is missing or holds no model; a name of the form `owner/model` or `model` may be a hub id."""
    if is_gguf(name):
        return  # its header is checked when it is loaded
    hub_logging.set_verbosity_error()  # else an unreachable hub prints ten lines
    text = str(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise MedheadError(f"the folder {text!r} holds no config.json; it is not a model folder")
        return
    if Path(name).is_file():
        raise MedheadError(f"{text!r} is a file, but not a GGUF file; give a model folder, a hub id or a GGUF file")
    parts = text.split("/")
    hub_id = not text.startswith((".", "/", "~")) and "\\" not in text and len(parts) == 2
    if not hub_id and not (len(parts) == 1 and text.isidentifier()):
        raise MedheadError(f"model folder {text!r} does not exist")


def _reason(name: str | Path, error: BaseException) -> str:
    """Return the first sentence of an error; where the name may be misspelt, also the names that medhead knows."""
    first = one_line(error).split(". ")[0][:240] or type(error).__name__
    return first if Path(name).exists() or "/" in str(name) else f"{first}; medhead knows {' and '.join(NAMED_MODELS)}"
