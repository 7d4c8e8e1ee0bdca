"""How often heads guess right on held-out text: `measure`.

The text's own tokens are the truth: at every anchor and depth the rank of the true token among the heads' guesses is
noted, given the true path above it. What follows from these ranks is in `rank_paths`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads import Heads
from medhead.heads.output_head import OutputHead
from medhead.model.target import Target
from medhead_training.objective.losses import positions_per_chunk
from medhead_training.objective.unroll import Level, PackedBatch, choose_anchors, unroll
from medhead_training.tree_eval import MISSED, UNREACHED, Measured, summarise

__all__ = ["Measured", "measure"]

PASS_TOKENS = 4096  # of one pass of the target
ATTENDED = 2**26  # scores of attention that heads compute at once


@torch.no_grad()
def measure(
    heads: Heads,
    target: Target,
    batches: Iterable[PackedBatch],
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
        output_head = OutputHead(heads, target, next((p.dtype for p in heads.parameters()), target.dtype))
        columns = _columns(output_head, target)
        with target.active(heads.config.feature_layers):
            for texts in _passes(batches, target):
                of_text, last = _ranks_along(output_head, columns, target, texts, ranks)
                found.append(of_text)
                ends.append(last)
                on_anchors(len(of_text))
                if sum(map(len, found)) >= most_anchors:
                    break
    finally:
        heads.train(training)
    if not sum(map(len, found)):
        raise MedheadError("the held-out texts hold no token to guess: every document needs at least 3 tokens")
    return summarise(torch.cat(found)[:most_anchors], torch.cat(ends)[:most_anchors], ranks)


def _passes(batches: Iterable[PackedBatch], target: Target) -> Iterator[PackedBatch]:
    """PackedBatch of one document a row, of similar lengths, on the target's device, as many as one pass of the target takes."""
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
            texts = PackedBatch(
                torch.zeros(len(group), longest, dtype=torch.long),
                torch.zeros(len(group), longest, dtype=torch.bool),
                torch.full((len(group), longest), -1),
            )
            for row, (ids, mask) in enumerate(group):
                texts.ids[row, : len(ids)], texts.mask[row, : len(ids)] = ids, mask
                texts.document[row, : len(ids)] = 0
            if bool(texts.guessable(2).any()):
                yield PackedBatch(*(part.to(target.device) for part in (texts.ids, texts.mask, texts.document)))


def _columns(output_head: OutputHead, target: Target) -> Tensor | None:
    """`[vocab]`: where in the heads' logits a token is, -1 for one that they do not name; None if they name all."""
    if output_head.tokens is None:
        return None
    columns = torch.full((target.vocab_size,), -1, device=target.device)
    columns[output_head.tokens] = torch.arange(len(output_head.tokens), device=target.device)
    return columns


def _ranks_along(
    output_head: OutputHead, columns: Tensor | None, target: Target, texts: PackedBatch, ranks: int
) -> tuple[Tensor, Tensor]:
    """Ranks `[anchors, depth]` int16 on the host, in the texts' order, and whether an anchor is the last of its stretch."""
    heads, (rows, length) = output_head.heads, texts.ids.shape
    positions = torch.arange(length, device=texts.ids.device).expand(rows, -1)
    _, features = target.read_hidden(target.model, texts.ids, positions)
    features = features.to(output_head.dtype)
    anchors, real = choose_anchors(texts, 1.0)
    width = anchors.shape[1]
    if heads.cache_entry_size:  # every anchor looks at the whole text
        width = max(1, ATTENDED // (rows * length * heads.config.num_heads * heads.config.depth))
    found = torch.full((rows, length, heads.config.depth), UNREACHED, dtype=torch.int16, device=target.device)
    for begin in range(0, anchors.shape[1], width):
        part = slice(begin, begin + width)
        levels = unroll(
            heads, texts, features, lambda ids: target.embed(ids).to(output_head.dtype), anchors[:, part], real[:, part]
        )
        for depth, level in enumerate(levels):
            truth = texts.ids[level.rows, level.at + 1]
            found[level.rows, level.at - 1 - depth, depth] = _ranks_of(output_head, columns, level, depth, truth, ranks)
    possible = texts.guessable(2)
    last = possible.clone()
    last[:, :-1] &= ~possible[:, 1:]
    return found[possible].cpu(), last[possible].cpu()


def _ranks_of(
    output_head: OutputHead, columns: Tensor | None, level: Level, depth: int, truth: Tensor, ranks: int
) -> Tensor:
    """`[n]` int16: how many guesses come before the true token `[n]`; of equally likely ones the first does."""
    result = torch.full_like(truth, MISSED, dtype=torch.int16)
    column = truth if columns is None else columns[truth]
    for chosen in (column >= 0).nonzero()[:, 0].split(positions_per_chunk(len(output_head.weight))):
        logits = output_head.logits(level.features[chosen], depth)
        own = column[chosen, None]
        of_truth = logits.gather(1, own)
        earlier = torch.arange(logits.shape[1], device=logits.device) < own
        rank = ((logits > of_truth) | ((logits == of_truth) & earlier)).sum(1)
        result[chosen] = torch.where(rank < ranks, rank, MISSED).to(torch.int16)
    return result
