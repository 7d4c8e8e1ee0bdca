"""Tokens as HTML, colored by source, and the names of sources and proposers on the page; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# kind of source: name and description, in the order of the legend
SOURCES: dict[str, tuple[str, str]] = {
    "heads": ("heads", "drafted by a trained head; a darker color is a deeper head"),
    "ngram": ("n-gram", "drafted from an earlier occurrence of the same n-gram"),
    "recycling": ("recycling", "a candidate of the target at an earlier occurrence of the token before it"),
    "lookahead": ("lookahead", "drafted in the target's lookahead window"),
    "bonus": ("bonus", "the target's own token at the end of a verify pass"),
}
MAX_DEPTH = 8  # deeper heads have the color of this depth


def source_kind(source: str) -> str:
    """Return the key of `SOURCES` for a token's source; `bonus` for an unknown one."""
    kind = source.split(" ", 1)[0]
    return kind if kind in SOURCES else "bonus"


def display_name(name: str) -> str:
    """Return the name of a proposer or a kind of source as the page shows it everywhere."""
    return SOURCES[name][0] if name in SOURCES else name


def css_classes(source: str) -> str:
    """Return the CSS classes for a token of this source."""
    kind, depth = source_kind(source), _head_depth(source)
    return f"mh-{kind}" + (f" mh-depth-{min(depth, MAX_DEPTH)}" if depth else "")


def color_tokens(tokens: Iterable[Sequence[str]]) -> str:
    """Return the HTML of pairs of text and source."""
    return "".join(color_token(text, source) for text, source in tokens if text)


def legend() -> str:
    """Return the legend of the colors, one line."""
    items = []
    for kind, (label, description) in SOURCES.items():
        sources = [f"{kind} {depth}" for depth in (1, 4, 8)] if kind == "heads" else [kind]
        swatch = "".join(f'<i class="mh-token {css_classes(source)}"></i>' for source in sources)
        items.append(f'<span class="mh-legend-item" title="{escape(description)}">{swatch}{escape(label)}</span>')
    return f'<div class="mh-legend" aria-label="Sources of the tokens">{"".join(items)}</div>'


def color_token(text: str, source: str) -> str:
    """Return one token; the space before it has no color, because it could stand at the end of a line."""
    word = text.lstrip()
    space = escape(text[: len(text) - len(word)])
    if not word:
        return space
    depth = _head_depth(source)
    title = display_name(source_kind(source)) + (f", depth {depth}" if depth else "")
    return f'{space}<span class="mh-token {css_classes(source)}" title="{title}">{escape(word)}</span>'


def _head_depth(source: str) -> int:
    """Return 3 for `heads 3`, and 0 for other sources."""
    kind, _, depth = source.partition(" ")
    return int(depth) if kind == "heads" and depth.isdecimal() else 0
