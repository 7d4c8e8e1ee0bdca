"""Token Recycling (Luo et al. 2024): the most probable successors that the target gave each token when it last saw it.

An adjacency matrix holds the top-k successors of every token with their log-probabilities. Every verified node updates it,
accepted or not; nothing is trained. It can be saved, and another run can start with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, register_proposer
from medhead.proposers.candidates import Candidates
from medhead.proposers.growth import grow
from medhead.proposers.recycling_state import load_state, save_state

if TYPE_CHECKING:
    from medhead.model.target import Target

_UNSEEN = -20.0  # log-probability of a successor that was never seen


@register_proposer("recycling")
class RecyclingProposer(Proposer):
    """Proposes recycled tokens. What was learnt is kept for later generations.

    Args:
        target: the target; its vocabulary sizes the matrix.
        tree_size: number of nodes of the tree, root included.
        successors: number of successors kept for every token.
        max_depth: depth of the tree.
        width: number of nodes of a frontier.
        state: file of `save` to start with; of its successors the most probable are taken.

    Raises:
        MedheadError: a number is out of range, or the file is missing, damaged, foreign, or of another vocabulary.
    """

    uses_noise, skippable = True, True

    def __init__(
        self,
        target: Target,
        tree_size: int = 16,
        successors: int = 8,
        max_depth: int = 6,
        width: int = 8,
        state: str | Path | None = None,
    ) -> None:
        if min(successors, max_depth, width) < 1:
            raise MedheadError(
                f"successors, max_depth and width must be at least 1, got {successors}, {max_depth} and {width}"
            )
        self.tree_size, self.max_depth, self.width = tree_size, max_depth, width
        shape = (target.vocab_size, min(successors, target.vocab_size))
        self.tokens = torch.arange(shape[1], device=target.device).repeat(shape[0], 1)
        self.logp = torch.full(shape, _UNSEEN, device=target.device)
        self._newest = torch.zeros(target.vocab_size, dtype=torch.long, device=target.device)
        if state is not None:
            tokens, logp = load_state(state, target.vocab_size)
            known = min(shape[1], tokens.shape[1])
            self.tokens[:, :known], self.logp[:, :known] = tokens[:, :known], logp[:, :known]

    def save(self, path: str | Path) -> None:
        """Write the matrix to a safetensors file, for `state`; a file of another kind is not overwritten.

        Raises:
            MedheadError: the file holds something else, or it cannot be written.
        """
        save_state(self.tokens, self.logp, path)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return the most probable recycled paths below every root."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        found = grow(state.roots, RecyclingExpander(self, state), depth, self.width, self.tree_size)
        return found.best_tree(state.roots, self.tree_size)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """Return the successors of all frontiers."""
        depth = min(max_depth, self.max_depth)
        return grow(state.roots, RecyclingExpander(self, state), depth, self.width) if depth > 0 else None

    def update(self, output: VerifyOutput) -> None:
        """Replace the successors of every token of the tree by those at one of its nodes."""
        nodes = output.tree.tokens.flatten()
        self._newest[nodes] = torch.arange(len(nodes), device=nodes.device)  # one node of each token, for both matrices
        taken = self._newest[nodes]
        top = output.logits.flatten(0, 1).float().log_softmax(-1).topk(self.tokens.shape[1], dim=-1)
        self.tokens[nodes], self.logp[nodes] = top.indices[taken], top.values[taken]


@dataclass
class RecyclingExpander:
    """The successors of a frontier, see `growth.Expander`; when sampling, with the noise of their position."""

    proposer: RecyclingProposer
    given: DecodeState

    def start(self) -> Tensor:
        """Return an empty state: successors depend on the last token alone."""
        return self.proposer.logp.new_zeros(len(self.given.roots), 1, 0)

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `growth.Expander.expand`."""
        children, logp = self.proposer.tokens[tokens], self.proposer.logp[tokens]
        if self.given.noise is not None:
            noise = self.given.noise.at(depth).gather(1, children.flatten(1)).view_as(logp)
            logp = (logp / self.given.temperature + noise).log_softmax(-1)
        return state.expand(-1, tokens.shape[1], -1), logp, children
