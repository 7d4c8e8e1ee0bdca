"""Trees from extra decoding heads: dynamic by cumulative probability, or a static shape of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medhead.core.gumbel import LazyGumbel
from medhead.core.lengths import Lengths
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.heads import Heads, load_heads
from medhead.heads.draft_cache import LazyDraftCache
from medhead.heads.output_head import OutputHead, shared_output_head
from medhead.model.packed_linear import fits
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, register_proposer
from medhead.proposers.candidates import Candidates
from medhead.proposers.growth import grow
from medhead.proposers.static_tree import StaticShape
from medhead.scheduling.cost_model import moving_mean

if TYPE_CHECKING:
    from medhead.model.target import Target

_MIN_EXIT, _MAX_EXIT = 0.03, 0.2  # limits of the probability of a path below which growth ends
_TOKEN_VALUE = 0.8  # factor of the exit threshold: seconds per level / seconds per token


@register_proposer("heads")
class HeadsProposer(Proposer):
    """Proposes with heads.

    Args:
        target: the target that the heads belong to.
        heads: the heads, the folder of their checkpoint, or `mtp` for the layers in the target's own checkpoint.
        tree_size: number of nodes of the tree, root included; None for that of the heads' configuration.
        width: number of nodes of a frontier; None for that of the heads' configuration.
        branching: number of children of every frontier node; None for that of the heads' configuration.
        max_depth: depth of the deepest tree; None for that of the heads' configuration.
        shape: paths of ranks (Medusa's static trees) instead of a dynamic tree.
        dtype: type that the heads compute in, which changes no output; by default that of the target.
        rank_by_noise: when sampling, rank candidates with the noise of their position.
        sharpness: factor of the heads' log-probabilities in greedy decoding. Heads learn the target's whole distribution,
            but greedy decoding takes the most probable token more often than its probability says. A larger factor makes
            trees deeper and narrower.
        min_prob: probability of the best path, in the mean of the rows, below which growth of `candidates` ends on a CPU;
            None follows the cost of a level of heads relative to a token, and is 0 where `tree_size` is given.
        clock: returns the time in seconds.

    Raises:
        MedheadError: there are no heads, they are of another model, or the tree is deeper than the heads.
    """

    is_expensive = True

    def __init__(
        self,
        target: Target,
        heads: Heads | str | Path | None = None,
        tree_size: int | None = None,
        width: int | None = None,
        branching: int | None = None,
        max_depth: int | None = None,
        shape: list[list[int]] | None = None,
        dtype: torch.dtype | None = None,
        rank_by_noise: bool = True,
        sharpness: float = 1.5,
        min_prob: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if heads is None:
            raise MedheadError("the proposer 'heads' needs heads: give the folder of a heads checkpoint (--heads)")
        heads = heads if isinstance(heads, Heads) else load_heads(heads, target)
        config = heads.config
        self.shape = None if shape is None else StaticShape(shape, target.device)
        self.width = config.tree_width if width is None else width
        self.branching = config.tree_branching if branching is None else branching
        depth = (config.tree_depth or config.depth) if max_depth is None else max_depth
        self.max_depth = depth = self.shape.depth if self.shape else depth
        if depth > config.depth:
            raise MedheadError(
                f"the tree is {depth} deep, but these heads predict {config.depth} tokens ahead; "
                f"use a depth of at most {config.depth}"
            )
        if min(depth, self.width, self.branching) < 1:
            given = f"{depth}, {self.width} and {self.branching}"
            raise MedheadError(f"depth, width and branching must be at least 1, got {given}")
        if not sharpness > 0 or not 0 <= (min_prob or 0) < 1:
            raise MedheadError(f"sharpness must be above 0, min_prob from 0 to below 1, got {sharpness} and {min_prob}")
        self.sharpness, self.uses_noise, self.clock = sharpness, rank_by_noise, clock
        self._min_prob = 0.0 if min_prob is None and tree_size is not None else min_prob
        self._level_seconds: float | None = None  # that a level of heads takes
        self._token_seconds: float | None = None  # that a token of the target takes
        self._fixed_size = tree_size is not None
        size = config.tree_size if tree_size is None else tree_size
        self.tree_size = self.shape.nodes if self.shape else size
        self.feature_layers = tuple(config.feature_layers)
        self.output_head = shared_output_head(heads, target, dtype)
        self.heads = self.output_head.heads
        packs = fits(self.output_head.packable_bytes) if target.packed is None else target.packed
        if packs and target.device.type == "cpu":
            self.output_head.pack()
        self._compiled: dict[int, tuple[Any, tuple[int, ...]]] = {}  # by number of arguments: greedy, or with noise

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Choose again how weights are multiplied: the number of threads may have changed."""
        self.output_head.recheck()

    @property
    def draft_key(self) -> Hashable | None:
        """The heads if they have a draft cache that can be continued from stored entries."""
        if self.heads.has_tensor_cache:
            return self.heads if self.heads.cache_entry_size else ()
        return self.heads if self.heads.is_resumable else None

    def new_draft_cache(self, lengths: Lengths, capacity: int) -> LazyDraftCache | None:
        """Return storage for heads that look back at the text."""
        output_head = self.output_head
        cache = self.heads.new_draft_cache(output_head.dtype, lengths, capacity)

        def encode(features: Tensor, token: Tensor, positions: Tensor, longest: int) -> Tensor:
            return self.heads.encode_cache_entry(features.to(output_head.dtype), token, positions, longest)

        return None if cache is None else LazyDraftCache(cache, encode, lambda tokens: output_head.token(tokens, 0))

    def on_prefill(
        self, draft_cache: LazyDraftCache | None, texts: list[list[int]], features: Tensor, start: int
    ) -> None:
        """Write the entries of a chunk of the prompts."""
        if draft_cache is None:
            return
        count, device = features.shape[1], features.device
        following = [text[start + 1 : start + 1 + count] for text in texts]
        counts = torch.tensor([len(tokens) for tokens in following], device=device)
        padded = torch.tensor([tokens + [0] * (count - len(tokens)) for tokens in following], device=device)
        draft_cache.write(features, padded, counts)

    def update_draft_cache(
        self, draft_cache: LazyDraftCache, features: Tensor, emitted: Tensor, counts: Tensor
    ) -> None:
        """Write the entries of the accepted nodes; those of plain decoding are written later, together."""
        if emitted.shape[1] == 1 and draft_cache.cache.lengths.host is not None:
            draft_cache.write_later(features, emitted)
        else:
            draft_cache.write(features, emitted, counts)

    def update(self, output: VerifyOutput) -> None:
        """Learn the seconds of a token."""
        if output.seconds:
            token = output.seconds * len(output.counts) / sum(output.counts)
            self._token_seconds = moving_mean(self._token_seconds, token)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return a tree for every sequence, ranked by the heads and, when sampling, by the noise of the coming positions."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        if self.shape is not None:
            return self.shape.fill(state.roots, self._expander(state, self.shape.width, depth), depth)
        expander = self._expander(state, min(self.branching, self.tree_size - 1), depth)
        found = grow(state.roots, expander, depth, self.width, None if state.fixed else self.tree_size)
        return found.best_tree(state.roots, self.tree_size)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """Return the children of all frontiers; with a fixed tree size, as deep as its nodes may reach."""
        depth = min(max_depth, self.max_depth)
        if depth < 1:
            return None
        if state.fixed:
            return grow(state.roots, self._expander(state, self.branching, depth), depth, self.width)
        began = self.clock()
        if len(state.roots) == 1 and state.draft_cache is None and depth == self.max_depth and state.target.compiles:
            found = self._compiled_candidates(state, depth)
        else:
            expander, nodes = self._expander(state, self.branching, depth), self.tree_size if self._fixed_size else None
            found = grow(state.roots, expander, depth, self.width, nodes, self.min_prob)
        self._level_seconds = moving_mean(self._level_seconds, (self.clock() - began) / len(found.levels))
        return found

    def _compiled_candidates(self, state: DecodeState, depth: int) -> Candidates:
        """Return the candidates by one compiled function, without an early exit."""
        given = [state.roots, state.features]
        if state.noise is not None:
            temperature = torch.as_tensor(state.temperature, device=state.roots.device)
            given += [state.noise.prefix(depth).contiguous(), temperature]

        def run(roots: Tensor, features: Tensor, noise: Tensor | None = None, temperature: Tensor | None = None) -> Any:
            coming = None if noise is None else LazyGumbel.of(noise)
            over = DecodeState(state.target, [], roots, features, coming, 1.0 if temperature is None else temperature)
            found = grow(roots, self._expander(over, self.branching, depth), depth, self.width)
            return found.tokens, found.parent_index, found.scores, found.levels

        if len(given) not in self._compiled:
            levels = run(*given)[3]  # eagerly before tracing, to fill cached tables
            compiled = state.target.compiled("the candidates of the heads", lambda *tensors: run(*tensors)[:3], given)
            self._compiled[len(given)] = compiled, levels
        compiled, levels = self._compiled[len(given)]
        tokens, parent_index, scores = compiled(*given)
        return Candidates(tokens, parent_index, scores, levels)

    @property
    def min_prob(self) -> float:
        """Probability of a path below which another level costs more than it brings."""
        if self._min_prob is not None:
            return self._min_prob
        if self._level_seconds is None:
            return _MAX_EXIT
        return min(_MAX_EXIT, max(_MIN_EXIT, _TOKEN_VALUE * self._level_seconds / (self._token_seconds or 1.0)))

    def _expander(self, state: DecodeState, branching: int, depth: int) -> HeadsExpander:
        view = None if state.draft_cache is None else state.draft_cache.view()
        noise = state.noise if self.uses_noise else None
        sharpness = self.sharpness if state.noise is None else 1.0
        return HeadsExpander(self.output_head, state, view, branching, depth, noise, sharpness)

    def free(self) -> None:
        """Release packed copies of the heads' weights."""
        self.output_head.free()

    @property
    def packed_bytes(self) -> int:  # type: ignore[override]
        """Memory of packed copies of the heads' weights."""
        return self.output_head.nbytes

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """Whether the heads' draft cache, if any, is a plain tensor."""
        return self.heads.has_tensor_cache

    @property
    def compilable(self) -> bool:  # type: ignore[override]
        """The same."""
        return self.heads.has_tensor_cache


@dataclass
class HeadsExpander:
    """The children of a frontier by the heads, see `growth.Expander`; `view` is what the heads see of the text."""

    output_head: OutputHead
    state: DecodeState
    view: Any
    branching: int
    depth: int
    noise: LazyGumbel | None
    sharpness: float = 1.0

    def start(self) -> Tensor:
        """Return the heads' state above the root, `[batch, 1, state]`."""
        output_head, state = self.output_head, self.state
        self._root = output_head.token(state.roots[:, None], 0)
        features = state.features.to(output_head.dtype)[:, None]
        above, self._shared = output_head.heads.init_state(features, self._root, self.view, self.depth)
        return above

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `growth.Expander.expand`."""
        output_head, width = self.output_head, tokens.shape[1]
        if output_head.heads.path_dependent:
            token = self._root if depth == 0 else output_head.token(tokens, depth)
            state, feature = output_head.heads.step(state, token, depth, self._shared)
        else:  # one distribution serves the whole depth
            _, feature = output_head.heads.step(state[:, :1], self._root, depth, self._shared)
        logits = output_head.logits(feature, depth)
        if self.noise is not None:
            noise = self.noise.at(depth)
            noise = noise if output_head.tokens is None else noise[:, output_head.tokens]
            logits = logits / self.state.temperature + noise[:, None]
        elif self.sharpness != 1:
            logits = logits * self.sharpness
        top = logits.log_softmax(-1).topk(min(self.branching, logits.shape[-1]), dim=-1)
        children = top.indices if output_head.tokens is None else output_head.tokens[top.indices]
        return state, top.values.expand(-1, width, -1), children.expand(-1, width, -1)
