"""Request bodies: OpenAI's fields and medhead's own; every other field is refused by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from medhead.config import SamplingParams, check_tree_size
from medhead.grammar import Grammar
from medhead.proposers import PROPOSERS
from medhead.serving.logprobs import MAX_TOP_LOGPROBS
from medhead_app.api.errors import ApiError
from medhead_app.api.grammars import Choice, GrammarText, JsonSchema, Regex, ResponseFormat, StructuredOutputs
from medhead_app.api.messages import KIND, AnyMessage, for_template, without_empty
from medhead_app.api.strict import StrictModel
from medhead_app.api.tools.plan import ToolRequest, new_tool_request
from medhead_app.api.tools.schema import ToolChoice, Tools

MAX_STOPS = 4
MAX_CHOICES = 128
# hints that change no text, with the type of their values
IGNORED: dict[str, type] = {
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"), str),
    "request_id": str,  # vLLM's
    "metadata": dict,
    "prediction": dict,
    "priority": int,
}
# fields that are not supported, with the values that ask for nothing; null always does
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "reasoning_effort", "verbosity", "web_search_options"), ()),
    **dict.fromkeys(("best_of", "length_penalty"), (1,)),
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("continue_final_message", "include_stop_str_in_output", "use_beam_search"), (False,)),
    **dict.fromkeys(("echo", "store"), (False,)),
    "top_logprobs": (0,),
    **dict.fromkeys(("functions", "tools"), ([],)),
    "function_call": ("none",),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
}
# further fields of `SamplingParams` with the names and values of the API
_SAME_NAMES = ("presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", "ignore_eos")


def _stop_tuple(stop: Any) -> Any:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"must be at most {MAX_STOPS} strings, got {len(texts)}")
    return tuple(texts)


def _prompt_list(prompt: Any) -> Any:
    """Return a list of texts and lists of token ids, from one of these or a list of them."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    for one in prompts:
        ids = isinstance(one, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in one)
        if not isinstance(one, str) and not ids:
            raise ValueError("must be a string, a list of token ids, or a list of these")
        if not one:
            raise ValueError("must not be empty")
    return prompts


def _bias_by_id(bias: Any) -> Any:
    """Return `logit_bias` with whole numbers as keys, which are strings in JSON."""
    if not isinstance(bias, dict) or not all(isinstance(key, str) and key.isdecimal() for key in bias):
        raise ValueError("must be an object of numbers by token id")
    return {int(key): value for key, value in bias.items()} or None


def _to_tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


def _known_proposer(name: str | None) -> str | None:
    if name is not None and name not in PROPOSERS:
        raise ValueError(f"must be one of {', '.join(sorted(PROPOSERS))}, got {name!r}")
    return name


def _check_sampling(value: Any, info: ValidationInfo) -> Any:
    """Let SamplingParams check the value of its field of the same name; its error is a ValueError."""
    assert info.field_name is not None
    SamplingParams(**{info.field_name: value})
    return value


CheckSampling = AfterValidator(_check_sampling)
CheckTreeSize = AfterValidator(lambda size: None if size is None else check_tree_size(size))
# as 64-bit two's complement: OpenAI's seeds are signed, the engine's are not
WrapSeed = AfterValidator(lambda seed: seed + 2**64 if seed is not None and -(2**63) <= seed < 0 else seed)
# -1 and 0 keep all tokens, as in vLLM
AllTokens = AfterValidator(lambda top_k: 0 if top_k == -1 else top_k)


class StreamOptions(StrictModel):
    """The field `stream_options`."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(StrictModel):
    """Fields of all endpoints."""

    left_out: ClassVar[tuple[str, ...]] = ()  # fields of a parent class that a body does not have
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    # None leaves a field to the model's generation configuration
    temperature: Annotated[float | None, Field(le=2), CheckSampling] = None
    top_p: Annotated[float | None, CheckSampling] = None
    top_k: Annotated[int | None, AllTokens, CheckSampling] = None
    min_p: Annotated[float | None, CheckSampling] = None
    repetition_penalty: Annotated[float | None, CheckSampling] = None
    no_repeat_ngram_size: Annotated[int | None, CheckSampling] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    presence_penalty: Annotated[float | None, CheckSampling] = None
    frequency_penalty: Annotated[float | None, CheckSampling] = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_bias_by_id), CheckSampling] = None
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_to_tuple), CheckSampling] = ()
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int | None, WrapSeed, CheckSampling] = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_tuple)] = ()
    response_format: ResponseFormat | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: GrammarText | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    proposer: Annotated[str | None, AfterValidator(_known_proposer)] = None
    tree_size: Annotated[int | None, CheckTreeSize] = None
    cache_salt: Annotated[str | None, Field(min_length=1)] = None

    def token_limit(self) -> tuple[str, int | None]:
        """Return the name and the value of the field that limits the answer."""
        return "max_tokens", self.max_tokens

    def num_logprobs(self) -> int | None:
        """Return how many of the most probable tokens to list with every token; None for no log probabilities."""
        return None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has log probabilities."""
        return False

    @property
    def candidates(self) -> int:
        """The number of texts to produce for every prompt."""
        return self.n

    def grammar(self) -> Grammar | None:
        """Return what the answer must look like, None for any text."""
        form = None if self.response_format is None else self.response_format.grammar()
        outputs = None if self.structured_outputs is None else self.structured_outputs.grammar()
        fields = {"response_format": form, "structured_outputs": outputs}
        fields |= {
            name: getattr(self, name) for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        }
        given = [name for name, grammar in fields.items() if grammar is not None]
        if len(given) > 1:
            raise ApiError(f"give {given[0]} or {given[1]}, not both", given[1], "invalid_value")
        return fields[given[0]] if given else None

    def request_fields(self, default_temperature: float) -> dict[str, Any]:
        """Return the arguments of `Service.request`, without those that have no effect."""
        temperature = default_temperature if self.temperature is None else self.temperature
        fields: dict[str, Any] = {"temperature": temperature, "seed": self.seed, "stop": self.stop}
        fields["grammar"] = self.grammar()
        fields |= {"proposer": self.proposer, "tree_size": self.tree_size, "min_new_tokens": self.min_tokens}
        fields |= {"logprobs": self.num_logprobs(), "cache_salt": self.cache_salt}
        for name in ("repetition_penalty", "no_repeat_ngram_size", *_SAME_NAMES):
            fields[name] = getattr(self, name)
        if temperature > 0:
            fields |= {"top_k": self.top_k, "min_p": self.min_p, "top_p": self.top_p}
        return {name: value for name, value in fields.items() if value is not None}


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None

    def num_logprobs(self) -> int | None:
        """Return how many of the most probable tokens to list with every token; None for no log probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs=true", "top_logprobs", "invalid_value")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has log probabilities."""
        return self.logprobs

    def token_limit(self) -> tuple[str, int | None]:
        """Return the name and the value of the field that limits the answer."""
        if self.max_completion_tokens is None:
            return super().token_limit()
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError("give max_completion_tokens or max_tokens, not both", "max_tokens", "invalid_value")
        return "max_completion_tokens", self.max_completion_tokens

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages for the chat template, the developer's as the system's."""
        return for_template(self.messages)

    def tool_request(self) -> ToolRequest | None:
        """Return the tools that may be called, None where there are none."""
        return new_tool_request(self.tools, self.tool_choice, self.parallel_tool_calls, self.grammar())


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt_list)]
    max_tokens: Annotated[int | None, Field(ge=1)] = 16  # OpenAI's default
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    echo: bool = False

    def num_logprobs(self) -> int | None:
        """Return how many of the most probable tokens to list with every token; None for no log probabilities."""
        if self.echo and self.logprobs is not None:
            raise ApiError("echo with logprobs is not supported by this server; leave one out", "echo", "invalid_value")
        return 0 if self.logprobs is None and self.candidates > self.n else self.logprobs

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has log probabilities."""
        return self.logprobs is not None

    @property
    def candidates(self) -> int:
        """The number of texts to produce for every prompt."""
        best_of = self.n if self.best_of is None else self.best_of
        if best_of < self.n:
            raise ApiError(f"best_of must be at least n, got {best_of} and {self.n}", "best_of", "invalid_value")
        if best_of > self.n and self.stream:
            raise ApiError("best_of above n needs stream=false", "best_of", "invalid_value")
        return best_of


Body = TypeVar("Body", bound=GenerationRequest)


def parse_body(kind: type[Body], content: bytes) -> Body:
    """Parse the body of a request."""
    try:
        fields = json.loads(content, parse_constant=_refuse_constant)
        if b"\\u" in content:  # JSON allows half a surrogate pair, UTF-8 does not
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    fields = _remove_neutral(kind, {name: value for name, value in fields.items() if value is not None})
    if isinstance(fields.get("messages"), list):
        fields["messages"] = without_empty(fields["messages"])
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from None
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options needs stream=true", "stream_options", "invalid_value")
    return body


def _remove_neutral(kind: type[GenerationRequest], fields: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    neutral = kind.neutral
    for name, value in fields.items():
        if name in kind.model_fields and name not in kind.left_out:
            kept[name] = value
        elif name in IGNORED:
            if not isinstance(value, IGNORED[name]):
                kind_name = {str: "a string", dict: "an object", int: "a whole number"}[IGNORED[name]]
                raise ApiError(f"{name} must be {kind_name}, got {value!r}"[:200], name, "invalid_type")
        elif name not in neutral:
            raise ApiError(f"unknown field {name[:80]!r}", name[:80], "unknown_parameter")
        elif not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in neutral[name]):
            raise ApiError(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
    return kept


def _first_error(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False)[0]
    param = ""
    for part in (one for one in found["loc"] if not str(one).startswith(KIND)):
        param += f"[{part}]" if isinstance(part, int) else f"{'.' if param else ''}{part}"[:80]
    message, code = found["msg"].removeprefix("Value error, "), "invalid_value"
    if found["type"] == "missing":
        message, code = "this field is required", "missing_required_parameter"
    elif found["type"] == "extra_forbidden":
        message, code = "this field is not supported by this server; leave it out", "unsupported_parameter"
    if not message.startswith(f"{param} "):  # SamplingParams names the field itself
        message = f"{param}: {message[:1].lower()}{message[1:]}"
    return ApiError(message, param, code)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
