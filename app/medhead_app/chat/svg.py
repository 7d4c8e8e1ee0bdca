"""Inline SVG of the last token tree and of a histogram of pass lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from medhead.serving.request import TreeView
from medhead_app.chat.token_colors import css_classes, display_name, source_kind

ROW, INDENT, LEFT, WIDTH = 20, 13, 12, 312  # pixels
MAX_LABEL = 18  # characters of a token
BARS = 12  # bars of the histogram; the last one counts all longer passes
Tree = dict[str, Any]


def tree_json(view: TreeView, texts: Sequence[str], bonus: str = "") -> Tree:
    """Return a tree with the texts of its nodes as plain JSON; `bonus` is empty if the output ended before that token."""
    lists = {"parents": list(view.parents), "sources": list(view.sources), "accepted": list(view.accepted)}
    return {"texts": list(texts), **lists, "bonus": bonus}


def is_valid_tree(tree: Any) -> bool:
    """Return whether a value sent by a browser is a tree."""
    if not isinstance(tree, dict):
        return False
    lists = [tree.get(name) for name in ("texts", "parents", "sources", "accepted")]
    if not all(isinstance(each, list) for each in lists):
        return False
    texts, parents, sources, accepted = (each for each in lists if each is not None)
    size = len(texts)
    return (
        0 < size <= 4096
        and len(parents) == len(sources) == size
        and all(isinstance(text, str) for text in [*texts, *sources, tree.get("bonus")])
        and all(type(parent) is int and 0 <= parent < max(node, 1) for node, parent in enumerate(parents))
        and all(type(node) is int and 0 <= node < size for node in accepted)
    )


def draw_tree(tree: Tree | None) -> str:
    """Return the SVG of a tree: one line per node, indented by depth, the accepted path first and in bold."""
    if tree is None or not is_valid_tree(tree):
        return '<div class="mh-empty">The tree of the last pass is drawn here.</div>'
    parents, accepted, bonus = tree["parents"], set(tree["accepted"]), tree["bonus"]
    depths: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if node else 0)
    order = _depth_first(parents, accepted)
    last, bonus_row = (tree["accepted"] or [0])[-1], len(tree["accepted"])  # the bonus token follows the accepted path
    rows = {node: row + (1 if bonus and row >= bonus_row else 0) for row, node in enumerate(order)}
    edges = [_edge(rows[p], depths[p], rows[n], n in accepted) for n, p in enumerate(parents) if n]
    nodes = [_node(rows[n], depths[n], tree["texts"][n], tree["sources"][n], n in accepted, n == 0) for n in order]
    if bonus:
        edges.append(_edge(rows[last], depths[last], bonus_row, True))
        nodes.append(_node(bonus_row, depths[last] + 1, bonus, "bonus", True, False))
    edges.sort(key=lambda edge: "mh-strong" in edge)  # the accepted path is drawn on top
    height, width = len(nodes) * ROW + 8, max(WIDTH, LEFT + max(depths) * INDENT + 150)
    return (
        f'<svg class="mh-tree" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{describe_tree(tree)}" xmlns="http://www.w3.org/2000/svg">{"".join(edges)}{"".join(nodes)}</svg>'
    )


def describe_tree(tree: Tree | None) -> str:
    """Return the caption of a tree."""
    if tree is None or not is_valid_tree(tree):
        return "no tree yet"
    return f"{len(tree['parents']) - 1} draft tokens · {max(len(tree['accepted']) - 1, 0)} accepted"


def draw_lengths(lengths: Sequence[int]) -> str:
    """Return the SVG of a histogram of the tokens per pass."""
    width, height, base, top = WIDTH, 138, 112, 22
    counts = Counter(min(length, BARS) for length in lengths)
    bars = max([8, *counts])
    highest, step = max([1, *counts.values()]), (width - 8) / bars
    parts = [f'<line class="mh-axis" x1="4" x2="{width - 4}" y1="{base}" y2="{base}"/>']
    for length in range(1, bars + 1):
        count = counts[length]
        label = str(count) if count < 10_000 else f"{count // 1000}k"
        bar = (base - top) * count / highest
        x, middle = 4 + (length - 1) * step, 4 + (length - 0.5) * step
        name = f"{length}+" if length == BARS else str(length)
        if count:
            parts.append(
                f'<rect class="mh-bar" x="{x + 3:.1f}" y="{base - bar:.1f}" width="{step - 6:.1f}" height="{bar:.1f}" rx="2">'
                f"<title>{count} passes emitted {name} tokens</title></rect>"
                f'<text class="mh-count" x="{middle:.1f}" y="{base - bar - 5:.1f}">{label}</text>'
            )
        parts.append(f'<text class="mh-tick" x="{middle:.1f}" y="{base + 16}">{name}</text>')
    return (
        f'<svg class="mh-lengths" viewBox="0 0 {width} {height}" role="img" aria-label="{describe_lengths(lengths)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def describe_lengths(lengths: Sequence[int]) -> str:
    """Return the caption of the histogram."""
    if not lengths:
        return "no pass yet"
    return f"mean {sum(lengths) / len(lengths):.2f} · {len(lengths)} passes"


def _depth_first(parents: Sequence[int], accepted: set[int]) -> list[int]:
    """Return the nodes in depth-first order, accepted children first."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        if node:
            children.setdefault(parent, []).append(node)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(sorted(children.get(node, []), key=lambda child: (child in accepted, -child)))
    return order


def _point(row: int, depth: int) -> tuple[int, int]:
    return LEFT + depth * INDENT, row * ROW + ROW // 2 + 4


def _edge(row: int, depth: int, child_row: int, accepted: bool) -> str:
    x, y = _point(row, depth)
    end_x, end_y = _point(child_row, depth + 1)
    kind = "mh-edge mh-strong" if accepted else "mh-edge"
    return f'<path class="{kind}" d="M{x} {y}V{end_y - 5}Q{x} {end_y} {x + 5} {end_y}H{end_x}"/>'


def _node(row: int, depth: int, text: str, source: str, accepted: bool, root: bool) -> str:
    x, y = _point(row, depth)
    kind, label = "bonus" if root else source_kind(source), _visible(text)
    if len(label) > MAX_LABEL:
        label = label[: MAX_LABEL - 1] + "…"
    state = "mh-accepted" if accepted else "mh-rejected"
    shape = (
        f'<rect class="mh-dot" x="{x - 4}" y="{y - 4}" width="8" height="8" rx="1"/>'
        if kind == "bonus"
        else f'<circle class="mh-dot" cx="{x}" cy="{y}" r="4.5"/>'
    )
    role = f"{display_name(kind)}, {'' if accepted else 'not '}accepted"
    role = "root, the newest token before this pass" if root else role
    return (
        f'<g class="mh-node {css_classes(kind)} {state}">{shape}<text x="{x + 10}" y="{y + 4}">{escape(label)}</text>'
        f"<title>{escape(_visible(text))} ({role})</title></g>"
    )


def _visible(text: str) -> str:
    """Replace invisible characters, also because XML does not allow all of them."""
    named = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"
    return "".join(char if char.isprintable() else "�" for char in named)
