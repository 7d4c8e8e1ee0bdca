"""What the commands share: the parser, exit codes, checks of numbers, model options, the prompt and the decoder.

Only what a command runs imports torch; importing this module does not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from medhead.config import ATTENTION_NAMES, EXACT, PROPOSER_NAMES, WEIGHTS, SamplingParams, check_tree_size
from medhead.errors import MedheadError
from medhead.grammar import Grammar

if TYPE_CHECKING:
    from medhead.decoder import Decoder

EXTRAS = {  # optional package: the extra of medhead that installs it
    "accelerate": "train", "bitsandbytes": "qlora", "datasets": "train", "fastapi": "app", "flash_attn": "flash",
    "gguf": "gguf", "gradio": "app", "httpx": "app", "llguidance": "structured", "markdown_it": "app", "matplotlib": "bench",
    "prometheus_client": "app", "psutil": "bench", "tensorboard": "train", "triton": "triton", "uvicorn": "app", "yaml": "train",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of description and examples, and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def run_command(parser: Parser, work: Callable[[argparse.Namespace], int | None], argv: list[str] | None) -> int:
    """Parse the arguments, run `work` on them, and return the exit code."""
    args = parser.parse_args(argv)
    return guarded(parser.prog, lambda: work(args))


def guarded(prog: str, work: Callable[[], int | None]) -> int:
    """Run a command's work; turn its end into an exit code, its own or 0, and at most one line on standard error."""
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except MedheadError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("medhead"):
            return _failed(prog, error)
        name = (error.name or str(error)).partition(".")[0]
        package = f"'medhead[{EXTRAS[name]}]'" if name in EXTRAS else name
        print(f"{prog}: error: {name} is not installed: pip install {package}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe has gone
        return 1
    except Exception as error:
        return _failed(prog, error)


def _failed(prog: str, error: Exception) -> int:
    if os.environ.get("MEDHEAD_DEBUG"):
        traceback.print_exc()
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"{prog}: failed: {reason} (set MEDHEAD_DEBUG=1 for the traceback)", file=sys.stderr)
    return 1


def check_range(
    args: argparse.Namespace, name: str, low: float, high: float = math.inf, allowed: str | None = None
) -> None:
    """Raise a MedheadError unless the option (each of its values, if it has several) is None or from `low` to `high`."""
    given = getattr(args, name)
    for value in given if isinstance(given, list) else [] if given is None else [given]:
        if not low <= value <= high:  # also true of nan
            allowed = allowed or (f"at least {low}" if high == math.inf else f"from {low:,} to {high:,}")
            raise MedheadError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")


@contextmanager
def _name_options() -> Iterator[None]:
    """Let errors of fields, which begin with the field's name, name the option."""
    try:
        yield
    except MedheadError as error:
        field, _, rest = str(error).partition(" ")
        raise MedheadError(f"--{field.replace('_', '-')} {rest}") from None


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling parameters that the options ask for, or raise a MedheadError that names the option."""
    grammar = read_grammar(args)
    with _name_options():
        given = {"repetition_penalty": args.repetition_penalty, "seed": args.seed, "grammar": grammar}
        params = SamplingParams(args.max_new_tokens, args.temperature, args.top_p, args.top_k, **given)
    if params.greedy and (args.top_p is not None or args.top_k is not None):
        raise MedheadError("--top-p and --top-k need --temperature above 0; at 0 decoding is greedy")
    return params


def read_grammar(args: argparse.Namespace) -> Grammar | None:
    """Return the grammar of --json-schema or --regex, None without; or raise a MedheadError that names the option."""
    if args.json_schema is None and args.regex is None:
        return None
    if args.json_schema is not None and args.regex is not None:
        raise MedheadError("give --json-schema or --regex, not both")
    try:
        if args.regex is not None:
            return Grammar("regex", args.regex)
        return Grammar.json_schema(Path(args.json_schema).read_text(encoding="utf-8"))
    except UnicodeError:
        raise MedheadError(f"--json-schema {args.json_schema!r} is not UTF-8 text") from None
    except OSError as error:
        raise MedheadError(f"--json-schema {args.json_schema!r} cannot be read: {error.strerror or error}") from None
    except MedheadError as error:
        option = f"--regex {args.regex!r}" if args.regex is not None else f"--json-schema {args.json_schema!r}"
        raise MedheadError(f"{option}: {error}") from None


def check_tree_option(args: argparse.Namespace) -> None:
    """Raise a MedheadError unless --tree-size is valid or was not given."""
    with _name_options():
        if args.tree_size is not None:
            check_tree_size(args.tree_size)


def add_device_options(group: Any, dtype: str = "auto") -> None:
    """Add --device, --dtype, --weights and --trust-remote-code."""
    usual = "float32 on a CPU, else bfloat16" if dtype == "auto" else dtype
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument("--dtype", default=dtype, help=f"float32, bfloat16 or float16 (default: {usual})")
    add_weights_option(group)
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def add_weights_option(group: Any) -> None:
    """Add --weights."""
    group.add_argument("--weights", choices=WEIGHTS, default="full", help="how a CPU keeps weights of linear layers. full: in "
                       "--dtype; stored: as the checkpoint or GGUF file has them, 4 to 16 bits, with the text of float32; int8, "
                       "int4: rounded, which changes the text (default: full)")  # fmt: skip


def add_exact_option(group: Any, default: str = "none") -> None:
    """Add --exact."""
    group.add_argument("--exact", choices=["auto", *EXACT, "none"], default=default,
                       help="on a CPU. bitwise: one text for every proposer, tree and batch, bit for bit, in bfloat16 and "
                       "float16 too. transformers: the same, and for one prompt the text of transformers generate; slower. none: "
                       "equal up to rounding. auto: bitwise in bfloat16 and float16 where passes take no longer with it "
                       f"(default: {default})")  # fmt: skip


def exact_of(args: argparse.Namespace) -> str | None:
    """Return the argument `exact` that the options ask for."""
    given = getattr(args, "exact", "none")
    return None if given == "none" else given


def add_generation_config_option(group: Any) -> None:
    """Add --generation-config."""
    group.add_argument("--generation-config", metavar="WHAT", help="none: ignore the model's generation_config.json but "
                       "its special tokens; a folder or hub id: take that one's; a JSON object: change these fields, as "
                       """'{"repetition_penalty": 1.0}' (default: the model's)""")  # fmt: skip


def add_model_options(group: Any) -> None:
    """Add the options of model, heads, proposer and device that every decoding command has."""
    group.add_argument(
        "--model", help="model folder, hub id, GGUF file, or smollm2 (default: the demo model that medhead ships)"
    )
    group.add_argument("--heads", help="folder of a heads checkpoint, or mtp for multi-token-prediction layers in the "
                       "model's own checkpoint (default: those that medhead ships for the model)")  # fmt: skip
    group.add_argument("--proposer", choices=PROPOSER_NAMES, help="what drafts the tokens (default: hybrid)")
    group.add_argument("--tree-size", type=int, help="nodes verified in a pass, 1 to 256 (default: the proposer's)")
    group.add_argument("--attention", default="auto", choices=ATTENTION_NAMES, help="attention backend (default: auto)")
    group.add_argument("--packed", action=argparse.BooleanOptionalAction,
                       help="on a CPU, keep a second copy of the weights in the layout that verifies trees fastest "
                       "(default: where it is faster and takes at most a quarter of the free memory)")  # fmt: skip
    add_exact_option(group, "auto")
    add_generation_config_option(group)
    add_device_options(group)


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt from --prompt, --prompt-file or standard input, or raise a MedheadError that says why not."""
    if args.prompt is not None and args.prompt_file is not None:
        raise MedheadError("give --prompt or --prompt-file, not both")
    if args.prompt is None and args.prompt_file is None and sys.stdin.isatty():
        raise MedheadError("no prompt: give --prompt, --prompt-file, or text on standard input")
    on_input = args.prompt_file in (None, "-")
    source = "the prompt on standard input" if on_input else f"prompt file {args.prompt_file!r}"
    try:
        if args.prompt is not None:
            source, text = "the prompt", str(args.prompt)
        else:
            text = sys.stdin.read() if on_input else Path(args.prompt_file).read_text(encoding="utf-8")
        text.encode("utf-8")  # a shell passes bytes that are not UTF-8 as surrogates
    except UnicodeError:
        raise MedheadError(f"{source} cannot be read: it is not UTF-8 text") from None
    except OSError as error:
        raise MedheadError(f"{source} cannot be read: {error.strerror or error}") from None
    return text


def proposer_options(args: argparse.Namespace, tokenizer: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the proposer that the options belong to and its arguments; None and no arguments if none was given."""
    given: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}  # option: proposers that take it, their arguments
    if getattr(args, "datastore", None) is not None:
        given["--datastore"] = ("hybrid", "ngram"), {"datastore": args.datastore, "tokenizer": tokenizer}
    if getattr(args, "lookahead", None) is not None:
        given["--lookahead"] = ("lookahead",), dict(zip(("window", "ngram", "guess_set"), args.lookahead, strict=True))
    if getattr(args, "recycling_state", None) is not None:
        path = Path(args.recycling_state)
        new = args.save_recycling_state and not path.exists()
        if new and not path.parent.is_dir():
            raise MedheadError(f"the folder {str(path.parent)!r} of --recycling-state does not exist; make it first")
        given["--recycling-state"] = ("recycling",), {} if new else {"state": args.recycling_state}
    elif getattr(args, "save_recycling_state", False):
        raise MedheadError("--save-recycling-state needs --recycling-state FILE, the file to write")
    if not given:
        return None, {}
    owners, arguments = next(iter(given.values()))
    chosen = args.proposer or ("hybrid" if args.heads else owners[0])
    for option, (proposers, _) in given.items():
        if chosen not in proposers:
            raise MedheadError(f"{option} belongs to the proposer {proposers[-1]!r}, not to {chosen!r}; leave one out")
    return chosen, arguments


def make_decoder(args: argparse.Namespace, model: Any, tokenizer: Any = None) -> Decoder:
    """Build the decoder that the options ask for, or raise a MedheadError if they contradict each other."""
    from medhead.decoder import Decoder
    from medhead.generation_config import override_generation_config
    from medhead.heads.adapter import adapts_target, heads_of, load_adapted
    from medhead.model.named_models import default_heads

    owner, options = proposer_options(args, tokenizer)
    override_generation_config(model, getattr(args, "generation_config", None))
    folder = args.heads or default_heads(args.model)
    step, packed = getattr(args, "step", "auto"), getattr(args, "packed", None)  # only some commands have them
    compiles_step = step == "compiled" and model.device.type != "cpu"  # which a hybrid's cannot be
    proposer = args.proposer or owner or ("heads" if folder and compiles_step else "hybrid")
    heads: Any = folder if proposer in ("heads", "hybrid") else None
    if heads and adapts_target(heads):
        model = load_adapted(model, heads)
        heads = heads_of(model)
        say(f"{folder} adapts the model itself: the text is the adapted model's")
    given = {"tree_size": args.tree_size, "attention": args.attention, "packed": packed, "step": step, **options}
    decoder = Decoder(model, proposer, heads=heads, exact=exact_of(args), **given)
    if decoder.target.bitwise is not None and not decoder.target.bitwise.by_default:
        say(decoder.target.bitwise.describe())
    for compiler in (decoder.graphs, decoder.compiled_target):
        if compiler is not None:
            compiler.on_progress = say
    return decoder


def say(line: str) -> None:
    """Print a line about the progress on standard error."""
    print(f"medhead: {line}", file=sys.stderr, flush=True)
