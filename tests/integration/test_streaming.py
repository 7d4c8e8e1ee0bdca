"""Streaming several tokens a step, without ever breaking a character."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from conftest import tiny_llama
from medhead import Decoder
from medhead.core.streaming import TextStream
from scripted import OracleProposer


class Recorder(BaseStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.columns: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.columns.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_streamer_sees_what_plain_decoding_shows_it(batch: int) -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 9, 13], [7, 8, 9], [20, 21, 22]])[:batch]
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    recorder = Recorder()
    with Decoder(model, OracleProposer(expected.tolist(), 64)) as decoder:
        found = model.generate(ids, custom_generate=decoder, streamer=recorder, **options)
    assert torch.equal(found, expected)
    assert recorder.ended == 1
    new = [column for column in recorder.columns if len(column) == batch][-(found.shape[1] - 3) :]
    assert torch.equal(torch.tensor(new).T, found[:, 3:])


def test_text_streamer_and_stop_strings(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama(vocab=len(tokenizer), eos_token_id=1)
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    whole = model.generate(ids, **options)
    words = [tokenizer.decode([token]) for token in whole[0, ids.shape[1] :].tolist()]
    stop = next(word for at, word in enumerate(words) if at > 5 and word.strip().isalnum() and word not in words[:at])
    options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    expected = model.generate(ids, **options)
    assert expected.shape[1] < whole.shape[1]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    with Decoder(model, OracleProposer(whole.tolist(), len(tokenizer))) as decoder:
        found = model.generate(ids, custom_generate=decoder, streamer=streamer, **options)
    assert torch.equal(found, expected)
    assert "".join(streamer) == tokenizer.decode(expected[0, ids.shape[1] :])


def streamed(tokenizer: PreTrainedTokenizerBase, text: str, sizes: list[int]) -> None:
    """A text pushed so many tokens at a time comes out whole, and no piece has half a character."""
    tokens = tokenizer(text)["input_ids"]
    stream, pieces, at, turn = TextStream(tokenizer), [], 0, 0
    while at < len(tokens):
        pieces.append(stream.push(tokens[at : at + sizes[turn % len(sizes)]]))
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    pieces.append(stream.finish())
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "\ufffd" not in "".join(pieces)


@given(st.text(max_size=120), st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_pieces_add_up_and_no_character_breaks(tokenizer: PreTrainedTokenizerBase, text: str, sizes: list[int]) -> None:
    streamed(tokenizer, text, sizes)


def test_a_character_waits_for_its_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer("a🐉b")["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokens]
    assert "".join(pieces) + stream.finish() == "a🐉b"
    assert pieces.count("") == 3  # four bytes, four tokens, one character
    half = TextStream(tokenizer)
    assert half.push(tokens[:2]) == "a"
    assert half.finish() == "\ufffd"  # the text ends inside a character: said at the end, not lost


def byte_fallback() -> PreTrainedTokenizerBase:
    """In the manner of Llama 2, Mistral and Gemma: what the vocabulary lacks is spelt in bytes, and read back by runs of them."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@given(
    st.lists(st.sampled_from(["a", " b", " ", "😀", "မြန်မာ", "é", "日本"]), max_size=40).map("".join),
    st.lists(st.integers(1, 5), min_size=1, max_size=10),
)
def test_pieces_add_up_with_byte_fallback(text: str, sizes: list[int]) -> None:
    streamed(byte_fallback(), text, sizes)


def test_bytes_without_a_character_neither_stop_nor_double_the_text() -> None:
    tokenizer = byte_fallback()
    hello, emoji, more = (tokenizer(text)["input_ids"] for text in ("Hello ", "😀", "a world"))
    cut = TextStream(tokenizer)  # inside the second of two
    pieces = [cut.push([token]) for token in hello + emoji + emoji[:2]]
    assert "".join(pieces) == "Hello 😀"
    assert set(cut.finish()) == {"\ufffd"}
    stray = TextStream(tokenizer)  # one byte too many, and on it goes
    pieces = [stray.push([token]) for token in hello + emoji + emoji[:1] + more]
    assert "".join(pieces).replace("\ufffd", "") == "Hello 😀a world"
    assert pieces[-1] == "d"
    assert stray.finish() == ""
