"""What the tools of a request ask for: the template's tools, the grammar of the answer, and the reader of its text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medhead.errors import MedheadError
from medhead.grammar import Grammar
from medhead_app.api.errors import ApiError
from medhead_app.api.tools.formats import ToolFormat, find_format, tool_template
from medhead_app.api.tools.grammar import CallGrammar
from medhead_app.api.tools.parsers import PARSERS
from medhead_app.api.tools.reader import ToolReader
from medhead_app.api.tools.schema import AllowedChoice, AnyTool, NamedChoice

_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class ToolRequest:
    """The tools of one request.

    Attributes:
        tools: that may be called.
        choice: `auto`, `required`, the function that must be called, or those that may be.
        parallel: whether there may be several calls.
        answer: what an answer without calls must look like, None for any text.
    """

    tools: Sequence[AnyTool]
    choice: str | NamedChoice | AllowedChoice
    parallel: bool
    answer: Grammar | None = None


@dataclass(frozen=True)
class ToolPlan:
    """How one request is served.

    Attributes:
        format: of the calls.
        tools: for the chat template.
        schemas: JSON schema of the arguments of each function that may be called, by its name.
        grammar: of the answer, None for any text.
        special_tokens: ids of the special tokens that are part of the text.
    """

    format: ToolFormat
    tools: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    grammar: Grammar | None
    special_tokens: tuple[int, ...] = field(default=())

    def new_reader(self) -> ToolReader:
        """Return a reader for one text."""
        return self.format.reader(self.schemas)


def new_tool_request(
    tools: Sequence[AnyTool], choice: str | NamedChoice | AllowedChoice | None, parallel: bool, answer: Grammar | None
) -> ToolRequest | None:
    """Return the tools of a request with these fields, None where no tool may be called.

    Raises:
        ApiError: the choice needs tools, and there are none.
    """
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(
            "tool_choice: it needs tools to call, and there are none; give tools", "tool_choice", "invalid_value"
        )
    return None if not tools or choice == "none" else ToolRequest(tools, choice or "auto", parallel, answer)


class ToolPlanner:
    """Makes the plans of one model.

    Args:
        tokenizer: of the model.
        parser: name of the format of calls; None for that of the chat template.
    """

    def __init__(self, tokenizer: Any, parser: str | None = None) -> None:
        self.tokenizer, self._template = tokenizer, tool_template(tokenizer)
        self._format = None if self._template is None else find_format(self._template, parser)

    def check_messages(self, messages: Sequence[dict[str, Any]], name: str) -> None:
        """Refuse messages about tools where the chat template knows none; `name` is the field that holds them."""
        about = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if self._template is None and about:
            message = f"{name}: the chat template of this model knows no tools; leave out their calls and results"
            raise ApiError(message, name, "invalid_value")

    def plan(self, request: ToolRequest) -> ToolPlan:
        """Return how a request is served.

        Raises:
            ApiError: the model cannot call tools, or a field of the request is wrong.
        """
        if self._template is None:
            message = "tools: the chat template of this model knows no tools; leave them out or serve another model"
            raise ApiError(message, "tools", "unsupported_parameter")
        if self._format is None:
            message = "tools: the chat template of this model writes calls in a format that this server does not read"
            raise ApiError(
                f"{message}; name one with --tool-parser ({', '.join(PARSERS)})", "tools", "unsupported_parameter"
            )
        tools = _chosen(request)
        added = self.tokenizer.added_tokens_decoder.items()
        kept = tuple(token for token, one in added if one.special and one.content in self._format.markers)
        schemas = {tool.function.name: tool.function.schema_of_arguments for _, tool in tools}
        shown = [tool.function.for_template() for tool in request.tools]
        return ToolPlan(self._format, shown, schemas, self._grammar(request, tools), kept)

    def _grammar(self, request: ToolRequest, tools: list[tuple[int, AnyTool]]) -> Grammar | None:
        assert self._format is not None
        choice = request.choice.mode if isinstance(request.choice, AllowedChoice) else request.choice
        must, many = choice != "auto", request.parallel and self._format.parallel
        strict = [must or bool(tool.function.strict) for _, tool in tools]
        every = len(tools) == len(request.tools)
        if not any(strict) and request.parallel and request.answer is None and every:
            return None
        schemas = []
        for (index, tool), follows in zip(tools, strict, strict=True):
            schema = tool.function.schema_of_arguments if follows else _ANY_ARGUMENTS
            _check_schema(schema, f"tools[{index}].{tool.path}parameters")
            schemas.append((tool.function.name, schema))
        answer = None if request.answer is None else _schema_of(request.answer)
        grammar = CallGrammar(self.tokenizer, schemas, free=not must and answer is None, many=many)
        answer = None if must else answer  # there is no answer without calls
        try:
            return grammar.build(self._format.calls, self._format.markers[0], answer, self._format.opening)
        except MedheadError as error:
            raise ApiError(f"tools: {error}", "tools", "invalid_value") from None


def _chosen(request: ToolRequest) -> list[tuple[int, AnyTool]]:
    """Return the tools that may be called, with their places in the request."""
    tools, choice = list(enumerate(request.tools)), request.choice
    if isinstance(choice, str):
        return tools
    names = {tool.function.name for tool in request.tools}
    wanted = [choice.name] if isinstance(choice, NamedChoice) else choice.names
    unknown = next((name for name in wanted if name not in names), None)
    if unknown is not None:
        message = f"tool_choice: no function of tools is called {unknown[:80]!r}; tools has {', '.join(sorted(names))}"
        raise ApiError(message[:400], "tool_choice", "invalid_value")
    return [one for one in tools if one[1].function.name in wanted]


def _check_schema(schema: dict[str, Any], param: str) -> None:
    try:
        Grammar.json_schema(schema)
    except MedheadError as error:
        raise ApiError(f"{param}: {error}", param, "invalid_function_parameters") from None


def _schema_of(answer: Grammar) -> dict[str, Any]:
    if answer.kind != "json_schema":
        message = "tools: an answer that may call tools takes a JSON schema, no other grammar; set tool_choice to none"
        raise ApiError(message, "tools", "invalid_value")
    found = json.loads(answer.text)
    return found if isinstance(found, dict) else {}
