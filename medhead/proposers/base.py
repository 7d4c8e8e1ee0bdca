"""The protocol of proposers and their registry.

A proposer never decides what is emitted, only how much of it is emitted at once. It sees the state of the sequences, fills a
token tree, and learns from the target's pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from medhead.config import check_tree_size
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError

if TYPE_CHECKING:
    from medhead.core.acceptance import Accepted
    from medhead.core.gumbel import LazyGumbel
    from medhead.core.lengths import Lengths
    from medhead.model.target import Target
    from medhead.proposers.candidates import Candidates
    from medhead.proposers.trie import DraftTrie


@dataclass
class DecodeState:
    """What a proposer may know before a pass.

    Attributes:
        target: the target.
        texts: prompt and emitted tokens of every sequence, the root last; empty in a captured step.
        roots: `[batch]` root tokens on the target's device.
        features: `[batch, size]` of the target at the token before the root: its last hidden state, or the outputs of the
            proposer's `feature_layers`; zeros before the first token, which the pass over the prompt gives.
        noise: Gumbel noise of the coming positions, or None when decoding is greedy.
        temperature: what logits are divided by before the noise is added, a number or `[batch, 1, 1]`.
        draft_cache: what `Proposer.new_draft_cache` returned, brought up to date.
        lengths: `[batch]` committed tokens of every sequence on the device; None if no proposer reads them.
        fixed: whether shapes must not depend on values and the host must not read a tensor (a captured step).
        drafts: what the host made for a captured step, see `Proposer.host_tries`; None without it.
    """

    target: Target
    texts: list[list[int]]
    roots: Tensor
    features: Tensor
    noise: LazyGumbel | None = None
    temperature: float | Tensor = 1.0
    draft_cache: Any = None
    lengths: Tensor | None = None
    fixed: bool = False
    drafts: Candidates | None = None


@dataclass
class VerifyOutput:
    """The result of a verify pass.

    Attributes:
        tree: the tree that was verified.
        logits: `[batch, nodes, vocab]` of the target.
        features: `[batch, nodes, size]` of the target, see `DecodeState.features`.
        accepted: the accepted paths.
        counts: `accepted.counts` on the host; empty in a captured step.
        emitted: `accepted.emitted` on the host.
        seconds: from the tree to the accepted path, the target's pass included; 0 where the prompts' pass gave the tokens.
        drafted: number of nodes of every row that the proposer filled, where a sequence has a grammar; those that follow are
            forced by the grammar.
    """

    tree: TokenTree
    logits: Tensor
    features: Tensor
    accepted: Accepted
    counts: list[int] = field(default_factory=list)
    emitted: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)


class Proposer:
    """Base of all proposers: plain decoding, a tree of one node.

    Attributes:
        name: registered name.
        max_depth: depth of the deepest tree that it fills.
        uses_noise: whether it ranks by the noise of the coming positions.
        feature_layers: layers of the target whose outputs it reads; none for the last hidden state.
        skippable: whether it may miss calls of `update`.
        is_expensive: whether its candidates take so long that a hybrid asks for them only where they pay.
        capturable: whether its part of a step can be captured: fixed shapes, no host reads.
        takes_drafts: whether in captured steps it proposes what `host_tries` made before the step.
        compilable: whether PyTorch's compiler can be given the whole captured step: the step changes its buffers alone.
        reads_nodes: whether `update` reads nodes of its tree by their places.
        packed_bytes: memory of packed copies of its weights.
        row_states: what it keeps on the host of every sequence, one entry each; empty for nothing.
    """

    name = "none"
    max_depth = 0
    uses_noise = False
    feature_layers: tuple[int, ...] = ()
    capturable = False
    takes_drafts = False
    compilable = False
    skippable = False
    is_expensive = False
    reads_nodes = False
    packed_bytes = 0
    row_states: Sequence[Any] = ()
    _tree_size = 1

    @property
    def tree_size(self) -> int:
        """The largest number of nodes of its trees, root included, from 1 to 256."""
        return self._tree_size

    @tree_size.setter
    def tree_size(self, size: int) -> None:
        self._tree_size = check_tree_size(size)

    @property
    def steps(self) -> int:
        """The largest number of tokens that a sequence can gain by a captured step."""
        return min(self.captured_depth, self.tree_size - 1) + 1

    @property
    def captured_depth(self) -> int:
        """Depth of the deepest tree that it fills in a captured step."""
        return self.max_depth

    @property
    def draft_key(self) -> Hashable | None:
        """What identifies the entries of its draft cache, `()` without one; None if `on_prefill` must see whole prompts.

        With a key, the engine may read a prompt from the middle on and load the entries before from storage, see `DraftCache`.
        """
        kind = type(self)
        keeps = kind.on_prefill is not Proposer.on_prefill or kind.new_draft_cache is not Proposer.new_draft_cache
        return None if keeps else ()

    @property
    def next_depth(self) -> int:
        """The deepest tree that it may fill in the next pass."""
        return self.max_depth

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Start a generation with these prompts and forget the last one."""

    def new_draft_cache(self, lengths: Lengths, capacity: int) -> Any:
        """Return empty storage for what it keeps of the committed tokens, with room for `capacity`, or None."""
        return None

    def on_prefill(self, draft_cache: Any, texts: list[list[int]], features: Tensor, start: int) -> None:
        """Read the target's features `[batch, tokens, size]` of the prompts' tokens from position `start` on."""

    def update_draft_cache(self, draft_cache: Any, features: Tensor, emitted: Tensor, counts: Tensor) -> None:
        """Write what it keeps of the accepted nodes, by tensor operations alone: a captured step runs this.

        Args:
            draft_cache: see `new_draft_cache`.
            features: `[batch, steps, size]` of the nodes on the accepted path.
            emitted: `[batch, steps]` the tokens that follow them.
            counts: `[batch]` how many of the steps are real.
        """

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return a tree for every sequence, no deeper than `max_depth`."""
        return TokenTree.root(state.roots)

    def host_tries(self, texts: list[list[int]]) -> list[DraftTrie]:
        """Return the draft tokens of every sequence for the next captured step; the last tokens of `texts` are the roots."""
        raise NotImplementedError(f"{self.name} makes no draft tokens on the host")

    def update_captured(self, output: VerifyOutput) -> None:
        """Learn from the verify pass of a captured step, by tensor operations alone."""

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """Return all candidates with estimated probabilities, for trees of several proposers; None without any."""
        return None

    def update(self, output: VerifyOutput) -> None:
        """Learn from a verify pass."""

    def keep_rows(self, rows: list[int]) -> None:
        """Keep only these sequences, in this order."""
        if self.row_states:
            self.row_states = [self.row_states[row] for row in rows]

    def fork(self) -> Proposer:
        """Return a proposer for sequences that will join; it shares what was learnt and begins with their prompts."""
        return copy(self)

    def merge(self, forked: Any) -> None:
        """Append the sequences of a `fork()` to those that are there."""
        self.row_states = [*self.row_states, *forked.row_states]

    def warmup(self, target: Target, rows: int) -> None:
        """Prepare for decoding up to `rows` sequences: measure and allocate now what would delay the first text."""

    def free(self) -> None:
        """Release memory that is kept only for speed; it is allocated again when needed."""

    def origins(self, tree: TokenTree, row: int) -> list[str]:
        """Return the name of the proposer of every node of a row of the last tree."""
        return ["root", *[self.name] * (tree.nodes - 1)]


PROPOSERS: dict[str, Callable[..., Proposer]] = {}
P = TypeVar("P", bound=type[Proposer])


def register_proposer(name: str) -> Callable[[P], P]:
    """Return a class decorator that registers a proposer; its constructor takes `target` and keyword options."""

    def add(kind: P) -> P:
        kind.name = name
        PROPOSERS[name] = kind
        return kind

    return add


def build_proposer(name: str, target: Target, **options: Any) -> Proposer:
    """Return a new proposer of a registered name.

    Raises:
        MedheadError: no proposer has that name, or an option is wrong.
    """
    if name not in PROPOSERS:
        raise MedheadError(f"no proposer is called {name!r}; known proposers: {', '.join(sorted(PROPOSERS))}")
    return PROPOSERS[name](target, **{key: value for key, value in options.items() if value is not None})


@register_proposer("none")
class PlainProposer(Proposer):
    """Plain decoding: proposes nothing but the root, whatever the tree size."""

    capturable = compilable = True

    def __init__(self, target: Any = None, **options: Any) -> None:
        self.tree_size = 1
