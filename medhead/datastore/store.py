"""A datastore on disk: the tokens of many documents and their positions sorted by the preceding tokens.

`tokens.npy` concatenates all documents, each followed by a separator that is no token. `order.npy` is the suffix array of
that text read backwards, so positions with similar contexts are neighbours: one binary search finds the positions that
share the longest context with the end of a text. Both files are memory-mapped. `datastore.json` describes them and the
vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medhead.errors import MedheadError, one_line

INFO_FILE, TOKENS_FILE, ORDER_FILE = "datastore.json", "tokens.npy", "order.npy"
FORMAT = "medhead datastore 1"
MAX_CONTEXT = 32  # tokens by which positions are sorted
Match = tuple[int, int]  # position of a token, and the number of tokens up to it that equal the end of the text


@dataclass(frozen=True)
class DatastoreInfo:
    """Content of `datastore.json`."""

    format: str  # name and version of the layout
    tokens: int  # length of `tokens.npy`, separators included
    positions: int  # length of `order.npy`
    documents: int
    vocab_size: int  # of the tokenizer; also the id of the separator
    fingerprint: str  # see `vocabulary_fingerprint`


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Return a hash of all tokens and their ids; equal hashes mean that every id stands for the same token."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class Datastore:
    """Finds the positions whose contexts match the end of a text.

    Args:
        info: description of the arrays.
        tokens: `[tokens]` unsigned ids and separators.
        order: `[positions]` unsigned positions in `tokens`, sorted by the tokens up to each, read backwards.
        name: shown in error messages.
    """

    def __init__(
        self, info: DatastoreInfo, tokens: npt.NDArray[Any], order: npt.NDArray[Any], name: str = "datastore"
    ) -> None:
        self.info, self.tokens, self.order, self.name = info, tokens, order, name

    @classmethod
    def open(cls, folder: str | Path) -> Datastore:
        """Memory-map the files of a datastore; one that is missing or damaged raises a `MedheadError`."""
        folder = Path(folder)
        info = read_info(folder)
        tokens, order = (_map(folder / name) for name in (TOKENS_FILE, ORDER_FILE))
        shapes = (tokens.shape, order.shape)
        if shapes != ((info.tokens,), (info.positions,)) or tokens.dtype.kind != "u" or order.dtype.kind != "u":
            raise MedheadError(
                f"the files of the datastore {str(folder)!r} do not belong together: {INFO_FILE} says {info.tokens} "
                f"tokens and {info.positions} positions, the arrays have shapes {shapes}; build it again"
            )
        return cls(info, tokens, order, str(folder))

    def next_token(self, position: int) -> int | None:
        """Return the token after a position, or None where its document ends."""
        token = int(self.tokens[position + 1])
        return None if token == self.info.vocab_size else token

    def find_matches(self, text: list[int], max_context: int, count: int) -> list[Match]:
        """Return up to `count` positions that share the longest context with the end of a text, longest first.

        At most `max_context` and `MAX_CONTEXT` tokens are compared; every match shares at least one.
        """
        tail = text[: -min(max_context, MAX_CONTEXT) - 1 : -1]
        middle = self._insertion_index(tail)
        low, high = max(0, middle - count), min(len(self.order), middle + count)
        positions = self.order[low:high].astype(np.int64)
        back = positions[:, None] - np.arange(len(tail))
        same = (self.tokens[np.maximum(back, 0)] == np.array(tail)) & (back >= 0)
        lengths = np.logical_and.accumulate(same, axis=1).sum(1)
        best = np.argsort(-lengths, kind="stable")[:count]
        return [(int(positions[index]), int(lengths[index])) for index in best if lengths[index]]

    def _insertion_index(self, tail: list[int]) -> int:
        """Return the number of positions that sort before a context, given backwards."""

        def context(index: int) -> list[int]:
            position = int(self.order[index])
            return self.tokens[max(0, position + 1 - len(tail)) : position + 1][::-1].tolist()

        return bisect_left(range(len(self.order)), tail, key=context)


def read_info(folder: Path) -> DatastoreInfo:
    """Read a folder's `datastore.json`; where it is missing or damaged raise a `MedheadError`."""
    if not folder.is_dir():
        raise MedheadError(f"datastore folder {str(folder)!r} does not exist; `medhead datastore` builds one")
    path = folder / INFO_FILE
    if not path.is_file():
        raise MedheadError(f"{str(folder)!r} holds no {INFO_FILE}; it is not a medhead datastore")
    try:
        info = DatastoreInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MedheadError(f"{path} cannot be read: {one_line(error, 100)}; build it again") from None
    if info.format != FORMAT:
        raise MedheadError(f"{path} has the format {info.format!r}, expected {FORMAT!r}; build it again")
    return info


def check_vocabulary(store: Datastore, vocab_size: int | None, tokenizer: Any = None) -> None:
    """Refuse a datastore that was not built with the target's tokenizer.

    `vocab_size` is the number of rows of the target's output matrix, which may exceed the vocabulary a little.
    """
    build = "build one with this model's tokenizer: medhead datastore"
    size = store.info.vocab_size
    if tokenizer is not None and vocabulary_fingerprint(tokenizer) != store.info.fingerprint:
        raise MedheadError(f"the datastore {store.name!r} was built with another tokenizer; {build}")
    unused = 0 if vocab_size is None else vocab_size - size
    if vocab_size is not None and (unused < 0 or (tokenizer is None and unused > max(1024, vocab_size // 10))):
        raise MedheadError(
            f"the datastore {store.name!r} was built with another tokenizer: its vocabulary has {size} tokens, "
            f"the model's {vocab_size}; {build}"
        )


def _map(path: Path) -> npt.NDArray[Any]:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        reason = one_line(error, 100)
        raise MedheadError(f"{path} is missing, truncated or damaged ({reason}); build the datastore again") from None
