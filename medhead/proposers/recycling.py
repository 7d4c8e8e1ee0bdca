"""Token Recycling (Luo et al. 2024): the most probable successors that the target gave each token when it last saw it.

An adjacency matrix holds the top-k successors of every token with their log-probabilities. Every verified node updates it,
accepted or not; nothing is trained. It can be saved, and another run can start with it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, register_proposer
from medhead.proposers.candidates import Candidates
from medhead.proposers.growth import grow

if TYPE_CHECKING:
    from medhead.model.target import Target

FORMAT = "medhead recycling 1"
_MIN_LOGP = -20.0  # a successor of this log-probability or less is never drafted


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

    uses_noise = skippable = capturable = True

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
            given = f"{successors}, {max_depth} and {width}"
            raise MedheadError(f"successors, max_depth and width must be at least 1, got {given}")
        self.tree_size, self.max_depth, self.width = tree_size, max_depth, width
        shape = (target.vocab_size, min(successors, target.vocab_size))
        self.tokens = torch.arange(shape[1], device=target.device).repeat(shape[0], 1)
        self.logp = torch.full(shape, -torch.inf, device=target.device)  # -inf: never seen
        self._newest = torch.zeros(target.vocab_size, dtype=torch.long, device=target.device)
        if state is not None:
            tokens, logp = _load_state(Path(state), target.vocab_size)
            known = min(shape[1], tokens.shape[1])
            self.tokens[:, :known], self.logp[:, :known] = tokens[:, :known], _floor(logp[:, :known])

    def save(self, path: str | Path) -> None:
        """Write the matrix to a safetensors file, for `state`; a file of another kind is not overwritten.

        Raises:
            MedheadError: the file holds something else, or it cannot be written.
        """
        path = Path(path)
        if path.exists():
            _read_state(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"tokens": self.tokens.to("cpu", torch.int32), "logp": self.logp.to("cpu", torch.float32)}
        try:
            save_file(content, scratch, metadata={"format": FORMAT})
            os.replace(scratch, path)
        except (OSError, SafetensorError) as error:
            raise MedheadError(f"{str(path)!r} cannot be written: {_reason(error)}") from None
        finally:
            scratch.unlink(missing_ok=True)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return the most probable recycled paths below every root, fewer than `tree_size` where few are known."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        nodes = None if state.fixed else self.tree_size
        found = grow(state.roots, RecyclingExpander(self, state), depth, self.width, nodes)
        possible = self.tree_size if state.fixed else 1 + found.num_possible()
        return found.best_tree(state.roots, min(self.tree_size, possible))

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
        self.tokens[nodes], self.logp[nodes] = top.indices[taken], _floor(top.values)[taken]

    update_captured = update  # it consists of tensor operations


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
            logp = _condition_on_noise(logp, noise, self.given.temperature, len(self.proposer.tokens))
        return state.expand(-1, tokens.shape[1], -1), logp, children


def _floor(logp: Tensor) -> Tensor:
    """Return log-probabilities with -inf for those that are too small to be drafted."""
    return logp.masked_fill(logp <= _MIN_LOGP, -torch.inf)


def _condition_on_noise(logp: Tensor, noise: Tensor, temperature: float | Tensor, vocab_size: int) -> Tensor:
    """Return the log-probabilities of known successors given the noise of their position, all `[batch, width, K]`.

    The others' noise is not looked at: the largest of their perturbed logits is `others` plus Gumbel noise, so it is below
    that of the best known successor with probability `exp(-exp(others - best))`. `others` is the logarithm of an upper bound
    of their sum of p^(1/temperature): their p sum to `rest`, and each is at most the least known p.
    """
    power, known = 1 / temperature, logp.exp()
    rest = (1 - known.sum(-1, keepdim=True)).clamp(min=torch.finfo(logp.dtype).tiny).log()
    least = logp.masked_fill(known == 0, torch.inf).amin(-1, keepdim=True).clamp(max=0)
    others = torch.maximum(rest + (power - 1) * least, rest * power + (1 - power) * math.log(vocab_size))
    perturbed = logp * power + noise
    found = perturbed.log_softmax(-1) - (others - perturbed.amax(-1, keepdim=True)).exp()
    return found.masked_fill(known == 0, -torch.inf)


def _load_state(path: Path, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the saved tokens (int64) and log-probabilities (float32), each `[vocab_size, successors]`, or raise an error."""
    tokens, logp = _read_state(path)
    tokens, logp, name = tokens.long(), logp.float(), f"the recycling state {str(path)!r}"
    if tokens.ndim != 2 or tokens.shape != logp.shape or not tokens.numel():
        shapes = f"{list(tokens.shape)} and {list(logp.shape)}, expected two of [vocabulary, successors]"
        raise MedheadError(f"{name} holds matrices of {shapes}; delete it and start a new one")
    if len(tokens) != vocab_size:
        sizes = f"{len(tokens)} tokens, this one has {vocab_size}"
        raise MedheadError(f"{name} was learnt from a model with {sizes}; give each model a file of its own")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size or bool((logp > 0).any() | logp.isnan().any()):
        raise MedheadError(f"{name} is damaged: a token or a log-probability is out of range; delete it")
    return tokens, logp


def _read_state(path: Path) -> tuple[Tensor, Tensor]:
    """Return the tensors of a file, unchecked; raise an error if it is no recycling state."""
    if not path.is_file():
        raise MedheadError(f"the recycling state {str(path)!r} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT and set(file.keys()) == {"tokens", "logp"}:
                return file.get_tensor("tokens"), file.get_tensor("logp")
    except (OSError, SafetensorError) as error:
        raise MedheadError(f"{str(path)!r} is no recycling state, or truncated or damaged: {_reason(error)}") from None
    raise MedheadError(f"{str(path)!r} is not a recycling state of medhead, but a safetensors file of something else")


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:100]
