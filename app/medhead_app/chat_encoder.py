"""Chats as token ids by the model's chat template, and what the model's processor makes of their images."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medhead.errors import MedheadError, one_line
from medhead.model.loading import apply_template
from medhead_app.images import ImageFile

ChatMessage = dict[str, Any]  # its `content` is a text, or a list of texts and `ImageFile`s
_PROBE = "medhead"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids, up to where the answer begins."""

    token_ids: list[int]
    dropped: int = 0  # number of oldest messages that were left out because they did not fit
    model_inputs: dict[str, Any] = field(default_factory=dict)  # see `Request`

    def followed_by(self, token_ids: list[int]) -> EncodedChat:
        """Return the conversation with tokens of an answer that has begun."""
        length, more = len(self.token_ids), len(token_ids)

        def longer(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_floating_point() or value.shape != (1, length):
                return value
            return torch.nn.functional.pad(value, (0, more))  # the answer's tokens are text, of type 0

        inputs = {name: longer(value) for name, value in self.model_inputs.items()}
        return EncodedChat(self.token_ids + token_ids, self.dropped, inputs)


class ChatEncoder:
    """Encodes chats for one model; without a chat template, messages are joined by blank lines.

    Args:
        tokenizer: of the model.
        processor: of a model that takes images, else None.
        dtype: of what the processor makes of pixels.
    """

    def __init__(self, tokenizer: Any, processor: Any = None, dtype: torch.dtype = torch.float32) -> None:
        # a tokenizer of its own: texts do not wait for a processor, which holds one too
        is_shared = getattr(processor, "tokenizer", None) is tokenizer
        self._tokenizer = copy.deepcopy(tokenizer) if processor is not None and is_shared else tokenizer
        self._processor, self._dtype = processor, dtype
        self._lock = threading.Lock()  # tokenizers keep the settings of a call in the object
        self._image_lock = threading.Lock()  # of the processor; the decoded images of one chat at a time are in memory
        self._takes_parts = processor is not None and not _takes_texts(processor)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        with self._lock:
            return list(self._tokenizer(text)["input_ids"])

    @contextmanager
    def decoded(self, messages: Sequence[ChatMessage]) -> Iterator[dict[ImageFile, Any]]:
        """Decode the images of a chat for `encode`; other chats with images wait until the block ends, texts do not.

        Raises:
            MedheadError: an image is damaged, or there are images and no processor.
        """
        files = _images(messages)
        if files and self._processor is None:
            raise MedheadError("the model reads text only: leave out the images")
        if not files:
            yield {}
            return
        with self._image_lock:
            yield {one: one.decode() for one in dict.fromkeys(files)}

    def encode(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] = (),
        decoded: Mapping[ImageFile, Any] | None = None,
    ) -> EncodedChat:
        """Return a chat up to where the answer begins.

        Args:
            messages: of the chat.
            tools: for the chat template.
            decoded: the images of these messages and maybe of others, inside of the block of `decoded`; None decodes them.

        Raises:
            MedheadError: the chat template or the processor refuses the messages, or see `decoded`.
        """
        if decoded is None:
            with self.decoded(messages) as decoded:
                return self.encode(messages, tools, decoded)
        if files := _images(messages):
            shown = [one | {"content": self._content(one)} for one in messages]
            return self._process(shown, [decoded[one] for one in files], tools)
        if not getattr(self._tokenizer, "chat_template", None):
            return EncodedChat(self.encode_text("\n\n".join(message["content"] for message in messages)))
        if self._takes_parts:
            messages = [one | {"content": self._content(one)} for one in messages]
        with self._lock:
            return EncodedChat(apply_template(self._tokenizer, messages, tools))

    def _content(self, message: ChatMessage) -> Any:
        """Return the content of a message as the chat template reads it; images have their places alone."""
        content = message["content"]
        if isinstance(content, str) and not self._takes_parts:
            return content
        parts = _parts(message)
        return [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image"} for one in parts]

    def _process(
        self, messages: Sequence[ChatMessage], images: list[Any], tools: Sequence[dict[str, Any]]
    ) -> EncodedChat:
        """Return what the processor makes of messages and their images, as its `apply_chat_template` does."""
        text = render_template(self._processor, messages, tools)
        bos = getattr(self._processor.tokenizer, "bos_token", None)
        options = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        try:
            found = dict(self._processor(text=[text], images=[images], return_tensors="pt", **options))
        except Exception as error:  # a processor can raise anything, for a text that holds its placeholders for example
            reason = one_line(error, 200)
            raise MedheadError(f"the model's processor refuses these messages and images: {reason}") from None
        token_ids = found.pop("input_ids")[0].tolist()
        found.pop("attention_mask", None)
        inputs = {name: self._as_read(value) for name, value in found.items()}
        return EncodedChat(token_ids, model_inputs=inputs)

    def _as_read(self, value: Any) -> Any:
        """Return pixels in the type that the model computes in."""
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def render_template(processor: Any, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = ()) -> str:
    """Return the text that a processor's chat template makes of messages.

    Raises:
        MedheadError: the template refuses them.
    """
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    try:
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options))
    except Exception as error:  # a template can raise anything
        raise MedheadError(f"the model's chat template refuses these messages: {one_line(error, 200)}") from None


def _images(messages: Sequence[ChatMessage]) -> list[ImageFile]:
    return [part for message in messages for part in _parts(message) if isinstance(part, ImageFile)]


def _parts(message: ChatMessage) -> list[str | ImageFile]:
    content = message["content"]
    return [content] if isinstance(content, str) else content


def _takes_texts(processor: Any) -> bool:
    """Return whether the chat template writes a content that is a text; some read lists of parts alone."""
    try:
        return _PROBE in render_template(processor, [{"role": "user", "content": _PROBE}])
    except MedheadError:
        return False
