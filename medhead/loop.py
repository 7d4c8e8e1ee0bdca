"""The decode loop: propose, verify, accept, commit; for batches of ragged rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from medhead.acceptance import Accepted, accept, accept_typical
from medhead.proposers.base import DecodeState, Proposer, Verified
from medhead.row import Row, Settings
from medhead.sampling import draw, is_local, process_nodes, temperature_of
from medhead.target import Target
from medhead.tree import TokenTree
from medhead.walk import walk


@dataclass
class StepTimes:
    """Seconds spent in each part of all steps."""

    propose: float = 0.0
    forward: float = 0.0
    accept: float = 0.0
    commit: float = 0.0
    other: float = 0.0

    def total(self) -> float:
        """All parts together."""
        return self.propose + self.forward + self.accept + self.commit + self.other


class DecodeLoop:
    """Decodes rows until all have ended.

    Args:
        target: the target, active (see `Target.active`).
        proposer: what fills the trees.
        settings: sampling, stopping and recording.
    """

    def __init__(self, target: Target, proposer: Proposer, settings: Settings) -> None:
        self.target, self.proposer, self.settings = target, proposer, settings
        self.local = is_local(settings.processors)
        self.temperature = temperature_of(settings.processors)
        self.times = StepTimes()
        self.prefill_seconds = 0.0
        self.cache_bytes = 0

    def run(self, rows: list[Row]) -> None:
        """Decode all rows to their end; their `output` grows as they go."""
        began = time.perf_counter()
        target, limit = self.target, self.settings.stopper.limit
        longest = max(len(row.text) for row in rows)
        self.cache = target.new_cache(len(rows), longest + min(limit, 256) + self.proposer.tree_size)
        self.proposer.begin(target, [row.text for row in rows])
        features = target.prefill(self.cache, [row.text[:-1] for row in rows], self.proposer.read)
        roots = torch.tensor([row.text[-1] for row in rows], device=target.device)
        self.prefill_seconds = self._now() - began
        while rows:
            rows, roots, features = self._step(rows, roots, features)
        self.cache_bytes = self.cache.nbytes()

    def _step(self, rows: list[Row], roots: Tensor, features: Tensor) -> tuple[list[Row], Tensor, Tensor]:
        """One pass: the rows that go on, their new roots, and the features of the tokens above them."""
        times, started = self.times, self._now()
        noise = self._noise(rows)
        state = DecodeState(self.target, [row.text for row in rows], roots, features, noise, self.temperature)
        began = self._now()
        tree = self.proposer.propose(state, self._depth_limit(rows))
        proposed = self._now()
        logits, features = self.target.verify(self.cache, tree)
        verified = self._now()
        accepted, scores = self._accept(rows, tree, logits, state.noise)
        counts, emitted = accepted.counts.tolist(), accepted.emitted.tolist()  # the step's one read by the host
        decided = self._now()
        self.cache.commit(counts, accepted.path if tree.nodes > 1 else None)
        committed = self._now()
        self.proposer.observe(Verified(tree, logits, features, accepted, counts, emitted, decided - proposed))
        running = self._emit(rows, counts, emitted, accepted, logits, scores)
        last = accepted.last
        roots, above = accepted.emitted.gather(1, accepted.counts[:, None] - 1)[:, 0], _pick(features, last)
        if len(running) < len(rows):
            going = {row.index for row in running}
            kept = [place for place, row in enumerate(rows) if row.index in going]
            roots, above = roots[kept], above[kept]
            if running:
                self.cache.keep_rows(kept)
                self.proposer.keep_rows(kept)
        ended = self._now()
        times.propose += proposed - began
        times.forward += verified - proposed
        times.accept += began - started + decided - verified  # making noise and drawing with it
        times.commit += committed - decided
        times.other += ended - committed
        return running, roots, above

    def _accept(
        self, rows: list[Row], tree: TokenTree, logits: Tensor, noise: Tensor | None
    ) -> tuple[Accepted, list[list[Tensor]] | None]:
        """Walk the trees; also the processed scores of every emitted token where somebody wants them."""
        settings = self.settings
        if not self.local:
            return walk(rows, tree, logits, noise, settings)
        if not settings.processors and noise is None and settings.typical is None:
            scores = logits  # greedy: the order of logits is enough
            accepted = accept(tree, logits.argmax(-1))
        else:
            scores = process_nodes(settings.processors, logits)
            if noise is not None:
                noise = noise[:, :1] if tree.nodes == 1 else _at_depth(noise, tree)
            drawn = draw(scores, noise)
            rule = settings.typical
            accepted = accept(tree, drawn) if rule is None else accept_typical(tree, drawn, scores, rule)
        if not (settings.keep_scores or settings.stopper.asks_others):
            return accepted, None
        return accepted, [list(scores[place, path].float()) for place, path in enumerate(accepted.path)]

    def _emit(
        self,
        rows: list[Row],
        counts: list[int],
        emitted: list[list[int]],
        accepted: Accepted,
        logits: Tensor,
        scores: list[list[Tensor]] | None,
    ) -> list[Row]:
        """Hand every row its new tokens, cut where it ends; returns the rows that go on."""
        settings, running = self.settings, []
        for place, row in enumerate(rows):
            of_tokens = scores[place] if scores is not None else None
            new = emitted[place][: counts[place]]
            new, ended = settings.stopper.take(row.padded + row.output, len(row.output), new, of_tokens)
            if settings.keep_scores and of_tokens is not None:
                row.scores += of_tokens[: len(new)]
            if settings.keep_logits:
                row.logits += list(logits[place, accepted.path[place, : len(new)]].float())
            row.passes += 1
            row.output += new
            row.text += new
            if settings.on_tokens is not None:
                settings.on_tokens(row, new, ended)
            if not ended:
                running.append(row)
        return running

    def _depth_limit(self, rows: list[Row]) -> int:
        """No tree is deeper than what rows may still emit, or than the context."""
        wanted = max(self.settings.stopper.limit - len(row.output) for row in rows) - 1
        room = self.target.context - max(len(row.text) for row in rows) - 1
        return max(0, min(self.proposer.max_depth, wanted, room))

    def _noise(self, rows: list[Row]) -> Tensor | None:
        """`[rows, depths, vocab]`: noise of the positions that this step may draw."""
        if self.settings.noise is None:
            return None
        device = self.target.device
        depths = self._depth_limit(rows) + 1
        first = torch.tensor([len(row.text) for row in rows], device=device)
        index = torch.tensor([row.index for row in rows], device=device)[:, None]
        positions = first[:, None] + torch.arange(depths, device=device)
        return self.settings.noise.gumbel(index, positions)

    def _now(self) -> float:
        if self.settings.synchronize is not None:
            self.settings.synchronize()
        return time.perf_counter()


def _at_depth(noise: Tensor, tree: TokenTree) -> Tensor:
    """`[batch, nodes, vocab]`: the noise that every node draws its next token with."""
    return noise.gather(1, tree.depth[..., None].expand(-1, -1, noise.shape[-1]))


def _pick(features: Tensor, last: Tensor) -> Tensor:
    """`[batch, size]`: the features of each row's last accepted node."""
    if features.shape[1] == 1:
        return features[:, 0]
    return features[torch.arange(features.shape[0], device=features.device), last]
