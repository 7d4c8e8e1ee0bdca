"""`medhead datastore`: index text so that the proposer ngram can look up what the model repeats from it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medhead.cli.common import Parser, run_command
from medhead.datastore.build import build_datastore, check_output
from medhead.datastore.documents import encode, read_documents, text_files
from medhead.datastore.store import INFO_FILE, ORDER_FILE, TOKENS_FILE
from medhead.errors import MedheadError

EXAMPLES = """\
examples:
  medhead datastore --model Qwen/Qwen3-0.6B --text notes/ --output notes-datastore
  medhead datastore --tokenizer my/tokenizer --text manual.txt answers.jsonl --output manual-datastore
  medhead generate --model Qwen/Qwen3-0.6B --datastore notes-datastore --prompt "How do I reset it?"

text:   UTF-8 files, or folders of them (hidden files and files that are not text are skipped). Each file is a document;
        in a *.jsonl file each text of a record is one. Give text that the model is likely to repeat: the documents it is
        asked about, the code of the project, its own earlier answers.
output: a folder with tokens.npy, order.npy and datastore.json, 6 to 8 bytes per token, mapped into memory when it is used.
        It serves every model with this vocabulary; other models refuse it.

exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C (no partial datastore is left)
"""


def parser() -> Parser:
    """Return the parser of the command."""
    options = Parser(
        prog="medhead datastore",
        description="Index text of your own, so that the proposer ngram drafts what the model repeats from it.",
        epilog=EXAMPLES,
    )
    what = options.add_argument_group("text and tokenizer")
    what.add_argument("--text", type=Path, nargs="+", required=True, metavar="PATH", help="files and folders of text")
    one = what.add_mutually_exclusive_group()
    one.add_argument(
        "--model", help="model whose tokenizer is used: folder, hub id, GGUF file, or smollm2 (default: demo model)"
    )
    one.add_argument("--tokenizer", help="folder that holds only a tokenizer, or a GGUF file, in place of --model")
    what.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the tokenizer")
    where = options.add_argument_group("output")
    where.add_argument("--output", type=Path, required=True, help="folder to write; it must be empty or missing")
    where.add_argument("--overwrite", action="store_true", help="replace an older datastore at --output")
    where.add_argument("--quiet", action="store_true", help="print no progress bar and no summary")
    return options


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from medhead.model.loading import load_tokenizer

    began = time.perf_counter()
    check_output(args.output, args.overwrite)
    files = text_files(args.text)
    name = args.tokenizer or args.model
    tokenizer = load_tokenizer(name, args.trust_remote_code, needs_model=not args.tokenizer)
    hidden = args.quiet or not sys.stderr.isatty()
    skipped: list[Path] = []
    with tqdm(total=5, desc="sort", unit="round", disable=hidden, leave=False) as bar:

        def on_round(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        documents = _documents(files, tokenizer, skipped, hidden)
        store = build_datastore(documents, tokenizer, args.output, args.overwrite, on_round)
    if args.quiet:
        return
    size = sum((args.output / name).stat().st_size for name in (INFO_FILE, TOKENS_FILE, ORDER_FILE))
    print(
        f"{store.info.tokens - store.info.documents:,} tokens of {store.info.documents:,} documents, "
        f"{size / 1e6:.1f} MB in {args.output}, {time.perf_counter() - began:.1f} s"
    )
    if skipped:
        print(f"skipped because they are not text: {len(skipped)} files, first {skipped[0]}", file=sys.stderr)
    print(f"use it: medhead generate --datastore {args.output} ...")


def _documents(files: list[Path], tokenizer: Any, skipped: list[Path], hidden: bool) -> Iterator[list[int]]:
    """Yield the token ids of every document, with a progress bar over the bytes of the files."""
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
    """Run `medhead datastore` and return its exit code."""
    return run_command(parser(), run, argv)
