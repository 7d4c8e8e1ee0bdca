"""The token tree: everything that the target verifies in one pass.

Node 0 is the root, the newest emitted token. Every other node is a draft token; its parent comes before it. All rows of a
batch have the same number of nodes; a row with fewer nodes is padded, which changes no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medhead.errors import MedheadError

WORD_BITS = 64


@dataclass(eq=False)
class TokenTree:
    """A batch of token trees with one number of nodes.

    Attributes:
        tokens: `[batch, nodes]` int64, token ids; column 0 holds the roots.
        parents: `[batch, nodes]` int64, index of each node's parent; the root is its own parent.
        depth: `[batch, nodes]` int64, distance from the root, 0 for the root.
        max_depth: largest depth a node may have, known on the host (shapes depend on it).
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    max_depth: int

    # ---------------------------------------------------------------- constructors

    @classmethod
    def from_parents(cls, tokens: Tensor, parents: Tensor) -> TokenTree:
        """Build and validate a tree from tokens and parents, each `[nodes]` or `[batch, nodes]`.

        Raises:
            MedheadError: the shapes differ, a parent does not come before its child, or node 0 is not its own parent.
        """
        tokens, parents = torch.atleast_2d(tokens).long(), torch.atleast_2d(parents).long()
        if parents.shape[0] == 1 and tokens.shape[0] > 1:
            parents = parents.expand(tokens.shape[0], -1)
        if tokens.shape != parents.shape:
            raise MedheadError(f"tokens {list(tokens.shape)} and parents {list(parents.shape)} must have one shape")
        if tokens.shape[1] == 0:
            raise MedheadError("a token tree needs at least its root")
        if bool((tokens < 0).any()):
            raise MedheadError(f"token ids must not be negative, got {int(tokens.min())}")
        index = torch.arange(tokens.shape[1], device=tokens.device)
        bad = (parents < 0) | ((parents >= index) & (index > 0)) | ((parents != 0) & (index == 0))
        if bool(bad.any()):
            row, node = bad.nonzero()[0].tolist()
            raise MedheadError(
                f"node {node} of row {row} has parent {int(parents[row, node])}: "
                "the root is its own parent (0) and every other parent must come before its child"
            )
        depth = _depths(parents)
        return cls(tokens, parents, depth, int(depth.max()))

    @classmethod
    def root(cls, tokens: Tensor) -> TokenTree:
        """Trees of one node: plain decoding. `tokens` is `[batch]`."""
        zeros = torch.zeros_like(tokens)[:, None]
        return cls(tokens[:, None], zeros, zeros, 0)

    @classmethod
    def chain(cls, tokens: Tensor) -> TokenTree:
        """One path per row: `tokens` is `[batch, nodes]`, root first."""
        nodes = tokens.shape[1]
        depth = torch.arange(nodes, device=tokens.device).expand_as(tokens)
        return cls(tokens, (depth - 1).clamp(min=0), depth, nodes - 1)

    @classmethod
    def from_paths(cls, root: int, paths: Sequence[Sequence[int]]) -> TokenTree:
        """One row from paths of token ids below the root; paths that share a beginning share its nodes."""
        tokens, parents, children = [int(root)], [0], {}
        for path in paths:
            node = 0
            for token in path:
                key = (node, int(token))
                if key not in children:
                    children[key] = len(tokens)
                    tokens.append(int(token))
                    parents.append(node)
                node = children[key]
        return cls.from_parents(torch.tensor(tokens), torch.tensor(parents))

    @classmethod
    def from_ranks(cls, root: int, ranks: Sequence[Sequence[int]], candidates: Tensor) -> TokenTree:
        """One row from Medusa's static form: `ranks` holds paths of ranks, `candidates[d, r]` the rank-r token of depth d+1.

        Raises:
            MedheadError: a path is deeper than there are candidate lists or a rank is larger than a list, or a path's
                beginning is missing.
        """
        parents = rank_parents(ranks)
        deepest, widest = candidates.shape
        tokens = [int(root)]
        for path in sorted_ranks(ranks):
            if len(path) > deepest:
                raise MedheadError(f"the tree is {len(path)} deep but there are only {deepest} candidate lists (heads)")
            if max(path) >= widest:
                raise MedheadError(f"the tree asks for rank {max(path)} but only {widest} candidates are kept")
            tokens.append(int(candidates[len(path) - 1, path[-1]]))
        return cls.from_parents(torch.tensor(tokens), torch.tensor(parents))

    @classmethod
    def merge(cls, trees: Sequence[TokenTree]) -> TokenTree:
        """Merge single-row trees with one root token; nodes reached by the same tokens become one.

        Raises:
            MedheadError: no tree was given, a tree has several rows, or the roots differ.
        """
        if not trees:
            raise MedheadError("merge needs at least one tree")
        roots = {int(tree.tokens[0, 0]) for tree in trees}
        if len(roots) > 1 or any(tree.tokens.shape[0] != 1 for tree in trees):
            raise MedheadError(f"only single-row trees with one root token can be merged, got roots {sorted(roots)}")
        paths = [path for tree in trees for path in tree.paths(0)]
        return cls.from_paths(roots.pop(), paths)

    # ---------------------------------------------------------------- shape and structure

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def nodes(self) -> int:
        """Number of nodes in each row, root included."""
        return self.tokens.shape[1]

    @cached_property
    def visible(self) -> Tensor:
        """`[batch, nodes, nodes]` bool: `visible[b, i, j]` when j is i or an ancestor of i. By pointer doubling."""
        nodes = self.nodes
        seen = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).expand(self.batch, nodes, nodes)
        jump, reach = self.parents, 1
        while reach <= self.max_depth:
            seen = seen | seen.gather(1, jump[:, :, None].expand(-1, -1, nodes))
            jump, reach = jump.gather(1, jump), reach * 2
        return seen

    @property
    def ancestor_bitmask(self) -> Tensor:
        """`[batch, nodes, ceil(nodes / 64)]` int64: bit j % 64 of word j // 64 is set when j is the node or an ancestor."""
        count = -(-self.nodes // WORD_BITS)
        bits = torch.nn.functional.pad(self.visible, (0, count * WORD_BITS - self.nodes)).long()
        shifts = torch.arange(WORD_BITS, device=bits.device)
        return (bits.unflatten(-1, (count, WORD_BITS)) << shifts).sum(-1)

    def paths_to(self, row: int) -> list[tuple[int, ...]]:
        """Return the tokens of the path to every node of a row, without the root's own: `()` for the root."""
        tokens, parents = self.tokens[row].tolist(), self.parents[row].tolist()
        ways: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            ways.append((*ways[parent], token))
        return ways

    def paths(self, row: int) -> list[list[int]]:
        """Return the token paths below the root of one row, one for each leaf; for display and tests."""
        parents, tokens = self.parents[row].tolist(), self.tokens[row].tolist()
        leaves = set(range(1, self.nodes)) - set(parents)
        found = []
        for leaf in sorted(leaves):
            path, node = [], leaf
            while node:
                path.append(tokens[node])
                node = parents[node]
            found.append(path[::-1])
        return found


def sorted_ranks(ranks: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return rank paths in Medusa's order: by length, then lexicographically, so that a parent comes before its child."""
    return sorted({tuple(path) for path in ranks}, key=lambda path: (len(path), path))


def rank_parents(ranks: Sequence[Sequence[int]]) -> list[int]:
    """Return the parents of a static tree's nodes, root first.

    Raises:
        MedheadError: an empty path, a negative rank, or a path whose beginning is missing.
    """
    index: dict[tuple[int, ...], int] = {(): 0}
    parents = [0]
    for path in sorted_ranks(ranks):
        if not path or min(path) < 0:
            raise MedheadError(f"a path of ranks needs at least one rank and none below 0, got {list(path)}")
        if path[:-1] not in index:
            raise MedheadError(f"the path {list(path)} needs its beginning {list(path[:-1])} in the tree as well")
        index[path] = len(parents)
        parents.append(index[path[:-1]])
    return parents


def _depths(parents: Tensor) -> Tensor:
    """Return the depth of every node, `[batch, nodes]`, by following all parents at once."""
    depth = torch.zeros_like(parents)
    at = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    while bool((at != 0).any()):
        depth += (at != 0).long()
        at = parents.gather(1, at)
    return depth
