"""Token ids of a training set on disk, written in one pass and read through memory maps.

A store is a folder: `tokens.bin` (int32) and `mask.bin` (bool) hold all documents one after the other, `ends.npy` (int64)
the end of each, `meta.json` the counts. Its name is a hash of everything it depends on, so an existing store is reused. It is
written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from array import array
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from medhead.errors import MedheadError
from medhead_training.data.encode import Encoder
from medhead_training.data.records import Sources, read_records, source_files, source_list

_VERSION = 1
_PROBE = "The quick  brown fox\n\njumps, 1234 ÄÖ 日本語 🙂"


class TokenStore:
    """A complete store, and its numbers of documents, tokens, tokens of the assistant, and records read.

    `ends` `[documents]` int64 is the end of each document among all tokens, `skipped` counts skipped records by reason.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.documents, self.tokens = int(meta["documents"]), int(meta["tokens"])
            self.assistant_tokens, self.records = int(meta["assistant_tokens"]), int(meta["records"])
            self.skipped: dict[str, int] = dict(meta["skipped"])
            self._tokens = np.memmap(self.folder / "tokens.bin", np.int32, "r", shape=(self.tokens,))
            self._mask = np.memmap(self.folder / "mask.bin", np.bool_, "r", shape=(self.tokens,))
            self.ends = np.load(self.folder / "ends.npy", mmap_mode="r", allow_pickle=False)
            sizes = [(self.folder / name).stat().st_size for name in ("tokens.bin", "mask.bin")]
            complete = sizes == [4 * self.tokens, self.tokens] and self.ends.shape == (self.documents,)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MedheadError(f"{str(folder)!r} is no readable token store: {error}") from None
        if not complete:
            raise MedheadError(f"the token store {str(folder)!r} is incomplete; delete the folder")

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and mask of one document."""
        start = self.ends[document - 1] if document % self.documents else 0
        return self.read(int(start), int(self.ends[document]))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)  # another process maps the files itself

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and mask of a range of all tokens."""
        return self._tokens[start:end], self._mask[start:end]

    def assistant_tokens_of(self, documents: np.ndarray) -> int:
        """Return how many tokens of these documents the assistant wrote."""
        return sum(int(self[document][1].sum()) for document in documents.tolist())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, `[documents]`."""
        return np.diff(self.ends, prepend=0)

    def split(self, held_out: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents to train on and, by seed alone, the held-out ones: a fraction (float) or a number (int)."""
        count = held_out
        if isinstance(held_out, float):
            if not 0.0 <= held_out < 1.0:
                raise MedheadError(f"the held-out fraction must be from 0 to below 1, got {held_out}")
            count = max(1, round(held_out * self.documents)) if held_out else 0
        if not 0 <= count < self.documents:
            raise MedheadError(f"{count} of {self.documents} documents cannot be held out; at least one must be left")
        order = np.random.default_rng(seed).permutation(self.documents)
        return np.sort(order[int(count) :]), np.sort(order[: int(count)])


def prepare_tokens(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, cache: str | Path,
    max_length: int | None = None, end_tokens: Iterable[int] = (), progress: bool = True,
) -> TokenStore:  # fmt: skip
    """Return the token store of these sources: an existing one from the folder `cache`, or a new one written there.

    The sources are those of `read_records`; `max_length` and `end_tokens` are those of `Encoder`.
    """
    cache, ends = Path(cache), sorted(set(end_tokens))
    key = _key(sources, tokenizer, max_length, ends)
    folder = cache / key
    if folder.is_dir():
        with suppress(MedheadError):
            return TokenStore(folder)
        shutil.rmtree(folder)
    _remove_leftovers(cache)
    temporary = cache / f".{key}.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_tokens(sources, Encoder(tokenizer, max_length, ends), temporary, progress)
        if _key(sources, tokenizer, max_length, ends) != key:
            raise MedheadError("the training data changed while it was read; start again")
        with suppress(OSError):  # another process may have finished first; its store is the same
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(folder)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of vocabulary, special tokens, chat template and the tokens of a sample text."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        tokenizer.get_chat_template() if tokenizer.chat_template else None,
        list(tokenizer(_PROBE)["input_ids"]),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(sources: Sources, tokenizer: PreTrainedTokenizerBase, max_length: int | None, end_tokens: list[int]) -> str:
    listed: list[Any] = []
    for source in source_list(sources):
        files = source_files(source)
        if files is None:
            listed.append([str(source), _dataset_revision(str(source))])
        for path in files or []:
            state = path.stat()
            listed.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    parts = [_VERSION, listed, tokenizer_fingerprint(tokenizer), max_length, end_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _dataset_revision(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # reading the dataset comes next and raises a clear error
        return None


def write_tokens(sources: Sources, encoder: Encoder, folder: Path, progress: bool) -> None:
    """Encode all records and write the files of a store into `folder`."""
    names = [str(source) for source in source_list(sources)]
    size = sum(path.stat().st_size for name in names for path in source_files(name) or [])
    skipped: Counter[str] = Counter()
    ends = array("q")
    tokens = assistant = records = 0
    bar = tqdm(total=size or None, unit="B", unit_scale=True, desc="tokens", disable=not progress, mininterval=1.0)
    with bar, (folder / "tokens.bin").open("wb") as token_file, (folder / "mask.bin").open("wb") as mask_file:
        for record in read_records(sources, bar.update):
            records += 1
            encoded = encoder.encode(record)
            if encoded.skipped is not None:
                skipped[encoded.skipped] += 1
                continue
            token_file.write(np.asarray(encoded.ids, np.int32).tobytes())
            mask_file.write(np.asarray(encoded.mask, np.bool_).tobytes())
            tokens += len(encoded.ids)
            assistant += sum(encoded.mask)
            ends.append(tokens)
            if not records % 1000:
                bar.set_postfix_str(f"{records:,} records, {tokens:,} tokens", refresh=False)
    if not ends:
        reasons = "; ".join(f"{count} times: {reason}" for reason, count in skipped.most_common(3))
        raise MedheadError(f"no usable text of an assistant among the {records} records that were read ({reasons})")
    np.save(folder / "ends.npy", np.asarray(ends, np.int64), allow_pickle=False)
    meta = {"version": _VERSION, "documents": len(ends), "tokens": tokens, "assistant_tokens": assistant,
            "records": records, "skipped": dict(skipped), "sources": names}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_leftovers(cache: Path) -> None:
    """Delete the temporary folders of killed processes of this machine."""
    for path in cache.glob(f".*.{socket.gethostname()}.*"):
        pid = path.name.rpartition(".")[2]
        try:
            if pid.isdecimal():
                os.kill(int(pid), 0)  # sends nothing
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except OSError:  # it runs
            pass
