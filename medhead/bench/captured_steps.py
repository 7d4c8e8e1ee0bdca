"""Decode steps on a model of random weights, ready to run: eager ones, and captured ones with and without heads.

Captured steps run over buffers with no sequence alive, so nothing is committed and every run is the same step at the same
context; eager steps get their lengths back after every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from medhead.compile.backends import BACKENDS, make
from medhead.compile.graph_cache import columns_for
from medhead.config import SamplingParams
from medhead.core.acceptance import verify_greedy
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise
from medhead.core.sampling import SamplingBatch
from medhead.core.step import decode_step
from medhead.core.tree import TokenTree
from medhead.heads import HeadsConfig, build_heads
from medhead.model.target import Target
from medhead.proposers.base import DecodeState, PlainProposer, Proposer
from medhead.proposers.heads import HeadsProposer

DEPTH = 8  # of the heads
FORWARD_ONLY = "forward only"
Steps = Iterator[tuple[str, Callable[[], object]]]


class FixedTree(Proposer):
    """Proposes the same binary tree of arbitrary tokens at every step."""

    capturable = True

    def __init__(self, target: Target, nodes: int) -> None:
        index = torch.arange(nodes, device=target.device)
        tree = TokenTree.from_parents(index, ((index - 1) // 2).clamp(min=0))
        self.tokens, self.parents, self.depth = tree.tokens[:, 1:], tree.parents, tree.depth
        self.tree_size, self.max_depth = nodes, tree.max_depth

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return the tree with the given roots."""
        rows = len(state.roots)
        tokens = torch.cat([state.roots[:, None], self.tokens.expand(rows, -1)], 1)
        return TokenTree(tokens, self.parents.expand(rows, -1), self.depth.expand(rows, -1), self.max_depth)


def proposers_of(target: Target, nodes: list[int]) -> dict[str, Proposer]:
    """Return plain decoding and a fixed tree of each size, by name."""
    return {"plain": PlainProposer(), **{f"{count} nodes": FixedTree(target, count) for count in nodes}}


def eager_steps(target: Target, ids: Tensor, nodes: list[int]) -> Steps:
    """Yield the name of every eager step over prompts `[batch, context]` and a function that runs it."""
    batch, context = ids.shape
    generator = GumbelNoise(target.vocab_size, target.device)
    with torch.inference_mode(), target.active():
        buffers = loop_buffers(target, batch, context + max(nodes) + 1, PlainProposer())
        target.prefill(buffers.cache, ids.tolist())
        for name, proposer in proposers_of(target, nodes).items():

            def run(proposer: Proposer = proposer) -> None:
                accept = lambda tree, logits, noise: verify_greedy(tree, logits)  # noqa: E731
                decode_step(target, proposer, buffers, generator, accept, proposer.steps - 1, [])
                buffers.lengths.set([context] * batch)

            yield name, run


def captured_steps(target: Target, batch: int, context: int, nodes: list[int], backend: str, kinds: list[str]) -> Steps:
    """Yield the name of every captured step and a function that runs it; `kinds` are those of the heads."""
    with target.active():
        for name, proposer in proposers_of(target, nodes).items():
            if proposer.tree_size > 1:
                yield f"{name}, {backend}, {FORWARD_ONLY}", _capture(target, proposer, batch, context, backend, True)
            yield f"{name}, {backend}", _capture(target, proposer, batch, context, backend)
    for kind in kinds:
        heads = build_heads(config_of(target, kind))
        for count in nodes:
            with_heads = HeadsProposer(target, heads, tree_size=count, dtype=target.dtype)
            with target.active(with_heads.feature_layers):
                run = _capture(target, with_heads, batch, context, backend)
                yield f"{count} nodes with {kind} heads, {backend}", run


def config_of(target: Target, kind: str) -> HeadsConfig:
    """Return the configuration that `medhead finetune` uses by default for this target."""
    size = target.hidden_size
    layers = {target.layers // 4, target.layers // 2, target.layers - 1} if kind in ("block", "attention") else ()
    heads = max(1, size // 128)
    return HeadsConfig(
        kind=kind, depth=DEPTH, hidden_size=size, vocab_size=target.vocab_size, num_target_layers=target.layers,
        inner_size=2 * size, correction_size=3 * size // 2, correction="recurrent" if kind == "block" else "none",
        num_layers=2, feature_layers=sorted(layers), num_heads=heads, num_kv_heads=max(1, heads // 4),
        head_dim=min(size, 128),
    )  # fmt: skip


def loop_buffers(target: Target, batch: int, capacity: int, proposer: Proposer) -> StepBuffers:
    """Return buffers of the decode loop for greedy sequences."""
    cache, device = target.new_cache(batch, capacity), target.device
    features = torch.zeros(batch, target.feature_size, dtype=target.dtype, device=device)
    sampling = SamplingBatch.of([SamplingParams()] * batch, range(batch), LogitsProcessorList(), device)
    roots = torch.zeros(batch, dtype=torch.long, device=device)
    return StepBuffers(cache, proposer.new_draft_cache(cache.lengths, capacity), roots, features, sampling)


def _capture(
    target: Target, proposer: Proposer, batch: int, context: int, backend: str, forward_only: bool = False
) -> Callable[[], object]:
    """Return a captured step at this context, or only its forward pass."""

    def forward(buffers: StepBuffers) -> None:
        state = DecodeState(target, [], buffers.roots, buffers.features, fixed=True)
        tree = proposer.propose(state, proposer.max_depth)
        logits, _ = target.verify(buffers.cache, tree)
        assert buffers.output is not None
        buffers.output[:, 0].copy_(logits[:, 0, 0].long())  # an unused result would be optimised away

    with torch.inference_mode(False), torch.no_grad():
        proposer.begin(target, [[0] * context] * batch)
        columns = columns_for(context + proposer.tree_size + proposer.steps)
        buffers = StepBuffers.allocate(loop_buffers(target, batch, 1, proposer), batch, columns, proposer.steps)
        if forward_only:
            forward(buffers)  # tables and kernels are made outside the capture
            run = BACKENDS[backend](forward, buffers, target.device)
        else:
            run = make(backend, target, proposer, buffers, GumbelNoise(target.vocab_size, target.device))
        buffers.lengths.device.fill_(context)

    def once() -> None:
        with torch.inference_mode(False), torch.no_grad():
            run()

    return once
