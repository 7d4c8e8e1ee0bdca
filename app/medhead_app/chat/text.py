"""Markdown as safe HTML: HTML in the text is escaped, and nothing is loaded from other sites.

With tokens, the words of the rendered text have the colors of their sources. Code is not colored. Where a rendered word stands in
the source is found by searching: markdown-it knows the lines of every block, and the words of a line keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from html import escape
from itertools import groupby, pairwise
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from medhead_app.chat.token_colors import color_token

COPY_CODE = '<button type="button" class="mh-tool" data-tool="code" title="Copy this code">Copy</button>'


def render_markdown(text: str, tokens: Iterable[Sequence[str]] = ()) -> str:
    """Return the HTML of a Markdown text; `tokens` are pairs of text and source whose texts joined are the text."""
    return _render(text, tuple((part, source) for part, source in tokens))


@lru_cache(maxsize=512)  # all messages are rendered at every update of the last one
def _render(text: str, tokens: tuple[tuple[str, str], ...]) -> str:
    text = text.replace("\r", "")  # markdown-it turns them into line breaks, which would move all words after them
    return str(_MARKDOWN.render(text, {"text": text, "sources": _sources(text, tokens)} if tokens else {}))


def _sources(text: str, tokens: Iterable[Sequence[str]]) -> list[str | None]:
    """Return the source of every character of a text. A token that is not there is left out: part of a character, a cut end."""
    sources: list[str | None] = [None] * len(text)
    position = 0
    for part, source in tokens:
        part = part.replace("\r", "")
        place = text.find(part, position, position + len(part) + 2)
        if part and place >= 0:
            position = place + len(part)
            sources[place:position] = [source] * len(part)
    return sources


def _color_words(state: StateCore) -> None:
    """Give every piece of text in a parsed document the sources of its characters."""
    if "sources" not in state.env:
        return
    text, sources, position = state.env["text"], state.env["sources"], 0
    for before, block in pairwise(state.tokens):
        if block.type != "inline" or block.map is None:
            continue
        cell = before.type in ("td_open", "th_open")  # a line has several, so that one begins after the one before
        places = iter([position] if cell else _line_places(text, block))
        position = max(position, next(places))
        for token in block.children or []:
            if token.type in ("softbreak", "hardbreak"):
                position = max(position, next(places, position))
                continue
            special = token.type == "text_special"  # an escape or an entity
            written = token.markup if special else token.content
            place = text.find(written, position) if written else -1
            if place < 0:
                continue
            position = place + len(written)
            if special or token.type == "text":
                found = [sources[position - 1]] * len(token.content) if special else sources[place:position]
                token.type, token.meta = "colored_text", {"sources": found}


def _line_places(text: str, block: Token) -> list[int]:
    """Return where the lines of a block's content begin in the text, after indents, bullets and other marks."""
    lines = text.split("\n")
    first = (block.map or [0])[0]
    start = sum(len(line) + 1 for line in lines[:first])
    places = []
    for content, line in zip(block.content.split("\n"), lines[first:], strict=False):
        places.append(start + max(line.rfind(content), 0))
        start += len(line) + 1
    return places or [start]


def _render_colored(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return "".join(_colored(tokens[index].content, tokens[index].meta["sources"]))


def _colored(text: str, sources: Sequence[str | None]) -> Iterator[str]:
    for source, group in groupby(zip(text, sources, strict=True), key=lambda pair: pair[1]):
        part = "".join(char for char, _ in group)
        yield escape(part) if source is None else color_token(part, source)


def _render_link(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _render_code(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    block = RendererHTML.fence if tokens[index].type == "fence" else RendererHTML.code_block
    return f'<div class="mh-code">{block(self, tokens, index, options, env)}{COPY_CODE}</div>'


_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True})
_MARKDOWN.enable(["table", "strikethrough"]).disable("image")  # images would tell other servers who reads
_MARKDOWN.core.ruler.before("text_join", "color_words", _color_words)
for _name, _rule in {
    "link_open": _render_link,
    "fence": _render_code,
    "code_block": _render_code,
    "colored_text": _render_colored,
}.items():
    _MARKDOWN.add_render_rule(_name, _rule)
