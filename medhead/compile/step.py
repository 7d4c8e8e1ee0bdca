"""The step itself: propose, verify, accept, commit as one function over `Buffers`, by tensor operations of fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from medhead.compile.buffers import Buffers
from medhead.core.acceptance import accept_at, pick
from medhead.core.gumbel import GumbelNoise, LazyGumbel
from medhead.core.sampling import draw_nodes, process_nodes, temperature_of
from medhead.model.target import Target
from medhead.proposers.base import DecodeState, Proposer


class FixedStep:
    """One step of `medhead.core.loop.DecodeLoop` that reads and writes buffers only.

    Args:
        target: the target, active.
        proposer: one that is `capturable`.
        processors: local logits processors.
        samples: whether noise is added.
    """

    def __init__(self, target: Target, proposer: Proposer, processors: LogitsProcessorList, samples: bool) -> None:
        self.target, self.proposer, self.processors = target, proposer, processors
        self.temperature = temperature_of(processors)
        self.noise = GumbelNoise(0, target.vocab_size, target.device) if samples else None

    def __call__(self, buffers: Buffers) -> None:
        """Decode one step further; a row that is not alive stays as it is."""
        target, proposer, lengths = self.target, self.proposer, buffers.lengths
        cache = buffers.cache(target)
        noise = self._noise(buffers)
        coming = None if noise is None else LazyGumbel.of(noise)
        state = DecodeState(target, [], buffers.roots, buffers.features, coming, self.temperature)
        tree = proposer.propose_at(state, buffers.memory, lengths)
        logits, features = target.verify_at(cache, tree, lengths)
        scores = process_nodes(self.processors, logits) if self.processors else logits
        accepted = accept_at(tree, draw_nodes(tree, scores, noise))
        counts = accepted.counts * buffers.alive
        if tree.nodes > 1:
            cache.commit_at(lengths, accepted.path, counts)
        if buffers.memory is not None:
            path = accepted.path[..., None].expand(-1, -1, features.shape[-1])
            proposer.observe_at(buffers.memory, lengths, features.gather(1, path), accepted.emitted)
        buffers.out.copy_(torch.cat([counts[:, None], accepted.emitted], 1))
        buffers.roots.copy_(accepted.emitted.gather(1, accepted.counts[:, None] - 1)[:, 0])
        buffers.features.copy_(pick(features, accepted.last))
        buffers.lengths.add_(counts)

    def _noise(self, buffers: Buffers) -> Tensor | None:
        """`[batch, steps, vocab]` of the positions behind the roots."""
        if self.noise is None:
            return None
        positions = buffers.lengths[:, None] + 1 + torch.arange(self.proposer.steps, device=self.target.device)
        return self.noise.seeded_by(buffers.seed).gumbel(buffers.index[:, None], positions)
