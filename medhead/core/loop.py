"""The decode loop: propose, verify, accept, commit; for batches of ragged rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from medhead.core.acceptance import Accepted, accept, accept_typical, pick
from medhead.core.gumbel import LazyGumbel, chunk_size
from medhead.core.sampling import draw_nodes, is_local, process_nodes, temperature_of
from medhead.core.sequence import Sequence, Settings
from medhead.core.sequential_accept import walk
from medhead.core.tree import TokenTree
from medhead.model.kv_cache import TreeCache, compact_order
from medhead.model.target import Target
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput


@dataclass
class StepTimes:
    """Seconds spent in each part of all steps; captured steps, which are not taken apart, count as `whole`."""

    propose: float = 0.0
    forward: float = 0.0
    accept: float = 0.0
    commit: float = 0.0
    other: float = 0.0
    whole: float = 0.0

    def total(self) -> float:
        """All parts together."""
        return self.propose + self.forward + self.accept + self.commit + self.other + self.whole


class DecodeLoop:
    """Decodes rows until all have ended.

    Args:
        target: the target, active (see `Target.active`).
        proposer: what fills the trees.
        settings: sampling, stopping and recording, for rows that have none of their own.

    Attributes:
        rows: the rows that still run.
        verified: what the last step found, by place in `rows` as it was before that step.
    """

    def __init__(self, target: Target, proposer: Proposer, settings: Settings) -> None:
        self.target, self.proposer, self.settings = target, proposer, settings
        self.local = is_local(settings.processors)
        self.temperature: float | Tensor = temperature_of(settings.processors)
        self.times = StepTimes()
        self.prefill_seconds, self.capture_seconds = 0.0, 0.0
        self.cache_bytes = 0
        self.rows: list[Sequence] = []
        self.verified: VerifyOutput | None = None

    def run(self, rows: list[Sequence]) -> None:
        """Decode all rows to their end; their `output` grows as they go."""
        self.start(rows)
        while self.rows:
            self.step()
        self.cache_bytes = max(self.cache_bytes, self.cache.nbytes())

    def start(self, rows: list[Sequence]) -> None:
        """Read the prompts of the first rows."""
        began = self._now()
        self.proposer.begin(self.target, [row.text for row in rows])
        self.cache, self._features = self._prefill(rows, self.proposer)
        self._roots = self._last_tokens(rows)
        self.rows = rows
        self.prefill_seconds += self._now() - began

    def join(self, rows: list[Sequence]) -> None:
        """Read the prompts of more rows; from the next step on they are decoded with the others."""
        if not self.rows:
            return self.start(rows)
        began = self._now()
        newcomers = self.proposer.fork()
        newcomers.begin(self.target, [row.text for row in rows])
        cache, features = self._prefill(rows, newcomers)
        self.cache.join(cache)
        self.proposer.merge(newcomers)
        self._features = torch.cat([self._features, features.to(self._features.dtype)])
        self._roots = torch.cat([self._roots, self._last_tokens(rows)])
        self.rows = self.rows + rows
        self.prefill_seconds += self._now() - began
        return None

    def keep(self, places: list[int]) -> None:
        """Only the rows at these places go on, in any order."""
        if len(places) == len(self.rows):
            return
        self.cache_bytes = max(self.cache_bytes, self.cache.nbytes())
        places = compact_order(places)
        self.rows = [self.rows[place] for place in places]
        if places:
            self._roots, self._features = self._roots[places], self._features[places]
            self.cache.keep_rows(places)
            self.proposer.keep_rows(places)

    def step(self) -> None:
        """One pass: propose, verify, accept, commit; rows that end leave."""
        times, started, rows = self.times, self._now(), self.rows
        noise = self._noise(rows)
        texts = [row.text for row in rows]
        state = DecodeState(self.target, texts, self._roots, self._features, noise, self._temperature(rows))
        began = self._now()
        tree = self.proposer.propose(state, self._depth_limit(rows))
        proposed = self._now()
        logits, features = self.target.verify(self.cache, tree)
        verified = self._now()
        accepted, scores = self._accept(rows, tree, logits, self._drawn_with(noise, tree))
        counts, emitted = accepted.counts.tolist(), accepted.emitted.tolist()  # the step's one read by the host
        decided = self._now()
        self.cache.commit(counts, accepted.path if tree.nodes > 1 else None)
        committed = self._now()
        self.verified = VerifyOutput(tree, logits, features, accepted, counts, emitted, decided - proposed)
        self.proposer.update(self.verified)
        raw = _along(accepted, logits) if self.settings.keep_logits else None
        running = self._emit(rows, counts, emitted, scores, raw)
        self._roots = accepted.emitted.gather(1, accepted.counts[:, None] - 1)[:, 0]
        self._features = pick(features, accepted.last)
        self.keep(running)
        ended = self._now()
        times.propose += proposed - began
        times.forward += verified - proposed
        times.accept += began - started + decided - verified  # making noise and drawing with it
        times.commit += committed - decided
        times.other += ended - committed

    # ---------------------------------------------------------------- inside

    def _prefill(self, rows: list[Sequence], proposer: Proposer) -> tuple[TreeCache, Tensor]:
        """A cache with the prompts but their last tokens, and the features above those."""
        longest = max(len(row.text) for row in rows)
        wanted = max(self._settings(row).stopper.limit for row in rows)
        cache = self.target.new_cache(len(rows), longest + min(wanted, 256) + proposer.tree_size)
        return cache, self.target.prefill(cache, [row.text[:-1] for row in rows], proposer.on_prefill)

    def _last_tokens(self, rows: list[Sequence]) -> Tensor:
        return torch.tensor([row.text[-1] for row in rows], device=self.target.device)

    def _settings(self, row: Sequence) -> Settings:
        return self.settings if row.own is None else row.own

    def _temperature(self, rows: list[Sequence]) -> float | Tensor:
        """What proposers divide logits by, a number or `[rows, 1, 1]`."""
        return self.temperature

    def _score(self, rows: list[Sequence], logits: Tensor) -> Tensor:
        """`[rows, nodes, vocab]`: what the draws are made from. Without processors the logits will do."""
        return process_nodes(self.settings.processors, logits) if self.settings.processors else logits

    def _accept(
        self, rows: list[Sequence], tree: TokenTree, logits: Tensor, noise: Tensor | None
    ) -> tuple[Accepted, list[list[Tensor]] | None]:
        """Walk the trees; also the processed scores of every emitted token where somebody wants them."""
        settings, rule = self.settings, self.settings.typical
        if not self.local:
            return walk(rows, tree, logits, noise, settings)
        scores = self._score(rows, logits)
        drawn = draw_nodes(tree, scores, noise)
        accepted = accept(tree, drawn) if rule is None else accept_typical(tree, drawn, scores.float(), rule)
        if not (settings.keep_scores or settings.stopper.asks_others):
            return accepted, None
        return accepted, _along(accepted, scores)

    def _emit(
        self,
        rows: list[Sequence],
        counts: list[int],
        emitted: list[list[int]],
        scores: list[list[Tensor]] | None = None,
        raw: list[list[Tensor]] | None = None,
    ) -> list[int]:
        """Hand every row its new tokens, cut where it ends; returns the places of the rows that go on."""
        running = []
        for place, row in enumerate(rows):
            settings = self._settings(row)
            of_tokens = scores[place] if scores is not None else None
            new = emitted[place][: counts[place]]
            new, ended = settings.stopper.take(row.padded + row.output, len(row.output), new, of_tokens)
            if settings.keep_scores and of_tokens is not None:
                row.scores += of_tokens[: len(new)]
            if settings.keep_logits and raw is not None:
                row.logits += raw[place][: len(new)]
            row.passes += 1
            row.output += new
            row.text += new
            if settings.on_tokens is not None:
                settings.on_tokens(row, new, ended)
            if not ended:
                running.append(place)
        return running

    def _depth_limit(self, rows: list[Sequence]) -> int:
        """No tree is deeper than what rows may still emit, or than the context."""
        wanted = max(self._settings(row).stopper.limit - len(row.output) for row in rows) - 1
        room = self.target.context - max(len(row.text) for row in rows) - 1
        return max(0, min(self.proposer.next_depth, wanted, room))

    def _noise(self, rows: list[Sequence]) -> LazyGumbel | None:
        """GumbelNoise of the positions that this step may draw."""
        generator, device = self.settings.noise, self.target.device
        if generator is None:
            return None
        first = torch.tensor([len(row.text) for row in rows], device=device)[:, None]
        index = torch.tensor([row.index for row in rows], device=device)[:, None]

        def make(begin: int, end: int) -> Tensor:
            return generator.gumbel(index, first + torch.arange(begin, end, device=device))

        return LazyGumbel(make, self._depth_limit(rows) + 1, chunk_size(len(rows), self.target.vocab_size, device))

    @staticmethod
    def _drawn_with(noise: LazyGumbel | None, tree: TokenTree) -> Tensor | None:
        """`[rows, depths, vocab]`: the noise of the nodes of a tree."""
        if noise is None:
            return None
        return noise.prefix(1 + (int(tree.depth.max()) if tree.depth.device.type == "cpu" else tree.max_depth))

    def _now(self) -> float:
        if self.settings.synchronize is not None:
            self.settings.synchronize()
        return time.perf_counter()


def _along(accepted: Accepted, values: Tensor) -> list[list[Tensor]]:
    """Float32 values of the nodes on every row's path, from `[batch, nodes, vocab]`."""
    return [list(values[place, path].float()) for place, path in enumerate(accepted.path)]
