"""Build the parts of a training run: the target, the initial heads, and the PEFT model around both."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from medhead.errors import MedheadError
from medhead.heads import Heads, HeadsConfig, build_heads, load_heads
from medhead.heads.adapter import wrap
from medhead.heads.block import BlockHeads
from medhead.model.gguf import is_gguf
from medhead.model.loading import load_model, pick_dtype
from medhead.model.named_models import resolve_model
from medhead.model.target import Target
from medhead_training.data.token_store import TokenStore
from medhead_training.trainer.options import TrainOptions

MIN_DRAFT_VOCAB, MAX_DRAFT_VOCAB = 8192, 32768  # little text holds few of the tokens that answers will need


def make_heads_config(options: TrainOptions, target: Target, draft_vocab: int) -> HeadsConfig:
    """Return the heads' configuration from the options, with sizes taken from the target."""
    kind, size, config = options.kind or "recurrent", target.hidden_size, target.config
    deep = kind in ("attention", "block")
    feature_layers = options.feature_layers
    if feature_layers is None:
        count = 5 if kind == "block" and target.layers >= 16 else 3
        spread = np.linspace(1, target.layers - 1, count) if target.layers > 1 else np.zeros(1)
        feature_layers = sorted({round(float(layer)) for layer in spread}) if deep else []
    heads = int(getattr(config, "num_attention_heads", 0) or 4)
    dim = int(getattr(config, "head_dim", None) or size // heads)
    correction = options.correction or {"medusa": "parent", "block": "recurrent"}.get(kind, "none")
    if options.mask_token >= 0 and kind != "block":
        raise MedheadError(f"--mask-token goes with --kind block, got --kind {kind}; leave it out")
    if options.mask_token >= target.num_embeddings:
        allowed = f"from -1 to {target.num_embeddings - 1}, the last token of {target.name}"
        raise MedheadError(f"--mask-token must be {allowed}, got {options.mask_token}")
    return HeadsConfig(
        kind=kind,
        depth=options.depth,
        hidden_size=size,
        vocab_size=target.vocab_size,
        num_target_layers=target.layers,
        target_type=str(getattr(target.model.config, "model_type", "")),
        inner_size=options.inner_size or 2 * size,
        num_layers=options.blocks or (2 if kind == "block" else 1),
        correction=correction,
        correction_size=options.correction_size or 3 * size // 2,
        feature_layers=feature_layers,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=dim + dim % 2,
        causal=options.causal,
        mask_token_id=options.mask_token,
        root_slot_predicts=options.mask_token < 0,
        draft_vocab_size=draft_vocab,
    )


def select_draft_tokens(options: TrainOptions, store: TokenStore, vocab_size: int) -> torch.Tensor | None:
    """Return the ids of the most frequent answer tokens in ascending order, or None for the whole vocabulary.

    Among equally frequent ones, those come first that are frequent in prompts, then those with lower ids, which most
    tokenizers give to more frequent tokens.
    """
    if options.draft_vocab == 0:
        return None
    counts, in_all = np.zeros((2, vocab_size), dtype=np.int64)
    for start in range(0, store.tokens, 1 << 22):
        tokens, mask = store.read(start, start + (1 << 22))
        counts += np.bincount(tokens[mask], minlength=vocab_size)[:vocab_size]
        in_all += np.bincount(tokens, minlength=vocab_size)[:vocab_size]
    wanted = options.draft_vocab
    if wanted < 0:
        covered = np.cumsum(np.sort(counts)[::-1]) / max(counts.sum(), 1)
        wanted = -(-(int(np.searchsorted(covered, 0.998)) + 1) // 64) * 64
        wanted = min(MAX_DRAFT_VOCAB, max(MIN_DRAFT_VOCAB, wanted))
    if wanted >= vocab_size:
        return None
    return torch.from_numpy(np.sort(np.lexsort((-in_all, -counts))[:wanted]).copy())


def make_heads(options: TrainOptions, target: Target, store: TokenStore) -> Heads:
    """Return newly initialised heads, or those of `--init-from`."""
    if options.init_from:
        heads = load_heads(options.init_from, target)
        if options.kind not in (None, heads.config.kind):
            raise MedheadError(
                f"--init-from holds heads of kind {heads.config.kind!r}, but --kind is {options.kind!r}; give the same kind"
            )
        if heads.config.own_output:
            raise MedheadError("--init-from holds heads with an output matrix of their own, which cannot be trained")
        return heads.float().requires_grad_(True)
    tokens = select_draft_tokens(options, store, target.vocab_size)
    torch.manual_seed(options.seed)
    heads = build_heads(make_heads_config(options, target, 0 if tokens is None else len(tokens)))
    if tokens is not None:
        assert heads.draft_tokens is not None
        heads.draft_tokens.copy_(tokens)
    if options.mask_token >= 0:
        cast(BlockHeads, heads).set_mask(target.embed(torch.tensor(options.mask_token, device=target.device)).detach())
    return heads.to(target.device)


def load_target(options: TrainOptions, device: torch.device) -> Any:
    """Load the target: in 4 bits for `qlora`, on the CPU for `--shard`."""
    dtype = pick_dtype(options.dtype, device)
    if options.recipe != "qlora":
        place = torch.device("cpu") if options.shard else device
        return load_model(options.model, place, dtype, options.trust_remote_code)
    source = resolve_model(options.model)
    if is_gguf(source):
        raise MedheadError(f"--recipe qlora cannot read the GGUF file {options.model!r}; use --recipe joint")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MedheadError("--recipe qlora needs bitsandbytes: pip install 'medhead[qlora]'") from None
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=quantization, device_map={"": device}, dtype=dtype, use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MedheadError(f"model {options.model!r} cannot be loaded in 4 bits: {reason}") from None
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def wrap_for_training(options: TrainOptions, target: Target, heads: Heads) -> tuple[Any, Heads]:
    """Return a PEFT model around target and heads, with LoRA if the recipe trains it, and its copy of the heads."""
    model = target.model
    if options.recipe == "heads":
        return wrap(model, heads)
    lora = {"r": options.lora_rank, "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout,
            "target_modules": options.lora_targets or find_linear_layers(model)}  # fmt: skip
    try:
        if options.gradient_checkpointing:
            new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5.24
            enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        wrapped, heads = wrap(model, heads, lora)
    except ValueError as error:
        raise MedheadError(f"{target.name} cannot be adapted: {' '.join(str(error).split())[:200]}") from None
    if model.get_output_embeddings() is not target.output or model.get_input_embeddings() is not target.embedding:
        raise MedheadError("--lora-targets names the embedding or the output matrix, which the heads share; remove it")
    return wrapped, heads


def find_linear_layers(model: Any) -> list[str]:
    """Return the names of the linear layers inside the decoder layers, the default targets of LoRA."""
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    # GPT-2 calls its linear layers Conv1D
    linear = [name.split(".") for name, kind in types.items() if "Linear" in kind or kind == "Conv1D"]
    names = {parts[-1] for parts in linear if any(part.isdigit() for part in parts)}
    if not names:
        raise MedheadError("no linear layers were found for LoRA; name some with --lora-targets")
    return sorted(names)
