"""What the benchmark programs share: options and their checks, model and prompts, tables, plots, results with provenance."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from medhead import __version__, generation_config
from medhead.bench.measure import Prompts
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.cli.common import (
    Parser,
    add_exact_option,
    add_generation_config_option,
    add_weights_option,
    check_range,
    exact_of,
)
from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.model.loading import load_model, load_tokenizer, pick_device, pick_dtype
from medhead.model.named_models import DEMO
from medhead.model.target import Target
from medhead_kernels.bench_report import cpu_name

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # of plots: medhead, a reference to look at, everything else
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", ORANGE, GREY)
Row = dict[str, Any]


def bench_parser(program: str, description: str, epilog: str, repeats: int) -> Parser:
    """Return a parser with the options that every benchmark has; `repeats` is the default of `--repeats`."""
    options = Parser(prog=f"medhead bench {program}", description=description, epilog=epilog)
    group = options.add_argument_group("measurement and output")
    group.add_argument("--repeats", type=int, default=repeats, help="timed runs; medians count (default: %(default)s)")
    group.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    group.add_argument("--output", type=Path, help=f"folder to write results.json, table.md and {program}.png to")
    group.add_argument("--title", default="", help="title of table and plot")
    return options


def add_decoding_options(options: Parser, max_new_tokens: int, num_prompts: int | None = None) -> None:
    """Add the options of model, prompts and token limit with these defaults; without `num_prompts` a file is required."""
    forms = "JSON lines with messages, prompt, question, turns or text"
    options.add_argument("--model", help="model folder, hub id, GGUF file, or smollm2 (default: the demo model)")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_weights_option(options)
    add_exact_option(options)
    add_generation_config_option(options)
    if num_prompts is None:
        options.add_argument("--prompts", required=True, help=f"{forms}, and category, the task")
    else:
        options.add_argument("--prompts", help=f"{forms} (default: built-in prompts)")
        options.add_argument("--num-prompts", type=int, default=num_prompts,
                             help="prompts to take from the start of the file (default: %(default)s)")  # fmt: skip
    options.add_argument("--max-new-tokens", type=int, default=max_new_tokens,
                         help="token limit of an answer (default: %(default)s)")  # fmt: skip


def add_text_options(options: Parser) -> None:
    """Add `--ignore-eos` and `--seed`."""
    options.add_argument("--ignore-eos", action="store_true", help="decode past the end token up to the token limit")
    options.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")


def check_options(args: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Raise a MedheadError if a shared option or one of `ranges` is out of range, or `--output` is a file."""
    shared = {"repeats": (1, math.inf), "num_prompts": (1, math.inf)}
    shared |= {"max_new_tokens": (1, 10**7), "seed": (0, 2**64 - 1)}
    for name, (low, high) in (shared | ranges).items():
        if name in args:
            check_range(args, name, low, high)
    if args.output is not None and args.output.is_file():
        raise MedheadError(f"--output {str(args.output)!r} is a file; give a folder")


def load_target(args: argparse.Namespace, dtype: str, ignore_eos: bool = False) -> Target:
    """Load the model that the options name; its texts also end at the EOS token of its tokenizer."""
    device = pick_device(args.device)
    model = load_model(args.model, device, pick_dtype(dtype, device), args.trust_remote_code, args.weights)
    prepare_texts(args, model, ignore_eos)
    return Target(model, exact=exact_of(args))


def prepare_texts(args: argparse.Namespace, model: Any, ignore_eos: bool = False) -> None:
    """Make the model's generation configuration that of the options and of its tokenizer."""
    generation_config.override_generation_config(model, args.generation_config)
    if ignore_eos:
        model.generation_config.update(eos_token_id=None, stop_strings=None)
    else:
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        model.generation_config.eos_token_id = generation_config.end_tokens(model, tokenizer) or None


def generate_arguments(args: argparse.Namespace, model: Any, temperature: float) -> dict[str, Any]:
    """Return the arguments of `generate` for the options; the model went through `prepare_texts`."""
    has_strings = generation_config.stop_strings(model)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code) if has_strings else None
    params = SamplingParams(args.max_new_tokens, temperature)
    return generation_config.generate_arguments(model, params, tokenizer)


def load_prompts(args: argparse.Namespace, context: int) -> Prompts:
    """Read and encode the prompts that the options name, each shortened to the newest tokens that fit."""
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    return encode_prompts(tokenizer, read_prompts(args.prompts, args.num_prompts), room_for_prompt(args, context))


def room_for_prompt(args: argparse.Namespace, context: int) -> int:
    """Return how many tokens of the model's context a prompt may have."""
    if args.max_new_tokens >= context:
        advice = f"in the model's context of {context}; give at most {context - 1}"
        raise MedheadError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt {advice}")
    return context - args.max_new_tokens


def progress_bar(total: int) -> Any:
    """Return a progress bar of answers on standard error; it changes every 10 seconds where that is no terminal."""
    return tqdm(total=total, unit="answer", mininterval=0.5 if sys.stderr.isatty() else 10, leave=False)


def say(line: str) -> None:
    """Print a line on standard error, above a progress bar."""
    tqdm.write(line, file=sys.stderr)


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on: date, hardware, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "medhead": __version__,
    }


def label(model: str | None) -> str:
    """Return a model's name in tables: the last part of a folder or file, wherever it lies."""
    return "demo model" if model in (None, DEMO) else Path(model).name if Path(model).exists() else model


def heading(args: argparse.Namespace, *parts: str) -> str:
    """Return one line that says what was measured and on what."""
    found = machine()
    on_gpu = pick_device(args.device).type == "cuda"
    place = found["gpu"] if on_gpu else f"{found['cpu']}, {found['threads']} threads"
    weights = f"{args.weights} weights" if getattr(args, "weights", "full") != "full" else ""
    return ", ".join(part for part in (args.title, *parts, weights, place, found["date"]) if part)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; its first `left` columns are aligned to the left, the others to the right."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def report(
    args: argparse.Namespace,
    program: str,
    title: str,
    text: str,
    rows: list[Row],
    plot: Callable[[list[Row], str, Path], None],
    show: bool = True,
    **extra: Any,
) -> None:
    """Print the table `text` below `title`, and write it with JSON and plot where `--output` asks for that.

    Without `show` nothing is printed: for a long run whose results are written as they come. `extra` goes into the JSON file.
    """
    if show:
        print(f"{title}\n\n{text}")
    if args.output is not None:
        content = {"machine": machine(), "command": f"medhead bench {program}", "options": vars(args), **extra}
        draw = partial(plot, rows, title)
        line = write_results(args.output, title, text, content | {"results": rows}, f"{program}.png", draw)
        if show:
            say(line)


def write_results(
    folder: Path, title: str, text: str, content: dict[str, Any], picture: str, draw: Callable[[Path], None]
) -> str:
    """Write `content` to results.json, `text` below `title` to table.md, and the plot `picture`; return a line that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    try:
        draw(folder / picture)
    except ImportError:
        return f"wrote {folder}/results.json, table.md; no plot: matplotlib is missing (pip install 'medhead[bench]')"
    return f"wrote {folder}/results.json, table.md, {picture}"


@contextmanager
def figure(
    path: Path, title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[Any]:
    """Draw a figure of `size` inches into a file; yields its axes `[rows, columns]`. `options` are those of `subplots`."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **options)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(textwrap.fill(title, int(14 * size[0])), fontsize=9)
    drawn.savefig(path, dpi=130)
