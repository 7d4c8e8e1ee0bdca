"""Draft tokens that the host makes for a captured step: up to 16 of every row, in levels whose sizes never change.

They travel as one integer tensor `[rows, 3, DRAFTS]`: token ids, places of the parents, and log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from medhead.proposers.candidates import Candidates
from medhead.proposers.trie import DraftTrie

LEVELS = (3, 2, *[1] * 11)  # of a text that repeats one path is long; alternatives matter near the root
DRAFTS = sum(LEVELS)
DEPTH = len(LEVELS)
_ENDS = list(accumulate(LEVELS))
_SCALE = 1 << 16  # integer / log-probability
_PADDING = -(1 << 40)  # of a place without a draft token


def pack_tries(tries: Sequence[DraftTrie]) -> Tensor:
    """Return the most probable nodes of every trie that have a place, `[rows, 3, DRAFTS]` int64 on the host."""
    rows = []
    for trie in tries:
        tokens, parents, scores = [0] * DRAFTS, [-1] * DRAFTS, [_PADDING] * DRAFTS
        places, free = {0: -1}, [end - size for end, size in zip(_ENDS, LEVELS, strict=True)]
        order = sorted(range(1, len(trie)), key=lambda node: (-trie.probs[node], trie.depths[node], node))
        for node in order:
            level, parent = trie.depths[node] - 1, trie.parents[node]
            if parent not in places or level >= DEPTH or free[level] == _ENDS[level]:
                continue
            place = places[node] = free[level]
            free[level] += 1
            tokens[place], parents[place] = trie.tokens[node], places[parent]
            scores[place] = round(math.log(trie.probs[node]) * _SCALE)
        rows.append([tokens, parents, scores])
    return torch.tensor(rows)


def no_drafts(rows: int, device: torch.device) -> Tensor:
    """Return a buffer without draft tokens."""
    return pack_tries([DraftTrie(0)] * rows).to(device)


def unpack_drafts(packed: Tensor, max_depth: int) -> Candidates:
    """Return what `pack_tries` returned as candidates down to a depth, by tensor operations on its device."""
    levels = LEVELS[:max_depth]
    tokens, parents, scores = packed[..., : sum(levels)].unbind(1)
    return Candidates(tokens, parents, (scores / _SCALE).masked_fill(scores == _PADDING, -torch.inf), levels)
