"""Pictures as inline SVG: the last token tree, and how many tokens the passes gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from medhead.serving.request import TreeView
from medhead_app.chat.token_colors import css_classes, kind_of

ROW, INDENT, LEFT, WIDTH = 20, 13, 12, 312  # pixels
LABEL = 18  # characters of a token that are shown
BARS = 12  # bars of the histogram; longer passes share the last one
Tree = dict[str, Any]


def tree_of(view: TreeView, texts: Sequence[str], bonus: str = "") -> Tree:
    """What is kept of a tree to draw it.

    Args:
        view: of the engine.
        texts: of its nodes.
        bonus: text of the model's own token after the accepted path; empty if the text ended before.
    """
    return {
        "texts": list(texts),
        "parents": list(view.parents),
        "sources": list(view.sources),
        "accepted": list(view.accepted),
        "bonus": bonus,
    }


def is_tree(tree: Any) -> bool:
    """Whether something that comes from a browser can be drawn."""
    if not isinstance(tree, dict):
        return False
    texts, parents, sources, accepted = (tree.get(name) for name in ("texts", "parents", "sources", "accepted"))
    if not (isinstance(texts, list) and isinstance(parents, list)):
        return False
    if not (isinstance(sources, list) and isinstance(accepted, list)):
        return False
    size = len(texts)
    return (
        0 < size <= 4096
        and len(parents) == len(sources) == size
        and all(isinstance(text, str) for text in [*texts, *sources, tree.get("bonus")])
        and all(type(parent) is int and 0 <= parent < max(node, 1) for node, parent in enumerate(parents))
        and all(type(node) is int and 0 <= node < size for node in accepted)
    )


def draw_tree(tree: Tree | None) -> str:
    """SVG of a tree, a node a line, indented by depth; the accepted path comes first and is drawn strong."""
    if not is_tree(tree):
        return '<div class="mh-empty">The tree of the last pass is drawn here.</div>'
    assert tree is not None
    parents, accepted = tree["parents"], set(tree["accepted"])
    last = tree["accepted"][-1] if tree["accepted"] else 0
    depths = _depths(parents)
    order = _order(parents, accepted)
    rows = {node: row for row, node in enumerate(order)}
    last_row = len(tree["accepted"])  # the model's own token stands below the accepted path
    below = 1 if tree["bonus"] else 0
    place = {node: row + (below if row >= last_row else 0) for node, row in rows.items()}
    lines = [_edge(place[p], depths[p], place[n], n in accepted) for n, p in enumerate(parents) if n]
    if tree["bonus"]:
        lines.append(_edge(place[last], depths[last], last_row, True))
    # weak lines first: the accepted path lies on top
    lines.sort(key=lambda line: "mh-strong" in line)
    nodes = [_node(place[n], depths[n], tree["texts"][n], tree["sources"][n], n in accepted, n == 0) for n in order]
    if tree["bonus"]:
        nodes.append(_node(last_row, depths[last] + 1, tree["bonus"], "bonus", True, False))
    height = (len(order) + below) * ROW + 8
    words = f"{len(parents) - 1} guesses, {len(accepted) - 1} accepted"
    width = max(WIDTH, LEFT + max([*depths, 0]) * INDENT + 150)
    return (
        f'<svg class="mh-tree" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{words}" xmlns="http://www.w3.org/2000/svg">{"".join(lines)}{"".join(nodes)}</svg>'
    )


def describe_tree(tree: Tree | None) -> str:
    """A line about a tree."""
    if not is_tree(tree):
        return "no pass yet"
    assert tree is not None
    return f"{len(tree['parents']) - 1} guesses · {max(len(tree['accepted']) - 1, 0)} accepted"


def draw_lengths(lengths: Sequence[int]) -> str:
    """SVG of a histogram of the tokens a pass, over a conversation."""
    width, height, base, top = WIDTH, 138, 112, 22
    most = max([8, *(min(length, BARS) for length in lengths)])
    counts = Counter(min(length, BARS) for length in lengths)
    highest, step = max([1, *counts.values()]), (width - 8) / most
    parts = [f'<line class="mh-axis" x1="4" x2="{width - 4}" y1="{base}" y2="{base}"/>']
    for length in range(1, most + 1):
        count = counts.get(length, 0)
        bar = (base - top) * count / highest
        x, middle = 4 + (length - 1) * step, 4 + (length - 0.5) * step
        name = f"{length}+" if length == BARS else str(length)
        if count:
            parts.append(
                f'<rect class="mh-bar" x="{x + 3:.1f}" y="{base - bar:.1f}" width="{step - 6:.1f}" height="{bar:.1f}" rx="2">'
                f"<title>{count} passes gave {name} tokens</title></rect>"
                f'<text class="mh-count" x="{middle:.1f}" y="{base - bar - 5:.1f}">{_short(count)}</text>'
            )
        parts.append(f'<text class="mh-tick" x="{middle:.1f}" y="{base + 16}">{name}</text>')
    return (
        f'<svg class="mh-lengths" viewBox="0 0 {width} {height}" role="img" aria-label="{describe_lengths(lengths)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def describe_lengths(lengths: Sequence[int]) -> str:
    """A line about the passes of a conversation."""
    if not lengths:
        return "no pass yet"
    return f"mean {sum(lengths) / len(lengths):.2f} · {len(lengths)} passes"


# ---------------------------------------------------------------- inside


def _depths(parents: Sequence[int]) -> list[int]:
    depths: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if node else 0)
    return depths


def _order(parents: Sequence[int], accepted: set[int]) -> list[int]:
    """Nodes from top to bottom: depth first, accepted children first."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        if node:
            children.setdefault(parent, []).append(node)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        below = sorted(children.get(node, []), key=lambda child: child not in accepted)
        stack.extend(reversed(below))
    return order


def _point(row: int, depth: int) -> tuple[int, int]:
    return LEFT + depth * INDENT, row * ROW + ROW // 2 + 4


def _edge(row: int, depth: int, below: int, strong: bool) -> str:
    x, y = _point(row, depth)
    end_x, end_y = _point(below, depth + 1)
    kind = "mh-edge mh-strong" if strong else "mh-edge"
    return f'<path class="{kind}" d="M{x} {y}V{end_y - 5}Q{x} {end_y} {x + 5} {end_y}H{end_x}"/>'


def _node(row: int, depth: int, text: str, source: str, accepted: bool, root: bool) -> str:
    x, y = _point(row, depth)
    label, kind = _label(text), "bonus" if root else kind_of(source)
    state = "mh-accepted" if accepted else "mh-rejected"
    shape = (
        f'<rect class="mh-dot" x="{x - 4}" y="{y - 4}" width="8" height="8" rx="1"/>'
        if kind == "bonus"
        else f'<circle class="mh-dot" cx="{x}" cy="{y}" r="4.5"/>'
    )
    who = "the newest token before this pass" if root else f"{kind}, {'accepted' if accepted else 'not accepted'}"
    return (
        f'<g class="mh-node {css_classes(kind)} {state}">{shape}<text x="{x + 10}" y="{y + 4}">{escape(label)}</text>'
        f"<title>{escape(_visible(text))} ({who})</title></g>"
    )


def _visible(text: str) -> str:
    """With signs for what cannot be seen; XML does not allow all characters."""
    named = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"
    return "".join(char if char.isprintable() else "�" for char in named)


def _label(text: str) -> str:
    visible = _visible(text)
    return visible if len(visible) <= LABEL else visible[: LABEL - 1] + "…"


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count // 1000}k"
