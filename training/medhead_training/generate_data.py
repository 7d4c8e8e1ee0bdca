"""`medhead generate-data`: let a model answer prompts, as training data for its heads (self-distillation).

Prompts are answered by continuous batching: as soon as some answers end, the next prompts take their places. Answer i is
sampled with seed + i, so in float32 it depends on its prompt and its index alone. Lines are written as answers end, and
sorted by index at the end: a run that was killed resumes to the very bytes it would have written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from medhead.cli.common import (
    Parser,
    add_device_options,
    add_generation_config_option,
    check_range,
    check_tree_option,
    make_decoder,
    run_command,
)
from medhead.config import SamplingParams
from medhead.core.continuous import decode_stream
from medhead.core.sequence import Sequence
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.generation_config import end_tokens, recorded_fields, stop_strings
from medhead.model.loading import load_model, load_tokenizer, pick_device, pick_dtype
from medhead.proposers import PROPOSERS
from medhead.serving.prepare import SequencePreparer
from medhead_training.data.feature_store import fingerprint
from medhead_training.data.prompts import cycle_prompts, encode_prompt, scan_prompts
from medhead_training.data.records import Message
from medhead_training.data.resumable import ResumableFile
from medhead_training.data.token_store import tokenizer_fingerprint

EXAMPLES = """\
examples:
  medhead generate-data --prompts prompts.jsonl --output data.jsonl
  medhead generate-data --model Qwen/Qwen3-0.6B --prompts prompts.jsonl --output data.jsonl \\
      --num-answers 50000 --temperatures 0 0.7 1.0 --batch-size 64 --dtype bfloat16
  medhead generate-data --model my/model --heads my/heads --prompts prompts.jsonl --output more.jsonl

prompts: JSON lines with `messages` (answers at the end are removed), `prompt`, `question`, `turns` or `text`.
output:  JSON lines with `messages`, `prompt_ids`, `answer_ids`, `temperature` and `index` (of the prompt, from 0);
         without a chat template `text` instead of `messages`. OUTPUT.meta.json beside it records the options.

If the command is killed, start it again with the same options (--batch-size may differ): it resumes where it was.

exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""
WRITER = "medhead generate-data 2"
LOOKAHEAD = 4  # batches whose prompts are sorted by length, so that prompts read together are about equally long
# what an answer depends on, beside the prompts, their tokens and the model
RECORDED = ("num_answers", "system", "max_new_tokens", "max_prompt_tokens", "temperatures", "seed")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its index in the output, its chat, and its token ids."""

    index: int
    messages: list[Message]
    ids: list[int]


def parser() -> Parser:
    """Return the command's parser."""
    description = "Let a model answer prompts. The answers are the training data of its heads."
    options = Parser(prog="medhead generate-data", description=description, epilog=EXAMPLES)
    add = options.add_argument_group("data").add_argument
    add("--prompts", type=Path, required=True, help="file of prompts (JSON lines)")
    add("--output", type=Path, required=True, help="file to write (JSON lines)")
    add("--num-answers", type=int, help="number of answers (default: one per prompt)")
    add("--system", help="system prompt for chats without one")
    add("--max-new-tokens", type=int, default=512, help="maximum tokens of an answer (default: 512)")
    add(
        "--max-prompt-tokens", type=int, help="longer prompts lose their oldest tokens (default: what fits the context)"
    )
    add("--temperatures", type=float, nargs="+", default=[0.7], metavar="T",
        help="one or more, used by prompts in turn; 0 is greedy decoding (default: 0.7)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    decoding = options.add_argument_group("decoding")
    add = decoding.add_argument
    add("--model", help="model folder, hub id, GGUF file, or smollm2 (default: the demo model that medhead ships)")
    add("--heads", help="folder of a heads checkpoint")
    add("--proposer", choices=sorted(PROPOSERS), help="what drafts the tokens (default: heads if given, else none)")
    add("--tree-size", type=int, help="nodes verified in a pass, 1 to 256 (default: the proposer's)")
    add("--batch-size", type=int, default=32, help="prompts answered at a time (default: 32)")
    add_device_options(decoding)
    add_generation_config_option(decoding)
    options.set_defaults(attention="auto")
    return options


def check_options(args: argparse.Namespace) -> None:
    """Raise a `MedheadError` that names the first option whose value is out of range."""
    for name in ("num_answers", "max_new_tokens", "max_prompt_tokens"):
        check_range(args, name, 1)
    check_range(args, "batch_size", 1, 65536)
    check_range(args, "temperatures", 0, 100)
    check_range(args, "seed", 0, 2**62 - 1, "from 0 to 2**62 - 1")
    check_tree_option(args)


def check_prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, number: int, max_tokens: int) -> None:
    """Encode all prompts once, so that a wrong one is reported at the start."""
    source = islice(cycle_prompts(args.prompts, 0, number, args.system), number)
    for _, where, messages in tqdm(source, total=number, desc="checking prompts", leave=False, delay=2.0):
        encode_prompt(tokenizer, messages, where, max_tokens)


def prompts_to_answer(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, number: int, max_tokens: int, done: set[int]
) -> Iterator[Prompt]:
    """Yield the prompts that are not done, the longest first within every `LOOKAHEAD` batches."""
    source = islice(cycle_prompts(args.prompts, 0, number, args.system), args.num_answers)
    left = (item for item in source if item[0] not in done)
    while window := list(islice(left, LOOKAHEAD * args.batch_size)):
        encoded = (
            Prompt(index, chat, encode_prompt(tokenizer, chat, where, max_tokens)) for index, where, chat in window
        )
        yield from sorted(encoded, key=lambda prompt: (-len(prompt.ids), prompt.index))


def answer_prompts(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, prompts: Iterator[Prompt], args: argparse.Namespace
) -> Iterator[tuple[Prompt, Sequence]]:
    """Yield every prompt with its answer, in the order in which the answers end; each is the text that the engine serves."""
    preparer, running = SequencePreparer(decoder, tokenizer), dict[int, Prompt]()

    def sequences() -> Iterator[Sequence]:
        for prompt in prompts:
            params = SamplingParams(args.max_new_tokens, temperature_of(prompt, args), seed=args.seed + prompt.index)
            sequence = preparer.prepare(preparer.new_sequence(prompt.ids, params))
            running[id(sequence)] = prompt
            yield sequence

    loop = decoder.new_loop()
    with loop.active():
        for sequence in decode_stream(loop, sequences(), args.batch_size):
            yield running.pop(id(sequence)), sequence


def temperature_of(prompt: Prompt, args: argparse.Namespace) -> float:
    """Return the temperature of a prompt's answer: the given ones take turns."""
    return float(args.temperatures[prompt.index % len(args.temperatures)])


def line_of(
    prompt: Prompt,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    stops: Iterable[str],
    temperature: float,
) -> bytes:
    """Return the JSON line of an answer; its text has no stop string, as that of the engine."""
    visible = ids[:-1] if ids[-1] in ends else ids
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answer = decode(visible)
    text = answer if tokenizer.chat_template else decode(prompt.ids + visible)
    dropped = len(answer) - min((answer.index(stop) for stop in stops if stop in answer), default=len(answer))
    text = text[: len(text) - dropped]
    record: dict[str, Any] = {"text": text}
    if tokenizer.chat_template:
        record = {"messages": [*prompt.messages, {"role": "assistant", "content": text}]}
    record |= {"prompt_ids": prompt.ids, "answer_ids": ids, "temperature": temperature, "index": prompt.index}
    return json.dumps(record).encode() + b"\n"


def max_prompt_tokens(args: argparse.Namespace, context: int) -> int:
    """Return the maximum number of tokens of a prompt that leaves room for every answer."""
    room = context - args.max_new_tokens
    if room < 1 or (args.max_prompt_tokens or 0) > room:
        wanted = f"--max-new-tokens {args.max_new_tokens}"
        wanted += f" and --max-prompt-tokens {args.max_prompt_tokens}" if args.max_prompt_tokens else ""
        raise MedheadError(f"{wanted} do not fit the model's context of {context} tokens; lower them")
    return int(args.max_prompt_tokens or room)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_options(args)
    logging.set_verbosity_error()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    digest, number = scan_prompts(args.prompts)
    args.num_answers = args.num_answers or number
    if args.num_answers > number and 0 in args.temperatures:
        raise MedheadError(
            f"--num-answers {args.num_answers} repeats the {number} prompts, and greedy decoding (--temperatures 0) would "
            "repeat the answers; give temperatures above 0 or more prompts"
        )
    args.proposer = args.proposer or ("heads" if args.heads else "none")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    if args.system is not None and not tokenizer.chat_template:
        raise MedheadError("--system needs a tokenizer with a chat template")
    output = ResumableFile(args.output, WRITER)
    options = {f"--{option.replace('_', '-')}": getattr(args, option) for option in RECORDED}
    options |= {"--dtype": str(dtype).removeprefix("torch."), "--prompts": digest}
    options |= {"--weights": args.weights} if args.weights != "full" else {}
    options["tokenizer"] = tokenizer_fingerprint(tokenizer)
    started = output.is_started(options)  # checked before a large model is loaded
    model = load_model(args.model, device, dtype, args.trust_remote_code, args.weights)
    options["--model"] = fingerprint(dict(model.named_parameters()))
    decoder = make_decoder(args, model)
    options["generation configuration"] = recorded_fields(model, tokenizer)
    max_tokens = max_prompt_tokens(args, decoder.target.context)
    if not started:
        check_prompts(args, tokenizer, min(number, args.num_answers), max_tokens)
        output.start(options)
    elif output.is_started(options) and finish(output, args):
        print(f"{args.output} holds all {args.num_answers} answers already")
        return
    with output.open() as file:
        done = set(output.read_indices(file, args.num_answers))
        prompts = prompts_to_answer(args, tokenizer, number, max_tokens, done)
        write_answers(decoder, tokenizer, prompts, len(done), args, file)
    finish(output, args)
    print(f"{args.output}: {args.num_answers} answers")


def finish(output: ResumableFile, args: argparse.Namespace) -> bool:
    """Return whether the file holds all answers; sort them if so."""
    with output.open() as file:
        indices = output.read_indices(file, args.num_answers)
        if len(indices) < args.num_answers:
            return False
        if indices != sorted(indices):
            output.sort()
        return True


def write_answers(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, prompts: Iterator[Prompt], done: int,
    args: argparse.Namespace, file: IO[bytes],
) -> None:  # fmt: skip
    """Answer the prompts and write each answer as it ends."""
    tokens = passes = 0
    start = time.perf_counter()
    ends, stops = end_tokens(decoder.model, tokenizer), stop_strings(decoder.model)
    with tqdm(total=args.num_answers, initial=done, unit="answer", smoothing=0.05, mininterval=1.0) as bar:
        try:
            for prompt, sequence in answer_prompts(decoder, tokenizer, prompts, args):
                file.write(line_of(prompt, sequence.output_ids, tokenizer, ends, stops, temperature_of(prompt, args)))
                file.flush()
                tokens, passes = tokens + len(sequence.output_ids), passes + sequence.passes
                speed = tokens / (time.perf_counter() - start)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s, accepted length {tokens / passes:.2f}", refresh=False)
                bar.update()
        except torch.OutOfMemoryError:
            given = f"--batch-size {args.batch_size}"
            raise MedheadError(
                f"{given} is too large for the memory of this device; start again with a lower one: the answers are kept"
            ) from None


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
