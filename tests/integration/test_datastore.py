"""The datastore: its content, its lookups, the tokenizer check, and its command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import tiny_llama
from medhead import Decoder, MedheadError
from medhead.cli.datastore import main
from medhead.datastore import Datastore, build_datastore
from medhead.datastore.build import concatenate, sort_positions
from medhead.datastore.documents import chunks, encode, read_documents
from medhead.datastore.store import FORMAT, MAX_CONTEXT, DatastoreInfo
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.proposers.ppm import StoreMemory, escape_mass
from scripted import trie_paths

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), max_size=25), min_size=1, max_size=6)


class Words:
    """A tokenizer of `size` words with the one method that datastores call."""

    def __init__(self, size: int, prefix: str = "w") -> None:
        self.vocabulary = {f"{prefix}{index}": index for index in range(size)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def in_memory(documents: list[list[int]], vocab: int = 4) -> Datastore:
    tokens, count = concatenate(documents, vocab)
    order = sort_positions(tokens, vocab)
    return Datastore(DatastoreInfo(FORMAT, len(tokens), len(order), count, vocab, ""), tokens, order)


def common(left: list[int], right: list[int]) -> int:
    """Return the number of tokens that two texts have in common at their ends."""
    n = 0
    while n < min(len(left), len(right)) and left[-1 - n] == right[-1 - n]:
        n += 1
    return n


def all_positions(documents: list[list[int]], text: list[int], longest: int) -> list[tuple[int, list[int]]]:
    """Return, for every position with a next token, the length it shares with the text's end and all tokens after it."""
    return [
        (min(common(ids[: at + 1], text), longest), ids[at + 1 :]) for ids in documents for at in range(len(ids) - 1)
    ]


@given(DOCUMENTS)
def test_positions_are_sorted_by_the_preceding_tokens(documents: list[list[int]]) -> None:
    store = in_memory(documents)
    tokens = store.tokens.tolist()
    backwards = [tuple(tokens[: position + 1][::-1][:MAX_CONTEXT]) for position in store.order.tolist()]
    assert backwards == sorted(backwards)
    assert sorted(store.order.tolist()) == [at for at in range(len(tokens)) if tokens[at] != 4 and tokens[at + 1] != 4]


def test_long_repeats_are_sorted_as_far_as_contexts_go() -> None:
    store = in_memory([[1] * 100, [2] + [1] * 50, [0] + [1] * 70])
    tokens = store.tokens.tolist()
    backwards = [tuple(tokens[: position + 1][::-1][:MAX_CONTEXT]) for position in store.order.tolist()]
    assert backwards == sorted(backwards)


@given(DOCUMENTS, st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 10), st.integers(1, 8))
def test_the_positions_most_like_a_text_are_found(
    documents: list[list[int]], text: list[int], longest: int, count: int
) -> None:
    store = in_memory(documents)
    found = store.find_matches(text, longest, count)
    expected = sorted((shared for shared, _ in all_positions(documents, text, longest) if shared), reverse=True)
    assert [shared for _, shared in found] == expected[:count]
    tokens = store.tokens.tolist()
    for position, shared in found:
        assert tokens[position - shared + 1 : position + 1] == text[-shared:]
        assert 4 not in (tokens[position], store.next_token(position))


@given(DOCUMENTS, st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 3))
def test_candidates_are_those_of_a_search(documents: list[list[int]], text: list[int], depth: int) -> None:
    found = trie_paths(StoreMemory(in_memory(documents), 5, 10**6).trie(text, 10**6, depth, 0.0))
    positions = [position for position in all_positions(documents, text, 5) if position[0]]
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    frontier: list[tuple[int, ...]] = [()]
    while frontier:
        path = frontier.pop()
        if len(path) == depth:
            continue
        here = [
            (n + len(path), rest[len(path)])
            for n, rest in positions
            if tuple(rest[: len(path)]) == path and len(rest) > len(path)
        ]
        rest = 1.0
        for length in sorted({n for n, _ in here}, reverse=True):
            seen = [token for n, token in here if n >= length]
            for token in seen:
                key = (*path, token)
                if key not in expected:
                    frontier.append(key)
                share = rest / (len(seen) + escape_mass(length))
                expected[key] = expected.get(key, 0.0) + expected[path] * share
            rest *= escape_mass(length) / (len(seen) + escape_mass(length))
            if rest <= 0.02:
                break
    del expected[()]
    assert found == pytest.approx(expected)


def test_a_datastore_on_disk_is_the_one_that_was_built(tmp_path: Path) -> None:
    rounds: list[tuple[int, int]] = []
    documents = [[1, 2, 3, 4], [], [5], [2, 3, 9, 1, 2]]
    store = build_datastore(documents, Words(10), tmp_path / "deep" / "store", on_round=lambda *r: rounds.append(r))
    again = Datastore.open(tmp_path / "deep" / "store")
    assert again.info == store.info
    assert (again.info.documents, again.info.vocab_size, again.info.tokens, again.info.positions) == (3, 10, 13, 7)
    assert again.tokens.tolist() == [1, 2, 3, 4, 10, 5, 10, 2, 3, 9, 1, 2, 10]
    assert again.find_matches([7, 2, 3], 8, 4) == [(2, 2), (8, 2)]
    assert rounds[-1][0] <= rounds[-1][1]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["store"]  # no scratch is left


def test_large_vocabularies_have_wider_tokens() -> None:
    tokens, _ = concatenate([[0, 65535, 70000]], 100_000)
    assert tokens.dtype == np.uint32
    assert in_memory([[0, 65535, 70000]], 100_000).find_matches([65535], 4, 4) == [(1, 1)]
    assert concatenate([[1]], 65535)[0].tolist() == [1, 65535]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    build_datastore([[1, 2]], Words(5), tmp_path / "store")
    with pytest.raises(MedheadError, match="holds a datastore already"):
        build_datastore([[1, 3]], Words(5), tmp_path / "store")
    assert build_datastore([[1, 3]], Words(5), tmp_path / "store", overwrite=True).tokens.tolist() == [1, 3, 5]
    (tmp_path / "store" / "letter.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "datastore.json").write_text('{"format": "something"}')
    (tmp_path / "file").write_text("mine")
    for name, says in (("store", "something else"), ("other", "cannot be read"), ("file", "is a file")):
        with pytest.raises(MedheadError, match=says):
            build_datastore([[1, 2]], Words(5), tmp_path / name, overwrite=True)
    assert (tmp_path / "store" / "letter.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    build_datastore([[1, 2]], Words(5), tmp_path / "empty")


def test_text_that_cannot_be_stored(tmp_path: Path) -> None:
    for documents, says in (([], "too short"), ([[1], [2]], "too short"), ([[1, 7]], "token id 7 is not in")):
        with pytest.raises(MedheadError, match=says):
            build_datastore(documents, Words(5), tmp_path / "store")
    (tmp_path / "file").write_text("")
    with pytest.raises(MedheadError, match="cannot be written"):
        build_datastore([[1, 2]], Words(5), tmp_path / "file" / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -------------------------------------------------------------------- with a model


@pytest.fixture
def store(tmp_path: Path) -> Path:
    build_datastore([[1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9]], Words(64), tmp_path / "store")
    return tmp_path / "store"


def test_draft_tokens_come_from_the_datastore(model: PreTrainedModel, store: Path) -> None:
    """The stored document is the model's own output, so it is copied; no datastore changes the text."""
    ids = torch.tensor([[5, 9, 13]])
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    plain = model.generate(ids, **options)
    build_datastore([plain[0].tolist()], Words(64), store, overwrite=True)
    decoder = Decoder(model, "ngram", datastore=store, tokenizer=Words(64))
    assert torch.equal(decoder.generate(ids, **options), plain)
    assert decoder.statistics.accepted_length > 4
    other = torch.tensor([[5, 9, 13], [20, 9, 9], [0, 1, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]])
    for how in ({"do_sample": False}, {"do_sample": True, "top_k": 0, "seed": 4}):
        expected = Decoder(model, "none").generate(other, attention_mask=mask, **(options | how))
        assert torch.equal(decoder.generate(other, attention_mask=mask, **(options | how)), expected)


def test_both_sources_share_one_tree(target: Target, store: Path) -> None:
    from test_ngram import state

    proposer = build_proposer("ngram", target, datastore=Datastore.open(store), tree_size=8, max_depth=3)
    text = [2, 3, 50, 51, 2, 3]
    proposer.begin(target, [text])
    found = trie_paths(proposer.tries(state(target, [text]), 3)[0])
    assert {(50, 51, 2), (4, 5, 6)} <= set(found)
    tree = proposer.propose(state(target, [text]), 2)
    assert {tuple(path) for path in tree.paths(0)} >= {(50, 51), (4, 5)}
    assert tree.nodes <= 8


def test_another_tokenizer_is_refused(target: Target, store: Path) -> None:
    big = Target(tiny_llama(vocab=3000))
    for chosen, tokenizer, says in (
        (target, Words(64, "v"), "another tokenizer; build one"),
        (target, Words(63), "another tokenizer; build one"),
        (Target(tiny_llama(vocab=60)), None, "its vocabulary has 64 tokens, the model's 60"),
        (big, None, "its vocabulary has 64 tokens, the model's 3000"),
    ):
        with pytest.raises(MedheadError, match=says) as refusal:
            build_proposer("ngram", chosen, datastore=store, tokenizer=tokenizer)
        assert "\n" not in str(refusal.value)
    build_proposer("ngram", Target(tiny_llama(vocab=70)), datastore=store)  # rows without a token
    build_proposer("ngram", big, datastore=store, tokenizer=Words(64))  # the right tokenizer


def damage(store: Path, how: str) -> None:
    if how == "no folder":
        shutil.rmtree(store)
    elif how == "no json":
        (store / "datastore.json").unlink()
    elif how == "json":
        (store / "datastore.json").write_text("{")
    elif how == "format":
        info = json.loads((store / "datastore.json").read_text())
        (store / "datastore.json").write_text(json.dumps(info | {"format": "medhead datastore 0"}))
    elif how == "truncated":
        (store / "order.npy").write_bytes((store / "order.npy").read_bytes()[:-3])
    elif how == "no tokens":
        (store / "tokens.npy").unlink()
    elif how == "pickle":
        np.save(store / "tokens.npy", np.array([{}], dtype=object), allow_pickle=True)
    elif how == "other order":
        np.save(store / "order.npy", np.arange(3, dtype=np.uint32))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no folder", "does not exist"),
        ("no json", "holds no datastore.json"),
        ("json", "cannot be read"),
        ("format", "format 'medhead datastore 0'"),
        ("truncated", "truncated or damaged"),
        ("no tokens", "missing, truncated or damaged"),
        ("pickle", "truncated or damaged"),
        ("other order", "do not belong together"),
    ],
)
def test_damaged_datastores_get_one_line(target: Target, store: Path, how: str, says: str) -> None:
    damage(store, how)
    with pytest.raises(MedheadError, match=says) as refusal:
        build_proposer("ngram", target, datastore=store)
    assert "\n" not in str(refusal.value)


# -------------------------------------------------------------------- text and command


def test_documents_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8-sig")
    assert read_documents(tmp_path / "a.txt") == ["one\ntwo"]
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "id": 3},
        "plain",
    ]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_documents(tmp_path / "b.jsonl") == ["Hi", "Ho", "plain"]
    for content in (b"\xff\xfe\x00", b"a\0b"):
        (tmp_path / "c.bin").write_bytes(content)
        assert read_documents(tmp_path / "c.bin") is None


@given(st.text(alphabet="ab\n", max_size=60))
def test_chunks_are_the_text(text: str) -> None:
    from medhead.datastore import documents

    before, documents.CHUNK_SIZE = documents.CHUNK_SIZE, 7
    try:
        cut = chunks(text)
        assert "".join(cut) == text
        assert all(0 < len(chunk) <= 7 for chunk in cut)
        assert all(chunk.endswith("\n") or "\n" not in chunk for chunk in cut[:-1])
    finally:
        documents.CHUNK_SIZE = before


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build a datastore from a folder of text and draft tokens from it."""
    from medhead.cli import generate

    text = tmp_path / "text"
    (text / "deeper").mkdir(parents=True)
    (text / ".hidden").write_text("not this one")
    (text / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (text / "story.txt").write_text("Once upon a time there was a dragon.")
    (text / "deeper" / "more.jsonl").write_text('{"text": "She went home."}\n')
    output = tmp_path / "store"
    code, out, err = run(["--model", str(folders["model"]), "--text", str(text), "--output", str(output)], capsys)
    assert code == 0, err
    assert "2 documents" in out
    assert "--datastore" in out
    assert "picture.png" in err
    store = Datastore.open(output)
    assert store.tokens.tolist() == [
        *encode(tokenizer, "She went home."),
        store.info.vocab_size,
        *encode(tokenizer, "Once upon a time there was a dragon."),
        store.info.vocab_size,
    ]
    alone = tmp_path / "tokenizer"
    tokenizer.save_pretrained(alone)
    again = ["--tokenizer", str(alone), "--text", str(text), "--output", str(output), "--quiet"]
    assert run([*again, "--overwrite"], capsys) == (0, "", "")
    assert Datastore.open(output).info == store.info
    common_options = ["--model", str(folders["model"]), "--prompt", "Once upon a", "--max-new-tokens", "20", "--json"]
    assert generate.main([*common_options, "--datastore", str(output), "--check"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["proposer"], result["identical"]) == ("hybrid", True)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["--help"], capsys)
    assert code == 0
    for word in ("--tokenizer", "--text", "--output", "examples:", "exit codes", ".jsonl", "memory"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "./nowhere", "--output", "{new}"], "'nowhere' does not exist"),
        (["--text", "{empty}", "--output", "{new}"], "there is no file in"),
        (["--text", "{binary}", "--output", "{new}"], "not UTF-8 text"),
        (["--text", "{broken}", "--output", "{new}"], "line 2 is not JSON"),
        (["--text", "{blank}", "--output", "{new}"], "too short"),
        (["--text", "{good}", "--output", "{good}"], "is a file"),
        (["--text", "{good}", "--output", "{full}"], "holds something else"),
        (["--text", "{good}", "--output", "{new}", "--model", "./nowhere"], "'./nowhere' does not exist"),
        (["--text", "{good}", "--output", "{new}", "--tokenizer", "{empty}"], "cannot be loaded"),
        (["--text", "{good}", "--output", "{new}", "--model", "x", "--tokenizer", "y"], "not allowed with"),
        (["--output", "{new}"], "--text"),
    ],
)
def test_wrong_input_gets_one_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / name for name in ("new", "empty", "binary", "broken", "blank", "good", "full")}
    for name in ("empty", "full"):
        paths[name].mkdir()
    (paths["full"] / "letter.txt").write_text("mine")
    paths["broken"] = tmp_path / "broken.jsonl"
    paths["broken"].write_text('{"text": "fine"}\n{"text":\n')
    paths["binary"].write_bytes(b"\xff\xfe\xff")
    paths["blank"].write_text("\n")
    paths["good"].write_text("Once upon a time.")
    code, out, err = run([argument.format(**paths) for argument in arguments], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert err.startswith("medhead datastore: error: ")
    assert not paths["new"].exists()
