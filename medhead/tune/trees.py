"""Trees of heads: the settings that are tried, and how the fastest one is stored with the heads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medhead.heads.config import CONFIG_FILE
from medhead.tune.search import Changes

SIZES = (4, 6, 8, 12, 16, 24, 32, 48)
FRONTIERS = ((1, 2), (2, 3), (4, 4), (8, 8))  # width and branching
DEPTHS = (3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Tree:
    """How trees are grown; the fields are those of `HeadsConfig`."""

    tree_size: int
    tree_width: int
    tree_branching: int
    tree_depth: int

    def options(self) -> dict[str, Any]:
        """Return the arguments of `HeadsProposer`."""
        return {"tree_size": self.tree_size, "width": self.tree_width, "branching": self.tree_branching,
                "max_depth": self.tree_depth}  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.tree_size} nodes, width {self.tree_width}, branching {self.tree_branching}, depth {self.tree_depth}"
        )


def dimensions(max_depth: int) -> Iterator[Changes[Tree]]:
    """Yield the changes to try, one dimension after the other, for heads of this depth."""
    yield [lambda t, n=n: replace(t, tree_size=n) for n in SIZES]  # type: ignore[misc]
    yield [lambda t, w=w, b=b: replace(t, tree_width=w, tree_branching=b) for w, b in FRONTIERS]  # type: ignore[misc]
    depths = sorted({d for d in (*DEPTHS, max_depth) if d <= max_depth})
    yield [lambda t, d=d: replace(t, tree_depth=d) for d in depths]  # type: ignore[misc]


def save_tree(folder: Path, tree: Tree) -> None:
    """Write the tree into the heads' configuration."""
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8")) | asdict(tree)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
