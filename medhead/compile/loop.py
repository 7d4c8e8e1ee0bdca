"""The decode loop around captured steps: the host reads what was emitted one step behind, so that the GPU never waits."""

from __future__ import annotations

import torch

from medhead.compile.async_output import outbox
from medhead.compile.graph_cache import Plan, Plans
from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence, Settings

_AHEAD = 1024  # tokens that room is made for at a time; a text that grows beyond gets a plan with more


class CapturedLoop(DecodeLoop):
    """Decodes by captured steps as far as they go, and the rest of the way like any loop.

    The prompts are read, and a text's last steps before the context ends are made, by `DecodeLoop`. Everything is, where the
    host has to look at every token: processors that look at the text, custom criteria, recorded scores, typical acceptance.

    Args:
        plans: where captured steps are kept.
        settings: sampling, stopping and recording.
        behind: steps that the host is behind the device; 1 on CUDA and 0 elsewhere if None.
    """

    def __init__(self, plans: Plans, settings: Settings, behind: int | None = None) -> None:
        super().__init__(plans.target, plans.proposer, settings)
        self.plans = plans
        self.behind = int(self.target.device.type == "cuda") if behind is None else behind
        # columns that a row may need beyond what the host knows of
        self._margin = self.proposer.steps * (self.behind + 1) + self.proposer.tree_size

    def run(self, rows: list[Sequence]) -> None:
        """Decode all rows to their end; their `output` grows as they go."""
        self.start(rows)
        while self.rows and self._can_go_on():
            with torch.inference_mode(False), torch.no_grad():
                self._run_captured()
        while self.rows:
            self.step()
        self.cache_bytes = max(self.cache_bytes, self.cache.nbytes())

    def _can_go_on(self) -> bool:
        """Whether captured steps serve these settings, and the context has room for them."""
        settings = self.settings
        looks = settings.keep_scores or settings.keep_logits or settings.stopper.asks_others
        return self.local and settings.typical is None and not looks and self._context_left()

    def _context_left(self) -> bool:
        return max(len(row.text) for row in self.rows) + self.proposer.steps * (self.behind + 2) <= self.target.context

    def _run_captured(self) -> None:
        """Steps with one plan, until all rows have ended or the plan or the context has no more room."""
        rows = self.rows
        plan = self._load()
        alive, waiting, taken = list(range(len(rows))), 0, self._now()
        box = outbox(plan.buffers.out, self.behind + 1)
        self.rows = []
        while alive:
            self.rows = [rows[place] for place in alive]
            goes_on = self._room(plan) and self._context_left()
            if goes_on:
                plan.run()
                box.post()
                waiting += 1
            if waiting > (self.behind if goes_on else 0):
                alive = self._read(rows, alive, plan, box.take())
                waiting -= 1
            elif not goes_on:
                break
        self._unload(plan, rows, alive)
        self.times.whole += self._now() - taken

    def _read(self, rows: list[Sequence], alive: list[int], plan: Plan, out: list[list[int]]) -> list[int]:
        """Hand the rows what a step emitted; returns the places of those that go on."""
        running = [rows[place] for place in alive]
        counts, emitted = [out[place][0] for place in alive], [out[place][1:] for place in alive]
        going = [alive[index] for index in self._emit(running, counts, emitted)]
        for place in set(alive) - set(going):
            plan.buffers.end(place)
        return going

    def _room(self, plan: Plan) -> bool:
        return max(len(row.text) for row in self.rows) + self._margin <= plan.buffers.columns

    def _load(self) -> Plan:
        """A plan with the running rows in it."""
        began = self._now()
        settings, memory = self.settings, self.proposer.memory()
        wanted = max(settings.stopper.limit - len(row.output) for row in self.rows)
        room = max(len(row.text) for row in self.rows) + min(wanted, _AHEAD) + self._margin
        samples = settings.noise is not None
        plan = self.plans.get(len(self.rows), room, settings.processors, samples, self._features, memory)
        seed = settings.noise.seed if settings.noise is not None else 0
        index = [row.index for row in self.rows]
        plan.buffers.load(self.cache, memory, self._roots, self._features, index, seed)
        self.cache_bytes = sum(store.nbytes for store in plan.buffers.stores.values())
        self.capture_seconds += self._now() - began
        return plan

    def _unload(self, plan: Plan, rows: list[Sequence], alive: list[int]) -> None:
        """Go on with the rows that are left as any loop does."""
        self.rows = [rows[place] for place in alive]
        lengths = [len(row.text) - 1 for row in self.rows]
        self.cache = self.target.new_cache(len(alive), max(lengths, default=0) + self._margin)
        if alive:
            memory, self._roots, self._features = plan.buffers.unload(self.cache, alive, lengths)
            self.proposer.resume(memory, lengths)
