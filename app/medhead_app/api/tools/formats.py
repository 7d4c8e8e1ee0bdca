"""The formats of calls by vLLM's names, and the one that a chat template writes."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2

from medhead_app.api.tools import hermes, llama3, mistral, pythonic, qwen3_coder
from medhead_app.api.tools.grammar import CallGrammar
from medhead_app.api.tools.reader import ToolReader


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls."""

    reader: type[ToolReader]
    calls: Callable[[CallGrammar], str]  # see `CallGrammar.build`
    markers: tuple[str, ...]  # special tokens that are part of the text; the first begins a call
    new_id: Callable[[], str]  # of a call
    parallel: bool = True  # whether the model may write several calls
    opening: str = ""  # see `CallGrammar.build`


def _uuid() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _nine() -> str:
    """Return an id of nine characters, the only ones that Mistral's templates take."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


_MISTRAL = (mistral.BEGIN, mistral.CALL_ID, mistral.ARGS)
HERMES = ToolFormat(hermes.HermesReader, hermes.hermes_calls, (hermes.BEGIN, hermes.END), _uuid)
LLAMA3 = ToolFormat(llama3.Llama3Reader, llama3.llama3_calls, (llama3.TAG,), _uuid, parallel=False, opening="{")
MISTRAL_LIST = ToolFormat(mistral.MistralReader, mistral.mistral_list, _MISTRAL, _nine)
MISTRAL_NAMED = ToolFormat(mistral.MistralReader, mistral.mistral_named, _MISTRAL, _nine)
PYTHONIC = ToolFormat(pythonic.PythonicReader, pythonic.pythonic_calls, (pythonic.TAG,), _uuid, opening="[")
LFM2 = ToolFormat(pythonic.Lfm2Reader, pythonic.lfm2_calls, (pythonic.LFM2_TAG,), _uuid, opening="[")
QWEN3_CODER = ToolFormat(qwen3_coder.Qwen3CoderReader, qwen3_coder.qwen3_coder_calls, (hermes.BEGIN, hermes.END), _uuid)


def tool_template(tokenizer: Any) -> str | None:
    """Return the chat template for tools, None where there is none or it knows no tools."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        template = str(tokenizer.get_chat_template(tools=[{}]))
        words = jinja2.Environment().lex(template)
        return template if any(kind == "name" and word == "tools" for _, kind, word in words) else None
    except (ValueError, jinja2.TemplateSyntaxError):  # several templates and none to choose, or a wrong one
        return None


def find_format(template: str, parser: str | None = None) -> ToolFormat | None:
    """Return the format that a chat template writes, None for one that is not known; `parser` names the format."""
    if parser == "mistral" or (parser is None and mistral.BEGIN in template):
        return MISTRAL_NAMED if mistral.ARGS in template else MISTRAL_LIST
    lfm2 = "<|tool_list_start|>" in template
    if parser == "pythonic" or (parser is None and (lfm2 or "[func_name1(param" in template)):  # as Meta's prompts ask
        return LFM2 if lfm2 else PYTHONIC
    xml = all(mark in template for mark in (hermes.BEGIN, qwen3_coder.FUNCTION, qwen3_coder.PARAMETER))
    if parser == "qwen3_coder" or (parser is None and xml):
        return QWEN3_CODER
    other = any(mark in template for mark in ("<function=", "<arg_key>"))  # XML inside of Hermes' marks
    if parser == "hermes" or (parser is None and hermes.BEGIN in template and not other):
        return HERMES
    llama = "<|start_header_id|>" in template and '"parameters": ' in template and hermes.BEGIN not in template
    return LLAMA3 if parser == "llama3_json" or (parser is None and llama) else None
