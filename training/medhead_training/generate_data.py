"""`python -m medhead_training.generate_data`: let a model answer prompts, as training data for its heads.

Heads learn to guess what this very model says, so they are trained on its own answers (self-distillation). What an
answer is depends on its index alone: prompts go through in windows, are sorted by length within a window and cut into
batches, and batch b draws with seed + b. So a run that was killed goes on to the very bytes it would have written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from medhead.cli.common import Parser, guarded, make_decoder
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL, load_model, load_tokenizer, pick_device, pick_dtype
from medhead.proposers import PROPOSERS
from medhead_training.data.encode import encode_prompt
from medhead_training.data.feature_store import tokenizer_fingerprint
from medhead_training.data.records import Message, prompts_from, scan_prompts
from medhead_training.trainer.resumable import ResumableFile

EXAMPLES = """\
examples:
  python -m medhead_training.generate_data --prompts prompts.jsonl --output data.jsonl
  python -m medhead_training.generate_data --model Qwen/Qwen3-0.6B --prompts prompts.jsonl --output data.jsonl \\
      --count 50000 --temperatures 0 0.7 1.0 --batch 64 --dtype bfloat16
  python -m medhead_training.generate_data --model my/model --heads my/heads --prompts prompts.jsonl --output more.jsonl

prompts: JSON lines with `messages` (answers at the end are taken off), `prompt`, `question`, `turns` or `text`.
output:  JSON lines with `messages`, `prompt_ids`, `answer_ids`, `temperature` and `index` (of the prompt, from 0);
         without a chat template `text` in place of `messages`. Beside it a small OUTPUT.meta.json keeps the options.

Kill it at any time and start it again with the same options: it goes on where it was.

exit codes: 0 done, 2 wrong input, 1 failure, 130 stopped with Ctrl-C
"""
WRITER = "medhead_training.generate_data 1"
WINDOW = 64  # batches whose prompts are sorted by length together


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered: its index in the output, the chat, and the token ids the model sees."""

    index: int
    messages: list[Message]
    ids: list[int]


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead_training.generate_data",
        description="Let a model answer prompts; its heads are then trained on these answers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = options.add_argument_group("what to write")
    what.add_argument("--prompts", type=Path, required=True, help="file of prompts (JSON lines)")
    what.add_argument("--output", type=Path, required=True, help="file to write (JSON lines)")
    what.add_argument("--count", type=int, help="number of answers (default: one for each prompt)")
    what.add_argument("--system", help="system prompt for chats that have none")
    what.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: 512)")
    what.add_argument(
        "--max-prompt-tokens", type=int, help="longer prompts lose their oldest tokens (default: what fits)"
    )
    what.add_argument("--temperatures", type=float, nargs="+", default=[0.7], metavar="T",
                      help="one or several, batches take turns; 0 is greedy decoding (default: 0.7)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="same seed, same answers (default: 0)")
    how = options.add_argument_group("what to decode with")
    how.add_argument("--model", help="model folder or hub id (default: the demo model that medhead ships)")
    how.add_argument("--heads", help="heads checkpoint folder")
    how.add_argument("--proposer", choices=sorted(PROPOSERS), help="what guesses (default: heads if given, else none)")
    how.add_argument("--tree-size", type=int, help="nodes verified in a pass, 1 to 256 (default: the proposer's)")
    how.add_argument("--batch", type=int, default=32, help="prompts answered at a time (default: 32)")
    how.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    how.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU)")
    how.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    options.set_defaults(attention="auto")
    return options


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        MedheadError: names the option and its value.
    """
    good_temperatures = all(math.isfinite(t) and 0.0 <= t <= 100.0 for t in args.temperatures)
    rules: list[tuple[str, Any, bool, str]] = [
        ("--count", args.count, args.count is None or args.count >= 1, "at least 1"),
        ("--batch", args.batch, 1 <= args.batch <= 65536, "from 1 to 65536"),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        (
            "--max-prompt-tokens",
            args.max_prompt_tokens,
            (args.max_prompt_tokens is None or args.max_prompt_tokens >= 1),
            "at least 1",
        ),
        ("--temperatures", args.temperatures, good_temperatures, "from 0 to 100"),
        ("--seed", args.seed, 0 <= args.seed < 2**62, "from 0 to 2**62 - 1"),
        ("--tree-size", args.tree_size, args.tree_size is None or 1 <= args.tree_size <= 256, "from 1 to 256"),
    ]
    for name, value, good, expected in rules:
        if not good:
            raise MedheadError(f"{name} must be {expected}, got {value}")


# -------------------------------------------------------------------- prompts


def check_prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, number: int, longest: int) -> None:
    """Read all prompts once, so that a wrong one is told at the start and not after hours."""
    source = islice(prompts_from(args.prompts, 0, number, args.system), number)
    for _, where, messages in tqdm(source, total=number, desc="checking prompts", leave=False, delay=2.0):
        encode_prompt(tokenizer, messages, where, longest)


def batches(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, number: int, longest: int, done: int
) -> Iterator[tuple[int, list[Prompt]]]:
    """Number and prompts of every batch, from the window of answer `done` on; in a window the longest come first."""
    size = WINDOW * args.batch
    start = done - done % size
    source = prompts_from(args.prompts, start, number, args.system)
    while start < args.count:
        window = [
            Prompt(index, messages, encode_prompt(tokenizer, messages, where, longest))
            for index, where, messages in islice(source, min(size, args.count - start))
        ]
        window.sort(key=lambda prompt: (-len(prompt.ids), prompt.index))
        for at in range(0, len(window), args.batch):
            yield (start + at) // args.batch, window[at : at + args.batch]
        start += size


# -------------------------------------------------------------------- answers


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A hash of some numbers of every parameter: enough to tell models apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def answer(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, batch: list[Prompt], number: int, args: argparse.Namespace
) -> list[bytes]:
    """Lines of the answers to one batch."""
    ends = decoder.model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    longest = max(len(prompt.ids) for prompt in batch)
    padding = [longest - len(prompt.ids) for prompt in batch]
    inputs = torch.tensor([[pad] * n + prompt.ids for n, prompt in zip(padding, batch, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    temperature = args.temperatures[number % len(args.temperatures)]
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = decoder.generate(
        inputs.to(decoder.target.device),
        attention_mask=mask.to(decoder.target.device),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        seed=args.seed + number,
        **how,
    )
    lines = []
    for prompt, row in zip(batch, output[:, longest:].tolist(), strict=True):
        stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        ids = row[:stop]
        said = ids[:-1] if ids[-1] in ends else ids
        shown = said if tokenizer.chat_template else prompt.ids + said
        text = tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        record: dict[str, Any] = {"text": text}
        if tokenizer.chat_template:
            record = {"messages": [*prompt.messages, {"role": "assistant", "content": text}]}
        record |= {"prompt_ids": prompt.ids, "answer_ids": ids, "temperature": temperature, "index": prompt.index}
        lines.append(json.dumps(record).encode() + b"\n")
    return lines


def prompt_limit(args: argparse.Namespace, context: int) -> int:
    """The most tokens of a prompt, so that every answer has room.

    Raises:
        MedheadError: the two limits do not fit the model's context.
    """
    room = context - args.max_new_tokens
    if room < 1 or (args.max_prompt_tokens or 0) > room:
        wanted = f"--max-new-tokens {args.max_new_tokens}"
        wanted += f" and --max-prompt-tokens {args.max_prompt_tokens}" if args.max_prompt_tokens else ""
        raise MedheadError(f"{wanted} do not fit the model's context of {context} tokens; lower them")
    return int(args.max_prompt_tokens or room)


def output_options(
    args: argparse.Namespace, digest: str, dtype: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Everything that an answer depends on, but for the model."""
    names = ("count", "system", "max_new_tokens", "max_prompt_tokens", "temperatures", "seed", "batch")
    options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return options | {"--dtype": dtype, "--prompts": digest, "tokenizer": tokenizer_fingerprint(tokenizer)}


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    check_numbers(args)
    logging.set_verbosity_error()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    digest, number = scan_prompts(args.prompts)
    args.count = args.count or number
    if args.count > number and 0 in args.temperatures:
        raise MedheadError(
            f"--count {args.count} repeats the {number} prompts, and greedy decoding (--temperatures 0) would repeat the "
            "answers; give temperatures above 0 or more prompts"
        )
    name = args.model or DEMO_MODEL
    args.proposer = args.proposer or ("heads" if args.heads else "none")
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    if args.system is not None and not tokenizer.chat_template:
        raise MedheadError("--system needs a tokenizer with a chat template")
    output = ResumableFile(args.output, WRITER)
    options = output_options(args, digest, str(dtype).removeprefix("torch."), tokenizer)
    begun = output.begun(options)  # told before a large model is loaded
    if begun:
        with output.open() as file:
            if len(output.indices(file, args.count, WINDOW * args.batch)) == args.count:
                print(f"{args.output} holds all {args.count} answers already")
                return
    model = load_model(name, device, dtype, args.trust_remote_code)
    options["--model"] = weights_fingerprint(model)
    decoder = make_decoder(args, model)
    longest = prompt_limit(args, decoder.target.context)
    if begun:
        output.begun(options)
    else:
        check_prompts(args, tokenizer, min(number, args.count), longest)
        output.begin(options)
    with output.open() as file:
        written = output.indices(file, args.count, WINDOW * args.batch)
        work = batches(args, tokenizer, number, longest, len(written))
        write_answers(decoder, tokenizer, work, written, args, file)
    print(f"{args.output}: {args.count} answers")


def write_answers(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    work: Iterator[tuple[int, list[Prompt]]],
    written: array[int],
    args: argparse.Namespace,
    file: IO[bytes],
) -> None:
    """Answer what is not written yet, batch by batch.

    Raises:
        MedheadError: the file holds other answers than this run would write, or a batch is too large for the device.
    """
    tokens = passes = 0
    begin = time.perf_counter()
    with tqdm(total=args.count, initial=len(written), unit="answer", smoothing=0.05, mininterval=1.0) as bar:
        for number, batch in work:
            there = written[number * args.batch : number * args.batch + len(batch)]
            if there.tolist() != [prompt.index for prompt in batch[: len(there)]]:
                raise ResumableFile(args.output, WRITER).changed(number * args.batch + 1)
            if len(there) == len(batch):
                continue
            try:
                lines = answer(decoder, tokenizer, batch, number, args)
            except torch.OutOfMemoryError:
                raise MedheadError(
                    f"{args.batch} prompts at a time are too many for this device; lower --batch"
                ) from None
            file.write(b"".join(lines[len(there) :]))
            file.flush()
            tokens, passes = tokens + decoder.statistics.new_tokens, passes + decoder.statistics.passes
            speed = tokens / (time.perf_counter() - begin)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s, {tokens / passes:.2f} tokens a pass", refresh=False)
            bar.update(len(lines) - len(there))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.generate_data", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
