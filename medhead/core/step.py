"""The decode step: propose, verify, accept, commit. The decode loop and captured steps run this one function."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from medhead.core.acceptance import Accepted, gather_last, gather_path
from medhead.core.buffers import StepBuffers
from medhead.core.constraint import BatchConstraints
from medhead.core.gumbel import GumbelNoise, LazyGumbel
from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput
from medhead.proposers.host_drafts import unpack_drafts

Accept = Callable[[TokenTree, Tensor, LazyGumbel | None], Accepted]


def decode_step(
    target: Target,
    proposer: Proposer,
    buffers: StepBuffers,
    generator: GumbelNoise,
    accept: Accept,
    max_depth: int,
    texts: list[list[int]],
    mark: Callable[[str], None] = lambda part: None,
    constraints: BatchConstraints | None = None,
    read: tuple[Tensor, Tensor] | None = None,
) -> VerifyOutput:
    """Decode every sequence of the batch by one verify pass; what it emitted is in the result and in `buffers.output`.

    With fixed buffers all shapes depend on those of the buffers alone and the host reads nothing, so the step can be traced,
    compiled, or captured as a CUDA graph. Otherwise trees may end early and the host reads what was emitted, once.

    Args:
        target: the target, active.
        proposer: fills the trees.
        buffers: the state of the batch; changed in place.
        generator: of the sampling noise.
        accept: returns the accepted path from the tree, the target's logits `[batch, nodes, vocab]` and the noise.
        max_depth: no tree is deeper.
        texts: prompt and output of every sequence; empty for fixed buffers.
        mark: called with the name of each part as it ends, for profiles.
        constraints: grammars of the sequences, to which the trees are fitted; None for none.
        read: logits `[batch, vocab]` and features `[batch, size]` of the roots, where these are the last tokens of prompts and
            read with them: `max_depth` is then 0, and there is no pass.
    """
    cache, lengths, fixed = buffers.cache, buffers.lengths, buffers.fixed
    reach = max_depth if constraints is None else max(max_depth, constraints.max_depth)
    noise = buffers.sampling.noise(generator, lengths.device, reach + 1, fixed)
    temperature = buffers.sampling.temperature
    state = DecodeState(
        target, texts, buffers.roots, buffers.features, noise, temperature, buffers.draft_cache, lengths.device, fixed
    )
    if buffers.drafts is not None:
        state.drafts = unpack_drafts(buffers.drafts, max_depth)
    tree = proposer.propose(state, max_depth)
    if target.shards is not None:
        tree = target.shards.tree(tree)
    drafted: list[int] = []
    if constraints is not None:
        tree, drafted = constraints.fit(tree)
    mark("propose")
    began, prepared = time.perf_counter(), target.prepared
    logits, features = (part[:, None] for part in read) if read else target.verify(cache, tree)
    mark("forward")
    accepted = accept(tree, logits, noise)
    result = VerifyOutput(tree, logits, features, accepted, drafted=drafted)
    counts = accepted.counts if buffers.alive is None else accepted.counts * buffers.alive
    if not fixed:
        result.counts, result.emitted = accepted.counts.tolist(), accepted.emitted.tolist()
        # the time to load or to compile a pass says nothing about the next one
        result.seconds = 0.0 if read or target.prepared != prepared else time.perf_counter() - began
    mark("accept")
    if not read:
        cache.commit(accepted.path, counts)
    if buffers.draft_cache is not None:
        path_features = features if tree.nodes == 1 else gather_path(features, accepted.path)
        proposer.update_draft_cache(buffers.draft_cache, path_features, accepted.emitted, counts)
    roots = accepted.emitted.gather(1, accepted.counts[:, None] - 1)[:, 0]
    if fixed:
        buffers.roots.copy_(roots)
    else:
        buffers.roots = roots  # the old ones may be part of the tree, which the proposer has yet to learn from
    buffers.features.copy_(gather_last(features, accepted.last))
    lengths.advance(counts, result.counts)
    if buffers.output is not None:
        buffers.output[:, 0] = counts
        buffers.output[:, 1 : 1 + accepted.emitted.shape[1]] = accepted.emitted
    mark("commit")
    return result
