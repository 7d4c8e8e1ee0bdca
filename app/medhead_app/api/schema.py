"""What programs may ask for: OpenAI's fields, medhead's own, and the refusal of everything else by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from medhead.proposers import PROPOSERS
from medhead_app.api.errors import ApiError

MAX_STOPS = 4
IDENTIFIERS = ("user", "safety_identifier", "prompt_cache_key")  # strings that change nothing
NEUTRAL: dict[
    str, tuple[Any, ...]
] = {  # fields that are not supported, with the values that ask for nothing; null always
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


def _joined(content: Any) -> Any:
    """Text, or a list of text parts, as one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"part {index} is not {{type: text, text: ...}}; this server reads text alone")
        texts.append(part["text"])
    return "\n".join(texts)


def _stops(stop: Any) -> Any:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("expected a text or a list of texts, none of them empty")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop texts")
    return tuple(texts)


def _one_prompt(prompt: Any) -> Any:
    """A text or token ids; or a list with one of these."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise ValueError("one prompt a request; send several requests for several prompts")
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    if not isinstance(prompt, str) and not ids:
        raise ValueError("expected a text or a list of token ids")
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _known_proposer(name: str) -> str:
    if name not in PROPOSERS:
        raise ValueError(f"no proposer is called {name!r}; there are {', '.join(sorted(PROPOSERS))}")
    return name


class Strict(BaseModel):
    """No field that it does not know, no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Common(Strict):
    """Fields of both endpoints."""

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    proposer: Annotated[str | None, AfterValidator(lambda name: name and _known_proposer(name))] = None
    tree_size: Annotated[int | None, Field(ge=1, le=256)] = None

    def limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value in tokens."""
        return "max_tokens", self.max_tokens

    def sampling(self) -> dict[str, Any]:
        """Fields of the engine's request."""
        drawn = self.temperature > 0
        return {
            "temperature": self.temperature,
            "top_p": self.top_p if drawn and self.top_p < 1 else None,
            "top_k": self.top_k if drawn and self.top_k > 0 else None,
            "min_p": self.min_p if drawn and self.min_p > 0 else None,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": self.stop,
            "proposer": self.proposer,
            "tree_size": self.tree_size,
        }


class ChatRequest(Common):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    def limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value in tokens."""
        if self.max_completion_tokens is None:
            return super().limit()
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError("give max_completion_tokens or max_tokens, not both", "max_tokens", "invalid_value")
        return "max_completion_tokens", self.max_completion_tokens

    def chat(self) -> list[dict[str, str]]:
        """Messages for the chat template."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        ]


class CompletionRequest(Common):
    """Body of `/v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    max_tokens: Annotated[int | None, Field(ge=1)] = 16  # OpenAI's default


Body = TypeVar("Body", bound=Common)


def read_body(kind: type[Body], body: bytes) -> Body:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, or asks for something that cannot be; names the field.
    """
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
        if b"\\u" in body:  # half a surrogate pair is JSON, but no text
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    fields = _without_neutral(kind, {name: value for name, value in fields.items() if value is not None})
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_null(message) for message in fields["messages"]]
    try:
        read = kind.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from None
    if read.stream_options is not None and not read.stream:
        raise ApiError("stream_options needs stream=true", "stream_options", "invalid_value")
    return read


def _without_neutral(kind: type[Common], fields: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in IDENTIFIERS:
            if not isinstance(value, str):
                raise ApiError(f"{name}: expected a text", name, "invalid_type")
        elif name not in NEUTRAL:
            raise ApiError(f"unknown field {name[:80]!r}", name[:80], "unknown_parameter")
        elif not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in NEUTRAL[name]):
            raise ApiError(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
    return kept


def _without_null(message: Any) -> Any:
    """Clients send an answer back with all its empty fields."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name == "content" or value not in (None, [])}


def _first_error(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False)[0]
    param = ""
    for part in found["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f"{'.' if param else ''}{part}"[:80]
    message, code = found["msg"].removeprefix("Value error, "), "invalid_value"
    if found["type"] == "missing":
        message, code = "this field is required", "missing_required_parameter"
    elif found["type"] == "extra_forbidden":
        message, code = "this field is not supported by this server; leave it out", "unsupported_parameter"
    return ApiError(f"{param}: {message[:1].lower()}{message[1:]}", param, code)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
