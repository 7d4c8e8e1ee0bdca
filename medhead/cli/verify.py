"""`medhead verify`: decode the prompt of a receipt plainly and say whether its text is reproduced."""

from __future__ import annotations

import argparse
from typing import Any

from medhead.cli.common import Parser, make_decoder, run_command, say
from medhead.config import SamplingParams
from medhead.errors import MedheadError

EXAMPLES = """\
examples:
  medhead verify hello.json    # which `medhead generate --prompt "Hello!" --exact bitwise --receipt hello.json` wrote
  medhead verify hello.json --model folder/of/the/model

exit codes: 0 reproduced, 1 not reproduced or failure, 2 wrong input or other weights, 130 stopped with Ctrl-C
"""
# options of `medhead generate` that change the text, and are part of a receipt
TEXT_OPTIONS = (
    "model", "device", "dtype", "weights", "packed", "generation_config", "exact", "temperature",
    "top_p", "top_k", "repetition_penalty", "max_new_tokens",
)  # fmt: skip


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="medhead verify",
        description="Decode the prompt of a receipt plainly, one token a pass, and say whether its text is reproduced.",
        epilog=EXAMPLES,
    )
    options.add_argument("receipt", help="file that medhead generate --receipt wrote")
    options.add_argument("--model", help="model folder, hub id or GGUF file (default: that of the receipt)")
    options.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return options


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 if the text is reproduced, else 1."""
    from medhead.receipt import first_difference, other_environment, read_receipt

    receipt = read_receipt(args.receipt)
    for line in other_environment(receipt):
        say(line)
    output_ids = decode_again(args, receipt)
    difference = first_difference(receipt, output_ids)
    if difference is None:
        print(f"reproduced: plain decoding gives the same {len(output_ids)} tokens")
        return 0
    print(f"not reproduced: {difference}")
    return 1


def decode_again(args: argparse.Namespace, receipt: dict[str, Any]) -> list[int]:
    """Return the new tokens of plain decoding with the options and the number of threads of a receipt.

    Raises:
        MedheadError: the weights are others, or the options are not those of a receipt.
    """
    import torch

    from medhead.cli.generate import arguments_of
    from medhead.model.loading import load_model, load_tokenizer, pick_device, pick_dtype
    from medhead.receipt import weights_hash

    options = receipt["options"]
    if missing := sorted({*TEXT_OPTIONS} - options.keys()):
        raise MedheadError(f"the receipt {args.receipt!r} lacks the options {', '.join(missing)}")
    name, device = args.model or options["model"], pick_device(options["device"])
    model = load_model(name, device, pick_dtype(options["dtype"], device), args.trust_remote_code, options["weights"])
    if weights_hash(model) != receipt["weights_sha256"]:
        raise MedheadError(
            f"the weights of {name or 'the demo model'} are not those of the receipt; give the model that wrote it with --model"
        )
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(receipt["environment"]["threads"]))
    try:
        made = {"model": name, "heads": None, "proposer": "none", "tree_size": None, "attention": "auto"}
        settings = argparse.Namespace(**options | made)
        decoder = make_decoder(settings, model)
        fields = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
        params = SamplingParams(**{field: options[field] for field in fields})
        ids = torch.tensor([receipt["prompt_ids"]], device=device)
        arguments = arguments_of(decoder, params, tokenizer, ids.shape[1])
        out = decoder.generate(ids, attention_mask=torch.ones_like(ids), seed=receipt["seed"], **arguments)
    finally:
        torch.set_num_threads(threads)
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def main(argv: list[str] | None = None) -> int:
    """Run `medhead verify` and return its exit code."""
    return run_command(parser(), run, argv)
