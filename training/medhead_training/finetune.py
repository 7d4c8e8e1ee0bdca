"""`medhead finetune`: train draft heads for a model."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers.integrations import TensorBoardCallback

from medhead.cli.common import Parser, run_command
from medhead.errors import MedheadError
from medhead.generation_config import end_tokens
from medhead.heads import Heads
from medhead.heads.adapter import ADAPTER_FILE, WEIGHTS_FILE, save_adapter
from medhead.heads.config import CONFIG_FILE
from medhead.model.eval_mode import eval_mode
from medhead.model.loading import DTYPES, load_tokenizer, pick_device
from medhead.model.target import Target
from medhead_training.data.packing import PackedDataset
from medhead_training.data.token_store import TokenStore, prepare_tokens
from medhead_training.objective.builders import load_target, make_heads, wrap_for_training
from medhead_training.objective.kept_features import keep_features, remove_features
from medhead_training.objective.measure import Document, measure_accuracy
from medhead_training.objective.module import HeadsModule
from medhead_training.objective.tree_eval import HeadAccuracy
from medhead_training.objective.unroll import PackedBatch
from medhead_training.trainer.auto_options import (
    MAX_HELD_OUT,
    TextFacts,
    choose,
    chosen_values,
    expectation,
    held_out_documents,
)
from medhead_training.trainer.options import TrainOptions, add_options, read_options
from medhead_training.trainer.report import plot_accuracy, write_card
from medhead_training.trainer.run_folder import FACTS_FILE, check_same_data, claim_folder
from medhead_training.trainer.shard import check_processes, exclude_frozen_from_ddp, shard_layers
from medhead_training.trainer.trainer import (
    HeadsTrainer,
    last_checkpoint,
    remove_incomplete_checkpoints,
    training_arguments,
)

EXAMPLES = """\
examples:
  medhead finetune --model Qwen/Qwen3-0.6B --data answers.jsonl --output my-heads
  medhead finetune --model my/model --data chats/ --output heads --kind attention --epochs 2
  medhead finetune --config run.yaml --output again
  accelerate launch -m medhead_training.finetune --model my/model --data answers.jsonl --output heads

Heads learn best from text that the model itself wrote. Make it first with
  medhead generate-data --model MODEL --prompts prompts.jsonl --output answers.jsonl

If the command is stopped, start it again with the same options: it resumes from its last checkpoint. The output folder holds
the finished heads (a PEFT adapter), a model card, accuracies, trees and a picture, and in `run` the checkpoints and logs.

exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""
ACCURACIES_FILE = "accuracies.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MIN_ANSWER_TOKENS = 10_000  # with fewer, heads learn little


def parser() -> Parser:
    """Return the command's parser."""
    description = "Train heads that draft a model's next tokens, for speculative decoding."
    options = Parser(prog="medhead finetune", description=description, epilog=EXAMPLES)
    add_options(options)
    return options


def split(options: TrainOptions, store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents to train on and the held-out ones, which are none if there is other text to measure with."""
    count = 0 if options.eval_data else held_out_documents(options, store.documents)
    return store.split(count, options.seed)


def check_anchors(rows: PackedDataset) -> None:
    """Raise a `MedheadError` if the text has no token that heads can learn to predict."""
    for index in rows.rows_of_epoch(0):
        row = {name: part[None] for name, part in rows[index].items()}
        if bool(PackedBatch(row["input_ids"], row["mask"], row["document"]).predictable(2).any()):
            return
    raise MedheadError("no document holds a token to predict: it needs an answer token after at least 2 others")


def data_hints(answer_tokens: int, steps: int, options: TrainOptions) -> list[str]:
    """Return what to say where the text is far too little for heads, or where --max-steps does not do what it seems to."""
    lines = []
    if answer_tokens < MIN_ANSWER_TOKENS:
        lines.append(
            f"{answer_tokens:,} answer tokens ({steps} steps) are far too few: heads need at least {MIN_ANSWER_TOKENS:,}, better "
            "hundreds of thousands; let the model write them with medhead generate-data"
        )
    if options.max_steps > steps:
        lines.append(
            f"--max-steps {options.max_steps} is a limit, not a target: --epochs {options.epochs} ends after {steps} "
            "steps; give more --epochs or more text"
        )
    return lines


def held_out_texts(store: TokenStore, documents: np.ndarray, seq_len: int) -> list[Document]:
    """Return held-out documents with a token to predict, shortest first, cut to `seq_len` tokens."""
    pairs = [store[document] for document in sorted(documents.tolist(), key=lambda d: int(store.lengths[d]))]
    cut = [(ids[:seq_len].astype(np.int64), mask[:seq_len].copy()) for ids, mask in pairs if mask[2:seq_len].any()]
    return [(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in cut]


def run(options: TrainOptions) -> None:
    """Prepare the data, train (resuming if there is a checkpoint), measure and write the heads."""
    output, device = Path(options.output), pick_device(options.device)
    arguments = training_arguments(options, output / "run", device)
    if device.index not in (None, arguments.device.index):
        raise MedheadError(
            f"--device {device} cannot name a GPU: set CUDA_VISIBLE_DEVICES={device.index} and give --device {device.type}"
        )
    device, main = arguments.device, arguments.process_index == 0  # each process has its own device
    if options.shard:
        check_processes()
    with arguments.main_process_first(local=False):
        folder = claim_folder(options, main)
        if (output / CONFIG_FILE).exists() and (output / FACTS_FILE).exists():
            _print(f"finished already: {output}", main)
            return
        tokenizer = load_tokenizer(options.model, options.trust_remote_code)
        model = load_target(options, device)
        target = Target(model, packed=False)  # packed weights only speed up decoding
        if (options.seq_len or 0) > target.context:
            raise MedheadError(
                f"--seq-len {options.seq_len} is more than the {target.context} tokens that {target.name} can read"
            )
        ends = end_tokens(model)
        sources = [options.data, options.eval_data] if options.eval_data else [options.data]
        stores = [prepare_tokens(s, tokenizer, folder / "tokens", end_tokens=ends, progress=main) for s in sources]
        check_same_data(folder, stores, main)
        if main:
            remove_incomplete_checkpoints(folder)
    store, held_out_store = stores[0], stores[-1]
    train, held_out = split(options, store)
    if options.eval_data:
        held_out = np.arange(min(MAX_HELD_OUT, held_out_store.documents))
    text = TextFacts.of(store)
    given, options = options, choose(options, text, target.context, arguments.world_size)
    assert options.seq_len is not None
    assert options.batch_size is not None
    assert options.epochs is not None
    arguments.per_device_train_batch_size, arguments.eval_steps = options.batch_size, options.eval_steps
    chosen = chosen_values(given, options)
    rows = PackedDataset(
        store, train, options.seq_len, options.seed, options.epochs, learn_from_all=options.learn_from == "all"
    )
    check_anchors(rows)
    wrapped, heads = wrap_for_training(options, target, make_heads(options, target, store))
    if options.shard:
        here, total = shard_layers(target, wrapped, device)
        _print(
            f"layers of {target.name} are sharded over {arguments.world_size} processes: this one holds {here:,} of {total:,} "
            "parameters", main,
        )  # fmt: skip
    module = HeadsModule(wrapped, target, heads, options)
    if options.shard:
        exclude_frozen_from_ddp(module)
    features: list[torch.Tensor] | None = [] if options.recipe == "heads" else None  # of held-out text, kept in memory
    texts = held_out_texts(held_out_store, held_out, options.seq_len)

    def evaluate_heads() -> dict[str, float]:
        if not texts:
            return {}
        with eval_mode(module):
            found = measure_accuracy(heads, target, texts, max_anchors=4096, features=features)
        top1 = {f"top1_depth_{d + 1}": row[0] for d, row in enumerate(found.accuracies)}
        return top1 | {"predicted_accepted_length": found.accepted_lengths["32"]}

    rows_per_step = options.batch_size * options.gradient_accumulation_steps * arguments.world_size
    epoch_steps = max(1, -(-len(rows) // rows_per_step))  # of all epochs
    lines = data_hints(store.assistant_tokens_of(train), epoch_steps, options)
    if arguments.max_steps > 0:  # never more than the epochs
        arguments.max_steps = min(arguments.max_steps, epoch_steps)
    trainer = HeadsTrainer(module, arguments, options, rows, evaluate_heads)
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    skipped = "".join(f", {count} records skipped ({reason})" for reason, count in store.skipped.items())
    _print(
        f"{store.documents:,} documents, {store.tokens:,} tokens, {store.assistant_tokens:,} of them to predict{skipped}; "
        f"{len(held_out)} documents held out; {parameters:,} parameters to train", main,
    )  # fmt: skip
    if chosen:
        values = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in chosen.items())
        _print(f"chosen from the amount of text, each can be given: {values}", main)
    for line in [expectation(text), *lines]:
        _print(line, main)
    if not module.supports_packing:
        line = "does not separate packed documents: each is read in a row of its own, which is slower"
        _print(f"{target.name} {line}", main)
    keep_features(module, rows, folder, arguments.world_size, main)
    if main and options.tensorboard:
        log_to_tensorboard(trainer, folder / "logs")
    checkpoint = last_checkpoint(folder)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    kept_step = trainer.load_best()
    minutes = (time.monotonic() - start) / 60
    with eval_mode(module):  # a sharded target takes all processes
        measured = measure_accuracy(heads, target, texts) if texts and (main or options.shard) else None
    if not main:
        return
    steps = trainer.state.global_step
    facts = {
        "model": options.model, "recipe": options.recipe, "loss": options.loss, "steps": steps, "kept_step": kept_step,
        "epochs": round(rows.epochs_in(steps * rows_per_step), 1), "documents": len(train), "tokens": rows.tokens,
        "answer_tokens": store.assistant_tokens_of(train),
        "minutes": round(minutes, 1), "resumed": checkpoint is not None,
        "parameters": sum(p.numel() for p in heads.parameters()), "seed": options.seed,
        "init_from": str(options.init_from or ""), "chosen": chosen,
    }  # fmt: skip
    write_results(output, wrapped, heads, measured, facts, DTYPES[options.save_dtype])
    remove_features(folder)


def write_results(
    output: Path, wrapped: Any, heads: Heads, measured: HeadAccuracy | None, facts: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write heads, accuracies, trees, model card and picture; `FACTS_FILE` is the last and marks completion."""
    config = heads.config
    config.accuracies, config.trees = (measured.accuracies, measured.trees) if measured else ([], {})
    try:
        save_adapter(wrapped, heads, output, dtype)
        write_card(output, config, facts, measured)
        if measured is not None:
            text = json.dumps(measured.to_dict(), indent=1) + "\n"
            (output / ACCURACIES_FILE).write_text(text, encoding="utf-8")
            plot_accuracy(output / "accuracy.png", measured)
        (output / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        for name in (WEIGHTS_FILE, ADAPTER_FILE, CONFIG_FILE, "README.md", ACCURACIES_FILE, "accuracy.png", FACTS_FILE):
            (output / name).unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:120]
        raise MedheadError(
            f"the heads cannot be written to {str(output)!r} ({reason}); free some space and start again: "
            "the checkpoint of the finished training is kept"
        ) from error
    if measured is not None:
        top1 = " ".join(f"{row[0]:.2f}" for row in measured.accuracies)
        _print(f"top-1 by depth {top1}; predicted accepted length {measured.accepted_lengths['32']:.2f} with 32 nodes")
    _print(f"heads are in {output}")


def log_to_tensorboard(trainer: HeadsTrainer, folder: Path) -> None:
    """Write the logs for TensorBoard too, if it is installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        _print("no TensorBoard logs: tensorboard is not installed (pip install 'medhead[train]')")
        return
    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)  # TENSORBOARD_LOGGING_DIR, if that is set
    trainer.add_callback(callback)


def _print(line: str, main: bool = True) -> None:
    if main:
        print(line, file=sys.stderr)


def work(args: argparse.Namespace) -> None:
    """Read the options and run; turn lack of memory or disk space into one line that says what to do."""
    options = read_options(args)
    try:
        run(options)
    except torch.OutOfMemoryError as error:
        raise MedheadError(
            f"out of memory: lower --batch-size ({options.batch_size}), --seq-len ({options.seq_len}) or --anchor-fraction "
            f"({options.anchor_fraction}), raise --gradient-accumulation-steps instead ({str(error).splitlines()[0][:80]})"
        ) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        hint = "free some and start again; the run resumes where it was"
        raise MedheadError(f"no space is left ({error}): {hint}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    code = run_command(parser(), work, argv)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # at once: while Python shuts down, threads of the process group can abort a process that has finished its work
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
