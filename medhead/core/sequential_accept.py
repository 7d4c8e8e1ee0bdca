"""Acceptance one node after the other, for processors that look at the text so far.

Every processor of a row sees the calls of plain decoding: one for each emitted token, in order, with that token's own
prefix. So grammars and prefix-dependent processors (penalties, n-gram bans) stay exact. Processors that look at the whole
batch go through `lockstep`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medhead.core.acceptance import Accepted
from medhead.core.constraint import keep_banned
from medhead.core.sampling import draw
from medhead.core.sequence import Sequence
from medhead.core.tree import TokenTree


def sequential_accept(
    sequences: list[Sequence], tree: TokenTree, logits: Tensor, noise: Tensor | None
) -> tuple[Accepted, list[list[Tensor]]]:
    """Accept node by node; also return the processed scores `[vocab]` of every sequence's emitted tokens.

    A sequence's path ends at an end token or at the token limit.

    Args:
        sequences: the running sequences.
        tree: the verified tree.
        logits: `[batch, nodes, vocab]`, masked by the grammars of sequences that have one.
        noise: `[batch, depths, vocab]` or None.
    """
    paths, tokens, scores = [], [], []
    all_parents, all_tokens = tree.parents.tolist(), tree.tokens.tolist()
    for row, sequence in enumerate(sequences):
        path: list[int] = [0]
        emitted: list[int] = []
        of_tokens: list[Tensor] = []
        node: int | None = 0
        processors = sequence.all_processors
        while node is not None:
            ids = torch.tensor([sequence.prompt_ids + sequence.output_ids + emitted], device=logits.device)
            processed = processors(ids, logits[row, node][None].to(torch.float32, copy=True))
            if sequence.constraint is not None:
                processed = keep_banned(processed, logits[row, node][None])
            token = int(draw(processed, None if noise is None else noise[row, len(emitted)][None]))
            emitted.append(token)
            of_tokens.append(processed[0])
            if sequence.stop_checker.ends_at(token, len(sequence.output_ids) + len(emitted)):
                break
            node = child_with(all_parents[row], all_tokens[row], node, token)
            if node is not None:
                path.append(node)
        paths.append(path)
        tokens.append(emitted)
        scores.append(of_tokens)
    steps = max(map(len, paths))
    counts = torch.tensor([len(path) for path in paths], device=logits.device)
    padded_paths = torch.tensor([path + [0] * (steps - len(path)) for path in paths], device=logits.device)
    padded_tokens = torch.tensor([some + [0] * (steps - len(some)) for some in tokens], device=logits.device)
    last = padded_paths.gather(1, counts[:, None] - 1)[:, 0]
    return Accepted(padded_paths, counts, padded_tokens, last), scores


def child_with(parents: list[int], tokens: list[int], node: int, token: int) -> int | None:
    """Return the first child of a node that is this token, None without one."""
    for index in range(node + 1, len(tokens)):
        if parents[index] == node and tokens[index] == token:
            return index
    return None
