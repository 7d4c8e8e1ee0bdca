"""Encode training records as token ids and a mask of the assistant's tokens.

The mask marks the assistant's tokens and the token that ends each turn: what the model generates and heads learn to draft.
There are three ways to find them, tried in this order:

1. A template with `{% generation %}` marks them itself.
2. A turn is what the rendered chat up to it adds to the rendered chat before it with the generation prompt.
3. If these are no prefixes of the whole chat (some templates remove old thoughts, move the system prompt, or end the last
   turn differently), the chat is rendered with a placeholder for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from medhead.errors import MedheadError
from medhead_training.data.records import Message, Record

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)  # what templates raise on unexpected chats

Span = tuple[int, int]  # of characters, end exclusive


class _SkipRecordError(Exception):
    """The record cannot be used; the message says why."""


@dataclass(slots=True)
class EncodedRecord:
    """Token ids and the assistant's mask, or the reason why the record is skipped."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    skipped: str | None = None


class Encoder:
    """Encode records with one tokenizer; records longer than `max_length` tokens keep their beginning.

    `end_tokens` are the ids that end a turn, as in the model's generation configuration; the tokenizer's EOS is added.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, end_tokens: Iterable[int] = ()
    ) -> None:
        if max_length is not None and max_length < 1:
            raise MedheadError(f"the maximum length must be at least 1 token, got {max_length}")
        self.tokenizer, self.max_length = tokenizer, max_length
        eos = tokenizer.eos_token_id
        self.end_tokens = frozenset(end_tokens) | (frozenset() if eos is None else {eos})
        self.template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self.tagged = bool(self.template and _GENERATION_TAG.search(self.template))
        added = tokenizer.added_tokens_decoder
        self._control = frozenset(token for token, content in added.items() if not str(content).isspace())
        self._size = max(len(tokenizer), max(added, default=-1) + 1)

    def encode(self, record: Record) -> EncodedRecord:
        """Return tokens and mask of a record, or why it is skipped."""
        try:
            if record.ids is not None:
                ids, mask = self._encode_ids(record.ids, record.where)
            elif record.text is not None:
                ids = self._token_ids(record.text, add_special_tokens=True)
                mask = [True] * len(ids)
            else:
                ids, mask = self._encode_chat(record.messages or [], record.where)
        except _SkipRecordError as reason:
            return EncodedRecord(skipped=str(reason))
        if not any(mask):
            return EncodedRecord(skipped="the assistant says nothing")
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        if not any(mask):
            return EncodedRecord(skipped=f"the assistant says nothing in the first {self.max_length} tokens")
        return EncodedRecord(ids, mask)

    def _encode_chat(self, messages: list[Message], where: str) -> tuple[list[int], list[bool]]:
        if self.template is None:
            raise MedheadError(
                f"{where} is a chat, but this tokenizer has no chat template: use records with `text`, or set the template"
            )
        if not any(message["role"] == "assistant" for message in messages):
            raise _SkipRecordError("no turn of the assistant")
        text, spans = self._tagged_spans(messages) if self.tagged else self._untagged_spans(messages)
        ids, offsets = self._tokenize(text)
        mask = [False] * len(ids)
        last = 0
        for span in spans:
            first, last = self._token_range(ids, offsets, text, span, last)
            first, last = self._trim_turn(ids, first, last)
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _encode_ids(self, ids: tuple[list[int], list[int]], where: str) -> tuple[list[int], list[bool]]:
        prompt, answer = ids
        largest = max(prompt + answer, default=0)
        if largest >= self._size:
            raise MedheadError(
                f"{where}: token id {largest} is outside this tokenizer's {self._size} tokens; "
                "the ids were written with another tokenizer"
            )
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    # ---------------------------------------------------------------- find the assistant's text

    def _render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TEMPLATE_ERRORS as error:
            raise _SkipRecordError(template_refusal(error)) from None

    def _tagged_spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Return the text and the spans of the template's generation tags.

        The mask of `apply_chat_template(return_assistant_tokens_mask=True)` is not used: it extends into the user's turns
        in several versions of transformers (issue 47325).
        """
        try:
            tokens = self.tokenizer.special_tokens_map
            texts, spans = render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=True, **tokens
            )
        except TEMPLATE_ERRORS as error:
            raise _SkipRecordError(template_refusal(error)) from None
        return texts[0], [(start, end) for start, end in spans[0] if end > start]

    def _untagged_spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        text = self._render(messages)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._prefix_length(text, messages[:index], generation_prompt=True)
                end = self._prefix_length(text, messages[: index + 1], generation_prompt=False)
                if start is None or end is None:
                    found = self._placeholder_span(text, messages, index)
                    start, end = (found[0] if start is None else start), (found[1] if end is None else end)
                if start > end:
                    raise _SkipRecordError("the chat template mixes up its turns")
                spans.append((start, end))
        return text, spans

    def _prefix_length(self, text: str, messages: list[Message], generation_prompt: bool) -> int | None:
        if not messages:
            return None
        try:
            part = self._render(messages, generation_prompt)
        except _SkipRecordError:  # the template may refuse a part of a chat
            return None
        return len(part) if text.startswith(part) else None

    def _placeholder_span(self, text: str, messages: list[Message], index: int) -> Span:
        """Return the span in `text` of one answer: what differs when a placeholder replaces it."""
        name = f"Answer{index}Of{len(text)}"
        replaced = [*messages[:index], messages[index] | {"content": name}, *messages[index + 1 :]]
        rendered = self._render(replaced)
        before, _, after = rendered.partition(name)
        unique = rendered.count(name) == 1 and name not in text and len(before) + len(after) <= len(text)
        if not unique or not text.startswith(before) or not text.endswith(after):
            raise _SkipRecordError("an answer was not found in the chat template's text")
        try:
            turn_end = self._render(replaced[: index + 1]).rpartition(name)[2]  # how a turn ends when nothing follows
        except _SkipRecordError:
            turn_end = ""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(after, turn_end, strict=False))
        return len(before), len(text) - len(after) + len(list(same))

    # ---------------------------------------------------------------- from characters to tokens

    def _token_ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _tokenize(self, text: str) -> tuple[list[int], list[Span] | None]:
        """Return token ids, and the span of characters of each if the tokenizer is a fast one."""
        if not self.tokenizer.is_fast:
            return self._token_ids(text), None
        output = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = output["offset_mapping"]  # byte-level tokenizers leave white space out
        reached = accumulate((end for _, end in spans), max, initial=0)
        offsets = [(min(start, before), end) for (start, end), before in zip(spans, reached, strict=False)]
        return list(output["input_ids"]), offsets

    def _token_range(
        self, ids: list[int], offsets: list[Span] | None, text: str, span: Span, first: int
    ) -> tuple[int, int]:
        """Return first and last (exclusive) token of a span of characters, searching from token `first` on."""
        start, end = span
        if offsets is None:
            return self._prefix_tokens(ids, text[:start]), self._prefix_tokens(ids, text[:end])
        while first < len(ids) and offsets[first][1] <= start:
            first += 1
        if first < len(ids) and offsets[first][0] < start and ids[first] in self._control:
            first += 1  # a token of the template that includes the answer's leading spaces
        last = first
        while last < len(ids) and offsets[last][0] < end and not text[end : offsets[last][1]].strip():
            last += 1
        return first, last

    def _prefix_tokens(self, ids: list[int], text: str) -> int:
        part = self._token_ids(text)
        if ids[: len(part)] != part:
            raise _SkipRecordError("the tokenizer gives no character offsets and merges a turn with its header")
        return len(part)

    def _trim_turn(self, ids: list[int], first: int, last: int) -> tuple[int, int]:
        """End a turn with its first end token; what the template writes after it is not the assistant's."""
        end = next((at for at in range(first, last) if ids[at] in self.end_tokens), None)
        if end is not None:
            return first, end + 1
        after = next((at for at in range(last, len(ids)) if not self._is_space(ids[at])), None)
        if after is not None and ids[after] in self.end_tokens and first < last:
            return first, after + 1
        shorter = last
        while shorter > first and self._is_space(ids[shorter - 1]):
            shorter -= 1
        return first, shorter if shorter > first and ids[shorter - 1] in self._control else last

    def _is_space(self, token: int) -> bool:
        return token not in self._control and self.tokenizer.decode([token]).isspace()


def template_refusal(error: Exception) -> str:
    """Return the error of a chat template in one line."""
    return f"the chat template refuses it: {' '.join(str(error).split())[:120]}"
