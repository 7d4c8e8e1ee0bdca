"""Load a service from command-line options: model, heads, decoder, engine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medhead.cli.common import add_model_options as add_decoder_options
from medhead.cli.common import make_decoder
from medhead.errors import MedheadError
from medhead.heads.adapter import adapts_target, heads_of
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.serving.engine import Engine
from medhead_app.memory_check import check_memory
from medhead_app.service import Service

DEMO_NAME = "medhead-demo"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `medhead generate` that choose the model, and `--name`."""
    group = parser.add_argument_group("model and proposer")
    add_decoder_options(group)
    group.add_argument("--name", help="name of the model on the page and in the API (default: from --model)")


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit how much is served."""
    group = parser.add_argument_group("limits")
    group.add_argument("--max-rows", type=int, default=8, help="largest number of requests in a batch (default: 8)")
    group.add_argument("--max-queue", type=int, default=64, help="largest number of waiting requests (default: 64)")
    group.add_argument("--time-limit", type=float, default=300.0, help="seconds a request may take (default: 300)")
    group.add_argument("--max-prompt-tokens", type=int, help="longest prompt in tokens (default: the model's context)")
    group.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer in tokens (default: 1024)")


def check_numbers(args: argparse.Namespace) -> None:
    """Check the options that are numbers."""
    prompt, size = args.max_prompt_tokens, args.tree_size
    for name, value, valid, allowed in (
        ("--tree-size", size, size is None or 1 <= size <= 256, "from 1 to 256"),
        ("--max-rows", args.max_rows, 1 <= args.max_rows <= 4096, "from 1 to 4096"),
        ("--max-queue", args.max_queue, 0 <= args.max_queue <= 10**6, "from 0 to 1,000,000"),
        ("--time-limit", args.time_limit, 0 < args.time_limit < float("inf"), "above 0"),
        ("--max-prompt-tokens", prompt, prompt is None or prompt >= 1, "at least 1"),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
    ):
        if not valid:
            raise MedheadError(f"{name} must be {allowed}, got {value}")


def load_service(args: argparse.Namespace, prog: str) -> Service:
    """Load the model and start the engine as the checked options say; report the slow steps as `prog`."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    source = args.model or DEMO_MODEL
    name = args.name or (DEMO_NAME if args.model is None else model_name(args.model))
    check_memory(source, device, dtype)
    with _reported(prog, f"loading {name} ({str(dtype).removeprefix('torch.')} on {device})"), _in_memory(name, device):
        tokenizer = load_tokenizer(source, args.trust_remote_code)
        decoder = make_decoder(args, load_model(source, device, dtype, args.trust_remote_code))
    heads: Any = args.heads or (str(DEMO_HEADS) if args.model is None else None)
    if heads is not None and adapts_target(heads):
        heads = heads_of(decoder.model)
    limits = {"max_rows": args.max_rows, "max_queue": args.max_queue, "time_limit": args.time_limit}
    engine = Engine(decoder, tokenizer, heads=heads, **limits)
    with _reported(prog, "measuring the cost of a pass unless it is cached"), _in_memory(name, device):
        engine.start()
    lengths = {"max_prompt_tokens": args.max_prompt_tokens, "max_new_tokens": args.max_new_tokens}
    return Service(engine, tokenizer, name, **lengths)


def model_name(model: str) -> str:
    """Return a hub id unchanged, and the last part of a folder's path."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@contextmanager
def _reported(prog: str, step: str) -> Iterator[None]:
    print(f"{prog}: {step} ...", end="", file=sys.stderr, flush=True)
    start, ending = time.perf_counter(), ""
    try:
        yield
        ending = f" {time.perf_counter() - start:.1f} s"
    finally:
        print(ending, file=sys.stderr, flush=True)


@contextmanager
def _in_memory(name: str, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise MedheadError(
            f"{name!r} does not fit the memory of {device}; try --dtype bfloat16, a smaller --max-rows, another --device "
            "or a smaller model"
        ) from None
