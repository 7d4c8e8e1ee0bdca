"""Markdown as safe HTML: HTML in the text is escaped, and nothing is loaded from other sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token


def _render_link(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True})
_MARKDOWN.enable(["table", "strikethrough"]).disable("image")  # images would tell other servers who reads
_MARKDOWN.add_render_rule("link_open", _render_link)


def render_markdown(text: str) -> str:
    """Return the HTML of a Markdown text."""
    return str(_MARKDOWN.render(text))
