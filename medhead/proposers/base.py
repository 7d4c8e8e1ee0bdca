"""The protocol of proposers and their registry.

A proposer never decides what is emitted, only how much of it is emitted at once. It sees the state of the rows, names a
token tree, and may look at what the target made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError

if TYPE_CHECKING:
    from medhead.core.acceptance import Accepted
    from medhead.core.gumbel import LazyGumbel
    from medhead.model.target import Target
    from medhead.proposers.candidates import Candidates


@dataclass
class DecodeState:
    """What a proposer may know before a pass. Rows are the rows still running.

    Attributes:
        target: the target.
        texts: prompt and emitted tokens of every row; the last one is the root.
        roots: `[batch]` root tokens on the target's device.
        features: `[batch, size]` of the target at the token before the root: its last hidden state, or the outputs of the
            proposer's `feature_layers`.
        noise: Gumbel noise of the coming positions, or None when decoding is greedy.
        temperature: what logits are divided by before the noise is added, a number or `[batch, 1, 1]`.
    """

    target: Target
    texts: list[list[int]]
    roots: Tensor
    features: Tensor
    noise: LazyGumbel | None = None
    temperature: float | Tensor = 1.0


@dataclass
class VerifyOutput:
    """What a pass found.

    Attributes:
        tree: the tree that was verified.
        logits: `[batch, nodes, vocab]` of the target.
        features: `[batch, nodes, size]` of the target, see `DecodeState.features`.
        accepted: what was kept.
        counts: `accepted.counts` on the host.
        emitted: `accepted.emitted` on the host.
        seconds: from the tree to the accepted path, the target's pass included.
    """

    tree: TokenTree
    logits: Tensor
    features: Tensor
    accepted: Accepted
    counts: list[int]
    emitted: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0


class Proposer:
    """Base of all proposers: plain decoding, a tree of one node.

    Attributes:
        name: registered name.
        max_depth: the deepest tree it names.
        tree_size: number of nodes it names, root included.
        uses_noise: whether it ranks by the noise of the coming positions.
        feature_layers: layers of the target whose outputs it reads; none for the last hidden state.
        skippable: whether it learns from passes without needing every one.
        is_expensive: whether naming candidates takes long enough to think about whether it pays.
        capturable: whether its part of a step can be captured (`medhead.compile`): shapes that never change, nothing that
            the host has to know. Then it has the methods that end in `_at`.
    """

    name = "none"
    max_depth = 0
    tree_size = 1
    uses_noise = False
    feature_layers: tuple[int, ...] = ()
    capturable = False
    skippable = False
    is_expensive = False
    packed_bytes = 0  # memory of packed copies of its weights

    @property
    def steps(self) -> int:
        """Most tokens that a row can gain by one of its trees."""
        return min(self.max_depth, self.tree_size - 1) + 1

    @property
    def next_depth(self) -> int:
        """The deepest tree it may name now."""
        return self.max_depth

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """A generation starts with these prompts; forget the last one."""

    def on_prefill(self, features: Tensor, start: int) -> None:
        """See the target's features `[batch, tokens, size]` of the prompts' tokens from position `start` on."""

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Name a tree for every row, no deeper than `max_depth`."""
        return TokenTree.root(state.roots)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """All that it can name, with estimates, for trees of several proposers; None if it knows nothing."""
        return None

    def update(self, verified: VerifyOutput) -> None:
        """See what the target said."""

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""

    def fork(self) -> Proposer:
        """A proposer that shares all that was learnt, for rows that will join: it is begun with their prompts and reads them."""
        return copy(self)

    def merge(self, newcomers: Any) -> None:
        """The rows of `newcomers()` join, behind those that are there."""

    def warmup(self, target: Target, rows: int) -> None:
        """Do now what would else take time when up to so many rows are decoded."""

    def free(self) -> None:
        """Give back memory that is only kept for speed; it is taken again when it is needed."""

    def memory(self) -> Tensor | None:
        """`[batch, capacity, size]`: what it keeps of every committed token; None if nothing. For captured steps."""
        return None

    def propose_at(self, state: DecodeState, memory: Tensor | None, lengths: Tensor) -> TokenTree:
        """`propose` as part of a captured step, always as deep and as large as it can be.

        Args:
            state: without `texts`, which the host knows late.
            memory: storage of the form of `memory()`, with room behind `lengths`.
            lengths: `[batch]` committed tokens of every row.
        """
        return TokenTree.root(state.roots)

    def observe_at(self, memory: Tensor, lengths: Tensor, features: Tensor, emitted: Tensor) -> None:
        """Write what has to be kept of accepted nodes into `memory` behind `lengths`; only proposers with a memory are asked.

        Args:
            memory: as in `propose_at`.
            lengths: `[batch]`.
            features: `[batch, steps, size]` of the nodes on the accepted path.
            emitted: `[batch, steps]` tokens behind them.
        """

    def resume(self, memory: Tensor | None, lengths: list[int]) -> None:
        """Captured steps are over: the rows go on with this memory and these committed lengths."""

    def origins(self, tree: TokenTree, row: int) -> list[str]:
        """Name of the proposer of every node of a row of the last tree; for people who look."""
        return ["root", *[self.name] * (tree.nodes - 1)]


PROPOSERS: dict[str, Callable[..., Proposer]] = {}
P = TypeVar("P", bound=type[Proposer])


def register_proposer(name: str) -> Callable[[P], P]:
    """Class decorator: make a proposer known by name. Its constructor takes `target` and keyword options."""

    def add(kind: P) -> P:
        kind.name = name
        PROPOSERS[name] = kind
        return kind

    return add


def build_proposer(name: str, target: Target, **options: Any) -> Proposer:
    """Make a registered proposer.

    Raises:
        MedheadError: no proposer has that name, or an option is wrong.
    """
    if name not in PROPOSERS:
        raise MedheadError(f"no proposer is called {name!r}; known proposers: {', '.join(sorted(PROPOSERS))}")
    return PROPOSERS[name](target, **{key: value for key, value in options.items() if value is not None})


def check_tree_size(size: int) -> int:
    """A number of nodes that makes sense.

    Raises:
        MedheadError: it does not.
    """
    if not isinstance(size, int) or not 1 <= size <= 256:
        raise MedheadError(f"the tree size must be a whole number from 1 to 256, got {size!r}")
    return size
