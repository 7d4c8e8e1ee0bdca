"""Trees of several proposers at once, no larger than pays.

Every member proposes candidates with probabilities, which are corrected by what was accepted before (`Calibration`). Equal
paths are merged, and the most probable nodes are the tree, as many as `TreeSizeController` chooses. Expensive members, the
heads, are asked only where the candidates of the others leave something to gain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from medhead.core.lengths import Lengths
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, build_proposer, register_proposer
from medhead.proposers.calibration import Calibration
from medhead.proposers.candidates import Candidates, merge
from medhead.scheduling.cost_model import MAX_NODES, CostModel, costs_batch, get_costs, known_costs, moving_mean
from medhead.scheduling.expert_bytes import ExpertBytes
from medhead.scheduling.tree_size import TreeSizeController

if TYPE_CHECKING:
    from medhead.model.target import Target
    from medhead.proposers.trie import DraftTrie

_ERROR_FACTOR = 2.0  # actual share of wrong tokens / estimated share
_MIN_MULTIPLE = 2.0  # expensive members are left out only for trees that promise so many times what they gain
# tensor parallel processes measure different times, from which they would choose different sizes
_SHARDED_TREE_SIZE = 16
_CAPTURED_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of a captured step's tree where the size is automatic
_CAPTURED_TOKENS = 256  # of all rows, up to which a GPU takes hardly longer than to read the weights
_DOUBLING_GAIN = 0.45  # tokens by which the accepted length grows where the tree's size doubles
_OWNERS = {"datastore": "ngram", "tokenizer": "ngram", "state": "recycling"}  # of options; all others are of heads


class Plan(NamedTuple):
    """The number of nodes of a tree, its expected tokens per second, and its expected number of accepted draft tokens."""

    nodes: int
    rate: float = 0.0
    gain: float = 0.0


@register_proposer("hybrid")
class HybridProposer(Proposer):
    """Several proposers, one tree.

    Args:
        target: the target.
        heads: heads for the member `heads`, see `HeadsProposer`.
        tree_size: number of nodes of every tree, root included; None adapts it to what pays (16 with tensor parallelism).
        members: names of registered proposers, or proposers; by default `heads` and `ngram`, or without heads `ngram` and
            `recycling`.
        costs: cost of a pass; None reads it from the user's cache or measures it.
        clock: returns the time in seconds.
        options: further options of the members: `datastore` and `tokenizer` of `ngram`, `state` of `recycling`, all others
            of `heads`.

    Raises:
        MedheadError: there are no members, a member gives no candidates, or two members read different layers.
    """

    def __init__(
        self,
        target: Target,
        heads: Any = None,
        tree_size: int | None = None,
        members: list[str | Proposer] | None = None,
        costs: CostModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        if members is None:
            members = ["ngram", "recycling"] if heads is None else ["heads", "ngram"]
        if tree_size is None and target.shards is not None:
            tree_size = _SHARDED_TREE_SIZE
        unused = sorted(key for key in options if _OWNERS.get(key, "heads") not in members)
        if unused:
            raise MedheadError(f"no member of the hybrid takes the options {', '.join(unused)}; leave them out")
        options |= {"heads": heads, "tree_size": tree_size, "clock": clock}
        self.members = [_build_member(member, target, options) for member in members]
        if not self.members:
            raise MedheadError("a hybrid needs at least one member, got none")
        self.calibrations = [Calibration() for _ in self.members]
        self.adapts = tree_size is None
        self.tree_size = MAX_NODES if tree_size is None else tree_size
        self.max_depth = max(member.max_depth for member in self.members)
        self.uses_noise = any(member.uses_noise for member in self.members)
        layers = {tuple(one.feature_layers) for one in self.members if one.feature_layers or one.name == "heads"}
        if len(layers) > 1:
            raise MedheadError(f"members of a hybrid must read the same layers of the target, got {sorted(layers)}")
        self.feature_layers = next(iter(layers), ())
        self.controller: TreeSizeController | None = None
        self.clock, self._given_costs = clock, costs
        self._experts = ExpertBytes.of(target.model)
        self._costs: dict[int, CostModel | None] = {}  # by batch class; None where nothing is in the user's cache
        self._proposed: list[Candidates | None] = [None] * len(self.members)
        self._corrected: list[Candidates] = []
        self._began, self._asked = 0.0, False  # of the running step; whether expensive members were asked
        self._ask_seconds: float | None = None  # that expensive members take
        self._ask_gain: float | None = None  # draft tokens accepted in passes in which they were asked

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """Whether all members are, and at most one, heads, has a draft cache."""
        heads = sum(member.draft_key != () for member in self.members)
        return heads < 2 and all(member.capturable for member in self.members)

    @property
    def takes_drafts(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(member.takes_drafts for member in self.members)

    @property
    def captured_depth(self) -> int:
        """That of the deepest member."""
        return max(member.captured_depth for member in self.members)

    def host_tries(self, texts: list[list[int]]) -> list[DraftTrie]:
        """Return the draft tokens of all members that make them on the host."""
        first, *others = [member.host_tries(texts) for member in self.members if member.takes_drafts]
        for other in others:
            for trie, more in zip(first, other, strict=True):
                trie.merge(more)
        return first

    def update_captured(self, output: VerifyOutput) -> None:
        """Let members learn; calibrations and the controller learn from steps of the ordinary loop alone."""
        for member in self.members:
            member.update_captured(output)

    def free(self) -> None:
        """Release the memory that members keep only for speed."""
        for member in self.members:
            member.free()

    @property
    def packed_bytes(self) -> int:  # type: ignore[override]
        """Memory of packed copies of all members' weights."""
        return sum(member.packed_bytes for member in self.members)

    @property
    def draft_key(self) -> Hashable | None:
        """The keys of all members with a draft cache; None if a member has none."""
        keys = [member.draft_key for member in self.members]
        return None if None in keys else tuple(key for key in keys if key != ())

    @property
    def next_depth(self) -> int:
        """Depth of the deepest tree that the controller may choose now; 0 during a pause."""
        return self.max_depth if self.controller is None else min(self.max_depth, self.controller.max_depth)

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Begin a generation; controller and calibrations keep what they learnt."""
        for member in self.members:
            member.begin(target, texts)
        self._target, self._rows = target, len(texts)
        if self.adapts:
            costs, batch = self._costs_of(len(texts), measure=True), costs_batch(len(texts))
            assert costs is not None
            if self.controller is None:
                self.controller = TreeSizeController(costs, self.tree_size, batch)
            self.controller.begin_text(costs, batch)

    def _costs_of(self, rows: int, measure: bool) -> CostModel | None:
        """Return the cost of a pass over so many rows; None if it is not known and may not be measured now."""
        batch = costs_batch(rows)
        if self._costs.get(batch) is None and (measure or batch not in self._costs):
            read = get_costs if measure else known_costs
            self._costs[batch] = self._given_costs or read(self._target, batch)
        return self._costs[batch]

    def new_draft_cache(self, lengths: Lengths, capacity: int) -> MemberDraftCaches | None:
        """Return the draft caches of all members, None if no member has one."""
        caches = [member.new_draft_cache(lengths, capacity) for member in self.members]
        return None if all(cache is None for cache in caches) else MemberDraftCaches(caches)

    def on_prefill(
        self, draft_cache: MemberDraftCaches | None, texts: list[list[int]], features: Tensor, start: int
    ) -> None:
        """Let all members read the prompts."""
        for member, cache in self._with_caches(draft_cache):
            member.on_prefill(cache, texts, features, start)

    def update_draft_cache(
        self, draft_cache: MemberDraftCaches, features: Tensor, emitted: Tensor, counts: Tensor
    ) -> None:
        """Update the draft caches of all members that have one."""
        for member, cache in self._with_caches(draft_cache):
            if cache is not None:
                member.update_draft_cache(cache, features, emitted, counts)

    def _with_caches(self, draft_cache: MemberDraftCaches | None) -> list[tuple[Proposer, Any]]:
        return list(zip(self.members, draft_cache or [None] * len(self.members), strict=True))

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return the most probable candidates of all members, as many as pay; in a captured step a fixed number."""
        if state.fixed:
            return self._propose_captured(state, max_depth)
        self._proposed, self._corrected = [None] * len(self.members), []
        self._began, self._asked = self.clock(), False
        if max_depth < 1 or (self.controller is not None and self.controller.is_paused):
            return TokenTree.root(state.roots)
        rows = len(state.texts)
        self._ask(state, max_depth, is_expensive=False)
        merged, plan = self._plan(rows)
        self._asked = self._pays_to_ask(merged, plan, rows)
        if self._asked:
            began = self.clock()
            self._ask(state, max_depth, is_expensive=True)
            self._ask_seconds = moving_mean(self._ask_seconds, self.clock() - began)
            merged, plan = self._plan(rows)
        return TokenTree.root(state.roots) if merged is None else merged.best_tree(state.roots, plan.nodes)

    def _propose_captured(self, state: DecodeState, max_depth: int) -> TokenTree:
        found = []
        for member, cache in self._with_caches(state.draft_cache):
            proposed = member.candidates(replace(state, draft_cache=cache), max_depth)
            found += [] if proposed is None else [proposed]
        nodes = captured_nodes(self._experts, len(state.roots)) if self.adapts else self.tree_size
        return merge(found).best_tree(state.roots, nodes) if found else TokenTree.root(state.roots)

    def _ask(self, state: DecodeState, max_depth: int, is_expensive: bool) -> None:
        """Collect the candidates of the members that are expensive, or of those that are not."""
        for place, (member, cache) in enumerate(self._with_caches(state.draft_cache)):
            if member.is_expensive == is_expensive:
                given = state if cache is None else replace(state, draft_cache=cache)
                proposed = self._proposed[place] = member.candidates(given, max_depth)
                if proposed is not None:
                    self._corrected.append(self.calibrations[place].correct(proposed))

    def _plan(self, rows: int) -> tuple[Candidates | None, Plan]:
        """Return all candidates so far, and the plan of their tree."""
        if not self._corrected:
            return None, Plan(1)
        merged = merge(self._corrected)
        if self.controller is None:
            return merged, Plan(min(self.tree_size, 1 + merged.num_possible()))
        probs = merged.top_probs(self.controller.sizes[-1] - 1).sum(0).tolist()
        nodes, rate = self.controller.choose(probs, rows, self.clock() - self._began)
        return merged, Plan(nodes, rate, sum(probs[: nodes - 1]))

    def _pays_to_ask(self, merged: Candidates | None, plan: Plan, rows: int) -> bool:
        """Return whether the gain of expensive members, where the others are wrong, has a better rate than the planned tree.

        They are left out only for a tree that promises a multiple of their gain.
        """
        if not any(member.is_expensive for member in self.members):
            return False
        if self.controller is None or merged is None or self._ask_seconds is None or self._ask_gain is None:
            return True
        if plan.gain < _MIN_MULTIPLE * rows * self._ask_gain:
            return True
        right = float(merged.scores[:, : merged.levels[0]].exp().sum(1).clamp(max=1).sum())
        return _ERROR_FACTOR * (rows - right) * self._ask_gain > plan.rate * self._ask_seconds

    def update(self, output: VerifyOutput) -> None:
        """Let members, calibrations and the controller learn from a pass."""
        skips = self.controller is not None and self.controller.may_skip_updates
        for member in self.members:
            if not (skips and member.skippable):
                member.update(output)
        for calibration, proposed in zip(self.calibrations, self._proposed, strict=True):
            if proposed is not None:
                calibration.update(proposed, output.emitted, output.counts)
        tokens = sum(output.counts) / len(output.counts)
        if self._asked:
            self._ask_gain = moving_mean(self._ask_gain, tokens - 1)
        if self.controller is not None and output.seconds:  # none where the prompt's pass gave the token
            other = max(0.0, self.clock() - self._began - output.seconds)
            self.controller.update(output.tree.nodes, tokens, output.seconds, other)

    def keep_rows(self, rows: list[int]) -> None:
        """Keep only these rows."""
        for member in self.members:
            member.keep_rows(rows)
        self._set_rows(len(rows))

    def fork(self) -> HybridProposer:
        """Return a hybrid of the members' forks, with a controller of its own."""
        copied = copy(self)
        copied.members, copied.controller = [member.fork() for member in self.members], None
        return copied

    def merge(self, forked: HybridProposer) -> None:
        """Append the rows of a fork to all members."""
        for member, joining in zip(self.members, forked.members, strict=True):
            member.merge(joining)
        self._set_rows(self._rows + forked._rows)

    def _set_rows(self, rows: int) -> None:
        self._rows = rows
        if self.controller is not None:  # nothing is measured in the middle of a text: the last costs are close enough
            costs = self._costs_of(rows, measure=False) or self.controller.costs
            self.controller.set_batch(costs, costs_batch(rows))

    def warmup(self, target: Target, rows: int) -> None:
        """Measure the costs of passes over 1, 2, 4 ... rows where they are not known, and warm up the members."""
        self._target = target
        for member in self.members:
            member.warmup(target, rows)
        if self.adapts:
            for batch in {costs_batch(count) for count in range(1, rows + 1)}:
                self._costs_of(batch, measure=True)

    def origins(self, tree: TokenTree, row: int) -> list[str]:
        """Return for every node the member that gave its path the largest probability."""
        both = zip(self.members, self._proposed, strict=True)
        known = [(member.name, proposed.paths(row)) for member, proposed in both if proposed is not None]
        found = ["root"]
        for path in tree.paths_to(row)[1:]:
            names = [(paths[path], name) for name, paths in known if path in paths]
            found.append(max(names)[1] if names else self.name)
        return found


def captured_nodes(experts: ExpertBytes | None, rows: int) -> int:
    """Return the number of nodes of captured trees for so many sequences: those with the best rate by the bytes they read.

    `experts` are those of the target, None without any: then the weights are read once, whatever the number of nodes.
    """

    def rate(nodes: int) -> float:
        gain = 1 + _DOUBLING_GAIN * math.log2(nodes)
        return gain if experts is None else gain / experts(rows * nodes)

    return max((nodes for nodes in _CAPTURED_SIZES if rows * nodes <= max(rows, _CAPTURED_TOKENS)), key=rate)


class MemberDraftCaches(list[Any]):
    """The draft caches of a hybrid's members, None for a member without one."""

    @property
    def cache(self) -> Any:
        """The storage of the one member that has any; captured steps serve no hybrid in which several have."""
        return self._one.cache

    @property
    def _one(self) -> Any:
        (found,) = [cache for cache in self if cache is not None]
        return found

    def over(self, cache: Any) -> MemberDraftCaches:
        """Return the same over another storage."""
        return MemberDraftCaches([None if one is None else one.over(cache) for one in self])

    def flush(self) -> None:
        """See `LazyDraftCache.flush`."""
        self._one.flush()

    def keep_rows(self, rows: list[int]) -> None:
        """Keep only these rows."""
        for cache in self:
            if cache is not None:
                cache.keep_rows(rows)

    def copy_tokens(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `DraftCache.copy_tokens`."""
        return [part for cache in self if cache is not None for part in cache.copy_tokens(row, begin, end)]

    def load_tokens(self, row: int, parts: Iterator[Tensor]) -> None:
        """See `DraftCache.load_tokens`."""
        for cache in self:
            if cache is not None:
                cache.load_tokens(row, parts)

    def join(self, other: MemberDraftCaches) -> None:
        """Append the rows of other draft caches of these members."""
        for cache, joining in zip(self, other, strict=True):
            if cache is not None:
                cache.join(joining)


def _build_member(member: str | Proposer, target: Target, options: dict[str, Any]) -> Proposer:
    """Return a member, built with its share of the options if it is given by name."""
    if isinstance(member, str):
        own = {key: value for key, value in options.items() if _OWNERS.get(key, "heads") == member}
        member = build_proposer(member, target, **own)
    if type(member).candidates is Proposer.candidates:
        raise MedheadError(f"the proposer {member.name!r} gives no candidates, so it cannot be part of a hybrid")
    return member
