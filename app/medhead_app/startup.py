"""Load a service as the options of a command say: model, heads, decoder, engine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medhead.cli.common import make_decoder
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads.adapter import adapts_target, heads_of
from medhead.model.loading import load_model, load_processor, load_tokenizer, pick_device, pick_dtype
from medhead.model.named_models import DEMO, default_heads, resolve_model
from medhead.model.prompt_inputs import modalities, why_no_images
from medhead.serving.engine import Engine
from medhead_app.memory_check import GIB, check_memory
from medhead_app.service import Service

DEMO_NAME = "medhead-demo"


def load_service(args: argparse.Namespace, prog: str) -> Service:
    """Load the model and start the engine as the checked options say; report the slow steps as `prog`."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    name = args.name or (DEMO_NAME if args.model in (None, DEMO) else model_name(args.model))
    check_memory(resolve_model(args.model), device, dtype)
    with _reported(prog, f"loading {name} ({str(dtype).removeprefix('torch.')} on {device})", name, device):
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        decoder = make_decoder(args, load_model(args.model, device, dtype, args.trust_remote_code, args.weights))
    processor = _load_processor(args, prog, tokenizer, decoder)
    heads: Any = args.heads or default_heads(args.model)
    if heads is not None and adapts_target(heads):
        heads = heads_of(decoder.model)
    limits = {"max_rows": args.max_rows, "max_queue": args.max_queue, "time_limit": args.time_limit}
    limits |= {"prefill_chunk": args.prefill_chunk}
    if args.prefix_cache_gib is not None:
        limits |= {"prefix_cache_bytes": int(args.prefix_cache_gib * GIB)}
    engine = Engine(decoder, tokenizer, heads=heads, **limits)
    with _reported(prog, "measuring the cost of a pass unless it is cached", name, device):
        engine.start()
    lengths = {"max_prompt_tokens": args.max_prompt_tokens, "max_new_tokens": args.max_new_tokens}
    return Service(engine, tokenizer, name, tool_parser=args.tool_parser, processor=processor, **lengths)


def _load_processor(args: argparse.Namespace, prog: str, tokenizer: Any, decoder: Decoder) -> Any:
    """Return the processor of a model that reads images, or None; then say why they are refused."""
    if "image" not in modalities(decoder.target.model):
        return None
    if (reason := why_no_images(decoder.target)) is None:
        try:
            return load_processor(args.model, tokenizer, args.trust_remote_code)
        except MedheadError as error:
            reason = str(error)
    print(f"{prog}: images are refused: {reason}", file=sys.stderr)
    return None


def model_name(model: str) -> str:
    """Return the last part of the path of a folder or file, and any other name unchanged."""
    return Path(model).resolve().name if Path(model).exists() else model


@contextmanager
def _reported(prog: str, step: str, name: str, device: torch.device) -> Iterator[None]:
    """Print a slow step and its seconds; turn an out-of-memory error into one line."""
    print(f"{prog}: {step} ...", end="", file=sys.stderr, flush=True)
    start, ending = time.perf_counter(), ""
    try:
        yield
        ending = f" {time.perf_counter() - start:.1f} s"
    except (torch.OutOfMemoryError, MemoryError):
        raise MedheadError(
            f"{name!r} does not fit the memory of {device}; try --dtype bfloat16, a smaller --max-rows, another --device "
            "or a smaller model"
        ) from None
    finally:
        print(ending, file=sys.stderr, flush=True)
