"""Trees from extra decoding heads: dynamic by cumulative probability, or a static shape of ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.proposers.base import DecodeState, Proposer, check_tree_size, register_proposer
from medhead.proposers.growth import grow_tree
from medhead.proposers.static_tree import StaticShape
from medhead.tree import TokenTree

TABLE_BYTES = 64 * 2**20  # largest table of encoded tokens that is kept

if TYPE_CHECKING:
    from medhead.target import Target


@register_proposer("heads")
class HeadsProposer(Proposer):
    """Proposes with heads.

    Args:
        target: the target the heads belong to.
        heads: the heads, or the folder of their checkpoint.
        tree_size: nodes of the tree, root included; what the heads' configuration says if None.
        width: nodes of a frontier.
        branching: candidates of every frontier node.
        max_depth: no tree is deeper; the heads' depth if None.
        shape: paths of ranks (Medusa's static trees) instead of a dynamic tree.
        dtype: what the heads compute in; no choice changes the text. The faster one is measured if None.
        rank_by_noise: when sampling, rank candidates with the noise of the position they are guessed for.

    Raises:
        MedheadError: no heads, heads of another model, or a tree deeper than the heads.
    """

    def __init__(
        self,
        target: Target,
        heads: Heads | str | Path | None = None,
        tree_size: int | None = None,
        width: int = 4,
        branching: int = 4,
        max_depth: int | None = None,
        shape: list[list[int]] | None = None,
        dtype: torch.dtype | None = None,
        rank_by_noise: bool = True,
    ) -> None:
        if heads is None:
            raise MedheadError("the proposer 'heads' needs heads: give the folder of a heads checkpoint (--heads)")
        self.heads = heads if isinstance(heads, Heads) else load_heads(heads, target)
        config = self.heads.config
        default = config.tree_depth or config.depth
        self.shape = None if shape is None else StaticShape(shape, target.device)
        wanted = self.shape.depth if self.shape else (default if max_depth is None else max_depth)
        if wanted > config.depth:
            raise MedheadError(
                f"the tree is {wanted} deep, but these heads guess {config.depth} tokens ahead; "
                f"use a depth of at most {config.depth}"
            )
        if wanted < 1 or width < 1 or branching < 1:
            raise MedheadError(f"depth, width and branching must be at least 1, got {wanted}, {width} and {branching}")
        self.max_depth = wanted
        self.width, self.branching, self.uses_noise = width, branching, rank_by_noise
        size = config.tree_size if tree_size is None else tree_size
        self.tree_size = self.shape.nodes if self.shape else check_tree_size(size)
        self.readout = Readout(self.heads, target, dtype)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """A tree for every row, ranked by the heads and, when sampling, by the noise of the coming positions."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        if self.shape is not None:
            return self.shape.fill(state.roots, self._expander(state, self.shape.widest), depth)
        expander = self._expander(state, min(self.branching, self.tree_size - 1))
        return grow_tree(state.roots, expander, self.tree_size, depth, self.width)

    def _expander(self, state: DecodeState, branching: int) -> HeadsExpander:
        return HeadsExpander(self.readout, state, branching, state.noise if self.uses_noise else None)


class Readout:
    """Heads, the rows of the output matrix that they name tokens with, and the type they compute in.

    Args:
        heads: the heads; moved to the type and device.
        target: whose embedding and output matrix they use.
        dtype: the type; None measures which of the target's own and bfloat16 is faster here.
    """

    def __init__(self, heads: Heads, target: Target, dtype: torch.dtype | None) -> None:
        weight, bias = target.output.weight.detach(), getattr(target.output, "bias", None)
        self.tokens = None if heads.draft_tokens is None else heads.draft_tokens.to(target.device)
        if self.tokens is not None:
            weight, bias = weight[self.tokens], None if bias is None else bias[self.tokens]
        self.dtype = dtype or _faster_dtype(weight)
        self.heads = heads.to(device=target.device, dtype=self.dtype)
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self._embed = target.embed
        self._table = self._encode_all(target) if self.heads.per_path else None

    def token(self, tokens: Tensor) -> Tensor:
        """What the heads need of token ids."""
        if self._table is not None:
            return self._table[tokens]
        return self.heads.encode(self._embed(tokens).to(self.dtype))

    @torch.inference_mode()
    def _encode_all(self, target: Target) -> Tensor | None:
        """The same for the whole vocabulary, unless that takes too much memory."""
        first = self.heads.encode(target.embed(torch.zeros(1, dtype=torch.long, device=target.device)).to(self.dtype))
        count = int(target.embedding.num_embeddings)
        if count * first.numel() * first.element_size() > TABLE_BYTES:
            return None
        return self.heads.encode(target.embed(torch.arange(count, device=target.device)).to(self.dtype))

    def logits(self, feature: Tensor) -> Tensor:
        """`[..., hidden]` to float32 `[..., draft vocabulary]`."""
        return F.linear(feature, self.weight, self.bias).float()


def _faster_dtype(weight: Tensor, repeats: int = 16) -> torch.dtype:
    """The target's type, or bfloat16 where a float32 target on a CPU multiplies faster with it: measured, a few ms."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight.dtype
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix, vectors = weight.to(dtype), torch.ones(4, weight.shape[1], dtype=dtype)
        F.linear(vectors, matrix)
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            F.linear(vectors, matrix)
            times.append(time.perf_counter() - began)
        seconds[dtype] = sorted(times)[repeats // 2]
    return min(seconds, key=lambda dtype: seconds[dtype])


class HeadsExpander:
    """Children of a frontier by the heads, for `growth.grow_tree` and `static_tree.StaticShape.fill`."""

    def __init__(self, readout: Readout, state: DecodeState, branching: int, noise: Tensor | None) -> None:
        self.readout, self.state, self.branching = readout, state, branching
        self.noise = noise if noise is None or readout.tokens is None else noise[:, :, readout.tokens]

    def start(self) -> Tensor:
        """`[batch, 1, hidden]`: the heads' state above the root."""
        return self.readout.heads.start(self.state.hidden.to(self.readout.dtype))[:, None]

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `growth.Expander.expand`."""
        readout = self.readout
        if readout.heads.per_path:
            token = readout.token(tokens)
        else:
            state = token = state[:, :1]  # one distribution serves the whole depth
        state, feature = readout.heads.advance(state, token, depth)
        logits = readout.logits(feature)
        if self.noise is not None:
            logits = logits / self.state.temperature + self.noise[:, depth, None]
        top = logits.log_softmax(-1).topk(min(self.branching, logits.shape[-1]), dim=-1)
        children = top.indices if readout.tokens is None else readout.tokens[top.indices]
        if readout.heads.per_path:
            return state, top.values, children
        width = tokens.shape[1]
        return state, top.values.expand(-1, width, -1), children.expand(-1, width, -1)
