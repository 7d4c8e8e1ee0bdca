"""How often heads guess right on held-out text, and the static trees that follow from it.

The text's own tokens are the truth: at every anchor and depth the rank of the true token among the heads' guesses is
noted, given the true path above it. The ranks of one anchor together are a path of ranks, and counting whole paths
says what a static tree is worth without assuming, as Medusa's search does, that depths are right independently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads import Heads
from medhead.heads.readout import Readout
from medhead.proposers.static_tree import best_static_tree
from medhead.target import Target

from .losses import positions_per_chunk
from .objective import Level, Texts, choose_anchors, unroll

NODES = (8, 16, 32, 64)  # sizes of the trees that are kept
MISSED, UNREACHED = -1, -2  # in place of a rank: the token was not named; the text has no token there
PASS_TOKENS = 4096  # of one pass of the target
ATTENDED = 2**26  # scores of attention that heads compute at once

Path = tuple[int, ...]
Tree = list[list[int]]


@dataclass
class Measured:
    """What heads did on held-out text.

    Attributes:
        anchors: number of them; each stands for one token of the text that decoding would emit.
        ranks: ranks that were told apart; what lies behind them is missed.
        reached: at depth d+1, anchors whose text goes on that far.
        accuracies: `accuracies[d][r]`, share of these at which the rank-r guess of depth d+1 was right.
        paths: the paths of ranks that happened, each cut at its first miss or where the text ended, and how often.
        trees: the best static trees by number of nodes, as `HeadsProposer(shape=...)` takes them.
        walked: tokens per pass when the measured texts are decoded with each of `trees`, counted pass by pass. Lower than
            `length`, since decoding stands more often where guesses are wrong: it jumps over what it guessed right.
    """

    anchors: int
    ranks: int
    reached: list[int]
    accuracies: list[list[float]]
    paths: dict[Path, int]
    trees: dict[str, Tree] = field(default_factory=dict)
    walked: dict[str, float] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Depths that were measured."""
        return len(self.accuracies)

    def top(self, ranks: int) -> list[float]:
        """At every depth, how often one of the first `ranks` guesses was right."""
        return [sum(row[:ranks]) for row in self.accuracies]

    @cached_property
    def begun(self) -> dict[Path, int]:
        """How many anchors have ranks that begin with a path, for every path that happened; `()` is all."""
        counts: Counter[Path] = Counter()
        for path, count in self.paths.items():
            for length in range(len(path) + 1):
                counts[path[:length]] += count
        return dict(counts)

    def value(self, path: Sequence[int]) -> float:
        """Share of anchors whose ranks begin with `path`: what a node of a static tree adds to the accepted length."""
        return self.begun.get(tuple(path), 0) / self.anchors

    def length(self, tree: Iterable[Sequence[int]]) -> float:
        """Accepted length of a static tree, the mean over all anchors: 1 for the target's own token, and its nodes' values."""
        return 1.0 + sum(self.value(path) for path in tree)

    def best_tree(self, nodes: int) -> Tree:
        """The static tree of at most `nodes` nodes, root included, with the largest `length`.

        No path is worth more than its beginning, so the best `nodes - 1` paths hold all their beginnings; of equal ones the
        shorter goes first, then the lower ranks. Paths that never happened are left out, but a tree has at least one.

        Raises:
            MedheadError: fewer than two nodes.
        """
        if nodes < 2:
            raise MedheadError(f"a static tree needs at least 2 nodes, got {nodes}")
        ordered = sorted(self.begun.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
        best = [path for path, _ in ordered if path][: nodes - 1] or [(0,)]
        return [list(path) for path in sorted(best, key=lambda path: (len(path), path))]

    def chain(self) -> float:
        """Accepted length when only the first guess of every depth is tried."""
        return self.length([(0,) * (depth + 1) for depth in range(self.depth)])

    def independent(self, nodes: int) -> tuple[Tree, float]:
        """The tree that `best_static_tree` makes of the accuracies, and its length if depths were independent.

        That texts end is part of both this length and the true one (`length` of the same tree).
        """
        alive = [now / max(before, 1) for before, now in zip([self.anchors, *self.reached], self.reached, strict=False)]
        rates = [[alive[depth] * rate for rate in row] for depth, row in enumerate(self.accuracies)]
        tree, total = best_static_tree(rates, nodes), 1.0
        for path in tree:
            value = 1.0
            for depth, rank in enumerate(path):
                value *= rates[depth][rank]
            total += value
        return tree, total

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; `lengths` is there for the reader, the rest for `from_dict`."""
        lengths = {nodes: round(self.length(tree), 4) for nodes, tree in self.trees.items()}
        return {
            "anchors": self.anchors,
            "ranks": self.ranks,
            "reached": self.reached,
            "accuracies": self.accuracies,
            "lengths": lengths | {"chain": round(self.chain(), 4)},
            "walked": {nodes: round(length, 4) for nodes, length in self.walked.items()},
            "trees": self.trees,
            "paths": {",".join(map(str, path)): count for path, count in self.paths.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measured:
        """What `to_dict` made."""
        fields = {name: value for name, value in data.items() if name not in ("lengths", "paths")}
        paths = {tuple(map(int, path.split(","))) if path else (): n for path, n in data["paths"].items()}
        return cls(**fields, paths=paths)


@torch.no_grad()
def measure(
    heads: Heads,
    target: Target,
    batches: Iterable[Texts],
    ranks: int = 10,
    most_anchors: int = 50_000,
    on_anchors: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Run heads along held-out texts.

    Heads and target compute in their own types, so the target may be in half precision. The heads are left in the mode
    (`train` or `eval`) that they came in.

    Args:
        heads: the heads, on the target's device.
        target: their target.
        batches: held-out texts; a row may hold several documents, which are taken apart.
        ranks: ranks that are told apart.
        most_anchors: the measurement ends when it has as many.
        on_anchors: called with the number of new anchors after every pass.

    Raises:
        MedheadError: `ranks` or `most_anchors` is below 1, or the texts hold no token to guess.
    """
    if ranks < 1 or most_anchors < 1:
        raise MedheadError(f"ranks and most_anchors must be at least 1, got {ranks} and {most_anchors}")
    training = heads.training
    heads.eval()
    found: list[Tensor] = []
    ends: list[Tensor] = []
    try:
        readout = Readout(heads, target, next((p.dtype for p in heads.parameters()), target.dtype))
        columns = _columns(readout, target)
        with target.active(heads.config.taps):
            for texts in _passes(batches, target):
                of_text, last = _ranks_along(readout, columns, target, texts, ranks)
                found.append(of_text)
                ends.append(last)
                on_anchors(len(of_text))
                if sum(map(len, found)) >= most_anchors:
                    break
    finally:
        heads.train(training)
    if not sum(map(len, found)):
        raise MedheadError("the held-out texts hold no token to guess: every document needs at least 3 tokens")
    return _summary(torch.cat(found)[:most_anchors], torch.cat(ends)[:most_anchors], ranks)


def _passes(batches: Iterable[Texts], target: Target) -> Iterator[Texts]:
    """Texts of one document a row, of similar lengths, on the target's device, as many as one pass of the target takes."""
    for batch in batches:
        documents = []
        for ids, mask, document in zip(batch.ids, batch.mask, batch.document, strict=True):
            for number in document[document >= 0].unique().tolist():
                here = document == number
                documents.append((ids[here], mask[here]))
        documents.sort(key=lambda pair: -len(pair[0]))  # stable
        while documents:
            longest = len(documents[0][0])
            rows = max(1, PASS_TOKENS // longest)
            group, documents = documents[:rows], documents[rows:]
            texts = Texts(
                torch.zeros(len(group), longest, dtype=torch.long),
                torch.zeros(len(group), longest, dtype=torch.bool),
                torch.full((len(group), longest), -1),
            )
            for row, (ids, mask) in enumerate(group):
                texts.ids[row, : len(ids)], texts.mask[row, : len(ids)] = ids, mask
                texts.document[row, : len(ids)] = 0
            if bool(texts.guessable(2).any()):
                yield Texts(*(part.to(target.device) for part in (texts.ids, texts.mask, texts.document)))


def _columns(readout: Readout, target: Target) -> Tensor | None:
    """`[vocab]`: where in the heads' logits a token is, -1 for one that they do not name; None if they name all."""
    if readout.tokens is None:
        return None
    columns = torch.full((target.vocab_size,), -1, device=target.device)
    columns[readout.tokens] = torch.arange(len(readout.tokens), device=target.device)
    return columns


def _ranks_along(
    readout: Readout, columns: Tensor | None, target: Target, texts: Texts, ranks: int
) -> tuple[Tensor, Tensor]:
    """Ranks `[anchors, depth]` int16 on the host, in the texts' order, and whether an anchor is the last of its stretch."""
    heads, (rows, length) = readout.heads, texts.ids.shape
    positions = torch.arange(length, device=texts.ids.device).expand(rows, -1)
    _, features = target.read_hidden(target.model, texts.ids, positions)
    features = features.to(readout.dtype)
    anchors, real = choose_anchors(texts, 1.0)
    width = anchors.shape[1]
    if heads.memory_size:  # every anchor looks at the whole text
        width = max(1, ATTENDED // (rows * length * heads.config.num_heads * heads.config.depth))
    found = torch.full((rows, length, heads.config.depth), UNREACHED, dtype=torch.int16, device=target.device)
    for begin in range(0, anchors.shape[1], width):
        part = slice(begin, begin + width)
        levels = unroll(
            heads, texts, features, lambda ids: target.embed(ids).to(readout.dtype), anchors[:, part], real[:, part]
        )
        for depth, level in enumerate(levels):
            truth = texts.ids[level.rows, level.at + 1]
            found[level.rows, level.at - 1 - depth, depth] = _ranks_of(readout, columns, level, depth, truth, ranks)
    possible = texts.guessable(2)
    last = possible.clone()
    last[:, :-1] &= ~possible[:, 1:]
    return found[possible].cpu(), last[possible].cpu()


def _ranks_of(readout: Readout, columns: Tensor | None, level: Level, depth: int, truth: Tensor, ranks: int) -> Tensor:
    """`[n]` int16: how many guesses come before the true token `[n]`; of equally likely ones the first does."""
    result = torch.full_like(truth, MISSED, dtype=torch.int16)
    column = truth if columns is None else columns[truth]
    for chosen in (column >= 0).nonzero()[:, 0].split(positions_per_chunk(len(readout.weight))):
        logits = readout.logits(level.features[chosen], depth)
        own = column[chosen, None]
        of_truth = logits.gather(1, own)
        earlier = torch.arange(logits.shape[1], device=logits.device) < own
        rank = ((logits > of_truth) | ((logits == of_truth) & earlier)).sum(1)
        result[chosen] = torch.where(rank < ranks, rank, MISSED).to(torch.int16)
    return result


def _summary(found: Tensor, last: Tensor, ranks: int) -> Measured:
    """Everything that is counted, from ranks `[anchors, depth]` and which anchors `[anchors]` end a stretch of text."""
    reached = (found != UNREACHED).cumprod(1).bool()  # behind a gap another turn begins: not of this path
    seen = reached.sum(0)
    hits = torch.stack([((found == rank) & reached).sum(0) for rank in range(ranks)], 1)  # [depth, ranks]
    right = (found >= 0).cumprod(1).bool()
    unique, kind, counts = found.masked_fill(~right, MISSED).unique(dim=0, return_inverse=True, return_counts=True)
    paths = [tuple(rank for rank in row if rank >= 0) for row in unique.tolist()]
    measured = Measured(
        anchors=len(found),
        ranks=ranks,
        reached=seen.tolist(),
        accuracies=[
            [round(n / max(of, 1), 5) for n in row] for row, of in zip(hits.tolist(), seen.tolist(), strict=True)
        ],
        paths=dict(zip(paths, counts.tolist(), strict=True)),
    )
    index = torch.arange(len(last))
    ends = torch.where(last, index + 1, len(last)).flip(0).cummin(0).values.flip(0).tolist()
    kinds = kind.tolist()
    for nodes in NODES:
        tree = measured.best_tree(nodes)
        measured.trees[str(nodes)] = tree
        measured.walked[str(nodes)] = len(kinds) / _passes_with(tree, paths, kinds, ends)
    return measured


def _passes_with(tree: Tree, paths: list[Path], kinds: list[int], ends: list[int]) -> int:
    """Passes of decoding with a tree; anchor i has the ranks `paths[kinds[i]]`, and its text ends before anchor `ends[i]`."""
    nodes = {tuple(path) for path in tree} | {()}
    accepted = [max(n for n in range(len(path) + 1) if path[:n] in nodes) for path in paths]
    passes = at = 0
    while at < len(kinds):
        passes += 1
        at = min(at + 1 + accepted[kinds[at]], ends[at])
    return passes
