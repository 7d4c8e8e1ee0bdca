"""From a training record to token ids, and which of them the assistant wrote.

Heads learn to guess what the model says, so the mask marks the assistant's tokens and the token that ends its turn.
A template with `{% generation %}` says itself where they are. For all others (every stock template of today) a turn
is what the chat with it has more than the chat up to it, with the generation prompt. Where that is no prefix (some
templates strip old thoughts, move the system prompt, or end the last turn in another way), the chat is rendered again
with a placeholder for every answer, which shows what stands between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from medhead.errors import MedheadError
from medhead_training.data.records import Message, Record

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError)  # what templates raise on chats they do not foresee

Span = tuple[int, int]  # of characters, end exclusive


class _Skip(Exception):
    """A record that cannot be used, and why."""


@dataclass(slots=True)
class Encoded:
    """Token ids and which of them the assistant wrote, or the reason why the record is of no use."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    skipped: str | None = None


class Encoder:
    """Turns records into tokens of one tokenizer.

    Args:
        tokenizer: with a chat template, if there are records of chats.
        max_length: longer records keep their beginning; None for no limit.
        end_tokens: ids that end a turn, as in the model's generation configuration; the tokenizer's EOS is one anyway.

    Raises:
        MedheadError: `max_length` is not positive.
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

    def encode(self, record: Record) -> Encoded:
        """Tokens and mask of a record, or why it is skipped.

        Raises:
            MedheadError: a chat without a chat template, or ids that are not this tokenizer's.
        """
        try:
            if record.ids is not None:
                ids, mask = self._exact(record)
            elif record.text is not None:
                ids = list(self.tokenizer(record.text, verbose=False)["input_ids"])
                mask = [True] * len(ids)
            else:
                ids, mask = self.chat(record.messages or [], record.where)
        except _Skip as reason:
            return Encoded(skipped=str(reason))
        if not any(mask):
            return Encoded(skipped="the assistant says nothing")
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        if not any(mask):
            return Encoded(skipped=f"the assistant says nothing in the first {self.max_length} tokens")
        return Encoded(ids, mask)

    def chat(self, messages: list[Message], where: str = "chat") -> tuple[list[int], list[bool]]:
        """Tokens of a chat, as the chat template writes it, and the assistant's mask."""
        if self.template is None:
            raise MedheadError(
                f"{where} is a chat, but this tokenizer has no chat template: use records with `text`, or set the template"
            )
        if not any(message["role"] == "assistant" for message in messages):
            raise _Skip("no turn of the assistant")
        text, spans = self._tagged(messages) if self.tagged else self._untagged(messages)
        ids, places = self._tokenize(text)
        mask = [False] * len(ids)
        last = 0
        for span in spans:
            first, last = self._token_range(ids, places, text, span, last)
            first, last = self._one_turn(ids, first, last)
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _exact(self, record: Record) -> tuple[list[int], list[bool]]:
        prompt, answer = record.ids or ([], [])
        largest = max(max(prompt, default=0), max(answer, default=0))
        if largest >= self._size:
            raise MedheadError(
                f"{record.where}: token id {largest} is outside this tokenizer's {self._size} tokens; "
                "the ids were written with another tokenizer"
            )
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    # ---------------------------------------------------------------- where the assistant's text is

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except _REFUSALS as error:
            raise _Skip(_refusal(error)) from None

    def _tagged(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Text and what the template's generation tags enclose.

        The mask of `apply_chat_template(return_assistant_tokens_mask=True)` comes from the same spans, but runs on
        into the user's turns in several versions of transformers (issue 47325), so only the spans are taken.
        """
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except _REFUSALS as error:
            raise _Skip(_refusal(error)) from None
        return texts[0], [(start, end) for start, end in spans[0] if end > start]

    def _untagged(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Text and the assistant's part of it, by comparing renderings of the chat."""
        text = self._render(messages)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._prefix(text, messages[:index], prompt=True)
                end = self._prefix(text, messages[: index + 1], prompt=False)
                if start is None or end is None:
                    found = self._around_placeholder(text, messages, index)
                    start, end = (found[0] if start is None else start), (found[1] if end is None else end)
                if start > end:
                    raise _Skip("the chat template mixes up its turns")
                spans.append((start, end))
        return text, spans

    def _prefix(self, text: str, messages: list[Message], prompt: bool) -> int | None:
        if not messages:
            return None
        try:
            part = self._render(messages, prompt)
        except _Skip:  # a part of a chat may be no chat for this template
            return None
        return len(part) if text.startswith(part) else None

    def _around_placeholder(self, text: str, messages: list[Message], index: int) -> Span:
        """One answer's span in `text`: what is left when the chat is rendered with a placeholder in its stead."""
        name = f"Answer{index}Of{len(text)}"
        replaced = [*messages[:index], messages[index] | {"content": name}, *messages[index + 1 :]]
        rendered = self._render(replaced)
        before, _, after = rendered.partition(name)
        found = rendered.count(name) == 1 and name not in text and len(before) + len(after) <= len(text)
        if not found or not text.startswith(before) or not text.endswith(after):
            raise _Skip("an answer was not found in the chat template's text")
        try:
            alone = self._render(replaced[: index + 1]).rpartition(name)[2]  # how a turn ends when nothing follows
        except _Skip:
            alone = ""
        return len(before), len(text) - len(after) + _common_start(after, alone)

    # ---------------------------------------------------------------- from characters to tokens

    def _tokenize(self, text: str) -> tuple[list[int], list[Span] | None]:
        """Token ids, and the characters of each where the tokenizer knows them."""
        if not self.tokenizer.is_fast:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), None
        output = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places: list[Span] = []
        reached = 0
        for start, end in output["offset_mapping"]:  # byte-level tokenizers leave white space out of their offsets
            places.append((min(start, reached), end))
            reached = max(reached, end)
        return list(output["input_ids"]), places

    def _token_range(
        self, ids: list[int], places: list[Span] | None, text: str, span: Span, first: int
    ) -> tuple[int, int]:
        """First and last (exclusive) token of a span of characters; the search begins at token `first`."""
        start, end = span
        if places is None:
            return self._length_of(ids, text[:start]), self._length_of(ids, text[:end])
        while first < len(ids) and places[first][1] <= start:
            first += 1
        if first < len(ids) and places[first][0] < start and ids[first] in self._control:
            first += 1  # a token of the template that has eaten the answer's leading spaces
        last = first
        while last < len(ids) and places[last][0] < end and not text[end : places[last][1]].strip():
            last += 1
        return first, last

    def _length_of(self, ids: list[int], text: str) -> int:
        part = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids[: len(part)] != part:
            raise _Skip("the tokenizer gives no character offsets and merges a turn with its header")
        return len(part)

    def _one_turn(self, ids: list[int], first: int, last: int) -> tuple[int, int]:
        """A turn ends with its first end token; what the template writes after it is not the assistant's."""
        for at in range(first, last):
            if ids[at] in self.end_tokens:
                return first, at + 1
        after = last
        while after < len(ids) and self._is_space(ids[after]):
            after += 1
        if after < len(ids) and ids[after] in self.end_tokens and first < last:
            return first, after + 1
        shorter = last
        while shorter > first and self._is_space(ids[shorter - 1]):
            shorter -= 1
        return first, shorter if shorter > first and ids[shorter - 1] in self._control else last

    def _is_space(self, token: int) -> bool:
        return token not in self._control and self.tokenizer.decode([token]).isspace()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, longest: int) -> list[int]:
    """Token ids of a chat that waits for an answer, or of its last message where there is no chat template.

    Args:
        tokenizer: of the model that will answer.
        messages: the chat.
        where: file and line, for messages.
        longest: most tokens; of a longer prompt the newest are kept, and a BOS token at its start.

    Raises:
        MedheadError: the template refuses the chat, or there is no token.
    """
    try:
        if tokenizer.chat_template:
            output = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        else:
            output = tokenizer(str(messages[-1].get("content", "")), verbose=False)
    except _REFUSALS as error:
        raise MedheadError(f"{where}: {_refusal(error)}") from None
    ids = list(output["input_ids"])
    if not ids:
        raise MedheadError(f"{where}: the prompt has no token")
    if len(ids) <= longest:
        return ids
    kept = ids[:1] if ids[0] == tokenizer.bos_token_id and longest > 1 else []
    return kept + ids[len(ids) - longest + len(kept) :]


def _refusal(error: Exception) -> str:
    return f"the chat template refuses it: {' '.join(str(error).split())[:120]}"


def _common_start(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return same
