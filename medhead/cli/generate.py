"""`medhead generate`: answer a prompt in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medhead.cli.common import (
    Parser,
    add_model_options,
    check_tree_option,
    make_decoder,
    read_prompt,
    run_command,
    sampling_params,
    say,
)
from medhead.errors import MedheadError

if TYPE_CHECKING:
    from torch import Tensor

    from medhead.config import SamplingParams
    from medhead.core.sequence import Sequence
    from medhead.decoder import Decoder

STEPS = ("auto", "loop", "graph", "compiled")  # the ways to run a step that users can choose; see `medhead.compile`
MIN_PASSES, LOW_LENGTH = 16, 1.3  # an answer of so many passes with a lower accepted length gets a hint
EXAMPLES = """\
examples:
  medhead generate --prompt "Tell me a story about a dragon."
  medhead generate --prompt "Hello!" --temperature 0.7 --seed 1
  medhead generate --model Qwen/Qwen3-8B --prompt "Why is the sky blue?" --proposer ngram --dtype bfloat16
  medhead generate --model my/model --heads my/heads --prompt-file question.txt --check
  medhead generate --model my/model --datastore my-notes --prompt "How do I reset it?"   (see medhead datastore)
  medhead generate --prompt "Hello!" --proposer recycling --recycling-state seen.safetensors --save-recycling-state
  medhead generate --prompt "Describe a dragon as JSON." --json-schema dragon.json
  echo "Once upon a time" | medhead generate --raw --max-new-tokens 50
  medhead generate --prompt "Tell me a short story." --compare
  medhead generate --prompt "Tell me a short story." --step compiled --compare
  medhead generate --prompt "Tell me a short story." --trace     (green: accepted draft tokens; underlined: bonus tokens)

python -m medhead.generate is the same command.
exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="medhead generate",
        description="Answer a prompt: the text of plain decoding, in fewer passes of the model.",
        epilog=EXAMPLES,
    )
    what = options.add_argument_group("model and proposer")
    add_model_options(what)
    what.add_argument("--datastore", metavar="FOLDER", help="folder that medhead datastore wrote, for ngram or hybrid")
    what.add_argument("--lookahead", type=int, nargs=3, metavar=("W", "N", "G"),
                      help="window, n-gram size and verified n-grams of the proposer lookahead")  # fmt: skip
    what.add_argument("--recycling-state", metavar="FILE", help="state of the proposer recycling to start from")
    what.add_argument("--save-recycling-state", action="store_true", help="write the state back to that file")
    what.add_argument("--step", default="auto", choices=STEPS,
                      help="how a step runs. auto: the ordinary loop, with passes that compiled has made before on this CPU; "
                      "loop: without them; graph: one CUDA graph, for the proposers heads and none; "
                      "compiled: by PyTorch, for every proposer, which takes a minute or two (default: auto)")  # fmt: skip
    text = options.add_argument_group("prompt")
    text.add_argument("--prompt", help="the prompt")
    text.add_argument("--prompt-file", help="file with the prompt (default, and -: standard input)")
    text.add_argument("--system", help="system prompt (chat models)")
    text.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    how = options.add_argument_group(
        "sampling", "an option that has no default takes the value of the model's generation_config.json"
    )
    how.add_argument("--max-new-tokens", type=int, default=200, help="longest answer in tokens (default: 200)")
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    how.add_argument("--top-p", type=float, help="keep the most probable tokens up to this mass; 1 keeps all")
    how.add_argument("--top-k", type=int, help="keep this many most probable tokens; 0 keeps all")
    how.add_argument("--repetition-penalty", type=float, help="divide the logits of earlier tokens by this; 1 is none")
    how.add_argument("--seed", type=int, default=0, help="same seed, same text, for every proposer (default: 0)")
    how.add_argument("--json-schema", metavar="FILE", help="the answer is JSON of the schema in this file")
    how.add_argument("--regex", metavar="PATTERN", help="the whole answer matches this regular expression")
    show = options.add_argument_group("output")
    show.add_argument("--check", action="store_true", help="compare with plain decoding token by token")
    show.add_argument("--compare", action="store_true", help="time it against plain decoding and transformers")
    show.add_argument("--trace", action="store_true", help="color accepted draft tokens and underline bonus tokens")
    show.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the text")
    show.add_argument("--receipt", metavar="FILE", help="write prompt, answer, seed, versions and passes as JSON, for "
                      "medhead verify")  # fmt: skip
    show.add_argument("--quiet", action="store_true", help="print no statistics line")
    return options


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    params = sampling_params(args)
    check_tree_option(args)
    if args.compare and params.grammar is not None:
        raise MedheadError(
            "--compare does not go with --json-schema and --regex, which transformers has not; use --check"
        )
    check_receipt(args)
    prompt = read_prompt(args)
    import torch

    from medhead.cli.verify import TEXT_OPTIONS
    from medhead.model.loading import encode_chat, load_model, load_tokenizer, pick_device, pick_dtype
    from medhead.receipt import PassRecorder, write_receipt

    device = pick_device(args.device)
    dtype, tokenizer = pick_dtype(args.dtype, device), load_tokenizer(args.model, args.trust_remote_code)
    ids = encode_chat(tokenizer, prompt, args.system, args.raw)
    decoder = make_decoder(args, load_model(args.model, device, dtype, args.trust_remote_code, args.weights), tokenizer)
    decoder.warmup()  # its time does not count as time of the answer
    recorder = PassRecorder() if args.receipt is not None else None
    decoder.on_output = recorder
    result = answer(args, params, decoder, tokenizer, torch.tensor([ids], device=device))
    if recorder is not None:
        promise = decoder.target.bitwise
        options = {name: getattr(args, name) for name in TEXT_OPTIONS} | {"exact": promise and promise.exact}
        write_receipt(args.receipt, decoder.model, options, args.seed, ids, result["token_ids"], recorder.passes)
    if args.compare:
        result["compare"] = compare(args, params, decoder, tokenizer, ids)
    save_state(args, decoder)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))


def check_receipt(args: argparse.Namespace) -> None:
    """Raise a MedheadError if --receipt was given with what a receipt does not hold."""
    if args.receipt is None:
        return
    from medhead.heads.adapter import adapts_target
    from medhead.model.named_models import default_heads

    folder: Path | None = args.heads or default_heads(args.model)
    refused = {
        "--json-schema": args.json_schema is not None,
        "--regex": args.regex is not None,
        f"--step {args.step}": args.step not in ("auto", "loop"),
        "heads that adapt the model": folder is not None and adapts_target(folder),
    }
    for option, given in refused.items():
        if given:
            raise MedheadError(f"--receipt does not go with {option}, which a receipt does not hold; leave one out")


def answer(
    args: argparse.Namespace, params: SamplingParams, decoder: Decoder, tokenizer: Any, inputs: Tensor
) -> dict[str, Any]:
    """Print the answer as it is decoded and what --check finds, or print nothing with --json; return its JSON object."""
    from medhead.cli.terminal import TerminalPrinter

    arguments = arguments_of(decoder, params, tokenizer, inputs.shape[1])
    arguments |= {"attention_mask": inputs.new_ones(inputs.shape)}
    printer = TerminalPrinter(tokenizer, trace=args.trace, silent=args.json)
    sequences: list[Sequence] = []

    def on_pass(sequence: Sequence, new: list[int]) -> None:
        sequences[:] = [sequence]
        printer.show(new)

    decoder.on_pass = on_pass
    try:
        decoder.generate(inputs, seed=args.seed, **arguments)
    finally:
        printer.finish()
        decoder.on_pass = decoder.on_output = None
        statistics = decoder.statistics
        if not args.json and not args.quiet and statistics.new_tokens:
            print(statistics_line(decoder) + ending(sequences[0], printer.text, params), file=sys.stderr)
            hint = speculation_hint(decoder)
            if hint:
                say(hint)
    result = {
        "text": printer.text,
        "token_ids": printer.tokens,
        "prompt_tokens": inputs.shape[1],
        "new_tokens": statistics.new_tokens,
        "finish_reason": "length" if sequences[0].is_cut else "stop",
        "passes": statistics.passes,
        "accepted_length": round(statistics.accepted_length, 4),
        "seconds": round(statistics.seconds, 4),
        "tokens_per_second": round(statistics.tokens_per_second, 2),
        "proposer": decoder.proposer.name,
    }
    if args.check:
        report = decoder.check(inputs, args.seed, **arguments)
        result["identical"] = report.identical
        if not args.json:
            print(report.describe(tokenizer.decode, decoder.target.dtype), file=sys.stderr)
    return result


def compare(
    args: argparse.Namespace, params: SamplingParams, decoder: Decoder, tokenizer: Any, ids: list[int]
) -> dict[str, Any]:
    """Count the runs of a comparison on standard error, print its table unless --json is given, and return its JSON object."""
    from medhead.cli import compare
    from medhead.cli.terminal import RunCounter

    counter = RunCounter(compare.RUNS, done=1, silent=args.quiet)
    arguments = arguments_of(decoder, params, tokenizer, len(ids))
    results = compare.compare(decoder, ids, arguments, args.seed, counter.add)
    if not args.json:
        print(compare.table(results, params.greedy))
    return compare.to_json(results, params.greedy)


def arguments_of(decoder: Decoder, params: SamplingParams, tokenizer: Any, prompt_tokens: int) -> dict[str, Any]:
    """Return the arguments of `model.generate`; an answer ends at the model's context.

    Raises:
        MedheadError: the prompt fills the context.
    """
    from medhead.core.stopping import token_limit
    from medhead.generation_config import generate_arguments

    limit = token_limit(params.max_new_tokens, prompt_tokens, decoder.target.context)
    arguments = generate_arguments(decoder.model, replace(params, max_new_tokens=limit), tokenizer)
    if params.grammar is not None:
        arguments |= {"grammar": params.grammar, "tokenizer": tokenizer}
    return arguments


def save_state(args: argparse.Namespace, decoder: Decoder) -> None:
    """Write the state of recycling back if --save-recycling-state asks for it."""
    if args.save_recycling_state:
        from medhead.proposers.recycling import RecyclingProposer

        assert isinstance(decoder.proposer, RecyclingProposer)
        decoder.proposer.save(args.recycling_state)


def uses_compiled_pass(decoder: Decoder) -> bool:
    """Return whether the target's passes were compiled ones."""
    return decoder.compiled_target is not None and decoder.compiled_target.in_use


def statistics_line(decoder: Decoder) -> str:
    """Return one line about the last generation."""
    s, proposer = decoder.statistics, decoder.proposer
    up_to = "up to " if getattr(proposer, "adapts", False) else ""
    way = decoder.graphs.backend if decoder.graphs is not None and s.captured_steps else ""
    step = f", step {way}" if way else ", compiled pass" if uses_compiled_pass(decoder) else ""
    return (
        f"[{proposer.name}, {up_to}{proposer.tree_size} nodes{step}] {s.new_tokens} tokens in {s.seconds:.2f} s, "
        f"{s.tokens_per_second:.1f} tokens/s, {s.passes} verify passes, accepted length {s.accepted_length:.2f}"
    )


def ending(sequence: Sequence, text: str, params: SamplingParams) -> str:
    """Return what the statistics line says about the end of the answer: whether it is cut, or empty."""
    if sequence.is_cut:
        count = len(sequence.output_ids)
        more = "the model's context is full" if count < params.max_new_tokens else "--max-new-tokens N for more"
        return f", cut at {count} tokens ({more})"
    return "" if text.strip() else ", the answer is empty"


def speculation_hint(decoder: Decoder) -> str | None:
    """Return what to do where draft tokens of proposers without training were hardly ever accepted; else None."""
    statistics, proposer = decoder.statistics, decoder.proposer
    members = {member.name for member in getattr(proposer, "members", [proposer])}
    if members & {"heads", "none"} or statistics.passes < MIN_PASSES or statistics.accepted_length >= LOW_LENGTH:
        return None
    controller = getattr(proposer, "controller", None)
    plain = controller.costs(1) * statistics.new_tokens if controller is not None else 0.0
    took = f", the time of {statistics.decode_seconds / plain:.2f} plain passes a token" if plain else ""
    return (
        f"draft tokens were hardly ever accepted (accepted length {statistics.accepted_length:.2f}{took}); to gain more, "
        "train heads (medhead finetune) and give them with --heads, or give --datastore text that is like the answers"
    )


def main(argv: list[str] | None = None) -> int:
    """Run `medhead generate` and return its exit code."""
    return run_command(parser(), run, argv)
