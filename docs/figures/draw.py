"""Draw the figures of the documentation: `python docs/figures/draw.py` writes `tree.svg` and `architecture.svg`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = """\
<style>
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.small { font-size: 12px; fill: #59636e; }
.title { font-weight: 600; }
.code { font-family: ui-monospace, monospace; font-size: 12px; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.paper { fill: #ffffff; }
.box { fill: #f6f8fa; stroke: #59636e; }
.node { fill: #ffffff; stroke: #59636e; stroke-width: 1.5; }
.kept { fill: #cfe8fc; stroke: #0969da; stroke-width: 2; }
.line { stroke: #59636e; stroke-width: 1.5; fill: none; }
.path { stroke: #0969da; stroke-width: 3; fill: none; }
.cell { fill: #ffffff; stroke: #d1d9e0; }
.prefix { fill: #d1d9e0; stroke: #ffffff; }
.seen { fill: #0969da; stroke: #ffffff; }
.head { fill: #59636e; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; }
.small { fill: #b1bac4; }
.paper { fill: #0d1117; }
.box { fill: #161b22; stroke: #8b949e; }
.node { fill: #0d1117; stroke: #b1bac4; }
.kept { fill: #0c2d6b; stroke: #58a6ff; }
.line { stroke: #8b949e; }
.path { stroke: #58a6ff; }
.cell { fill: #0d1117; stroke: #30363d; }
.prefix { fill: #484f58; stroke: #0d1117; }
.seen { fill: #58a6ff; stroke: #0d1117; }
.head { fill: #8b949e; }
}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>
"""

# the tree of `tree.svg`: the token and the parent of every node, and the nodes that are accepted
PREFIX = ("a", "brave", "little")
TOKENS = ("dog", "named", "who", "Max", "Spot", "lived", ".")
PARENTS = (0, 0, 0, 1, 1, 2, 4)
ACCEPTED = (0, 1, 4, 6)
PLACES = ((70, 170), (175, 105), (175, 235), (280, 60), (280, 150), (280, 235), (385, 150))  # x, y of every node


def page(width: int, height: int, title: str, body: list[str]) -> str:
    """Return an SVG document that is readable on a light and on a dark page."""
    shapes = "\n".join(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}">\n<title>{title}</title>\n{STYLE}'
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>\n{shapes}\n</svg>\n'
    )


def text(x: float, y: float, content: str, style: str = "") -> str:
    """Return one line of text."""
    return f'<text x="{x}" y="{y}" class="{style}">{content}</text>'


def ancestors(node: int) -> set[int]:
    """Return a node and all nodes above it."""
    found = {node}
    while node:
        node = PARENTS[node]
        found.add(node)
    return found


def tree() -> str:
    """Return the figure of one token tree and of the mask that verifies it."""
    body = [text(24, 30, "The token tree", "title"), text(500, 30, "The attention mask of its one pass", "title")]
    for node in range(1, len(TOKENS)):
        (x1, y1), (x2, y2) = PLACES[PARENTS[node]], PLACES[node]
        style = "path" if node in ACCEPTED else "line"
        body.append(f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
    for node, (token, (x, y)) in enumerate(zip(TOKENS, PLACES, strict=True)):
        style = "kept" if node in ACCEPTED else "node"
        body.append(f'<rect class="{style}" x="{x - 34}" y="{y - 17}" width="68" height="34" rx="17"/>')
        body.append(text(x, y + 5, token, "middle"))
        body.append(text(x, y + 31, f"node {node}", "small middle"))
    body += [
        text(24, 300, "Blue: the longest path whose tokens are the target's own.", "small"),
        text(24, 318, "The target's token after node 6 is the bonus token: 4 tokens from one pass.", "small"),
    ]
    side, left, top = 24, 610, 92
    for column, token in enumerate((*PREFIX, *TOKENS)):
        x = left + side * column + side / 2
        body.append(f'<text class="small" transform="translate({x + 4} {top - 8}) rotate(-55)">{token}</text>')
    for row, token in enumerate(TOKENS):
        body.append(text(left - 10, top + side * row + 17, f"{row} {token}", "small end"))
        seen = ancestors(row)
        for column in range(len(PREFIX) + len(TOKENS)):
            node = column - len(PREFIX)
            style = "prefix" if node < 0 else "seen" if node in seen else "cell"
            body.append(
                f'<rect class="{style}" x="{left + side * column}" y="{top + side * row}" '
                f'width="{side}" height="{side}"/>'
            )
    body += [
        text(500, 282, "Grey: the committed prefix, seen by every node.", "small"),
        text(500, 300, "Blue: the node itself and its ancestors.", "small"),
        text(500, 318, "Position of a node = length of the prefix + depth.", "small"),
    ]
    return page(890, 336, "A token tree of seven nodes and its attention mask", body)


def architecture() -> str:
    """Return the figure of the packages and of the parts of one step."""

    def box(x: int, y: int, width: int, height: int, title: str, *lines: str, style: str = "box") -> None:
        body.append(f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        body.append(text(x + width / 2, y + 22, title, "title middle"))
        body.extend(text(x + width / 2, y + 40 + 16 * n, line, "code middle") for n, line in enumerate(lines))

    def arrow(x1: int, y1: int, x2: int, y2: int) -> None:
        body.append(f'<line class="line" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" marker-end="url(#tip)"/>')

    body: list[str] = []
    box(24, 20, 400, 76, "medhead_app", "chat page, OpenAI-compatible API, load test", "app/")
    box(466, 20, 400, 76, "medhead_training", "generate-data, finetune, evaluate, export", "training/")
    arrow(224, 96, 224, 126)
    arrow(666, 96, 666, 126)
    box(24, 126, 842, 270, "medhead", style="paper")
    body.append('<rect class="line" x="24" y="126" width="842" height="270" rx="6"/>')
    box(44, 160, 250, 58, "Decoder", "generate(custom_generate=decoder)")
    box(320, 160, 250, 58, "Engine", "continuous batching of requests")
    box(596, 160, 250, 58, "medhead command", "medhead.cli")
    arrow(169, 218, 169, 240)
    arrow(445, 218, 445, 240)
    body.append('<rect class="line" x="34" y="242" width="822" height="146" rx="6" stroke-dasharray="4 4"/>')
    steps = (
        ("propose", "proposers, heads,", "datastore, tree size"),
        ("verify", "model: one pass", "over all nodes"),
        ("accept", "core: sampling,", "longest matching path"),
        ("commit", "model: key/value", "cache"),
    )
    for place, (title, *lines) in enumerate(steps):
        x = 44 + place * 206
        box(x, 254, 184, 76, title, *lines, style="kept")
        if place < len(steps) - 1:
            arrow(x + 184, 292, x + 206, 292)
    body.append('<path class="line" d="M754 330V362H136V334" marker-end="url(#tip)"/>')
    body.append(
        text(
            445, 380, "one step: 1 to depth + 1 new tokens, and the features of the last accepted node", "small middle"
        )
    )
    arrow(445, 396, 445, 426)
    box(24, 426, 842, 60, "medhead_kernels", "attention backends, tree commit, packed weights: tensors in, tensors out")
    body.append(text(445, 508, "Imports point down only.", "small middle"))
    return page(890, 524, "The packages of medhead and the four parts of a step", body)


FIGURES = {"tree.svg": tree, "architecture.svg": architecture}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
