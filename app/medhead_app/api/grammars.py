"""Fields that say what an answer must look like: OpenAI's `response_format` and those of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from medhead.grammar import Grammar
from medhead_app.api.errors import ApiError
from medhead_app.api.strict import StrictModel


def _check(kinds: type | tuple[type, ...], allowed: str, make: Callable[[Any], Grammar]) -> BeforeValidator:
    """Return a validator that makes a grammar of a value of these types; its errors say what is allowed."""

    def check(value: Any) -> Grammar:
        if not isinstance(value, kinds):
            raise ValueError(f"must be {allowed}")
        return make(value)

    return BeforeValidator(check)


def _choice(texts: list[Any]) -> Grammar:
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a list of strings")
    return Grammar.choice(texts)


_SCHEMA = _check((dict, str), "a JSON schema, as an object or its JSON text", Grammar.json_schema)
_REGEX = _check(str, "a regular expression", lambda text: Grammar("regex", text))
_TEXT = _check(str, "a grammar in the syntax of Lark or GBNF", lambda text: Grammar("grammar", text))
JsonSchema = Annotated[Grammar, _SCHEMA]
Regex = Annotated[Grammar, _REGEX]
Choice = Annotated[Grammar, _check(list, "a list of strings", _choice)]
GrammarText = Annotated[Grammar, _TEXT]


class NamedSchema(StrictModel):
    """The field `json_schema` of `response_format`; the answer follows it whether it is strict or not."""

    name: str
    description: str | None = None
    grammar: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The field `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> Grammar | None:
        """Return what the answer must look like, None for any text."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "response_format must have json_schema with the type json_schema, and only there"
            raise ApiError(message, "response_format", "invalid_value")
        if self.json_schema is not None:
            return self.json_schema.grammar
        return Grammar.json_object() if self.type == "json_object" else None


class StructuredOutputs(StrictModel):
    """vLLM's field `structured_outputs`: one of its fields."""

    json_schema: JsonSchema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Regex | None = None
    choice: Choice | None = None
    grammar_text: GrammarText | None = Field(None, alias="grammar")

    def grammar(self) -> Grammar | None:
        """Return what the answer must look like, None for any text."""
        found: list[Grammar] = [
            one for one in (self.json_schema, self.regex, self.choice, self.grammar_text) if one is not None
        ]
        found += [Grammar.json_object()] if self.json_object else []
        if len(found) > 1:
            raise ApiError("structured_outputs must have one field", "structured_outputs", "invalid_value")
        return found[0] if found else None
