"""Train heads for a model of your own: `python -m medhead.training.finetune --model … --data … --output …`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from medhead.errors import MedheadError
from medhead.generate import Parser, guarded
from medhead.heads import Heads, HeadsConfig, build_heads, load_heads
from medhead.heads.adapter import CONFIG_FILE, save_adapter, wrap
from medhead.load import DTYPES, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.target import Target

from .losses import loss_named
from .measure import Measured, measure
from .module import HeadsModule, evaluating
from .objective import Texts
from .options import TrainOptions, add_options, read_options
from .packing import PackedDataset
from .report import plot_accuracy, write_card
from .store import TokenStore, prepare
from .trainer import HeadsTrainer, last_checkpoint, remove_torn

EXAMPLES = """\
examples:
  python -m medhead.training.finetune --model Qwen/Qwen3-0.6B --data answers.jsonl --output my-heads
  python -m medhead.training.finetune --model my/model --data chats/ --output heads --kind attention --epochs 2
  python -m medhead.training.finetune --config run.yaml --output again
  accelerate launch -m medhead.training.finetune --model my/model --data answers.jsonl --output heads

Text that the model itself wrote trains much better heads than any other: make some first with
  python -m medhead.training.generate_data --model … --prompts prompts.jsonl --output answers.jsonl

Start the same command again to go on where it was stopped. The output folder holds the finished heads (a PEFT adapter),
a model card, accuracies, trees and a picture, and the folder `run` with checkpoints and logs.
"""
OPTIONS_FILE, FACTS_FILE = "options.json", "training.json"
FREE = ("output", "device", "save_steps", "log_steps", "eval_steps", "tensorboard")  # may change when a run goes on


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.training.finetune",
        description="Train heads that guess what a model says next, so that it can be decoded faster.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(options)
    return options


def heads_config(options: TrainOptions, target: Target, draft_vocab: int) -> HeadsConfig:
    """The configuration that the options ask for, with sizes taken from the target."""
    kind, size, config = options.kind, target.hidden_size, target.config
    deep = kind in ("attention", "block")
    taps = options.taps
    if taps is None:
        count = 5 if kind == "block" and target.layers >= 16 else 3
        spread = np.linspace(1, target.layers - 1, count) if target.layers > 1 else np.zeros(1)
        taps = sorted({round(float(layer)) for layer in spread}) if deep else []
    heads = int(getattr(config, "num_attention_heads", 0) or 4)
    dim = int(getattr(config, "head_dim", None) or size // heads)
    correction = options.correction or {"medusa": "parent", "block": "recurrent"}.get(kind, "none")
    return HeadsConfig(
        kind=kind,
        depth=options.depth,
        hidden_size=size,
        vocab_size=target.vocab_size,
        target_layers=target.layers,
        target_type=str(getattr(target.model.config, "model_type", "")),
        inner_size=options.inner_size or 2 * size,
        blocks=options.blocks or (2 if kind == "block" else 1),
        correction=correction,
        correction_size=options.correction_size or 3 * size // 2,
        taps=taps,
        num_heads=heads,
        key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=dim + dim % 2,
        causal=options.causal,
        draft_vocab=draft_vocab,
    )


def draft_tokens(options: TrainOptions, store: TokenStore, vocab_size: int) -> torch.Tensor | None:
    """`[draft vocabulary]`: the most frequent tokens of the answers, in order of their ids; None for all."""
    if options.draft_vocab == 0:
        return None
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, store.tokens, 1 << 22):
        tokens, mask = store.read(start, min(start + (1 << 22), store.tokens))
        counts += np.bincount(tokens[mask], minlength=vocab_size)[:vocab_size]
    wanted = options.draft_vocab
    if wanted < 0:
        covered = np.cumsum(np.sort(counts)[::-1]) / max(counts.sum(), 1)
        wanted = min(32768, -(-(int(np.searchsorted(covered, 0.998)) + 1) // 64) * 64)
    if wanted >= vocab_size:
        return None
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:wanted]).copy())


def new_heads(options: TrainOptions, target: Target, store: TokenStore) -> Heads:
    """Heads to begin with: fresh ones, or those of `--init-from`."""
    if options.init_from:
        heads = load_heads(options.init_from, target)
        if heads.config.kind != options.kind:
            raise MedheadError(
                f"--init-from holds heads of kind {heads.config.kind!r}, the run trains {options.kind!r}"
            )
        return heads.float().requires_grad_(True)
    tokens = draft_tokens(options, store, target.vocab_size)
    torch.manual_seed(options.seed)
    heads = build_heads(heads_config(options, target, 0 if tokens is None else len(tokens)))
    if tokens is not None:
        assert heads.draft_tokens is not None
        heads.draft_tokens.copy_(tokens)
    return heads.to(target.device)


def claim(options: TrainOptions) -> Path:
    """The run's folder: a new one, or that of the same run. Nothing else is ever written into.

    Raises:
        MedheadError: the output folder holds something else, or a run with other options.
    """
    output = Path(options.output)
    record = output / "run" / OPTIONS_FILE
    if output.exists() and not output.is_dir():
        raise MedheadError(f"--output {options.output!r} is a file; give a folder")
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(options.to_dict()))
        other = sorted(name for name in now if name not in FREE and before.get(name) != now[name])
        if other:
            name = other[0]
            raise MedheadError(
                f"--output {options.output!r} holds a run with other options: {name} was {before.get(name)!r}, now "
                f"{now[name]!r}; give the same options to go on, or another folder"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise MedheadError(f"--output {options.output!r} holds something else; give a new or empty folder")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(options.to_dict(), indent=1) + "\n", encoding="utf-8")
    return record.parent


def load_target(options: TrainOptions) -> Any:
    """The model, in four bits for `qlora`.

    Raises:
        MedheadError: it cannot be loaded, or bitsandbytes is missing.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.recipe != "qlora":
        return load_model(options.model, device, dtype, options.trust_remote_code)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MedheadError("--recipe qlora needs bitsandbytes: pip install 'medhead[qlora]'") from None
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=four_bits, device_map={"": device}, dtype=dtype, use_safetensors=True,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)


def held_out_texts(store: TokenStore, documents: np.ndarray, length: int, device: torch.device) -> list[Texts]:
    """Held-out documents in padded batches of one document a row."""
    order = sorted(documents.tolist(), key=lambda document: int(store.lengths[document]))
    batches = []
    for start in range(0, len(order), 8):
        rows = [store[document] for document in order[start : start + 8]]
        longest = min(length, max(len(tokens) for tokens, _ in rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        document = torch.full((len(rows), longest), -1)
        for row, (tokens, answer) in enumerate(rows):
            count = min(longest, len(tokens))
            ids[row, :count] = torch.from_numpy(tokens[:count].astype(np.int64))
            mask[row, :count] = torch.from_numpy(answer[:count].copy())
            document[row, :count] = 0
        batches.append(Texts(ids.to(device), mask.to(device), document.to(device)))
    return batches


def run(options: TrainOptions) -> None:
    """The whole run: prepare, train (going on where it was stopped), measure, write the heads."""
    loss_named(options.loss)
    folder = claim(options)
    output = Path(options.output)
    if (output / CONFIG_FILE).exists() and (output / FACTS_FILE).exists():
        print(f"finished already: {output}", file=sys.stderr)
        return
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    model = load_target(options)
    target = Target(model)
    ends = model.generation_config.eos_token_id
    end_tokens = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    cache = folder / "tokens"
    store = prepare(options.data, tokenizer, cache, end_tokens=end_tokens)
    train, held_out = store.split(min(256, max(1, round(options.held_out * store.documents)))
                                  if options.held_out and store.documents > 1 else 0, options.seed)  # fmt: skip
    held_store = store
    if options.eval_data:
        held_store = prepare(options.eval_data, tokenizer, cache, end_tokens=end_tokens)
        held_out = np.arange(min(256, held_store.documents))
    heads = new_heads(options, target, store)
    lora = None
    if options.recipe != "heads":
        lora = {"r": options.lora_rank, "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout,
                "target_modules": options.lora_targets or linear_layers(model)}  # fmt: skip
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped, heads = wrap(model, heads, lora)
    module = HeadsModule(wrapped, target, heads, options)
    texts = held_out_texts(held_store, held_out, options.length, target.device)

    def evaluate_heads() -> dict[str, float]:
        with evaluating(module):
            found = measure(heads, target, texts, most_anchors=4096)
        top1 = {f"top1_depth_{d + 1}": row[0] for d, row in enumerate(found.accuracies)}
        return top1 | {"predicted_accepted_length": found.length(found.best_tree(32))}

    rows = PackedDataset(store, train, options.length, options.seed, options.epochs)
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(
        f"{store.documents:,} documents, {store.tokens:,} tokens, {store.assistant_tokens:,} of them to guess"
        f"{_skipped(store)}; {len(held_out)} documents held out; {parameters:,} parameters to train", file=sys.stderr,
    )  # fmt: skip
    trainer = HeadsTrainer(module, training_arguments(options, folder, target), options, rows, evaluate_heads)
    remove_torn(folder)
    found = last_checkpoint(folder)
    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    except torch.OutOfMemoryError as error:
        raise MedheadError(
            f"out of memory: lower --batch-size ({options.batch_size}), --length ({options.length}) or --share "
            f"({options.share}), raise --accumulation instead ({str(error).splitlines()[0][:80]})"
        ) from None
    if not trainer.is_world_process_zero():
        return
    facts = {
        "model": options.model, "recipe": options.recipe, "loss": options.loss, "steps": trainer.state.global_step,
        "epochs": options.epochs, "documents": len(train), "tokens": rows.tokens, "answer_tokens": store.assistant_tokens,
        "minutes": round((time.monotonic() - began) / 60, 1), "resumed": found is not None,
        "parameters": sum(p.numel() for p in heads.parameters()), "seed": options.seed,
    }  # fmt: skip
    with evaluating(module):
        finish(output, wrapped, heads, measure(heads, target, texts), facts, DTYPES[options.save_dtype])


def finish(
    output: Path, wrapped: Any, heads: Heads, measured: Measured, facts: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write heads, accuracies, trees, model card and picture."""
    heads.config.accuracies, heads.config.trees = measured.accuracies, measured.trees
    save_adapter(wrapped, heads, output, dtype)
    (output / "accuracies.json").write_text(json.dumps(measured.to_dict(), indent=1) + "\n", encoding="utf-8")
    write_card(output, heads.config, facts, measured)
    plot_accuracy(output / "accuracy.png", measured)
    (output / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    top1 = " ".join(f"{row[0]:.2f}" for row in measured.accuracies)
    length = measured.length(measured.best_tree(32))
    print(f"top-1 by depth {top1}; {length:.2f} tokens a pass predicted with 32 nodes", file=sys.stderr)
    print(f"heads are in {output}", file=sys.stderr)


def training_arguments(options: TrainOptions, folder: Path, target: Target) -> TrainingArguments:
    """transformers' arguments for these options."""
    reports = []
    if options.tensorboard:
        try:
            import tensorboard  # noqa: F401

            reports = ["tensorboard"]
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
        except ImportError:
            print("no TensorBoard logs: tensorboard is not installed (pip install 'medhead[train]')", file=sys.stderr)
    on_gpu = target.device.type == "cuda"
    evaluate = options.eval_steps or options.save_steps
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the data set holds all epochs
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_grad_norm=options.clip,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=evaluate,
        report_to=reports,
        seed=options.seed,
        use_cpu=not on_gpu,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        disable_tqdm=True,
        log_level="error",
    )


def linear_layers(model: Any) -> list[str]:
    """Names of the linear layers inside the decoder layers, for LoRA."""
    names = set()
    for name, module in model.named_modules():
        if "Linear" in type(module).__name__ and any(part.isdigit() for part in name.split(".")):
            names.add(name.rsplit(".", 1)[-1])
    if not names:
        raise MedheadError("no linear layers were found to adapt; name them with --lora-targets")
    return sorted(names)


def _skipped(store: TokenStore) -> str:
    return "".join(f", {count} records left out ({why})" for why, count in store.skipped.items())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.training.finetune", lambda: run(read_options(args)))


if __name__ == "__main__":
    sys.exit(main())
