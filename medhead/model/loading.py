"""Loading models and tokenizers with errors that a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from medhead.errors import MedheadError

DEMO_MODEL = Path(__file__).parents[1] / "assets" / "model"
DEMO_HEADS = Path(__file__).parents[1] / "assets" / "heads"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        MedheadError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise MedheadError(f"device {name!r} is not there ({reason}); use --device cpu or auto") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; `auto` is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        MedheadError: the name is unknown, or the device cannot compute in it.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise MedheadError(f"dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    dtype = DTYPES[name]
    try:
        probe = torch.ones(1, 1, 8, 8, dtype=dtype, device=device)
        torch.nn.functional.scaled_dot_product_attention(probe, probe, probe)
        torch.nn.functional.linear(probe, probe[0, 0])
    except RuntimeError:
        raise MedheadError(f"this {device.type} cannot compute in {name}; use --dtype float32") from None
    return dtype


def load_model(
    name: str | Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, from safetensors alone.

    Raises:
        MedheadError: it does not exist, is no causal language model, or its files are damaged.
    """
    _check_folder(name)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except SafetensorError as error:
        raise MedheadError(
            f"a weights file of {str(name)!r} is truncated or damaged ({error}); download it again"
        ) from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise MedheadError(f"model {str(name)!r} cannot be loaded: {_first_sentence(error)}") from None
    finally:
        logging.enable_progress_bar()
    return model.to(device).eval()


def load_tokenizer(
    name: str | Path, trust_remote_code: bool = False, needs_model: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or alone in a folder if it does not need one.

    Raises:
        MedheadError: there is none, or it cannot be read.
    """
    if needs_model or not Path(name).is_dir():
        _check_folder(name)
    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise MedheadError(f"the tokenizer of {str(name)!r} cannot be loaded: {_first_sentence(error)}") from None


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, raw: bool) -> list[int]:
    """Token ids of a prompt, through the chat template when the tokenizer has one.

    Raises:
        MedheadError: the prompt is empty, or a system prompt has no template to go into.
    """
    if not prompt.strip():
        raise MedheadError("the prompt is empty: give some text with --prompt, --prompt-file or on standard input")
    templated = not raw and getattr(tokenizer, "chat_template", None)
    if system is not None and not templated:
        raise MedheadError("--system needs a tokenizer with a chat template, and no --raw")
    if not templated:
        return list(tokenizer(prompt)["input_ids"])
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _check_folder(name: str | Path) -> None:
    hub_logging.set_verbosity_error()  # a hub that cannot be reached is one line here, not ten
    text = str(name)
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise MedheadError(f"the folder {text!r} holds no config.json; it is not a model folder")
    elif looks_local and not (text.count("/") == 0 and text.isidentifier()):
        raise MedheadError(f"model folder {text!r} does not exist")


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    cut = text.find(". ")
    return (text if cut < 0 else text[:cut])[:240] or type(error).__name__
