"""From options to a running service: model, heads, decoder, engine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medhead.cli.common import add_model_options as add_decoding_options
from medhead.cli.common import make_decoder
from medhead.errors import MedheadError
from medhead.heads.adapter import adapts_target, heads_of
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.serving.engine import Engine
from medhead_app.memory_check import check_fits
from medhead_app.service import Service

DEMO_NAME = "medhead-demo"


def add_model_options(options: argparse.ArgumentParser) -> None:
    """What is served, as in `medhead.generate`."""
    what = options.add_argument_group("what to decode with")
    add_decoding_options(what)
    what.add_argument("--name", help="what the model is called on the page and in the API (default: from --model)")


def add_limit_options(options: argparse.ArgumentParser) -> None:
    """How much is served at a time."""
    limits = options.add_argument_group("limits")
    limits.add_argument("--max-rows", type=int, default=8, help="requests decoded at a time (default: 8)")
    limits.add_argument("--max-queue", type=int, default=64, help="requests that may wait (default: 64)")
    limits.add_argument("--time-limit", type=float, default=300.0, help="seconds for one request (default: 300)")
    limits.add_argument("--max-prompt-tokens", type=int, help="longest prompt (default: what the context holds)")
    limits.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer (default: 1024)")


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        MedheadError: names the option and its value.
    """
    rules: list[tuple[str, Any, bool, str]] = [
        ("--tree-size", args.tree_size, args.tree_size is None or 1 <= args.tree_size <= 256, "from 1 to 256"),
        ("--max-rows", args.max_rows, 1 <= args.max_rows <= 4096, "from 1 to 4096"),
        ("--max-queue", args.max_queue, 0 <= args.max_queue <= 10**6, "from 0 to 1,000,000"),
        ("--time-limit", args.time_limit, 0 < args.time_limit < float("inf"), "above 0"),
        (
            "--max-prompt-tokens",
            args.max_prompt_tokens,
            args.max_prompt_tokens is None or args.max_prompt_tokens >= 1,
            "at least 1",
        ),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
    ]
    for name, value, good, expected in rules:
        if not good:
            raise MedheadError(f"{name} must be {expected}, got {value}")


def load_service(args: argparse.Namespace, prog: str) -> Service:
    """Load everything and start the engine; says on standard error what takes long.

    Args:
        args: of `add_model_options` and `add_limit_options`, checked.
        prog: name of the program, for messages.

    Raises:
        MedheadError: something is not there, does not fit, or does not go together.
    """
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    source = args.model or DEMO_MODEL
    name = args.name or (DEMO_NAME if args.model is None else model_name(args.model))
    check_fits(source, device, dtype)
    with _step(prog, f"loading {name} ({str(dtype).removeprefix('torch.')} on {device})"), _memory(name, device):
        tokenizer = load_tokenizer(source, args.trust_remote_code)
        decoder = make_decoder(args, load_model(source, device, dtype, args.trust_remote_code))
    heads: Any = args.heads or (str(DEMO_HEADS) if args.model is None else None)
    if heads is not None and adapts_target(heads):
        heads = heads_of(decoder.model)
    engine = Engine(
        decoder,
        tokenizer,
        heads=heads,
        max_rows=args.max_rows,
        max_queue=args.max_queue,
        time_limit=args.time_limit,
    )
    with _step(prog, "measuring what a pass costs, unless that is known"), _memory(name, device):
        engine.start()
    limits = {"max_prompt_tokens": args.max_prompt_tokens, "max_new_tokens": args.max_new_tokens}
    return Service(engine, tokenizer, name, **limits)


def model_name(model: str) -> str:
    """A hub id as it is, a folder by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@contextmanager
def _step(prog: str, what: str) -> Iterator[None]:
    print(f"{prog}: {what} ...", end="", file=sys.stderr, flush=True)
    began, ending = time.perf_counter(), ""
    try:
        yield
        ending = f" {time.perf_counter() - began:.1f} s"
    finally:
        print(ending, file=sys.stderr, flush=True)


@contextmanager
def _memory(name: str, device: torch.device) -> Iterator[None]:
    """Running out of memory, in one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise MedheadError(
            f"{name!r} does not fit the memory of {device}; --dtype bfloat16, fewer --max-rows, another --device or a "
            "smaller model may do"
        ) from None
