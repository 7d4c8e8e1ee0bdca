"""Which guesses are kept: the walk from the root, done for all nodes at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medhead.core.sampling import on_host
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError

_MOST_NODES = 512  # nodes of all rows that are walked over on the host, where they are there


@dataclass(frozen=True)
class TypicalAcceptance:
    """Medusa's lossy rule (Cai et al. 2024): a guess is kept if its probability exceeds min(epsilon, delta * exp(-entropy)).

    The text is then no longer the target's own; it is off unless asked for.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < 1 and 0 < self.delta < 1):
            raise MedheadError(f"typical acceptance needs 0 < epsilon, delta < 1, got {self.epsilon} and {self.delta}")


@dataclass
class Accepted:
    """Result of one walk, per row.

    Attributes:
        path: `[batch, steps]` node at every depth along the accepted path, node 0 first; arbitrary behind `counts`.
        counts: `[batch]` nodes on the path, root included; also the number of tokens that the pass emits.
        emitted: `[batch, steps]` tokens emitted: the accepted guesses, then the bonus token.
        last: `[batch]` last accepted node, where the bonus token was drawn.
    """

    path: Tensor
    counts: Tensor
    emitted: Tensor
    last: Tensor


def accept(tree: TokenTree, drawn: Tensor) -> Accepted:
    """Keep the deepest path on which every token is the one that the target drew at its parent.

    Args:
        tree: the verified tree.
        drawn: `[batch, nodes]`, the target's token at every node.
    """
    if tree.nodes > 1 and drawn.numel() <= _MOST_NODES and on_host(drawn):
        return _accept_here(tree, drawn)
    return accept_at(tree, drawn)


def accept_at(tree: TokenTree, drawn: Tensor) -> Accepted:
    """The same where the tensors are, in shapes that never change: `[batch, max_depth + 1]`. The host looks at nothing."""
    if tree.nodes == 1:
        ones = torch.ones_like(tree.tokens[:, 0])
        return Accepted(torch.zeros_like(tree.tokens), ones, drawn, torch.zeros_like(ones))
    right = tree.tokens == drawn.gather(1, tree.parents)
    right[:, 0] = True
    last = _deepest(tree, right)
    return _along(tree, last, drawn)


def accept_typical(tree: TokenTree, drawn: Tensor, scores: Tensor, rule: TypicalAcceptance) -> Accepted:
    """Keep the deepest path of plausible guesses; ties go to the more probable one. Lossy.

    Args:
        tree: the verified tree.
        drawn: `[batch, nodes]`, tokens drawn at every node; only the bonus token is used.
        scores: `[batch, nodes, vocab]` processed logits.
        rule: the two thresholds.
    """
    if tree.nodes == 1:
        return accept(tree, drawn)
    logp = scores.log_softmax(-1)
    entropy = -torch.special.entr(logp.exp()).sum(-1).neg()
    threshold = torch.minimum(torch.full_like(entropy, rule.epsilon), rule.delta * torch.exp(-entropy)).log()
    of_parent = logp.gather(1, tree.parents[..., None].expand_as(logp)).gather(2, tree.tokens[..., None])[..., 0]
    of_parent[:, 0] = 0.0
    plausible = of_parent > threshold.gather(1, tree.parents)
    plausible[:, 0] = True
    path_logp = (tree.visible * of_parent[:, None].clamp(min=-1e4)).sum(-1)
    last = _deepest(tree, plausible, tie=torch.exp(path_logp / tree.nodes))
    found = _along(tree, last, drawn)
    follow = tree.tokens.gather(1, found.path[:, 1:])
    guesses = torch.cat([follow, drawn[:, :1]], 1)
    bonus = drawn.gather(1, last[:, None])
    steps = torch.arange(guesses.shape[1], device=guesses.device)
    found.emitted = torch.where(steps < found.counts[:, None] - 1, guesses, bonus)
    return found


def pick(features: Tensor, last: Tensor) -> Tensor:
    """`[batch, size]`: the features of each row's last accepted node."""
    if features.shape[1] == 1:
        return features[:, 0]
    return features[torch.arange(features.shape[0], device=features.device), last]


def _accept_here(tree: TokenTree, drawn: Tensor) -> Accepted:
    """The same on the host: for some hundred nodes a loop is over before tensor operations have begun."""
    paths, counts = [], []
    for tokens, parents, said in zip(tree.tokens.tolist(), tree.parents.tolist(), drawn.tolist(), strict=True):
        depth, last = [0] * len(tokens), 0  # of the nodes on right paths; -1 for all others
        for node in range(1, len(tokens)):
            parent = parents[node]
            kept = depth[parent] >= 0 and tokens[node] == said[parent]
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


def _deepest(tree: TokenTree, right: Tensor, tie: Tensor | None = None) -> Tensor:
    """`[batch]`: the deepest node whose whole path is right; among equals the one with the largest `tie` in (0, 1]."""
    kept = ~(tree.visible & ~right[:, None]).any(-1)
    if tie is None:
        return ((tree.depth + 1) * kept).argmax(1)
    return ((tree.depth + 1 + tie * 0.99) * kept).argmax(1)


def _along(tree: TokenTree, last: Tensor, drawn: Tensor) -> Accepted:
    """The path from the root to `last`, laid out by depth."""
    batch, nodes = tree.tokens.shape
    on_path = tree.visible.gather(1, last[:, None, None].expand(batch, 1, nodes))[:, 0]
    steps = tree.max_depth + 1
    slot = tree.depth.masked_fill(~on_path, steps)  # nodes off the path go to a slot that is cut off
    path = torch.zeros(batch, steps + 1, dtype=torch.long, device=drawn.device)
    path.scatter_(1, slot, torch.arange(nodes, device=drawn.device).expand(batch, nodes))
    path = path[:, :steps]
    counts = tree.depth.gather(1, last[:, None])[:, 0] + 1
    return Accepted(path, counts, drawn.gather(1, path), last)
