"""Log probabilities in OpenAI's two formats."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from medhead.serving.logprobs import TokenLogprobs

LOWEST = -9999.0  # in the place of minus infinity, which JSON does not have
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte


class TokenTexts:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # decoders of some tokenizers drop a space at the beginning of a text, so every token is decoded after another one
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._skip = len(self._decode(self._before))

    def text(self, token: int) -> str:
        """Return the text of a token; bytes that are no character are U+FFFD."""
        return self._decode([*self._before, token])[self._skip :]

    def bytes(self, token: int) -> bytes:
        """Return the bytes of a token in UTF-8, also where they are a part of a character."""
        text = self.text(token)
        piece = self._tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else None
        if piece is None:
            return text.encode()
        if found := _BYTE.fullmatch(piece):
            return bytes.fromhex(found[1])
        alphabet = _byte_alphabet()
        return bytes(alphabet[char] for char in piece) if all(char in alphabet for char in piece) else text.encode()

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def chat_logprobs(texts: TokenTexts, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
    """Return the field `logprobs` of a choice of `/v1/chat/completions`."""
    content = [
        _entry(texts, one.token, one.logprob) | {"top_logprobs": [_entry(texts, *pair) for pair in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(texts: TokenTexts, logprobs: list[TokenLogprobs], offset: int) -> dict[str, Any]:
    """Return the field `logprobs` of a choice of `/v1/completions`; `offset` is where the first token begins."""
    tokens = [texts.text(one.token) for one in logprobs]
    offsets = [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))]
    top = [_by_text(texts, [*one.top, (one.token, one.logprob)]) for one in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [max(one.logprob, LOWEST) for one in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _entry(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": max(logprob, LOWEST), "bytes": list(texts.bytes(token))}


def _by_text(texts: TokenTexts, pairs: list[tuple[int, float]]) -> dict[str, float]:
    """Return log probabilities by the text of the token; of tokens with one text the most probable counts."""
    found: dict[str, float] = {}
    for token, logprob in pairs:
        found.setdefault(texts.text(token), max(logprob, LOWEST))
    return found


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    return {char: byte for byte, char in bytes_to_unicode().items()}
