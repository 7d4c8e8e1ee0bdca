"""The walk from the root one node at a time, for processors that look at the text so far.

Every processor sees exactly the calls of plain decoding: one for each emitted token, in order, with that token's own
prefix. So stateful processors (grammars, counters) and prefix-dependent ones (penalties, n-gram bans) stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medhead.core.acceptance import Accepted
from medhead.core.sampling import draw
from medhead.core.sequence import Sequence, Settings
from medhead.core.tree import TokenTree


def walk(
    rows: list[Sequence], tree: TokenTree, logits: Tensor, noise: Tensor | None, settings: Settings
) -> tuple[Accepted, list[list[Tensor]]]:
    """Accept node by node; also returns the processed scores `[vocab]` of every row's emitted tokens.

    Args:
        rows: the running rows.
        tree: the verified tree.
        logits: `[batch, nodes, vocab]`.
        noise: `[batch, depths, vocab]` or None.
        settings: processors and the stopper (the walk ends with the row, as plain decoding would).
    """
    paths, tokens, kept = [], [], []
    all_parents, all_tokens = tree.parents.tolist(), tree.tokens.tolist()
    for place, row in enumerate(rows):
        processors = row.processors or settings.processors
        path, new, fresh, node = [0], [], [], 0  # type: ignore[var-annotated]
        while True:
            ids = torch.tensor([row.padded + row.output + new], device=logits.device)
            scores = processors(ids, logits[place, node][None].to(torch.float32, copy=True))
            token = int(draw(scores, None if noise is None else noise[place, len(new)][None]))
            new.append(token)
            fresh.append(scores[0])
            if settings.stopper.ends_at(token, len(row.output) + len(new)):
                break
            below = _child(all_parents[place], all_tokens[place], node, token)
            if below is None:
                break
            node = below
            path.append(node)
        paths.append(path)
        tokens.append(new)
        kept.append(fresh)
    steps = max(map(len, paths))
    counts = torch.tensor([len(path) for path in paths], device=logits.device)
    padded_paths = torch.tensor([path + [0] * (steps - len(path)) for path in paths], device=logits.device)
    padded_tokens = torch.tensor([new + [0] * (steps - len(new)) for new in tokens], device=logits.device)
    last = padded_paths.gather(1, counts[:, None] - 1)[:, 0]
    return Accepted(padded_paths, counts, padded_tokens, last), kept


def _child(parents: list[int], tokens: list[int], node: int, token: int) -> int | None:
    """The node's child with this token."""
    for index in range(node + 1, len(tokens)):
        if parents[index] == node and tokens[index] == token:
            return index
    return None
