"""Measure how often draft heads are right on held-out text.

For every anchor and depth the rank of the true token among the heads' draft tokens is counted, given the true tokens above
it. `tree_eval` derives accuracies and static trees from these ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads import Heads
from medhead.heads.output_head import OutputHead
from medhead.model.target import Target
from medhead_training.objective.chunked import positions_per_chunk
from medhead_training.objective.module import eval_mode
from medhead_training.objective.tree_eval import MISSED, UNREACHED, HeadAccuracy, summarize_ranks
from medhead_training.objective.unroll import DraftLevel, PackedBatch, sample_anchors, unroll

MAX_BATCH_TOKENS = 4096  # of one pass of the target
MAX_ATTENTION_SCORES = 2**26  # that heads compute at once


@torch.no_grad()
def measure_accuracy(
    heads: Heads,
    target: Target,
    batches: Iterable[PackedBatch],
    ranks: int = 10,
    max_anchors: int = 50_000,
    on_anchors: Callable[[int], None] = lambda count: None,
) -> HeadAccuracy:
    """Run heads along held-out text, heads and target each in their own dtype.

    Args:
        heads: the heads, on the target's device; their training mode is restored.
        target: their target.
        batches: held-out text; documents packed into one row are separated.
        ranks: ranks to distinguish; a larger rank counts as a miss.
        max_anchors: the measurement stops after this many.
        on_anchors: called with the number of new anchors after every pass.

    Raises:
        MedheadError: `ranks` or `max_anchors` is below 1, or the text holds no token to predict.
    """
    if ranks < 1 or max_anchors < 1:
        raise MedheadError(f"ranks and max_anchors must be at least 1, got {ranks} and {max_anchors}")
    all_ranks: list[Tensor] = []
    all_last: list[Tensor] = []
    with eval_mode(heads), target.active(heads.config.feature_layers):
        output_head = OutputHead(heads, target, next((p.dtype for p in heads.parameters()), target.dtype))
        columns = _columns(output_head, target)
        for batch in _unpack(batches, target):
            of_batch, last = _ranks_along(output_head, columns, target, batch, ranks)
            all_ranks.append(of_batch)
            all_last.append(last)
            on_anchors(len(of_batch))
            if sum(map(len, all_ranks)) >= max_anchors:
                break
    if not sum(map(len, all_ranks)):
        raise MedheadError("the held-out text holds no token to predict: every document needs at least 3 tokens")
    return summarize_ranks(torch.cat(all_ranks)[:max_anchors], torch.cat(all_last)[:max_anchors], ranks)


def pad_documents(documents: list[tuple[Tensor, Tensor]], device: torch.device) -> PackedBatch:
    """Return a batch with one document per row from pairs of token ids and masks, padded at the end."""
    shape = len(documents), max(len(ids) for ids, _ in documents)
    batch = PackedBatch(
        torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    )
    for row, (ids, mask) in enumerate(documents):
        batch.ids[row, : len(ids)], batch.mask[row, : len(ids)] = ids, mask
        batch.document[row, : len(ids)] = 0
    return PackedBatch(batch.ids.to(device), batch.mask.to(device), batch.document.to(device))


def _unpack(batches: Iterable[PackedBatch], target: Target) -> Iterator[PackedBatch]:
    """Yield batches of one document per row, of similar lengths, on the target's device."""
    for batch in batches:
        documents = []
        for ids, mask, document in zip(batch.ids, batch.mask, batch.document, strict=True):
            for number in document[document >= 0].unique().tolist():
                here = document == number
                documents.append((ids[here], mask[here]))
        documents.sort(key=lambda pair: -len(pair[0]))  # stable
        while documents:
            rows = max(1, MAX_BATCH_TOKENS // len(documents[0][0]))
            group, documents = documents[:rows], documents[rows:]
            padded = pad_documents(group, target.device)
            if bool(padded.predictable(2).any()):
                yield padded


def _columns(output_head: OutputHead, target: Target) -> Tensor | None:
    """Return each token's column in the heads' logits `[vocab]`, -1 outside the draft vocabulary; None for all tokens."""
    if output_head.tokens is None:
        return None
    columns = torch.full((target.vocab_size,), -1, device=target.device)
    columns[output_head.tokens] = torch.arange(len(output_head.tokens), device=target.device)
    return columns


def _ranks_along(
    output_head: OutputHead, columns: Tensor | None, target: Target, batch: PackedBatch, ranks: int
) -> tuple[Tensor, Tensor]:
    """Return ranks `[anchors, depth]` int16 in text order, and whether an anchor is the last of its answer `[anchors]`."""
    heads, (rows, length) = output_head.heads, batch.ids.shape
    positions = torch.arange(length, device=batch.ids.device).expand(rows, -1)
    _, features = target.read_hidden(target.model, batch.ids, positions)
    features = features.to(output_head.dtype)
    anchors, valid = sample_anchors(batch, 1.0)
    width = anchors.shape[1]
    if heads.memory_size:  # every anchor attends to the whole text
        width = max(1, MAX_ATTENTION_SCORES // (rows * length * heads.config.num_heads * heads.config.depth))
    found = torch.full((rows, length, heads.config.depth), UNREACHED, dtype=torch.int16, device=target.device)
    for begin in range(0, anchors.shape[1], width):
        part = slice(begin, begin + width)
        levels = unroll(
            heads,
            batch,
            features,
            lambda ids: target.embed(ids).to(output_head.dtype),
            anchors[:, part],
            valid[:, part],
        )
        for depth, level in enumerate(levels):
            labels = batch.ids[level.rows, level.at + 1]
            found[level.rows, level.at - 1 - depth, depth] = _ranks_of(
                output_head, columns, level, depth, labels, ranks
            )
    possible = batch.predictable(2)
    last = possible.clone()
    last[:, :-1] &= ~possible[:, 1:]
    return found[possible].cpu(), last[possible].cpu()


def _ranks_of(
    output_head: OutputHead, columns: Tensor | None, level: DraftLevel, depth: int, labels: Tensor, ranks: int
) -> Tensor:
    """Return how many draft tokens rank above each label, int16 `[n]`; among equal logits the smaller column is first."""
    result = torch.full_like(labels, MISSED, dtype=torch.int16)
    column = labels if columns is None else columns[labels]
    for chosen in (column >= 0).nonzero()[:, 0].split(positions_per_chunk(len(output_head.weight))):
        logits = output_head.logits(level.features[chosen], depth)
        own = column[chosen, None]
        of_label = logits.gather(1, own)
        earlier = torch.arange(logits.shape[1], device=logits.device) < own
        rank = ((logits > of_label) | ((logits == of_label) & earlier)).sum(1)
        result[chosen] = torch.where(rank < ranks, rank, MISSED).to(torch.int16)
    return result
