"""Captured steps on a model of random weights: the forward pass only, steps over fixed trees, and steps with heads.

No row of the buffers is alive, so nothing is committed and every run is the same step at the same context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from medhead.compile.backends import make
from medhead.compile.buffers import Buffers
from medhead.compile.graph_cache import columns_for
from medhead.compile.step import FixedStep
from medhead.core.tree import TokenTree
from medhead.heads import HeadsConfig, build_heads
from medhead.proposers.base import DecodeState, Proposer
from medhead.proposers.heads import HeadsProposer
from medhead.proposers.none import PlainProposer

if TYPE_CHECKING:
    from medhead.model.target import Target

DEPTH = 8  # of the heads
FORWARD_ONLY = "forward only"
_GREEDY = (LogitsProcessorList(), False)


class FixedTree(Proposer):
    """Proposes the same binary tree of arbitrary tokens at every step."""

    capturable = True

    def __init__(self, target: Target, nodes: int) -> None:
        index = torch.arange(nodes, device=target.device)
        tree = TokenTree.from_parents(index, ((index - 1) // 2).clamp(min=0))
        self.tokens, self.parents, self.depth = tree.tokens[:, 1:], tree.parents, tree.depth
        self.tree_size, self.max_depth = nodes, tree.max_depth

    def propose_at(self, state: DecodeState, memory: Tensor | None, lengths: Tensor) -> TokenTree:
        """Return the tree with the given roots."""
        rows = len(state.roots)
        tokens = torch.cat([state.roots[:, None], self.tokens.expand(rows, -1)], 1)
        return TokenTree(tokens, self.parents.expand(rows, -1), self.depth.expand(rows, -1), self.max_depth)


class ForwardStep(FixedStep):
    """Runs the target's forward pass over the tree, and nothing else of a step."""

    def __call__(self, buffers: Buffers) -> None:
        """Verify the tree."""
        state = DecodeState(self.target, [], buffers.roots, buffers.features)
        tree = self.proposer.propose_at(state, None, buffers.lengths)
        logits, _ = self.target.verify_at(buffers.cache(self.target), tree, buffers.lengths)
        buffers.out[:, 0].copy_(logits[:, 0, 0].long())  # an unused result would be optimised away


def steps_of(
    target: Target, rows: int, context: int, nodes: list[int], way: str, kinds: list[str]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name of every kind of step and a function that runs it."""
    proposers: dict[str, Proposer] = {"plain": PlainProposer()}
    proposers |= {f"{count} nodes": FixedTree(target, count) for count in nodes}
    with target.active():
        for name, proposer in proposers.items():
            if proposer.tree_size > 1:
                yield (
                    f"{name}, {way}, {FORWARD_ONLY}",
                    _ready(ForwardStep(target, proposer, *_GREEDY), rows, context, way),
                )
            yield f"{name}, {way}", _ready(FixedStep(target, proposer, *_GREEDY), rows, context, way)
    for kind in kinds:
        heads = build_heads(config_of(target, kind))
        for count in nodes:
            with_heads = HeadsProposer(target, heads, tree_size=count, dtype=target.dtype)
            with target.active(with_heads.feature_layers):
                step = FixedStep(target, with_heads, *_GREEDY)
                yield f"{count} nodes with {kind} heads, {way}", _ready(step, rows, context, way)


def config_of(target: Target, kind: str) -> HeadsConfig:
    """Return the configuration that `medhead finetune` uses by default for this target."""
    size = target.hidden_size
    layers = {target.layers // 4, target.layers // 2, target.layers - 1} if kind in ("block", "attention") else ()
    heads = max(1, size // 128)
    return HeadsConfig(
        kind=kind, depth=DEPTH, hidden_size=size, vocab_size=target.vocab_size, target_layers=target.layers,
        inner_size=2 * size, correction_size=3 * size // 2, correction="recurrent" if kind == "block" else "none",
        blocks=2, feature_layers=sorted(layers), num_heads=heads, key_heads=max(1, heads // 4), head_dim=min(size, 128),
    )  # fmt: skip


def _ready(step: FixedStep, rows: int, context: int, way: str) -> Callable[[], object]:
    target, proposer = step.target, step.proposer
    with torch.inference_mode(False), torch.no_grad():
        proposer.begin(target, [[0] * context] * rows)
        features = torch.zeros(rows, target.feature_size, dtype=target.dtype, device=target.device)
        room = columns_for(context + proposer.tree_size + proposer.steps)
        buffers = Buffers.empty(target, rows, room, proposer.steps, features, proposer.memory())
        run = make(way, step, buffers)
        buffers.lengths.fill_(context)

    def once() -> None:
        with torch.inference_mode(False), torch.no_grad():
            run()

    return once
