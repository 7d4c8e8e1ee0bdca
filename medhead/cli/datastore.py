"""The command: read text, build a datastore, say how to use it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medhead.datastore.build import build_datastore, check_output
from medhead.datastore.documents import encode, read_documents, text_files
from medhead.datastore.store import INFO_FILE, ORDER_FILE, TOKENS_FILE
from medhead.errors import MedheadError
from medhead.generate import Parser, guarded
from medhead.model.loading import DEMO_MODEL, load_tokenizer

EXAMPLES = """\
examples:
  python -m medhead.datastore --model Qwen/Qwen3-0.6B --text notes/ --output notes-datastore
  python -m medhead.datastore --tokenizer my/tokenizer --text manual.txt answers.jsonl --output manual-datastore
  python -m medhead.generate --model Qwen/Qwen3-0.6B --datastore notes-datastore --prompt "How do I reset it?"

text:   UTF-8 files, or folders of them (hidden files and files that are no text are left out). Each file is a document;
        in a *.jsonl file each text of a record is one. What the model is likely to repeat helps: the documents it is
        asked about, code of the project, its own earlier answers.
output: a folder with tokens.npy, order.npy and datastore.json, about 6 to 8 bytes for each token, mapped into memory
        when it is used. It fits every model with this vocabulary and is refused by others.

exit codes: 0 done, 2 wrong input, 1 failure, 130 stopped with Ctrl-C (nothing is left behind)
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead.datastore",
        description="Make text of your own searchable, so that the proposer ngram can guess what the model repeats from it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    who = options.add_mutually_exclusive_group()
    who.add_argument("--model", help="model folder or hub id whose tokenizer is used (default: the demo model)")
    who.add_argument("--tokenizer", help="the same for a folder that holds a tokenizer alone")
    options.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="PATH", help="files and folders of text"
    )
    options.add_argument("--output", type=Path, required=True, help="folder to write; it must not hold anything")
    options.add_argument("--overwrite", action="store_true", help="take the place of an older datastore at --output")
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    options.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return options


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    began = time.perf_counter()
    check_output(args.output, args.overwrite)
    files = text_files(args.text)
    tokenizer = load_tokenizer(
        args.tokenizer or args.model or DEMO_MODEL, args.trust_remote_code, needs_model=not args.tokenizer
    )
    hidden = args.quiet or not sys.stderr.isatty()
    skipped: list[Path] = []
    with tqdm(total=5, desc="sort", unit="round", disable=hidden, leave=False) as bar:

        def on_round(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        store = build_datastore(
            _documents(files, tokenizer, skipped, hidden), tokenizer, args.output, args.overwrite, on_round
        )
    if not args.quiet:
        sizes = sum((args.output / name).stat().st_size for name in (INFO_FILE, TOKENS_FILE, ORDER_FILE))
        print(
            f"{store.info.tokens - store.info.documents:,} tokens of {store.info.documents:,} documents, "
            f"{sizes / 1e6:.1f} MB in {args.output}, {time.perf_counter() - began:.1f} s"
        )
        if skipped:
            print(f"left out because they are no text: {len(skipped)} files, first {skipped[0]}", file=sys.stderr)
        print(f"use it: python -m medhead.generate --datastore {args.output} ...")


def _documents(files: list[Path], tokenizer: Any, skipped: list[Path], hidden: bool) -> Iterator[list[int]]:
    """Token ids of every document, with a progress bar over the bytes of the files."""
    sizes = [path.stat().st_size for path in files]
    with tqdm(total=sum(sizes), desc="read", unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        for path, size in zip(files, sizes, strict=True):
            texts = read_documents(path)
            if texts is None:
                skipped.append(path)
            for text in texts or []:
                yield encode(tokenizer, text)
            bar.update(size)
    if len(skipped) == len(files):
        raise MedheadError(f"{str(files[0])!r} is not UTF-8 text")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead.datastore", lambda: run(args))
