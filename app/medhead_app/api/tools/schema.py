"""The fields `tools` and `tool_choice` of a request."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from medhead_app.api.strict import StrictModel

MAX_TOOLS = 128
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
        raise ValueError(f"must be 1 to 64 letters, digits, underscores or hyphens, got {name[:80]!r}")
    return name


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if schema and schema.get("type") != "object":
        raise ValueError(f"must be a JSON schema with the type object, got the type {schema.get('type')!r}"[:200])
    return schema


class Function(StrictModel):
    """A function that the model may call; its calls follow the schema of its parameters if it is strict."""

    name: Annotated[str, AfterValidator(_check_name)]
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_schema)] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON schema of the arguments; without parameters there are none."""
        return self.parameters or _NO_ARGUMENTS

    def for_template(self) -> dict[str, Any]:
        """Return the tool for the chat template."""
        function = self.model_dump(exclude_none=True, include={"name", "description"})
        return {"type": "function", "function": {**function, "parameters": self.schema_of_arguments}}


class Tool(StrictModel):
    """One member of `tools` of a chat."""

    path: ClassVar[str] = "function."  # of the function's fields

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """One member of `tools` of `/v1/responses`."""

    path: ClassVar[str] = ""

    type: Literal["function"]

    @property
    def function(self) -> Function:
        """The function itself."""
        return self


AnyTool = Tool | FlatTool


def _check_tools(tools: list[AnyTool]) -> list[AnyTool]:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"must have functions of different names, got {twice!r} twice")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_check_tools)]
FlatTools = Annotated[list[FlatTool], Field(max_length=MAX_TOOLS), AfterValidator(_check_tools)]


class NamedChoice(StrictModel):
    """The function that must be called."""

    name: str


class AllowedChoice(StrictModel):
    """The functions that may be called, or one of which must be."""

    mode: Literal["auto", "required"]
    names: list[str]


def _read_choice(choice: Any) -> Any:
    """Return a word, or the functions that may or must be called; of both forms, that of chats and that of responses."""
    if choice in ("none", "auto", "required"):
        return choice
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function" and (name := _name_of(choice)) is not None:
        return NamedChoice(name=name)
    if kind != "allowed_tools":
        raise ValueError(
            'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
        )
    found = _without_type(choice, "allowed_tools")
    tools = found.get("tools") if isinstance(found, dict) and set(found) == {"mode", "tools"} else None
    names = [name for name in map(_name_of, tools) if name is not None] if isinstance(tools, list) else []
    if not tools or len(names) < len(tools) or found["mode"] not in ("auto", "required"):
        raise ValueError(
            'of the type allowed_tools must have a mode, "auto" or "required", and tools, a list of at least one '
            '{"type": "function", "function": {"name": ...}}'
        )
    return AllowedChoice(mode=found["mode"], names=names)


def _without_type(choice: dict[str, Any], field: str) -> Any:
    """Return the fields of a choice: those of this field in a chat, its own in responses."""
    rest = {key: value for key, value in choice.items() if key != "type"}
    return rest[field] if set(rest) == {field} else rest


def _name_of(tool: Any) -> str | None:
    """Return the name of a function that is referred to, None for another object."""
    found = _without_type(tool, "function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return (
        found["name"] if isinstance(found, dict) and set(found) == {"name"} and isinstance(found["name"], str) else None
    )


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedChoice | AllowedChoice, BeforeValidator(_read_choice)]
