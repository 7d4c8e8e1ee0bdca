"""Candidates of one row, chosen from by loops compiled for this CPU (see `loops`): corrected, merged, and the best of them.

Candidates stand level by level, so that a parent comes before its children. The tensor operations that say the same for many
rows and on a GPU are in `medhead.proposers.candidates`.
"""

from __future__ import annotations

import numpy as np

from medhead_kernels.loops import likeliest, loop


@loop
def corrected(scores, parent_index, ends, totals, most, out):
    """Scores `[n]` moved by the total of their level, none above `most` or above its parent's.

    Args:
        scores: `[n]`.
        above: `[n]` int64, places of parents, -1 below the root.
        ends: `[levels]` int64, where every level ends.
        totals: `[levels]` float32.
        most: the largest score.
        out: `[n]`.
    """
    place = 0
    for level in range(ends.shape[0]):
        while place < ends[level]:
            score = min(scores[place] + totals[level], most)
            if parent_index[place] >= 0:
                score = min(score, out[parent_index[place]])
            out[place] = score
            place += 1


@loop
def merged(tokens, parent_index, scores, begins, starts, ends, out_tokens, out_above, out_scores, out_levels):
    """Candidates of several members as one set in which every path stands once, with the best of its scores.

    Args:
        tokens: `[n]` int64 of all members, one after the other.
        above: `[n]` int64, places of parents among the member's own, -1 below the root.
        scores: `[n]`.
        begins: `[members]` int64, where every member begins.
        starts: `[levels, members]` int64, where each level of each member begins in `tokens`.
        ends: `[levels, members]`, and where it ends.
        out_tokens: `[n]`, as all that follow.
        out_above: places of parents among what comes out.
        out_scores: the best scores.
        out_levels: `[levels]`, how many each level has.

    Returns:
        How many there are.
    """
    places = np.empty(tokens.shape[0], np.int64)  # of every given candidate among what comes out
    count = 0
    for level in range(starts.shape[0]):
        begin = count
        for member in range(starts.shape[1]):
            for given in range(starts[level, member], ends[level, member]):
                parent = -1 if parent_index[given] < 0 else places[begins[member] + parent_index[given]]
                place = begin
                while place < count and not (out_above[place] == parent and out_tokens[place] == tokens[given]):
                    place += 1
                if place == count:
                    out_tokens[place], out_above[place], out_scores[place] = tokens[given], parent, scores[given]
                    count += 1
                else:
                    out_scores[place] = max(out_scores[place], scores[given])
                places[given] = place
        out_levels[level] = count - begin
    return count


@loop
def best(tokens, parent_index, scores, levels, root, most, tree):
    """The tree of the `most` likeliest candidates; a child counts no more than its parent.

    Of equal ones those that come first are taken, so no parent of a node is ever left out.

    Args:
        tokens: `[n]` int64.
        above: `[n]` int64.
        scores: `[n]`.
        levels: `[levels]` int64, how many each level has.
        root: token of the root.
        most: how many candidates.
        tree: `[3, at least most + 1]` int64, out: tokens, parents and depths of the nodes.

    Returns:
        How many nodes the tree has; candidates with a score of -inf are none.
    """
    make_monotone = np.empty_like(
        scores
    )  # rounding may have put a child above its parent, which would then be left out
    for place in range(scores.shape[0]):
        make_monotone[place] = (
            scores[place] if parent_index[place] < 0 else min(scores[place], make_monotone[parent_index[place]])
        )
    most = min(most, scores.shape[0])
    values, places = np.empty(most, np.float32), np.empty(most, np.int64)
    likeliest(make_monotone, most, values, places)
    nodes = np.zeros(scores.shape[0], np.int64)  # of every candidate; 0 for those that are left out
    for rank in range(most):
        if values[rank] > -np.inf:
            nodes[places[rank]] = 1
    tree[0, 0], tree[1, 0], tree[2, 0] = root, 0, 0
    count, place = 1, 0
    for level in range(levels.shape[0]):
        for _ in range(levels[level]):
            if nodes[place]:
                nodes[place] = count
                tree[0, count], tree[2, count] = tokens[place], level + 1
                tree[1, count] = 0 if parent_index[place] < 0 else nodes[parent_index[place]]
                count += 1
            place += 1
    return count
