"""Trees of several proposers at once, no larger than pays.

Every member names candidates with estimates; the estimates are corrected by what was really accepted (`Calibration`);
equal paths are merged; the likeliest nodes are the tree, as many as `TreeSizeController` says. Heads are only asked
where what cheaper members name leaves something to gain.
"""

from __future__ import annotations

import time
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from medhead.core.lengths import Lengths
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import (
    DecodeState,
    Proposer,
    VerifyOutput,
    build_proposer,
    register_proposer,
)
from medhead.proposers.calibration import Calibration
from medhead.proposers.candidates import Candidates, merge
from medhead.scheduling.cost_model import CostModel, costs_batch, costs_of, known_costs
from medhead.scheduling.tree_size import TreeSizeController

if TYPE_CHECKING:
    from medhead.model.target import Target

MOST_NODES = 64
_FOLLOW = 0.1  # weight of the newest pass
_DOUBT = 2.0  # how often what looks certain is wrong, by what the estimates say
_MULTIPLE = 2.0  # of what is_expensive members bring
OWNERS = {"datastore": "ngram", "tokenizer": "ngram", "warm": "recycling"}  # of options; all others are of heads


class Expected(NamedTuple):
    """Nodes of a tree, tokens a second that are expected of it, and how many guesses are expected to come true."""

    nodes: int
    rate: float = 0.0
    gain: float = 0.0


@register_proposer("hybrid")
class HybridProposer(Proposer):
    """Several proposers, one tree.

    Args:
        target: the target.
        heads: heads for the member `heads`, see `HeadsProposer`.
        tree_size: nodes of every tree, root included; None adapts them to what pays.
        members: names of registered proposers, or proposers; by default heads (if given), `ngram` and `recycling`.
        costs: of a pass, for tests and tuned settings; measured (or taken from the user's cache) if None.
        options: further options of the members: `datastore` and `tokenizer` of `ngram`, `warm` of `recycling`, all others
            of `heads`.

    Raises:
        MedheadError: no members, a member that names no candidates, or two members that read different layers.
    """

    def __init__(
        self,
        target: Target,
        heads: Any = None,
        tree_size: int | None = None,
        members: list[str | Proposer] | None = None,
        costs: CostModel | None = None,
        **options: Any,
    ) -> None:
        if members is None:
            members = ["ngram", "recycling"] if heads is None else ["heads", "ngram"]
        names = {member if isinstance(member, str) else "" for member in members}
        lost = sorted(key for key in options if OWNERS.get(key, "heads") not in names)
        if lost:
            raise MedheadError(f"{', '.join(lost)}: no member of the hybrid takes this option")
        self.members = [self._member(member, target, heads, options, tree_size) for member in members]
        if not self.members:
            raise MedheadError("a hybrid needs at least one member, got none")
        self.calibrations = [Calibration() for _ in self.members]
        self.adapts = tree_size is None
        self.tree_size = MOST_NODES if tree_size is None else tree_size
        self.max_depth = max(member.max_depth for member in self.members)
        self.uses_noise = any(member.uses_noise for member in self.members)
        feature_layers = {
            tuple(member.feature_layers) for member in self.members if member.feature_layers or member.name == "heads"
        }
        if len(feature_layers) > 1:
            raise MedheadError(
                f"members of a hybrid read one set of layers of the target, got {sorted(feature_layers)}"
            )
        self.feature_layers = next(iter(feature_layers), ())
        self._given, self._costs = costs, dict[int, CostModel | None]()  # by rows; None where nobody has measured
        self.budget: TreeSizeController | None = None
        self._named: list[Candidates | None] = [None] * len(self.members)
        self._corrected: list[Candidates] = []  # the same, by what those who named any can be trusted with
        self._began, self._asked = (
            0.0,
            False,
        )  # the running step: when it began, whether is_expensive members were asked
        self._asking: float | None = None  # seconds
        self._brought: float | None = None  # tokens of a pass in which they were asked, the last one not counted

    @staticmethod
    def _member(
        member: str | Proposer, target: Target, heads: Any, options: dict[str, Any], tree_size: int | None
    ) -> Proposer:
        if isinstance(member, str):
            mine = {key: value for key, value in options.items() if OWNERS.get(key, "heads") == member}
            if member == "heads":
                mine |= {"heads": heads, "tree_size": tree_size}
            member = build_proposer(member, target, **mine)
        if type(member).candidates is Proposer.candidates:
            raise MedheadError(f"the proposer {member.name!r} names no candidates, so it cannot be part of a hybrid")
        return member

    def free(self) -> None:
        """All members give back."""
        for member in self.members:
            member.free()

    @property
    def packed_bytes(self) -> int:  # type: ignore[override]
        """All members' together."""
        return sum(member.packed_bytes for member in self.members)

    @property
    def next_depth(self) -> int:
        """None while it rests, and no deeper than what it would choose now."""
        return self.max_depth if self.budget is None else min(self.max_depth, self.budget.deepest())

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Members begin; budget and calibrations go on with what they learnt."""
        for member in self.members:
            member.begin(target, texts)
        self._target, self._rows = target, len(texts)
        if self.adapts:
            costs = self._measured(len(texts))
            if self.budget is None:
                self.budget = TreeSizeController(costs, self.tree_size, costs_batch(len(texts)))
            self.budget.again(costs, costs_batch(len(texts)))

    def _measured(self, rows: int) -> CostModel:
        """Costs of a pass over so many rows; they are kept for 1, 2, 4, 8 ... rows."""
        batch = costs_batch(rows)
        costs = self._costs.get(batch) or self._given or costs_of(self._target, batch, self.tree_size)
        self._costs[batch] = costs
        return costs

    def _known(self, rows: int) -> CostModel | None:
        """The same where nothing may be measured: in the midst of a text."""
        batch = costs_batch(rows)
        if batch not in self._costs:
            self._costs[batch] = self._given or known_costs(self._target, batch, self.tree_size)
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
        caches = [None] * len(self.members) if draft_cache is None else draft_cache.caches
        return list(zip(self.members, caches, strict=True))

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """The likeliest candidates of all members, as many as pay."""
        self._named, self._corrected = [None] * len(self.members), []
        self._began, self._asked = time.perf_counter(), False
        if max_depth < 1 or (self.budget is not None and self.budget.resting()):
            return TokenTree.root(state.roots)
        self._ask(state, max_depth, is_expensive=False)
        found, rows = self._merged(), len(state.texts)
        expected = None if found is None else self._expected(found, rows)
        self._asked = self._pays_to_ask(found, expected, rows)
        if self._asked:
            began = time.perf_counter()
            self._ask(state, max_depth, is_expensive=True)
            self._asking = _followed(self._asking, time.perf_counter() - began)
            found = self._merged()
            expected = None if found is None else self._expected(found, rows)
        if found is None or expected is None:
            return TokenTree.root(state.roots)
        return found.best(state.roots, expected.nodes)

    def _ask(self, state: DecodeState, max_depth: int, is_expensive: bool) -> None:
        for place, (member, cache) in enumerate(self._with_caches(state.draft_cache)):
            if member.is_expensive != is_expensive:
                continue
            named = self._named[place] = member.candidates(
                state if cache is None else replace(state, draft_cache=cache), max_depth
            )
            if named is not None:
                self._corrected.append(self.calibrations[place].correct(named))

    def _merged(self) -> Candidates | None:
        """All that was named so far."""
        return merge(self._corrected) if self._corrected else None

    def _pays_to_ask(self, found: Candidates | None, expected: Expected | None, rows: int) -> bool:
        """Whether is_expensive members are worth their time, beside what the others have named.

        Where those are right, expensive ones add nothing; where they are wrong, what expensive ones brought lately. That many tokens
        for the time of asking must be a better rate than the pass has without them. And who promises little is not believed:
        is_expensive members are only left out for a tree that promises a multiple of what they bring.
        """
        if not any(member.is_expensive for member in self.members):
            return False
        if self.budget is None or found is None or expected is None or self._asking is None or self._brought is None:
            return True
        if expected.gain < _MULTIPLE * rows * self._brought:
            return True
        sure = float(found.scores[:, : found.levels[0]].exp().sum(1).clamp(max=1).sum())
        return _DOUBT * (rows - sure) * self._brought > expected.rate * self._asking

    def _expected(self, found: Candidates, rows: int) -> Expected:
        """What the tree of these candidates would be, and bring."""
        if self.budget is None:
            return Expected(self.tree_size)
        gains = found.gains(self.budget.most - 1).sum(0).tolist()
        nodes, rate = self.budget.choose(gains, rows, time.perf_counter() - self._began)
        return Expected(nodes, rate, sum(gains[: nodes - 1]))

    def update(self, verified: VerifyOutput) -> None:
        """Members see the pass; calibrations and budget learn from it."""
        asleep = self.budget is not None and self.budget.asleep()
        for member in self.members:
            if not (asleep and member.skippable):
                member.update(verified)
        counts = verified.counts
        for calibration, named in zip(self.calibrations, self._named, strict=True):
            if named is not None:
                calibration.learn(named, verified.emitted, counts)
        tokens = sum(counts) / len(counts)
        if self._asked:
            self._brought = _followed(self._brought, tokens - 1)
        if self.budget is not None:
            self.budget.saw(verified.tree.nodes, tokens, verified.seconds, self._outside(verified))

    def _outside(self, verified: VerifyOutput) -> float:
        """Seconds of the step so far that were not the pass."""
        return max(0.0, time.perf_counter() - self._began - verified.seconds)

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""
        for member in self.members:
            member.keep_rows(rows)
        self._now_rows(len(rows))

    def fork(self) -> HybridProposer:
        """Newcomers of all members."""
        copied = copy(self)
        copied.members, copied.budget = [member.fork() for member in self.members], None
        return copied

    def merge(self, newcomers: HybridProposer) -> None:
        """Rows join all members."""
        for member, joining in zip(self.members, newcomers.members, strict=True):
            member.merge(joining)
        self._now_rows(self._rows + newcomers._rows)

    def _now_rows(self, rows: int) -> None:
        self._rows = rows
        if self.budget is None:
            return
        self.budget.rows_change(
            self._known(rows) or self.budget.costs, costs_batch(rows)
        )  # those of before are near enough

    def warmup(self, target: Target, rows: int) -> None:
        """Measure what passes over 1, 2, 4 ... rows cost, where that is not known; members do the same with theirs."""
        self._target = target
        for member in self.members:
            member.warmup(target, rows)
        if self.adapts:
            for batch in {costs_batch(count) for count in range(1, rows + 1)}:
                self._measured(batch)

    def origins(self, tree: TokenTree, row: int) -> list[str]:
        """The member that thinks most of a node's path."""
        known = [
            (member.name, named.paths(row))
            for member, named in zip(self.members, self._named, strict=True)
            if named is not None
        ]
        found = ["root"]
        for path in tree.paths_to(row)[1:]:
            names = [(paths[path], name) for name, paths in known if path in paths]
            found.append(max(names)[1] if names else self.name)
        return found


@dataclass
class MemberDraftCaches:
    """The draft caches of a hybrid's members, None for a member without one."""

    caches: list[Any]

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        for cache in self.caches:
            if cache is not None:
                cache.keep_rows(rows)

    def join(self, other: MemberDraftCaches) -> None:
        """Append the rows of other draft caches of these members."""
        for cache, joining in zip(self.caches, other.caches, strict=True):
            if cache is not None:
                cache.join(joining)


def _followed(known: float | None, new: float) -> float:
    """A mean in which the newest counts a tenth."""
    return new if known is None else known + _FOLLOW * (new - known)
