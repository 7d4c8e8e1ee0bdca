"""Trees from extra decoding heads: dynamic by cumulative probability, or a static shape of ranks."""

from __future__ import annotations

import time
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
from medhead.proposers.growth import grow, grow_tree
from medhead.proposers.static_tree import StaticShape

if TYPE_CHECKING:
    from medhead.model.target import Target

UNLIKELY, LIKELY = 0.03, 0.2  # between these lies the probability from which on a guess pays for itself
_WORTH = 0.8  # tokens that a guess which comes true is worth, per level of heads that it took
_FOLLOW = 0.1  # weight of the newest pass


@register_proposer("heads")
class HeadsProposer(Proposer):
    """Proposes with heads.

    Args:
        target: the target the heads belong to.
        heads: the heads, the folder of their checkpoint, or `mtp` for the layers that the target's checkpoint brings.
        tree_size: nodes of the tree, root included; what the heads' configuration says if None.
        width: nodes of a frontier; what the heads' configuration says if None.
        branching: candidates of every frontier node; the same.
        max_depth: no tree is deeper; the heads' depth if None.
        shape: paths of ranks (Medusa's static trees) instead of a dynamic tree.
        dtype: what the heads compute in; no choice changes the text. The faster one is measured if None.
        rank_by_noise: when sampling, rank candidates with the noise of the position they are guessed for.
        sharpness: what log-probabilities of the heads are multiplied by when decoding greedily. Heads learn the target's
            whole distribution, but greedy decoding takes its likeliest token, and does so more often than that token's
            probability says. More makes trees deeper and narrower.
        least: probability of the likeliest path, in the mean of the rows, below which heads look no further when they name
            candidates for trees of several proposers, on a CPU; None follows what a level of heads costs beside a token, and
            is 0 where `tree_size` is given.

    Raises:
        MedheadError: no heads, heads of another model, or a tree deeper than the heads.
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
        least: float | None = None,
    ) -> None:
        if heads is None:
            raise MedheadError("the proposer 'heads' needs heads: give the folder of a heads checkpoint (--heads)")
        self.heads = heads if isinstance(heads, Heads) else load_heads(heads, target)
        config = self.heads.config
        default = config.tree_depth or config.depth
        self.shape = None if shape is None else StaticShape(shape, target.device)
        width = config.tree_width if width is None else width
        branching = config.tree_branching if branching is None else branching
        wanted = self.shape.depth if self.shape else (default if max_depth is None else max_depth)
        if wanted > config.depth:
            raise MedheadError(
                f"the tree is {wanted} deep, but these heads guess {config.depth} tokens ahead; "
                f"use a depth of at most {config.depth}"
            )
        if wanted < 1 or width < 1 or branching < 1:
            raise MedheadError(f"depth, width and branching must be at least 1, got {wanted}, {width} and {branching}")
        if not sharpness > 0:
            raise MedheadError(f"sharpness must be above 0, got {sharpness}")
        if least is not None and not 0 <= least < 1:
            raise MedheadError(f"least must be a probability from 0 to below 1, got {least}")
        self.sharpness, self._given_least, self._sized = sharpness, least, tree_size is not None
        self._level, self._token = 0.0, 1.0  # seconds that a level of heads takes, and a token of the target
        self.max_depth = wanted
        self.feature_layers = tuple(config.feature_layers)
        self.width, self.branching, self.uses_noise = width, branching, rank_by_noise
        size = config.tree_size if tree_size is None else tree_size
        self.tree_size = self.shape.nodes if self.shape else size
        self.output_head = shared_output_head(self.heads, target, dtype)
        self.heads = self.output_head.heads
        wanted_packed = fits(self.output_head.packable_bytes) if target.packed is None else target.packed
        if wanted_packed and target.device.type == "cpu":
            self.output_head.pack()
        self._compiled: dict[int, tuple[Any, tuple[int, ...]]] = {}  # by number of arguments: greedy, or with noise

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Look again at how weights are multiplied: the number of threads may have changed."""
        self.output_head.recheck()

    def new_draft_cache(self, lengths: Lengths, capacity: int) -> LazyDraftCache | None:
        """Return storage for heads that look back at the text."""
        cache = self.heads.new_draft_cache(self.output_head.dtype, lengths, capacity)
        return None if cache is None else LazyDraftCache(cache, self._encode_entries, self._embed_next)

    def _encode_entries(self, features: Tensor, token: Tensor, positions: Tensor, longest: int) -> Tensor:
        return self.heads.encode_cache_entry(features.to(self.output_head.dtype), token, positions, longest)

    def _embed_next(self, tokens: Tensor) -> Tensor:
        return self.output_head.token(tokens, 0)

    def on_prefill(
        self, draft_cache: LazyDraftCache | None, texts: list[list[int]], features: Tensor, start: int
    ) -> None:
        """Keep what the heads look back at of a chunk of the prompts."""
        if draft_cache is None:
            return
        count = features.shape[1]
        following = torch.zeros(len(texts), count, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens = text[start + 1 : start + 1 + count]
            following[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        counts = torch.tensor([min(count, max(0, len(text) - 1 - start)) for text in texts], device=features.device)
        draft_cache.write(features, following.to(features.device), counts)

    def update_draft_cache(
        self, draft_cache: LazyDraftCache, features: Tensor, emitted: Tensor, counts: Tensor
    ) -> None:
        """Keep what the heads look back at of the accepted nodes; those of plain decoding are written together, later."""
        if emitted.shape[1] == 1 and draft_cache.cache.lengths.host is not None:
            draft_cache.write_later(features, emitted)
        else:
            draft_cache.write(features, emitted, counts)

    def update(self, output: VerifyOutput) -> None:
        """Learn what a token of the target costs."""
        if output.seconds:
            token = output.seconds * len(output.counts) / sum(output.counts)
            self._token = token if self._token == 1.0 else self._token + _FOLLOW * (token - self._token)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return a tree for every sequence, ranked by the heads and, when sampling, by the noise of the coming positions."""
        depth = min(max_depth, self.max_depth, self.tree_size - 1)
        if depth < 1:
            return TokenTree.root(state.roots)
        if self.shape is not None:
            return self.shape.fill(state.roots, self._expander(state, self.shape.widest, depth), depth)
        expander = self._expander(state, min(self.branching, self.tree_size - 1), depth)
        return grow_tree(state.roots, expander, self.tree_size, depth, self.width, not state.fixed)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """What the heads name at every node of the frontiers; with a given size, as deep as its nodes may reach."""
        depth = min(max_depth, self.max_depth)
        if depth < 1:
            return None
        began = time.perf_counter()
        found = self._grown(state, depth)
        level = (time.perf_counter() - began) / len(found.levels)
        self._level = self._level + _FOLLOW * (level - self._level) if self._level else level
        return found

    def free(self) -> None:
        """Give packed copies of the heads' weights back."""
        self.output_head.free()

    @property
    def packed_bytes(self) -> int:  # type: ignore[override]
        """DraftCacheView of packed copies of the heads' weights."""
        return self.output_head.nbytes

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """Whether the heads keep plain entries of the text, or nothing."""
        return self.heads.has_tensor_cache

    # ---------------------------------------------------------------- inside

    def _grown(self, state: DecodeState, depth: int) -> Candidates:
        nodes = self.tree_size if self._sized else None
        if len(state.roots) == 1 and state.draft_cache is None and depth == self.max_depth and state.target.compiles:
            return self._grown_compiled(state, depth)
        expander = self._expander(state, self.branching, depth)
        return grow(state.roots, expander, depth, self.width, nodes, least=self.least)

    def _grown_compiled(self, state: DecodeState, depth: int) -> Candidates:
        """The same as one compiled function, which always looks as deep as it can."""
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
            levels = run(*given)[3]  # eagerly, before anything is written down: tables are made
            compiled = state.target.compiled("the guesses of the heads", lambda *tensors: run(*tensors)[:3], given)
            self._compiled[len(given)] = compiled, levels
        compiled, levels = self._compiled[len(given)]
        tokens, parent_index, scores = compiled(*given)
        return Candidates(tokens, parent_index, scores, levels)

    @property
    def least(self) -> float:
        """Probability of a path below which looking further costs more than it brings."""
        if self._given_least is not None:
            return self._given_least
        if self._sized:
            return 0.0
        if not self._level:
            return LIKELY  # not measured yet
        return min(LIKELY, max(UNLIKELY, _WORTH * self._level / self._token))

    def _expander(self, state: DecodeState, branching: int, depth: int) -> HeadsExpander:
        view = None if state.draft_cache is None else state.draft_cache.view()
        return HeadsExpander(self.output_head, state, view, branching, depth, *self._ranking(state))

    def _ranking(self, state: DecodeState) -> tuple[LazyGumbel | None, float]:
        """GumbelNoise to rank by, and what log-probabilities are multiplied by without."""
        return (state.noise if self.uses_noise else None), (self.sharpness if state.noise is None else 1.0)


class HeadsExpander:
    """Children of a frontier by the heads, for `growth.grow_tree` and `static_tree.StaticShape.fill`."""

    def __init__(
        self,
        output_head: OutputHead,
        state: DecodeState,
        memory: Any,
        branching: int,
        depth: int,
        noise: LazyGumbel | None,
        sharpness: float = 1.0,
    ) -> None:
        self.output_head, self.state, self.memory = output_head, state, memory
        self.branching, self.depth, self.sharpness = branching, depth, sharpness
        self.noise = noise

    def start(self) -> Tensor:
        """`[batch, 1, state]`: the heads' state above the root."""
        output_head, state = self.output_head, self.state
        self._root = output_head.token(state.roots[:, None], 0)
        features = state.features.to(output_head.dtype)[:, None]
        above, self._shared = output_head.heads.init_state(features, self._root, self.memory, self.depth)
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
