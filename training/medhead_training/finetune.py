"""Train heads for a model of your own: `python -m medhead_training.finetune --model … --data … --output …`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead.heads import Heads
from medhead.heads.adapter import ADAPTER_FILE, WEIGHTS_FILE, save_adapter
from medhead.heads.config import CONFIG_FILE
from medhead.model.loading import DTYPES, load_tokenizer, pick_device
from medhead.model.target import Target
from medhead_training.data.feature_store import TokenStore, prepare
from medhead_training.data.packing import PackedDataset
from medhead_training.data.shard import check_processes, leave_to_shards, spread_layers
from medhead_training.measure import Measured, measure
from medhead_training.objective.builders import adapted, load_target, new_heads
from medhead_training.objective.module import HeadsModule, evaluating
from medhead_training.objective.unroll import PackedBatch
from medhead_training.trainer.options import TrainOptions, add_options, read_options
from medhead_training.trainer.report import plot_accuracy, write_card
from medhead_training.trainer.run_folder import FACTS_FILE, claim, same_data
from medhead_training.trainer.trainer import HeadsTrainer, last_checkpoint, remove_torn

EXAMPLES = """\
examples:
  python -m medhead_training.finetune --model Qwen/Qwen3-0.6B --data answers.jsonl --output my-heads
  python -m medhead_training.finetune --model my/model --data chats/ --output heads --kind attention --epochs 2
  python -m medhead_training.finetune --config run.yaml --output again
  accelerate launch -m medhead_training.finetune --model my/model --data answers.jsonl --output heads

Text that the model itself wrote trains much better heads than any other: make some first with
  python -m medhead_training.generate_data --model … --prompts prompts.jsonl --output answers.jsonl

Start the same command again to go on where it was stopped. The output folder holds the finished heads (a PEFT adapter),
a model card, accuracies, trees and a picture, and the folder `run` with checkpoints and logs.
"""
ACCURACIES_FILE = "accuracies.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead_training.finetune",
        description="Train heads that guess what a model says next, so that it can be decoded faster.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(options)
    return options


def split(options: TrainOptions, store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """Documents to train on, and those held out, which is none if there is other text to measure with."""
    wanted = bool(options.held_out) and not options.eval_data and store.documents > 1
    return store.split(min(256, max(1, round(options.held_out * store.documents))) if wanted else 0, options.seed)


def check_anchors(rows: PackedDataset) -> None:
    """Refuse text that heads cannot learn from.

    Raises:
        MedheadError: no document goes on beyond the token that the target itself says.
    """
    for index in rows.rows_of_epoch(0):
        row = {name: part[None] for name, part in rows[index].items()}
        if bool(PackedBatch(row["input_ids"], row["mask"], row["document"]).guessable(2).any()):
            return
    raise MedheadError("no document holds a token to guess: it needs an answer token behind at least 2 others")


def held_out_texts(store: TokenStore, documents: np.ndarray, length: int, device: torch.device) -> list[PackedBatch]:
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
        texts = PackedBatch(ids.to(device), mask.to(device), document.to(device))
        if bool(texts.guessable(2).any()):
            batches.append(texts)
    return batches


def run(options: TrainOptions) -> None:
    """The whole run: prepare, train (going on where it was stopped), measure, write the heads."""
    output, device = Path(options.output), pick_device(options.device)
    arguments = training_arguments(options, output / "run", device)
    if device.index not in (None, arguments.device.index):
        raise MedheadError(f"choose the GPU with CUDA_VISIBLE_DEVICES={device.index}, and give --device {device.type}")
    device, main = arguments.device, arguments.process_index == 0  # each process has its own device
    if options.shard:
        check_processes()
    with arguments.main_process_first(local=False):
        folder = claim(options, main)
        if (output / CONFIG_FILE).exists() and (output / FACTS_FILE).exists():
            if main:
                print(f"finished already: {output}", file=sys.stderr)
            return
        tokenizer = load_tokenizer(options.model, options.trust_remote_code)
        model = load_target(options, device)
        target = Target(model, packed=False)  # it trains: weights to decode with would only take memory
        if options.length > target.context:
            raise MedheadError(
                f"--length {options.length} is more than the {target.context} tokens that {target.name} can read"
            )
        ends = model.generation_config.eos_token_id
        end_tokens = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        data = [options.data, options.eval_data] if options.eval_data else [options.data]
        stores = [prepare(part, tokenizer, folder / "tokens", end_tokens=end_tokens, progress=main) for part in data]
        same_data(folder, stores, main)
        if main:
            remove_torn(folder)
    store, held_store = stores[0], stores[-1]
    train, held_out = split(options, store)
    if options.eval_data:
        held_out = np.arange(min(256, held_store.documents))
    rows = PackedDataset(store, train, options.length, options.seed, options.epochs)
    check_anchors(rows)
    wrapped, heads = adapted(options, target, new_heads(options, target, store))
    if options.shard:
        here, numbers = spread_layers(target, wrapped, device)
        if main:
            print(
                f"layers of {target.name} are spread over {arguments.world_size} processes: {here:,} of {numbers:,} numbers "
                "are in this one", file=sys.stderr,
            )  # fmt: skip
    module = HeadsModule(wrapped, target, heads, options)
    if options.shard:
        leave_to_shards(module)
    texts = held_out_texts(held_store, held_out, options.length, device)

    def evaluate_heads() -> dict[str, float]:
        if not texts:
            return {}
        with evaluating(module):
            found = measure(heads, target, texts, most_anchors=4096)
        top1 = {f"top1_depth_{d + 1}": row[0] for d, row in enumerate(found.accuracies)}
        return top1 | {"predicted_accepted_length": found.walked["32"]}

    rows_a_step = options.batch_size * options.accumulation * arguments.world_size
    if arguments.max_steps > 0:  # never more than the epochs
        arguments.max_steps = min(arguments.max_steps, max(1, -(-len(rows) // rows_a_step)))
    trainer = HeadsTrainer(module, arguments, options, rows, evaluate_heads)
    if main:
        parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(
            f"{store.documents:,} documents, {store.tokens:,} tokens, {store.assistant_tokens:,} of them to guess"
            f"{_skipped(store)}; {len(held_out)} documents held out; {parameters:,} parameters to train", file=sys.stderr,
        )  # fmt: skip
        if not module.packs:
            print(
                f"{target.name} mixes texts that stand in one row: each is read in its own, which is slower",
                file=sys.stderr,
            )
        if options.tensorboard:
            log_to_tensorboard(trainer, folder / "logs")
    found = last_checkpoint(folder)
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    minutes = (time.monotonic() - began) / 60
    with evaluating(module):  # all processes read a target that is spread over them
        measured = measure(heads, target, texts) if texts and (main or options.shard) else None
    if not main:
        return
    seen = trainer.state.global_step * rows_a_step
    facts = {
        "model": options.model, "recipe": options.recipe, "loss": options.loss, "steps": trainer.state.global_step,
        "epochs": round(rows.epochs_in(seen), 1), "documents": len(train), "tokens": rows.tokens,
        "answer_tokens": store.assistant_tokens_of(train),
        "minutes": round(minutes, 1), "resumed": found is not None,
        "parameters": sum(p.numel() for p in heads.parameters()), "seed": options.seed,
        "init_from": str(options.init_from or ""),
    }  # fmt: skip
    finish(output, wrapped, heads, measured, facts, DTYPES[options.save_dtype])


@contextmanager
def plain_errors(options: TrainOptions) -> Iterator[None]:
    """Turns what the machine lacks into one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MedheadError(
            f"out of memory: lower --batch-size ({options.batch_size}), --length ({options.length}) or --share "
            f"({options.share}), raise --accumulation instead ({str(error).splitlines()[0][:80]})"
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise MedheadError(
            f"no space is left ({error}): free some and start again; the run goes on where it was"
        ) from None


def finish(
    output: Path, wrapped: Any, heads: Heads, measured: Measured | None, facts: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write heads, accuracies, trees, model card and picture; what is written last says that all is there."""
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
            "what was trained is kept in its checkpoint"
        ) from error
    if measured is not None:
        top1 = " ".join(f"{row[0]:.2f}" for row in measured.accuracies)
        length = measured.walked["32"]
        print(f"top-1 by depth {top1}; {length:.2f} tokens a pass predicted with 32 nodes", file=sys.stderr)
    print(f"heads are in {output}", file=sys.stderr)


def log_to_tensorboard(trainer: HeadsTrainer, folder: Path) -> None:
    """Write the logs for TensorBoard too, if it is installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        print("no TensorBoard logs: tensorboard is not installed (pip install 'medhead[train]')", file=sys.stderr)
        return
    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)  # TENSORBOARD_LOGGING_DIR, if that is set
    trainer.add_callback(callback)


def training_arguments(options: TrainOptions, folder: Path, device: torch.device) -> TrainingArguments:
    """transformers' arguments for these options; they know the processes that train together."""
    on_gpu = device.type == "cuda"
    evaluate = options.eval_steps or options.save_steps
    arguments = TrainingArguments(
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
        report_to=[],
        seed=options.seed,
        use_cpu=device.type == "cpu",
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,  # none changes
        ddp_timeout=6 * 3600,  # one process tokenizes for all
        disable_tqdm=True,
        log_level="error",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs need as many processes; `DataParallel` cannot do it
    return arguments


def _skipped(store: TokenStore) -> str:
    return "".join(f", {count} records left out ({why})" for why, count in store.skipped.items())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)

    def work() -> None:
        options = read_options(args)
        with plain_errors(options):
            run(options)

    code = guarded("medhead_training.finetune", work)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # at once: while Python takes itself down, threads of the process group can abort a process that has done its work
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
