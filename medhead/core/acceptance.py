"""Acceptance: the walk from the root along the tokens that the target draws, for all nodes at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medhead.core.gumbel import LazyGumbel
from medhead.core.sampling import draw, draw_nodes, on_host
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError

_MAX_HOST_NODES = 512  # up to so many nodes a loop on the host is faster than tensor operations


@dataclass(frozen=True)
class TypicalAcceptance:
    """Medusa's lossy rule (Cai et al. 2024): keep a draft token of probability above min(epsilon, delta * exp(-entropy)).

    The text is then no longer the target's own; the rule is off unless asked for.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < 1 and 0 < self.delta < 1):
            raise MedheadError(f"typical acceptance needs 0 < epsilon, delta < 1, got {self.epsilon} and {self.delta}")


@dataclass
class Accepted:
    """The accepted path of every row."""

    path: Tensor  # `[batch, steps]` node at every depth of the path, node 0 first; arbitrary beyond `counts`
    counts: Tensor  # `[batch]` nodes on the path, root included; also the number of tokens that the pass emits
    emitted: Tensor  # `[batch, steps]` emitted tokens: the accepted draft tokens, then the bonus token
    last: Tensor  # `[batch]` last node of the path, where the bonus token was drawn


def verify_greedy(tree: TokenTree, scores: Tensor, fixed: bool = False) -> Accepted:
    """Accept the longest path whose tokens are the most probable ones at their parents.

    Args:
        tree: the verified tree.
        scores: `[batch, nodes, vocab]`.
        fixed: keep shapes that depend on the tree alone, `[batch, max_depth + 1]`, and read nothing on the host.
    """
    return accept_drawn(tree, draw(scores, None), fixed)


def verify_sampled(tree: TokenTree, scores: Tensor, noise: LazyGumbel, fixed: bool = False) -> Accepted:
    """Accept the longest path whose tokens are the ones drawn with `noise` at their parents; see `verify_greedy`."""
    return accept_drawn(tree, draw_nodes(tree, scores, _noise_of(tree, noise, fixed)), fixed)


def verify_typical(tree: TokenTree, scores: Tensor, noise: LazyGumbel | None, rule: TypicalAcceptance) -> Accepted:
    """Accept the longest path of plausible draft tokens; of equally long ones the more probable path. Lossy.

    Args:
        tree: the verified tree.
        scores: `[batch, nodes, vocab]`.
        noise: of the bonus token; None takes the most probable token.
        rule: the two thresholds.
    """
    drawn = draw_nodes(tree, scores, None if noise is None else _noise_of(tree, noise))
    if tree.nodes == 1:
        return accept_drawn(tree, drawn)
    logp = scores.float().log_softmax(-1)
    entropy = -torch.special.entr(logp.exp()).sum(-1).neg()
    threshold = torch.minimum(torch.full_like(entropy, rule.epsilon), rule.delta * torch.exp(-entropy)).log()
    of_parent = logp.gather(1, tree.parents[..., None].expand_as(logp)).gather(2, tree.tokens[..., None])[..., 0]
    of_parent[:, 0] = 0.0
    plausible = of_parent > threshold.gather(1, tree.parents)
    plausible[:, 0] = True
    path_logp = (tree.visible * of_parent[:, None].clamp(min=-1e4)).sum(-1)
    last = _deepest(tree, plausible, tie=torch.exp(path_logp / tree.nodes))
    found = _path_to(tree, last, drawn)
    follow = tree.tokens.gather(1, found.path[:, 1:])
    draft_tokens = torch.cat([follow, drawn[:, :1]], 1)
    bonus = drawn.gather(1, last[:, None])
    steps = torch.arange(draft_tokens.shape[1], device=draft_tokens.device)
    found.emitted = torch.where(steps < found.counts[:, None] - 1, draft_tokens, bonus)
    return found


def accept_drawn(tree: TokenTree, drawn: Tensor, fixed: bool = False) -> Accepted:
    """Accept the longest path on which every token is the one that the target drew at its parent.

    Args:
        tree: the verified tree.
        drawn: `[batch, nodes]`, the target's token at every node.
        fixed: see `verify_greedy`.
    """
    if tree.nodes == 1:
        ones = torch.ones_like(tree.tokens[:, 0])
        return Accepted(torch.zeros_like(tree.tokens), ones, drawn, torch.zeros_like(ones))
    if not fixed and drawn.numel() <= _MAX_HOST_NODES and on_host(drawn):
        return _accept_on_host(tree, drawn)
    matches = tree.tokens == drawn.gather(1, tree.parents)
    matches[:, 0] = True
    return _path_to(tree, _deepest(tree, matches), drawn)


def gather_path(values: Tensor, path: Tensor) -> Tensor:
    """Return `[batch, steps, size]`: the values `[batch, nodes, size]` of the nodes on every row's path."""
    return values.gather(1, path[..., None].expand(-1, -1, values.shape[-1]))


def gather_last(values: Tensor, last: Tensor) -> Tensor:
    """Return `[batch, size]`: the values `[batch, nodes, size]` of every row's last accepted node."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(values.shape[0], device=values.device), last]


def _noise_of(tree: TokenTree, noise: LazyGumbel, fixed: bool = False) -> Tensor:
    """Return the noise `[batch, depths, vocab]` of the tokens below the nodes of a tree."""
    deepest = int(tree.depth.max()) if not fixed and on_host(tree.depth) else tree.max_depth
    return noise.prefix(1 + deepest)


def _accept_on_host(tree: TokenTree, drawn: Tensor) -> Accepted:
    paths, counts = [], []
    for tokens, parents, targets in zip(tree.tokens.tolist(), tree.parents.tolist(), drawn.tolist(), strict=True):
        depth, last = [0] * len(tokens), 0  # of nodes on matching paths; -1 for all others
        for node in range(1, len(tokens)):
            parent = parents[node]
            kept = depth[parent] >= 0 and tokens[node] == targets[parent]
            depth[node] = depth[parent] + 1 if kept else -1
            if depth[node] > depth[last]:
                last = node
        path = [last]
        while path[-1]:
            path.append(parents[path[-1]])
        paths.append(path[::-1])
        counts.append(len(path))
    steps = max(counts)
    padded = torch.tensor([path + [0] * (steps - len(path)) for path in paths])
    ends = torch.tensor([path[-1] for path in paths])
    return Accepted(padded, torch.tensor(counts), drawn.gather(1, padded), ends)


def _deepest(tree: TokenTree, matches: Tensor, tie: Tensor | None = None) -> Tensor:
    """Return `[batch]`: the deepest node whose whole path matches; ties go to the largest `tie` in (0, 1]."""
    kept = ~(tree.visible & ~matches[:, None]).any(-1)
    if tie is None:
        return ((tree.depth + 1) * kept).argmax(1)
    return ((tree.depth + 1 + tie * 0.99) * kept).argmax(1)


def _path_to(tree: TokenTree, last: Tensor, drawn: Tensor) -> Accepted:
    """Return the path from the root to `last`, laid out by depth."""
    batch, nodes = tree.tokens.shape
    on_path = tree.visible.gather(1, last[:, None, None].expand(batch, 1, nodes))[:, 0]
    steps = tree.max_depth + 1
    slot = tree.depth.masked_fill(~on_path, steps)  # nodes off the path go to a slot that is cut off
    path = torch.zeros(batch, steps + 1, dtype=torch.long, device=drawn.device)
    path.scatter_(1, slot, torch.arange(nodes, device=drawn.device).expand(batch, nodes))
    path = path[:, :steps]
    counts = tree.depth.gather(1, last[:, None])[:, 0] + 1
    return Accepted(path, counts, drawn.gather(1, path), last)
