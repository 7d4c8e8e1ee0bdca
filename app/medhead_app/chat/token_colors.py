"""Tokens as HTML, tinted by where they came from. Everything that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# source: what it is called, and what it means; the order of the legend
SOURCES: dict[str, tuple[str, str]] = {
    "heads": ("head", "guessed by a trained head; the deeper, the stronger the tint"),
    "ngram": ("n-gram", "followed the same words earlier"),
    "recycling": ("recycled", "named by the model earlier, after the same token"),
    "lookahead": ("lookahead", "from the model's own window of guesses"),
    "bonus": ("model", "the model's own token at the end of a pass"),
}
DEPTHS = 8  # tints of heads; deeper ones look alike


def kind_of(source: str) -> str:
    """The key of `SOURCES` for a token's source; what is unknown counts as the model's own."""
    kind = source.split(" ", 1)[0]
    return kind if kind in SOURCES else "bonus"


def depth_of(source: str) -> int:
    """The depth in `heads 3`, from 1; 0 for what has none."""
    _, _, depth = source.partition(" ")
    return int(depth) if depth.isdecimal() else 0


def css_classes(source: str) -> str:
    """Classes of an element that stands for a token of that source."""
    kind, depth = kind_of(source), depth_of(source)
    return f"mh-{kind}" + (f" mh-depth-{min(depth, DEPTHS)}" if kind == "heads" and depth else "")


def tinted(tokens: Iterable[Sequence[str]]) -> str:
    """Spans for pairs of text and source. The HTML of more tokens begins with the HTML of fewer."""
    return "".join(_span(text, source) for text, source in tokens if text)


def legend() -> str:
    """What the tints mean, in one line."""
    items = "".join(_item(kind) for kind in SOURCES)
    return f'<div class="mh-legend" aria-label="Where tokens came from">{items}</div>'


def _span(text: str, source: str) -> str:
    """The token, with the space before it left untinted: at the end of a line it would be a block of colour."""
    word = text.lstrip()
    space = text[: len(text) - len(word)]
    if not word:
        return escape(space)
    return f'{escape(space)}<span class="mh-token {css_classes(source)}" title="{escape(_tooltip(source))}">{escape(word)}</span>'


def _tooltip(source: str) -> str:
    kind, depth = kind_of(source), depth_of(source)
    return f"head at depth {depth}" if kind == "heads" and depth else SOURCES[kind][0]


def _item(kind: str) -> str:
    name, meaning = SOURCES[kind]
    tints = [f"{kind} {depth}" for depth in (1, 4, 8)] if kind == "heads" else [kind]
    swatch = "".join(f'<i class="mh-token {css_classes(tint)}"></i>' for tint in tints)
    return f'<span class="mh-legend-item" title="{escape(meaning)}">{swatch}{escape(name)}</span>'
