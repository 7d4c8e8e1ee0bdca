"""The state of a batch between two steps: all that a step reads and writes, as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medhead.core.lengths import Lengths
from medhead.core.sampling import SamplingBatch
from medhead.heads.draft_cache import TensorDraftCache
from medhead.model.kv_cache import KVBuffers, TreeCache


@dataclass(eq=False)
class StepBuffers:
    """The state of a batch between two steps.

    The decode loop's buffers grow and shrink with the batch. Those of a captured step are fixed: every tensor stays where it
    is and keeps its shape, and the host knows no lengths.
    """

    cache: TreeCache  # the target's keys and values of the committed tokens
    draft_cache: Any  # what the proposer keeps of them, see `Proposer.new_draft_cache`; None for nothing
    roots: Tensor  # `[batch]` int64, the newest token of every sequence
    features: Tensor  # `[batch, size]` of the target at the token before the root
    sampling: SamplingBatch  # sampling parameters of every sequence
    alive: Tensor | None = None  # `[batch]` int64, 1 for a sequence that runs; None if all do
    # `[batch, 1 + steps]` int64, what the last captured step emitted: how many tokens, then the tokens
    output: Tensor | None = None
    drafts: Tensor | None = None  # `[batch, 3, n]` int64, draft tokens that the host made, see `host_drafts`

    @property
    def lengths(self) -> Lengths:
        """Committed tokens of every sequence."""
        return self.cache.lengths

    @property
    def fixed(self) -> bool:
        """Whether shapes must not change and the host must not read: a captured step."""
        return self.alive is not None

    def keep_rows(self, rows: list[int], sampling: SamplingBatch) -> None:
        """Keep only these rows, in this order."""
        self.roots, self.features, self.sampling = self.roots[rows], self.features[rows], sampling
        self.cache.keep_rows(rows)
        if self.draft_cache is not None:
            self.draft_cache.keep_rows(rows)
        self.lengths.keep_rows(rows)

    def join(self, other: StepBuffers, sampling: SamplingBatch) -> None:
        """Append the rows of other buffers, which are used up."""
        self.roots = torch.cat([self.roots, other.roots])
        self.features = torch.cat([self.features, other.features.to(self.features.dtype)])
        self.sampling = sampling
        if self.draft_cache is not None:
            self.draft_cache.join(other.draft_cache)
        self.cache.join(other.cache)
        self.lengths.join(other.lengths)

    # ---------------------------------------------------------------- captured steps

    @classmethod
    def allocate(
        cls, like: StepBuffers, rows: int, columns: int, steps: int, drafts: Tensor | None = None
    ) -> StepBuffers:
        """Return fixed buffers for `rows` sequences of up to `columns` tokens and nodes.

        Args:
            like: buffers of the decode loop; their types and sizes are taken over.
            rows: sequences.
            columns: tokens and nodes of a sequence.
            steps: most tokens that a step emits.
            drafts: buffer for draft tokens that the host makes; None for none.
        """
        device = like.roots.device
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        lengths = Lengths(zeros, None)
        empty = TreeCache(like.cache.layout, rows, columns)
        cache = TreeCache.from_buffers(empty.layout, empty.buffers, lengths)
        draft_cache = None
        if like.draft_cache is not None:
            entries = like.draft_cache.cache.rows
            draft_cache = like.draft_cache.over(
                TensorDraftCache.from_buffer(entries.new_zeros(rows, cache.capacity, entries.shape[2]), lengths)
            )
        return cls(
            cache,
            draft_cache,
            torch.zeros_like(zeros),
            like.features.new_zeros(rows, like.features.shape[1]),
            like.sampling.fixed(rows),
            torch.zeros_like(zeros),
            torch.zeros(rows, 1 + steps, dtype=torch.long, device=device),
            drafts,
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors in a fixed order, as `over` takes them, every layer's keys and values apart."""
        assert self.alive is not None
        assert self.output is not None
        drafts = [] if self.draft_cache is None else [self.draft_cache.cache.rows]
        rest = [self.lengths.device, self.roots, self.features, self.sampling.numbers, self.sampling.scales]
        made = [] if self.drafts is None else [self.drafts]
        return [*self.cache.per_layer, *drafts, *rest, self.alive, self.output, *made]

    def over(self, tensors: list[Tensor]) -> StepBuffers:
        """Return buffers of the same form over other tensors."""
        left = iter(tensors)
        buffers: KVBuffers = {
            spec: [next(left) for _ in range(len(buffer))] for spec, buffer in self.cache.buffers.items()
        }
        rows = None if self.draft_cache is None else next(left)
        lengths = Lengths(next(left), None)
        draft_cache = None if rows is None else self.draft_cache.over(TensorDraftCache.from_buffer(rows, lengths))
        roots, features, numbers, scales, alive, output, *made = left
        sampling = self.sampling.over(numbers, scales)
        cache = TreeCache.from_buffers(self.cache.layout, buffers, lengths)
        return StepBuffers(cache, draft_cache, roots, features, sampling, alive, output, *made)

    def load(self, other: StepBuffers) -> None:
        """Take over the sequences of the decode loop's buffers; places beyond their number stay empty."""
        assert self.alive is not None
        count, used = len(other.roots), other.lengths.longest
        for spec, buffer in self.cache.buffers.items():
            buffer[:, :count, :, :used].copy_(other.cache.buffers[spec][:, :, :, :used])
        if self.draft_cache is not None:
            with torch.inference_mode():  # as all that the decode loop's buffers hold
                other.draft_cache.flush()
            self.draft_cache.cache.rows[:count, :used].copy_(other.draft_cache.cache.rows[:, :used])
        self.sampling.load(other.sampling)
        self.lengths.device[:count].copy_(other.lengths.device)
        self.roots[:count].copy_(other.roots)
        self.features[:count].copy_(other.features)
        self.alive[:count].fill_(1)
        self.alive[count:].zero_()
        self.lengths.device[count:].zero_()

    def end(self, place: int) -> None:
        """Mark the sequence at this place as ended: it stays in the batch with length 0."""
        assert self.alive is not None
        self.alive[place].zero_()
        self.lengths.device[place].zero_()

    def unload(self, places: list[int], lengths: list[int], room: int, sampling: SamplingBatch) -> StepBuffers:
        """Return the sequences at these places as buffers of the decode loop.

        Args:
            places: where they are.
            lengths: their committed tokens.
            room: tokens and nodes to leave room for after them.
            sampling: their sampling parameters.
        """
        device = self.roots.device
        picked, used = torch.tensor(places, device=device, dtype=torch.long), max(lengths)
        cache = TreeCache(self.cache.layout, len(places), used + room)
        cache.lengths = Lengths.of(lengths, device)
        for spec, buffer in self.cache.buffers.items():
            cache.buffers[spec][:, :, :, :used].copy_(buffer[:, picked.to(buffer.device), :, :used])
        draft_cache = None
        if self.draft_cache is not None:
            rows = self.draft_cache.cache.rows[picked]
            draft_cache = self.draft_cache.over(TensorDraftCache.from_buffer(rows, cache.lengths))
        return StepBuffers(cache, draft_cache, self.roots[picked], self.features[picked], sampling)
