"""The grammar of an answer that may or must call tools, in llguidance's form of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from medhead.grammar import Grammar, json_form


class CallGrammar:
    """The rules of the calls of one request; a format adds the rules of its own.

    Args:
        tokenizer: of the model; markers may be tokens of their own.
        tools: names of the functions, each with the JSON schema of its arguments.
        free: whether any text may precede a call, or be the whole answer.
        many: whether there may be several calls.

    Attributes:
        tools: as given.
        names: of the functions.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[tuple[str, dict[str, Any]]], free: bool, many: bool) -> None:
        self.tools, self.names, self.free = tools, [name for name, _ in tools], free
        self._many = many
        added = tokenizer.added_tokens_decoder
        self._tokens = {one.content: token for token, one in added.items()}
        self._ordinary = {token: one.content for token, one in added.items() if not one.special}
        self._rules = {f"arguments_{i}": json_rule(schema) for i, (_, schema) in enumerate(tools)}

    def add(self, name: str, rule: str) -> None:
        """Add a rule, in place of the one of this name: `arguments_0` is the JSON of the first function's arguments."""
        self._rules[name] = rule

    def token(self, text: str) -> str:
        """Return a marker: the token of this text if there is one, else the text."""
        return f"<[{self._tokens[text]}]>" if text in self._tokens else quoted(text)

    def lead(self, marker: str) -> str:
        """Return the marker, after any text that has none where text may precede a call."""
        if not self.free:
            return self.token(marker)
        if marker in self._tokens:
            self.add("lead", f"text {self.token(marker)}")
        else:
            self.add("lead[lazy]", rf"/(.|\n)*{_escaped(marker)}/")
        return "lead"

    def either(self, heads: Sequence[str]) -> str:
        """Return the alternative of the functions: the head of each and its arguments."""
        return "(" + " | ".join(f"{head} arguments_{i}" for i, head in enumerate(heads)) + ")"

    def repeated(self, rule: str) -> str:
        """Return the further calls, of which there are none where there may be one call only."""
        return f"({rule})*" if self._many else ""

    def build(
        self, calls: Callable[[CallGrammar], str], marker: str, answer: dict[str, Any] | None, opening: str = ""
    ) -> Grammar:
        """Return the grammar of the whole answer.

        Args:
            calls: adds the rules of a format and returns that of its calls.
            marker: what calls begin with; free text has none.
            answer: JSON schema of an answer without calls; None for free text where it may be free, else for none.
            opening: a character at which free text is a call too.
        """
        self.add("calls", calls(self))
        start = "calls"
        if answer is not None:
            self.add("answer", json_rule(answer))
            start = "answer | calls"
        elif self.free:
            start = "text | calls"
            others = sorted(token for token, text in self._ordinary.items() if text != marker)
            self.add("text", f"(TEXT | <[{','.join(map(str, others))}]>)*" if others and not opening else "TEXT")
            first = rf"\s*([^\s{_escaped(opening)}](.|\n)*)?" if opening else r"(.|\n)*"
            self.add("TEXT", rf"/{first}/ & ~/(.|\n)*{_escaped(marker)}(.|\n)*/")
        rules = [f"{name}: {rule}" for name, rule in {"start": start, **self._rules}.items()]
        return Grammar("grammar", "\n".join(rules) + "\n")


def quoted(text: str) -> str:
    """Return a text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: dict[str, Any]) -> str:
    """Return the rule of the JSON values of a schema."""
    return "%json " + json.dumps(json_form(schema))


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
