"""`python -m medhead.generate`: answer a prompt in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medhead.cli.terminal import TerminalPrinter
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.heads.adapter import adapts_target, heads_of, load_adapted
from medhead.model.loading import (
    DEMO_HEADS,
    DEMO_MODEL,
    encode_chat,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from medhead.model.target import ATTENTIONS
from medhead.proposers import PROPOSERS
from medhead.proposers.recycling import RecyclingProposer

STEPS = ("loop", "graph", "compiled")  # those that serve users; see `medhead.compile`
EXAMPLES = """\
examples:
  python -m medhead.generate --prompt "Tell me a story about a dragon."
  python -m medhead.generate --prompt "Hello!" --temperature 0.7 --seed 1
  python -m medhead.generate --model Qwen/Qwen3-8B --prompt "Why is the sky blue?" --proposer ngram --dtype bfloat16
  python -m medhead.generate --model my/model --heads my/heads --prompt-file question.txt --check
  python -m medhead.generate --model my/model --datastore my-notes --prompt "How do I reset it?"   (medhead.datastore makes one)
  python -m medhead.generate --prompt "Hello!" --proposer recycling --recycling-state seen.safetensors --save-recycling-state
  echo "Once upon a time" | python -m medhead.generate --raw --max-new-tokens 50
  python -m medhead.generate --prompt "Tell me a short story." --compare
  python -m medhead.generate --prompt "Tell me a short story." --step compiled --compare
  python -m medhead.generate --prompt "Tell me a short story." --trace     (green: guessed and accepted)

exit codes: 0 done, 2 wrong input, 1 failure, 130 stopped with Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Print the error in one line and leave with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_model_options(what: Any) -> None:
    """Model, proposer and device, for every command that decodes."""
    what.add_argument("--model", help="model folder or hub id (default: the demo model that medhead ships)")
    what.add_argument(
        "--heads",
        help="heads checkpoint folder, or mtp for layers in the model's own (default: demo heads with the demo model)",
    )
    what.add_argument("--proposer", choices=sorted(PROPOSERS), help="what guesses (default: hybrid, all there is)")
    what.add_argument("--tree-size", type=int, help="nodes verified in a pass, 1 to 256 (default: the proposer's)")
    what.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    what.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU)")
    what.add_argument("--attention", default="auto", choices=ATTENTIONS, help="attention backend")
    what.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="on a CPU, keep the weights a second time in the layout that trees are verified fastest with "
        "(default: where it is faster and takes at most a quarter of the free memory)",
    )
    what.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.generate",
        description="Answer a prompt, faster than plain decoding and with exactly its text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = options.add_argument_group("what to decode with")
    add_model_options(what)
    what.add_argument("--datastore", metavar="FOLDER", help="text of your own that ngram looks things up in")
    what.add_argument(
        "--lookahead", type=int, nargs=3, metavar=("W", "N", "G"), help="window, n-gram and guesses of lookahead"
    )
    what.add_argument("--recycling-state", metavar="FILE", help="what recycling has learnt before; it is only read")
    what.add_argument(
        "--save-recycling-state", action="store_true", help="write what recycling has learnt back to that file"
    )
    what.add_argument(
        "--step", default="loop", choices=STEPS,
        help="how a step is run; with the proposers heads and none it can be a CUDA graph; with any, "
        "what can be is compiled, which takes a minute and pays for long work",
    )  # fmt: skip
    text = options.add_argument_group("prompt")
    text.add_argument("--prompt", help="the prompt")
    text.add_argument("--prompt-file", help="file with the prompt; - or nothing: standard input")
    text.add_argument("--system", help="system prompt (chat models)")
    text.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    how = options.add_argument_group("sampling")
    how.add_argument("--max-new-tokens", type=int, default=200, help="(default: 200)")
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default)")
    how.add_argument("--top-p", type=float, help="keep the most probable tokens up to this mass, 0 to 1")
    how.add_argument("--top-k", type=int, help="keep this many most probable tokens")
    how.add_argument("--seed", type=int, default=0, help="same seed, same text, with and without speculation")
    show = options.add_argument_group("output")
    show.add_argument("--check", action="store_true", help="compare with plain decoding token by token")
    show.add_argument("--compare", action="store_true", help="time it against plain decoding and transformers")
    show.add_argument("--trace", action="store_true", help="colour accepted and bonus tokens")
    show.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    show.add_argument("--quiet", action="store_true", help="no statistics line")
    return options


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        MedheadError: names the option and its value.
    """
    rules: list[tuple[str, Any, bool, str]] = [
        ("--max-new-tokens", args.max_new_tokens, 1 <= args.max_new_tokens <= 10**7, "from 1 to 10,000,000"),
        ("--temperature", args.temperature, 0.0 <= args.temperature <= 100.0, "from 0 to 100"),
        ("--top-p", args.top_p, args.top_p is None or 0.0 < args.top_p <= 1.0, "above 0 and at most 1"),
        ("--top-k", args.top_k, args.top_k is None or args.top_k >= 1, "at least 1"),
        ("--seed", args.seed, 0 <= args.seed < 2**64, "from 0 to 2**64 - 1"),
        ("--tree-size", args.tree_size, args.tree_size is None or 1 <= args.tree_size <= 256, "from 1 to 256"),
    ]
    for name, value, good, expected in rules:
        if not good:
            raise MedheadError(f"{name} must be {expected}, got {value}")
    if args.prompt is not None and args.prompt_file is not None:
        raise MedheadError("give --prompt or --prompt-file, not both")
    if args.temperature == 0 and (args.top_p is not None or args.top_k is not None):
        raise MedheadError("--top-p and --top-k need --temperature above 0; at 0 decoding is greedy")


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the option, a file or standard input.

    Raises:
        MedheadError: the file cannot be read.
    """
    if args.prompt is None and args.prompt_file is None and sys.stdin.isatty():
        raise MedheadError("no prompt: give --prompt, --prompt-file, or text on standard input")
    given = "the prompt"
    try:
        if args.prompt is not None:
            text = str(args.prompt)
        elif args.prompt_file in (None, "-"):
            given = "the prompt on standard input"
            text = sys.stdin.read()
        else:
            given = f"prompt file {args.prompt_file!r}"
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        text.encode("utf-8")  # a shell hands on bytes that are none as surrogates
    except UnicodeError:
        raise MedheadError(f"{given} cannot be read: it is not UTF-8 text") from None
    except OSError as error:
        raise MedheadError(f"{given} cannot be read: {error.strerror or error}") from None
    return text


def make_decoder(args: argparse.Namespace, model: Any, tokenizer: Any = None) -> Decoder:
    """The decoder that the options ask for.

    Raises:
        MedheadError: options that do not go together, or that the proposer refuses.
    """
    owner, options = proposer_options(args, tokenizer)
    heads = args.heads or (str(DEMO_HEADS) if args.model is None else None)
    step, packed = getattr(args, "step", "loop"), getattr(args, "packed", None)  # which other commands do not ask for
    proposer = args.proposer or owner or ("heads" if heads and step != "loop" else "hybrid")
    used: Any = heads if proposer in ("heads", "hybrid") else None
    if used and adapts_target(used):
        model = load_adapted(model, used)
        used = heads_of(model)
        print(f"medhead.generate: {heads} adapts the model itself: the text is the adapted model's", file=sys.stderr)
    given = {"tree_size": args.tree_size, "attention": args.attention, "packed": packed, "step": step, **options}
    decoder = Decoder(model, proposer, heads=used, **given)
    for maker in (decoder.graphs, decoder.compiled_target):
        if maker is not None:
            maker.on_progress = lambda line: print(f"medhead.generate: {line}", file=sys.stderr)
    return decoder


def proposer_options(args: argparse.Namespace, tokenizer: Any) -> tuple[str | None, dict[str, Any]]:
    """The proposer that the options belong to, None if there are none, and its arguments.

    Raises:
        MedheadError: they belong to another proposer than the one that was asked for.
    """
    asked: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}
    if getattr(args, "datastore", None) is not None:
        asked["--datastore"] = ("hybrid", "ngram"), {"datastore": args.datastore, "tokenizer": tokenizer}
    if getattr(args, "lookahead", None) is not None:
        asked["--lookahead"] = ("lookahead",), dict(zip(("window", "ngram", "guesses"), args.lookahead, strict=True))
    if getattr(args, "recycling_state", None) is not None:
        path = Path(args.recycling_state)
        new = args.save_recycling_state and not path.exists()
        if new and not path.parent.is_dir():
            raise MedheadError(f"the folder {str(path.parent)!r} of --recycling-state does not exist; make it first")
        asked["--recycling-state"] = ("recycling",), {} if new else {"warm": args.recycling_state}
    elif getattr(args, "save_recycling_state", False):
        raise MedheadError("--save-recycling-state needs --recycling-state FILE, the file to write")
    if not asked:
        return None, {}
    owners, given = next(iter(asked.values()))
    chosen = args.proposer or ("hybrid" if args.heads else owners[0])
    for option, (proposers, _) in asked.items():
        if chosen not in proposers:
            raise MedheadError(
                f"{option} belongs to the proposer {proposers[-1]!r}, but {chosen!r} guesses; leave one out"
            )
    return chosen, given


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `model.generate` for the options."""
    chosen: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        chosen |= {"temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}
    return chosen


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    check_numbers(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    name = args.model or DEMO_MODEL
    tokenizer = load_tokenizer(name, args.trust_remote_code)
    ids = encode_chat(tokenizer, read_prompt(args), args.system, args.raw)
    model = load_model(name, device, dtype, args.trust_remote_code)
    decoder = make_decoder(args, model, tokenizer)
    decoder.warmup()  # so that it does not count as time of the answer
    inputs = torch.tensor([ids], device=device)
    chosen = sampling(args)
    if args.compare:
        from medhead.cli.compare import compare

        compare(decoder, inputs, chosen, args.seed)
        save_learnt(args, decoder)
        return
    printer = TerminalPrinter(tokenizer, trace=args.trace, silent=args.json)
    decoder.on_pass = lambda row, new: printer.show(new)
    try:
        decoder.generate(inputs, attention_mask=torch.ones_like(inputs), seed=args.seed, **chosen)
    finally:
        printer.finish()
        decoder.on_pass = None
        if not args.json and not args.quiet and decoder.statistics.new_tokens:
            print(statistics_line(decoder), file=sys.stderr)
    save_learnt(args, decoder)
    statistics = decoder.statistics
    report = decoder.check(inputs, args.seed, attention_mask=torch.ones_like(inputs), **chosen) if args.check else None
    if report is not None and not args.json:
        print(report, file=sys.stderr)
    if args.json:
        result = {
            "text": printer.text,
            "token_ids": printer.tokens,
            "prompt_tokens": len(ids),
            "new_tokens": statistics.new_tokens,
            "passes": statistics.passes,
            "accepted_length": round(statistics.accepted_length, 4),
            "seconds": round(statistics.seconds, 4),
            "tokens_per_second": round(statistics.tokens_per_second, 2),
            "proposer": decoder.proposer.name,
        }
        if report is not None:
            result["identical"] = report.identical
        print(json.dumps(result, ensure_ascii=False))


def save_learnt(args: argparse.Namespace, decoder: Decoder) -> None:
    """Write the state of recycling back, if that was asked for.

    Raises:
        MedheadError: it cannot be written.
    """
    if args.save_recycling_state:
        assert isinstance(decoder.proposer, RecyclingProposer)
        decoder.proposer.save(args.recycling_state)


def statistics_line(decoder: Decoder) -> str:
    """One line about the last generation."""
    s, proposer = decoder.statistics, decoder.proposer
    most = "up to " if getattr(proposer, "adapts", False) else ""
    way = decoder.graphs.backend if decoder.graphs is not None and s.captured_steps else ""
    step = f", step {way}" if way else ", compiled pass" if decoder.compiled_target is not None else ""
    return (
        f"[{proposer.name}, {most}{proposer.tree_size} nodes{step}] {s.new_tokens} tokens in {s.seconds:.2f} s, "
        f"{s.tokens_per_second:.1f} tokens/s, {s.passes} verify passes, accepted length {s.accepted_length:.2f}"
    )


def guarded(prog: str, work: Callable[[], None]) -> int:
    """Run a command's work; turn how it ends into an exit code and at most one line on standard error."""
    try:
        work()
        sys.stdout.flush()
    except MedheadError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        return 1
    except Exception as error:
        if os.environ.get("MEDHEAD_DEBUG"):
            traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"{prog}: failed: {reason} (set MEDHEAD_DEBUG=1 for the details)", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.generate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
