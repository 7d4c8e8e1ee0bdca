"""What a text must look like: a JSON schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from medhead.errors import MedheadError, one_line

KINDS = ("json_schema", "regex", "choice", "grammar")
# JSON as json.dumps writes it; free white space would leave nothing between two values that the grammar forces
_JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language, to which a text is constrained; checked by llguidance when it is made.

    Attributes:
        kind: `json_schema`, `regex`, `choice` or `grammar`.
        text: the JSON text of a schema; a regular expression in the syntax of Rust's `regex`, which matches the whole text;
            the JSON text of a list of strings; a grammar in the syntax of Lark or GBNF.

    Raises:
        MedheadError: the kind is unknown, the text is wrong or uses what llguidance does not support, or llguidance is not
            installed.

    Example:
        >>> grammar = Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
        >>> model.generate(**inputs, custom_generate=decoder, tokenizer=tokenizer, grammar=grammar)
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MedheadError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.text, str):
            raise MedheadError(f"the text of a grammar must be a string, got {type(self.text).__name__}")
        compile_grammar(self.kind, self.text)

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool | str) -> Grammar:
        """Return the grammar of a JSON schema, given as an object or as its JSON text."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Return the grammar of any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Return the grammar of one of these texts."""
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))


@lru_cache(maxsize=64)
def compile_grammar(kind: str, text: str) -> str:
    """Return a grammar in llguidance's own form.

    Args:
        kind: see `Grammar`.
        text: see `Grammar`.

    Raises:
        MedheadError: see `Grammar`.
    """
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise MedheadError("a grammar needs llguidance: pip install 'medhead[structured]'") from None
    name = f"the {kind.replace('_', ' ').replace('json', 'JSON')}"
    try:
        source = _to_source(kind, text)
    except (ValueError, RecursionError) as error:
        raise MedheadError(f"{name} is wrong: {one_line(error, 200)}") from None
    if problem := LLMatcher.validate_grammar(source):
        if not LLMatcher.validate_grammar_with_warnings(source)[0]:
            return source  # a warning
        raise MedheadError(f"{name} is wrong: {one_line(problem, 200)}")
    return source


def json_form(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema that asks llguidance for the form of `json.dumps` where it is part of a grammar."""
    return {**schema, "x-guidance": {**_JSON_FORM, **schema.get("x-guidance", {})}}


def _to_source(kind: str, text: str) -> str:
    from llguidance import LLMatcher, grammar_from

    if kind == "json_schema":
        schema = json.loads(text)  # its errors name line and column of the text itself
        if schema is False or not isinstance(schema, dict | bool):
            raise ValueError(f"it must be an object that allows some text, got {text[:60]}")
        return LLMatcher.grammar_from_json_schema({} if schema is True else text, _JSON_FORM)
    if kind == "choice":
        texts = json.loads(text)
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one for one in texts):
            raise ValueError("it must be a list of at least one string, none of them empty")
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(json.dumps(one, ensure_ascii=False) for one in texts)}")
    return LLMatcher.grammar_from_regex(text) if kind == "regex" else grammar_from("grammar", text)
