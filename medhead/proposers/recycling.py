"""Token Recycling (Luo et al. 2024): the candidates that the target itself named the last time it saw a token.

An adjacency matrix holds the last top-k successors of every token; it is updated from every verified node, accepted or
not, and needs no training. Log-probabilities are kept beside the tokens, so that trees are grown by them. What was learnt
can be saved, and another run can start with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, register_proposer
from medhead.proposers.candidates import Candidates
from medhead.proposers.growth import grow, grow_tree
from medhead.proposers.recycling_state import load_state, save_state

if TYPE_CHECKING:
    from medhead.model.target import Target

_UNSEEN = -20.0  # log-probability of a successor that was never seen


@register_proposer("recycling")
class RecyclingProposer(Proposer):
    """Proposes recycled tokens. What was learnt stays for later generations.

    Args:
        target: the target; its vocabulary sizes the matrix.
        tree_size: nodes of the tree, root included.
        successors: candidates kept for every token.
        max_depth: depth of the tree.
        width: nodes of a frontier.
        warm: file of `save` to start with; of its successors the likeliest are taken.

    Raises:
        MedheadError: a number that cannot be, or a file that is missing, damaged, foreign, or of another vocabulary.
    """

    uses_noise, skippable = True, True

    def __init__(
        self,
        target: Target,
        tree_size: int = 16,
        successors: int = 8,
        max_depth: int = 6,
        width: int = 8,
        warm: str | Path | None = None,
    ) -> None:
        if min(successors, max_depth, width) < 1:
            raise MedheadError(
                f"successors, depth and width must be at least 1, got {successors}, {max_depth} and {width}"
            )
        self.tree_size, self.max_depth, self.width = tree_size, max_depth, width
        shape = (target.vocab_size, min(successors, target.vocab_size))
        self.tokens = torch.arange(shape[1], device=target.device).repeat(shape[0], 1)
        self.logp = torch.full(shape, _UNSEEN, device=target.device)
        self._newest = torch.zeros(target.vocab_size, dtype=torch.long, device=target.device)
        self._state: DecodeState | None = None
        if warm is not None:
            tokens, logp = load_state(warm, target.vocab_size)
            known = min(shape[1], tokens.shape[1])
            self.tokens[:, :known], self.logp[:, :known] = tokens[:, :known], logp[:, :known]

    def save(self, path: str | Path) -> None:
        """Write what was learnt to a safetensors file, for `warm`; only a file of this kind is overwritten.

        Raises:
            MedheadError: the file holds something else, or it cannot be written.
        """
        save_state(self.tokens, self.logp, path)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """The likeliest recycled paths below every root."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        self._state = state
        return grow_tree(state.roots, self, self.tree_size, depth, self.width)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """The frontiers' recycled successors."""
        depth = min(max_depth, self.max_depth)
        if depth < 1:
            return None
        self._state = state
        return grow(state.roots, self, depth, self.width)

    def start(self) -> Tensor:
        """There is no state along a path."""
        assert self._state is not None
        return self.logp.new_zeros(len(self._state.texts), 1, 0)

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Successors of the frontier; when sampling, ranked by the noise of the position too."""
        assert self._state is not None
        children, logp = self.tokens[tokens], self.logp[tokens]
        if self._state.noise is not None:
            noise = self._state.noise.at(depth).gather(1, children.flatten(1)).view_as(logp)
            logp = (logp / self._state.temperature + noise).log_softmax(-1)
        return state.expand(-1, tokens.shape[1], -1), logp, children

    def update(self, verified: VerifyOutput) -> None:
        """EncodeCacheEntry what the target named at every node; of nodes with one token, one is remembered."""
        nodes = verified.tree.tokens.flatten()
        self._newest[nodes] = torch.arange(len(nodes), device=nodes.device)  # whichever wins, it wins both matrices
        taken = self._newest[nodes]
        top = verified.logits.flatten(0, 1).float().log_softmax(-1).topk(self.tokens.shape[1], dim=-1)
        self.tokens[nodes], self.logp[nodes] = top.indices[taken], top.values[taken]
