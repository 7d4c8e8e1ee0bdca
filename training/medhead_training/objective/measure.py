"""Measure how often draft heads are right on held-out text.

For every anchor and depth the rank of the true token among the heads' draft tokens is counted, given the true tokens above
it. `tree_eval` derives accuracies and static trees from these ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medhead.errors import MedheadError
from medhead.heads import Heads
from medhead.heads.output_head import OutputHead
from medhead.model.eval_mode import eval_mode
from medhead.model.target import Target
from medhead_training.objective.chunked import positions_per_chunk
from medhead_training.objective.module import draft_columns
from medhead_training.objective.tree_eval import MISSED, UNREACHED, HeadAccuracy, summarize_ranks
from medhead_training.objective.unroll import DraftLevel, PackedBatch, sample_anchors, unroll

MAX_BATCH_TOKENS = 4096  # of one pass of the target
MAX_ATTENTION_SCORES = 2**26  # that heads compute at once

Document = tuple[Tensor, Tensor]  # token ids and the mask of the tokens to predict, each [length]


@torch.no_grad()
def measure_accuracy(
    heads: Heads,
    target: Target,
    documents: Iterable[Document],
    ranks: int = 10,
    max_anchors: int = 50_000,
    features: list[Tensor] | None = None,
) -> HeadAccuracy:
    """Run heads along held-out documents, heads and target each in their own dtype, until `max_anchors` are measured.

    `ranks` ranks are distinguished; a larger one counts as a miss. The first call with an empty list `features` fills it with
    the target's, later calls with the same list, documents and target read them there.
    """
    if ranks < 1 or max_anchors < 1:
        raise MedheadError(f"ranks and max_anchors must be at least 1, got {ranks} and {max_anchors}")
    found: list[tuple[Tensor, Tensor]] = []
    count = 0
    with eval_mode(heads), target.active(heads.config.feature_layers):
        output_head = OutputHead(heads, target, next((p.dtype for p in heads.parameters()), target.dtype))
        columns = draft_columns(output_head.tokens, target.vocab_size, target.device)
        for number, batch in enumerate(_batches(documents, target.device)):
            if features is None or number == len(features):
                kept = _features_of(target, batch)
                if features is not None:
                    features.append(kept)
            else:
                kept = features[number]
            found.append(_ranks_along(output_head, columns, target, batch, kept, ranks))
            count += len(found[-1][0])
            if count >= max_anchors:
                break
    if not count:
        raise MedheadError("the held-out text holds no token to predict: every document needs at least 3 tokens")
    all_ranks, last = (torch.cat(parts)[:max_anchors] for parts in zip(*found, strict=True))
    return summarize_ranks(all_ranks, last, ranks)


def _batches(documents: Iterable[Document], device: torch.device) -> Iterator[PackedBatch]:
    """Yield batches of one document per row, of similar lengths, padded at the end."""
    source = iter(documents)
    while window := sorted(islice(source, 8), key=lambda document: -len(document[0])):
        while window:
            rows = max(1, MAX_BATCH_TOKENS // len(window[0][0]))
            group, window = window[:rows], window[rows:]
            ids, mask = (pad_sequence(list(parts), batch_first=True).to(device) for parts in zip(*group, strict=True))
            document = pad_sequence([torch.zeros_like(ids) for ids, _ in group], batch_first=True, padding_value=-1)
            batch = PackedBatch(ids, mask, document.to(device))
            if bool(batch.predictable(2).any()):
                yield batch


def _features_of(target: Target, batch: PackedBatch) -> Tensor:
    """Return the target's features `[rows, length, feature_size]`."""
    rows, length = batch.ids.shape
    positions = torch.arange(length, device=batch.ids.device).expand(rows, -1)
    return target.read_hidden(target.model, batch.ids, positions)[1]


def _ranks_along(
    output_head: OutputHead, columns: Tensor, target: Target, batch: PackedBatch, features: Tensor, ranks: int
) -> tuple[Tensor, Tensor]:
    """Return ranks `[anchors, depth]` int16 in text order, and whether an anchor is the last of its answer `[anchors]`."""
    heads, dtype, (rows, length) = output_head.heads, output_head.dtype, batch.ids.shape
    features = features.to(dtype)
    anchors, valid = sample_anchors(batch, 1.0)
    width = anchors.shape[1]
    if heads.cache_entry_size:  # every anchor attends to the whole text
        width = max(1, MAX_ATTENTION_SCORES // (rows * length * heads.config.num_heads * heads.config.depth))
    found = torch.full((rows, length, heads.config.depth), UNREACHED, dtype=torch.int16, device=target.device)
    for some_anchors, some_valid in zip(anchors.split(width, 1), valid.split(width, 1), strict=True):
        levels = unroll(heads, batch, features, lambda ids: target.embed(ids).to(dtype), some_anchors, some_valid)
        for depth, level in enumerate(levels):
            column = columns[batch.ids[level.rows, level.at + 1]]
            found[level.rows, level.at - 1 - depth, depth] = _ranks_of(output_head, level, depth, column, ranks)
    possible = batch.predictable(2)
    last = possible.clone()
    last[:, :-1] &= ~possible[:, 1:]
    return found[possible].cpu(), last[possible].cpu()


def _ranks_of(output_head: OutputHead, level: DraftLevel, depth: int, column: Tensor, ranks: int) -> Tensor:
    """Return how many draft tokens rank above each label, int16 `[n]`; among equal logits the smaller column is first."""
    result = torch.full_like(column, MISSED, dtype=torch.int16)
    for chosen in (column >= 0).nonzero()[:, 0].split(positions_per_chunk(len(output_head.weight))):
        logits = output_head.logits(level.features[chosen], depth)
        own = column[chosen, None]
        of_label = logits.gather(1, own)
        earlier = torch.arange(logits.shape[1], device=logits.device) < own
        rank = ((logits > of_label) | ((logits == of_label) & earlier)).sum(1)
        result[chosen] = torch.where(rank < ranks, rank, MISSED).to(torch.int16)
    return result
