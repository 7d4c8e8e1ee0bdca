"""Trees of heads: what is tried, and where the best one is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medhead.heads.config import CONFIG_FILE
from medhead.tune.search import Changes

SIZES = (4, 6, 8, 12, 16, 24, 32, 48)
FRONTIERS = ((1, 2), (2, 3), (4, 4), (8, 8))  # width and branching


@dataclass(frozen=True)
class Tree:
    """How trees are grown; names as in `HeadsConfig`."""

    tree_size: int
    tree_width: int
    tree_branching: int
    tree_depth: int

    def options(self) -> dict[str, Any]:
        """For `HeadsProposer`."""
        names = ("tree_size", "width", "branching", "max_depth")
        return dict(zip(names, (self.tree_size, self.tree_width, self.tree_branching, self.tree_depth), strict=True))

    def __str__(self) -> str:
        return (
            f"{self.tree_size} nodes, width {self.tree_width}, branching {self.tree_branching}, depth {self.tree_depth}"
        )


def neighbours(deepest: int) -> Iterator[Changes[Tree]]:
    """What is tried, one dimension after the other, with heads of depth `deepest`."""
    yield [lambda t, n=n: replace(t, tree_size=n) for n in SIZES]  # type: ignore[misc]
    yield [lambda t, w=w, b=b: replace(t, tree_width=w, tree_branching=b) for w, b in FRONTIERS]  # type: ignore[misc]
    depths = sorted({d for d in (3, 4, 6, 8, 12, deepest) if d <= deepest})
    yield [lambda t, d=d: replace(t, tree_depth=d) for d in depths]  # type: ignore[misc]


def keep(folder: Path, tree: Tree) -> None:
    """Write the tree into the heads' configuration."""
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {name: getattr(tree, name) for name in ("tree_size", "tree_width", "tree_branching", "tree_depth")}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
