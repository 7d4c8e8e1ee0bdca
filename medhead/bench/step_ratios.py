"""What the times of steps mean beside each other: the ratios that a user of a GPU asks for."""

from __future__ import annotations

from typing import Any

from medhead.bench.captured_steps import ALONE


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """One line for every shape, batch, context and way to run steps.

    Args:
        rows: of `medhead.bench.step`'s results: shape, batch, context, step, ms, of_reading.
    """
    lines = []
    for place in dict.fromkeys((row["shape"], row["batch"], row["context"]) for row in rows):
        here = {row["step"]: row for row in rows if (row["shape"], row["batch"], row["context"]) == place}
        ways = ["", *dict.fromkeys(name.split(", ")[2] for name in here if name.count(", ") == 2 and "plain" in name)]
        lines += [
            f"{place[0]}, batch {place[1]}, {place[2]} tokens, {way or 'loop'}: {_line(here, way)}" for way in ways
        ]
    return lines


def _line(here: dict[str, Any], way: str) -> str:
    """Ratios of one way; what was not measured is left out."""
    behind = f", {way}" if way else ""
    ms = {name: row["ms"] for name, row in here.items()}
    plain = f"medhead, plain{behind}"
    found = [f"plain step {here[plain]['of_reading']:.2f} x reading the weights"] if plain in here else []
    eager = "transformers, eager"
    if plain in ms and eager in ms:
        found.append(f"{ms[eager] / ms[plain]:.2f} x the speed of transformers generate")
    trees = [name for name in ms if name.endswith(f"nodes{behind}") and name.startswith("medhead")]
    if trees and plain in ms:
        largest = max(trees, key=_nodes)
        found.append(f"{_nodes(largest)} nodes cost {ms[largest] / ms[plain]:.2f} plain steps")
    for name in ms:
        alone = f"medhead, {_nodes(name)} nodes{behind}, {ALONE}"
        if name.endswith(f"heads{behind}") and alone in ms:
            kind = name.split(" by ")[1].split(" heads")[0]
            found.append(
                f"{kind} heads, {_nodes(name)} nodes: {1 - ms[alone] / ms[name]:.0%} of the step outside the pass"
            )
    return "; ".join(found)


def _nodes(name: str) -> int:
    """The number in `medhead, 64 nodes ...`; 0 for other steps."""
    digits = name.removeprefix("medhead, ").split(" ")[0]
    return int(digits) if digits.isdigit() else 0
