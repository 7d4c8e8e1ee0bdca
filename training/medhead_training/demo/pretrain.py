"""Train the demo target from scratch: `python -m medhead_training.demo.pretrain --data DIR --output DIR`.

With `--init-from` an existing target is trained further on the datasets of `--mix`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from medhead.cli.common import Parser, check_range, run_command
from medhead.errors import MedheadError
from medhead.model.loading import load_model, load_tokenizer
from medhead_training.demo.corpus import FILES, chats, pack
from medhead_training.demo.tokenizer import train_tokenizer
from medhead_training.trainer.optim import muon_and_adamw, set_learning_rate

MIX = {"tinystories": 2.5, "sgd": 0.8, "stories_chat": 0.5, "general_chat": 0.5}
CONTEXT = 1024


def demo_config(tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int) -> LlamaConfig:
    """Return the configuration of the demo target, which has 5.4M parameters with the defaults."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batch_at(stream: np.ndarray, step: int, length: int, tokens_per_step: int, seed: int) -> torch.Tensor:
    """Return random windows `[tokens_per_step / length, length]`, which depend on seed and step alone."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(stream) - length - 1, tokens_per_step // length)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


@torch.no_grad()
def validation_losses(model: LlamaForCausalLM, streams: dict[str, np.ndarray], length: int = 512) -> dict[str, float]:
    """Return the mean cross-entropy in nats per token on the beginning of every held-out set."""
    model.eval()
    losses = {}
    for name, stream in streams.items():
        if len(stream) < length:
            continue
        rows = min(16, len(stream) // length)
        ids = torch.from_numpy(stream[: rows * length].astype(np.int64)).view(rows, length)
        losses[name] = float(model(ids, labels=ids).loss)
    model.train()
    return losses


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, np.ndarray, dict[str, np.ndarray]]:
    """Return tokenizer, training stream and held-out streams, which are made once and kept in the output folder."""
    work = args.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    made_of = {name: getattr(args, name) for name in ("mix", "seed", "vocab_size")} | {"init_from": str(args.init_from)}
    record = work / "made_of.json"
    if (work / "train.npy").exists():
        before = json.loads(record.read_text())
        if before != made_of:
            name = next(key for key in made_of if before.get(key) != made_of[key])
            raise MedheadError(
                f"{args.output} holds a run with another {name} ({before.get(name)!r}, now {made_of[name]!r}); "
                "give the same options to resume it, or another --output"
            )
    else:
        documents = chats(args.data, args.mix, args.seed)
        if args.init_from:
            load_tokenizer(str(args.init_from)).save_pretrained(work / "tokenizer")
        else:
            sample = (message["content"] for chat in documents[:20000] for message in chat)
            train_tokenizer(sample, args.vocab_size, CONTEXT).save_pretrained(work / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
        if len(tokenizer) > 2**16:
            raise MedheadError(f"the vocabulary has {len(tokenizer):,} tokens; this recipe stores at most {2**16:,}")
        record.write_text(json.dumps(made_of))
        np.save(work / "new.npy", pack(tokenizer, documents))
        os.replace(work / "new.npy", work / "train.npy")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    held_out = {}
    for name in args.mix:
        if args.eval and (args.eval / f"{FILES.get(name, name)}.jsonl").exists():
            held_out[name] = pack(tokenizer, chats(args.eval, {name: 1.0}, args.seed))
    return tokenizer, np.load(work / "train.npy", mmap_mode="r"), held_out


def train(args: argparse.Namespace) -> None:
    """Prepare the text, train (resuming if there is a checkpoint), evaluate and write the model folder."""
    for name, minimum in (("tokens_per_step", CONTEXT), ("warmup", 1), ("steps", 1)):
        check_range(args, name, minimum)
    args.mix = dict(args.mix)
    tokenizer, stream, held_out = prepare_text(args)
    if len(stream) < CONTEXT + 2:
        raise MedheadError(f"the text has {len(stream):,} tokens; training needs at least {CONTEXT + 2:,}")
    torch.manual_seed(args.seed)
    if args.init_from:
        model = load_model(str(args.init_from), torch.device("cpu"), torch.float32)
        if not isinstance(model, LlamaForCausalLM):
            raise MedheadError(f"--init-from {str(args.init_from)!r} is a {type(model).__name__}; give a Llama model")
    else:
        model = LlamaForCausalLM(demo_config(tokenizer, args.hidden, args.layers))
    model.train()
    optimizer = muon_and_adamw(model.named_parameters(), args.muon_lr, args.adamw_lr)
    work, step, spent = args.output / "work", 0, 0.0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        print(f"resuming at step {step}", file=sys.stderr)
    forward = torch.compile(model) if args.compile else model
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} tokens of text, {args.steps} steps", file=sys.stderr)
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=10, smoothing=0.05)
    began, saved_at, running = time.monotonic() - spent, time.monotonic(), None
    while True:
        seconds = time.monotonic() - began
        done = max(step / args.steps, seconds / (60 * args.minutes) if args.minutes else 0.0)
        if done >= 1.0:
            break
        factor = min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        set_learning_rate(optimizer, factor)
        ids = batch_at(stream, step, CONTEXT if done > 0.85 else 512, args.tokens_per_step, args.seed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = forward(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        if not torch.isfinite(loss):
            hint = "lower --muon-lr; the run resumes from its last checkpoint"
            raise MedheadError(f"the loss is {float(loss)} at step {step}: {hint}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        value = loss.item()
        running = value if running is None else 0.98 * running + 0.02 * value
        bar.update()
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        if time.monotonic() - saved_at > 60 * args.save_minutes:
            seconds = time.monotonic() - began
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            torch.save(state, work / "state.tmp")
            os.replace(work / "state.tmp", work / "state.pt")  # a kill leaves the old state or the new one
            export(model, tokenizer, args.output / "snapshot")
            saved_at = time.monotonic()
    bar.close()
    losses = validation_losses(model, held_out)
    report = {
        "parameters": parameters, "steps": step, "tokens": step * args.tokens_per_step,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "validation_loss": {name: round(loss, 3) for name, loss in losses.items()},
        "init_from": args.init_from.name if args.init_from else None,
        **{name: getattr(args, name) for name in ("mix", "muon_lr", "adamw_lr", "tokens_per_step", "seed")},
    }  # fmt: skip
    export(model, tokenizer, args.output / "model")
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model folder in bfloat16; the weights in training stay as they are."""
    if folder.exists():
        shutil.rmtree(folder)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mix_entry(text: str) -> tuple[str, float]:
    """Parse `NAME=TIMES` of `--mix`."""
    name, _, times = text.partition("=")
    if name not in (*MIX, *FILES):
        raise argparse.ArgumentTypeError(f"{text!r} names no dataset; there are {', '.join((*MIX, *FILES))}")
    try:
        if 0 < float(times) < math.inf:
            return name, float(times)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be NAME=TIMES with a positive number, such as {name}=2")


def parser() -> Parser:
    """Return the command's parser."""
    options = Parser(
        prog="python -m medhead_training.demo.pretrain",
        description="Train the demo target from scratch. If it is killed, start it again: it resumes from its last checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--data", type=Path, required=True, help="folder with the training files (jsonl)")
    add("--eval", type=Path, help="folder with held-out files, for the validation loss")
    add("--output", type=Path, required=True, help="folder for checkpoints and the model")
    add("--init-from", type=Path, help="Llama model to train further; without it training starts from scratch")
    add("--mix", type=mix_entry, nargs="+", metavar="NAME=TIMES", default=list(MIX.items()),
        help="datasets and how often each is read; `repeats` is made from tinystories")  # fmt: skip
    add("--minutes", type=float, default=0.0, help="end of the schedule in minutes (0: --steps decides)")
    add("--steps", type=int, default=2400, help="updates")
    add("--tokens-per-step", type=int, default=8192, help="tokens of an update")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--layers", type=int, default=6, help="layers")
    add("--vocab-size", type=int, default=4096, help="size of the vocabulary")
    add("--muon-lr", type=float, default=0.01, help="peak learning rate of matrices")
    add("--adamw-lr", type=float, default=0.004, help="peak learning rate of the rest")
    add("--warmup", type=int, default=40, help="updates in which the learning rates rise")
    add("--save-minutes", type=float, default=4.0, help="minutes between checkpoints")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the model")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), train, argv)


if __name__ == "__main__":
    sys.exit(main())
