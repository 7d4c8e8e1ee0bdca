"""Markdown as HTML that is safe to show: HTML in the text stays text, and nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token


def _open_link(
    self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any
) -> str:  # a renderer's rule
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"]).disable("image")  # an image would tell its server who reads
    parser.add_render_rule("link_open", _open_link)
    return parser


_PARSER = _parser()


def readable(text: str) -> str:
    """HTML of a markdown text."""
    return str(_PARSER.render(text))
