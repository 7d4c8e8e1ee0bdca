"""Building a datastore: documents to tokens, tokens to places sorted by what precedes them, and a folder that is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medhead.datastore.store import (
    CONTEXT,
    FORMAT,
    INFO_FILE,
    ORDER_FILE,
    TOKENS_FILE,
    Datastore,
    Info,
    read_info,
    vocabulary_fingerprint,
)
from medhead.errors import MedheadError


def build_datastore(
    documents: Iterable[list[int]],
    tokenizer: Any,
    folder: str | Path,
    overwrite: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> Datastore:
    """Write a datastore. While it is sorted it takes some 50 bytes of memory for each token.

    Args:
        documents: token ids of every document.
        tokenizer: what made them; only its vocabulary is read.
        folder: where to write; it appears when everything is written.
        overwrite: take the place of a datastore that is there; nothing else is ever overwritten.
        on_round: called with how many rounds of sorting are done, and of how many.

    Raises:
        MedheadError: the folder holds something, there is no text, a token is not the tokenizer's, or the disk is full.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    vocabulary = tokenizer.get_vocab()
    vocab_size = max(vocabulary.values(), default=-1) + 1
    tokens, count = join(documents, vocab_size)
    order = sorted_places(tokens, vocab_size, on_round)
    if not len(order):
        raise MedheadError("the text is too short for a datastore: no document has two tokens")
    info = Info(FORMAT, len(tokens), len(order), count, vocab_size, vocabulary_fingerprint(tokenizer))
    _write(folder, info, tokens, order)
    return Datastore.open(folder)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        MedheadError: it is a file, a folder with something else in it, or a datastore that was not to be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise MedheadError(f"{str(folder)!r} is a file; give a folder that does not exist yet")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    strangers = {path.name for path in folder.iterdir()} - {INFO_FILE, TOKENS_FILE, ORDER_FILE}
    if strangers or not (folder / INFO_FILE).is_file():
        raise MedheadError(f"{str(folder)!r} holds something else; give a folder that is empty or does not exist yet")
    read_info(folder)
    if not overwrite:
        raise MedheadError(f"{str(folder)!r} holds a datastore already; give another folder, or --overwrite")


def join(documents: Iterable[list[int]], vocab_size: int) -> tuple[npt.NDArray[Any], int]:
    """All documents behind each other, a separator (`vocab_size`) behind each; also their number.

    Raises:
        MedheadError: a token is not below `vocab_size`.
    """
    kind = np.uint16 if vocab_size < 2**16 else np.uint32
    parts, count = [np.zeros(0, kind)], 0
    for ids in documents:
        if not ids:
            continue
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise MedheadError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is not in the tokenizer's vocabulary of {vocab_size}"
            )
        parts.append(np.array([*ids, vocab_size], kind))
        count += 1
    return np.concatenate(parts), count


def sorted_places(
    tokens: npt.NDArray[Any], separator: int, on_round: Callable[[int, int], None] | None = None
) -> npt.NDArray[Any]:
    """Positions that have a token behind them in their document, sorted by the `CONTEXT` tokens up to each, read backwards.

    Prefix doubling (Manber and Myers 1993): when places are ranked by the last h tokens, pairs of ranks that are h apart
    rank them by the last 2h. Nothing comes before everything, so a text's beginning sorts first.
    """
    ranks = tokens.astype(np.int64) + 1
    rounds = CONTEXT.bit_length() - 1
    order = np.argsort(ranks, kind="stable")
    for done in range(rounds):
        reach = 1 << done
        before = np.zeros_like(ranks)
        before[reach:] = ranks[:-reach]
        pairs = ranks * (int(ranks.max(initial=0)) + 1) + before
        order = np.argsort(pairs, kind="stable")
        steps = np.concatenate([[0], np.diff(pairs[order]) != 0])
        ranks[order] = np.cumsum(steps) + 1
        if on_round is not None:
            on_round(done + 1, rounds)
        if int(ranks.max(initial=0)) == len(ranks):  # all told apart
            break
    behind = np.append(tokens[1:], separator)
    useful = (tokens != separator) & (behind != separator)
    order = order[useful[order]]
    return order.astype(np.uint32 if len(tokens) < 2**32 else np.uint64)


def _write(folder: Path, info: Info, tokens: npt.NDArray[Any], order: npt.NDArray[Any]) -> None:
    """Write beside the folder, then put it in place, so that a run that is killed leaves no half of a datastore."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fresh, old = scratch / "new", scratch / "old"
            fresh.mkdir()
            np.save(fresh / TOKENS_FILE, tokens, allow_pickle=False)
            np.save(fresh / ORDER_FILE, order, allow_pickle=False)
            (fresh / INFO_FILE).write_text(info.to_json(), encoding="utf-8")
            if folder.exists():
                os.replace(folder, old)
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise MedheadError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from None
