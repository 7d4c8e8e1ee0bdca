"""A datastore on disk: the tokens of many documents, and their places sorted by what precedes them.

`tokens.npy` holds all documents behind each other, each followed by a separator that is no token. `order.npy` is the
suffix array of that text read backwards: places whose preceding tokens are alike are neighbours. So one binary search
finds where a text's end would stand, and the places around it are those with the longest common contexts. Both files are
memory-mapped. `datastore.json` says what they hold and which vocabulary it was made with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medhead.errors import MedheadError

INFO_FILE, TOKENS_FILE, ORDER_FILE = "datastore.json", "tokens.npy", "order.npy"
FORMAT = "medhead datastore 1"
CONTEXT = 32  # tokens by which places are sorted; longer contexts are not told apart
Place = tuple[int, int]  # position of a token, and how many tokens up to it are those of the text


@dataclass(frozen=True)
class Info:
    """What `datastore.json` says.

    Attributes:
        format: name and version of the layout.
        tokens: length of `tokens.npy`, separators included.
        places: length of `order.npy`.
        documents: number of documents.
        vocab_size: tokens of the tokenizer; this number is the separator.
        fingerprint: of the tokenizer's vocabulary, see `vocabulary_fingerprint`.
    """

    format: str
    tokens: int
    places: int
    documents: int
    vocab_size: int
    fingerprint: str

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self), indent=2) + "\n"


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """A hash of all tokens and their ids: two tokenizers with the same one mean the same by every id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class Datastore:
    """Looks up what followed a context.

    Args:
        info: what it holds.
        tokens: `[tokens]` unsigned ids and separators.
        order: `[places]` unsigned positions in `tokens`, sorted by the tokens up to each, read backwards.
        name: what messages call it.
    """

    def __init__(self, info: Info, tokens: npt.NDArray[Any], order: npt.NDArray[Any], name: str = "datastore") -> None:
        self.info, self.tokens, self.order, self.name = info, tokens, order, name

    @classmethod
    def open(cls, folder: str | Path) -> Datastore:
        """Map a datastore's files.

        Raises:
            MedheadError: there is none, or its files are damaged or do not belong together.
        """
        folder = Path(folder)
        info = read_info(folder)
        arrays = [_map(folder / name) for name in (TOKENS_FILE, ORDER_FILE)]
        lengths = [array.shape for array in arrays]
        if lengths != [(info.tokens,), (info.places,)] or any(array.dtype.kind != "u" for array in arrays):
            raise MedheadError(
                f"the files of the datastore {str(folder)!r} do not belong together: {INFO_FILE} speaks of {info.tokens} "
                f"tokens and {info.places} places, the arrays are {lengths}; build it again"
            )
        return cls(info, arrays[0], arrays[1], str(folder))

    def token_behind(self, place: int) -> int | None:
        """The token behind a position, None where its document ends."""
        token = int(self.tokens[place + 1])
        return None if token == self.info.vocab_size else token

    def places_like(self, text: list[int], longest: int, count: int) -> list[Place]:
        """Places that a text's end has most in common with, longest common context first; at least one token is.

        Args:
            text: token ids.
            longest: most tokens that are compared, at most `CONTEXT`.
            count: most places.
        """
        tail = text[: -min(longest, CONTEXT) - 1 : -1]
        middle = self._insertion(tail)
        low, high = max(0, middle - count), min(len(self.order), middle + count)
        places = self.order[low:high].astype(np.int64)
        back = places[:, None] - np.arange(len(tail))
        same = (self.tokens[np.maximum(back, 0)] == np.array(tail)) & (back >= 0)
        lengths = np.logical_and.accumulate(same, axis=1).sum(1)
        best = np.argsort(-lengths, kind="stable")[:count]
        return [(int(places[at]), int(lengths[at])) for at in best if lengths[at]]

    def _insertion(self, tail: list[int]) -> int:
        """How many places come before a context that is given backwards."""
        order, tokens = self.order, self.tokens
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            place = int(order[middle])
            smaller = False
            for at, token in enumerate(tail):
                theirs = int(tokens[place - at]) if at <= place else -1
                if theirs != token:
                    smaller = theirs < token
                    break
            if smaller:
                low = middle + 1
            else:
                high = middle
        return low


def read_info(folder: Path) -> Info:
    """What a folder's `datastore.json` says.

    Raises:
        MedheadError: the folder is missing or no datastore, or the file is damaged.
    """
    if not folder.is_dir():
        raise MedheadError(f"datastore folder {str(folder)!r} does not exist; `python -m medhead.datastore` builds one")
    path = folder / INFO_FILE
    if not path.is_file():
        raise MedheadError(f"{str(folder)!r} holds no {INFO_FILE}; it is not a datastore of medhead")
    try:
        info = Info(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MedheadError(f"{path} cannot be read: {' '.join(str(error).split())[:100]}; build it again") from None
    if info.format != FORMAT:
        raise MedheadError(f"{path} has the format {info.format!r}, expected {FORMAT!r}; build it again")
    return info


def check_fit(store: Datastore, vocab_size: int | None, tokenizer: Any = None) -> None:
    """Refuse a datastore of another tokenizer.

    Args:
        store: the datastore.
        vocab_size: rows of the target's output matrix, often a few more than the tokenizer has tokens; None if unknown.
        tokenizer: the target's tokenizer, if there is one.

    Raises:
        MedheadError: the vocabularies differ.
    """
    build = "build one with this model's tokenizer: python -m medhead.datastore"
    theirs = store.info.vocab_size
    if tokenizer is not None and vocabulary_fingerprint(tokenizer) != store.info.fingerprint:
        raise MedheadError(f"the datastore {store.name!r} was built with another tokenizer; {build}")
    spare = 0 if vocab_size is None else vocab_size - theirs
    if vocab_size is not None and (spare < 0 or (tokenizer is None and spare > max(1024, vocab_size // 10))):
        raise MedheadError(
            f"the datastore {store.name!r} was built with another tokenizer: its vocabulary has {theirs} tokens, "
            f"the model's {vocab_size}; {build}"
        )


def _map(path: Path) -> npt.NDArray[Any]:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise MedheadError(f"{path} is missing, truncated or damaged ({reason}); build the datastore again") from None
