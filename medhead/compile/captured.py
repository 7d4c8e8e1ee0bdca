"""A batch of sequences that is decoded by captured steps."""

from __future__ import annotations

from medhead.compile.async_input import DraftInput
from medhead.compile.async_output import async_output
from medhead.compile.graph_cache import GraphCache
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise
from medhead.core.sampling import SamplingBatch
from medhead.core.sequence import Sequence
from medhead.errors import MedheadError


class CapturedSteps:
    """Runs captured steps for some sequences until they end or have no more room.

    On CUDA the host reads what was emitted `graphs.lag` steps later, so that the GPU never waits. A sequence that has ended
    keeps running until the host reads it; extra tokens are dropped.

    Args:
        graphs: where captured steps are kept.
        buffers: the decode loop's buffers with the sequences; copied.
        sequences: the sequences, by row of the buffers.
        generator: of the sampling noise.

    Attributes:
        rows: where the sequences that run are in the buffers.
    """

    def __init__(
        self, graphs: GraphCache, buffers: StepBuffers, sequences: list[Sequence], generator: GumbelNoise
    ) -> None:
        self._graphs, self._sequences = graphs, sequences
        self.rows = list(range(len(sequences)))  # of the sequences that run
        self._step = graphs.get(buffers, graphs.room(sequences), generator)
        self._step.buffers.load(buffers)
        output = self._step.buffers.output
        assert output is not None
        self._output = async_output(output, graphs.lag + 1)
        drafts = self._step.buffers.drafts
        self._drafts = None if drafts is None else DraftInput(drafts)

    @classmethod
    def of(
        cls, graphs: GraphCache, buffers: StepBuffers, sequences: list[Sequence], generator: GumbelNoise
    ) -> CapturedSteps | None:
        """Return captured steps for sequences; None where the ordinary loop must decode them, see `GraphCache.give_up`."""
        if not graphs.fits(sequences):
            return None
        try:
            return cls(graphs, buffers, sequences, generator)
        except MedheadError as error:
            graphs.give_up(error, sequences)
        return None

    @property
    def running(self) -> list[Sequence]:
        """The sequences that run."""
        return [self._sequences[row] for row in self.rows]

    @property
    def buffers(self) -> StepBuffers:
        """The fixed buffers."""
        return self._step.buffers

    @property
    def cache_bytes(self) -> int:
        """Memory of the key/value cache."""
        return self._step.buffers.cache.nbytes()

    def has_room(self) -> bool:
        """Return whether the buffers have room for another step."""
        longest = max(len(sequence.token_ids) for sequence in self.running)
        return longest + self._graphs.margin <= self._step.buffers.cache.capacity

    def step(self) -> tuple[list[int], list[list[int]]] | None:
        """Start a step; return the numbers and tokens that an earlier one emitted for `running`, if they are due."""
        if self._drafts is not None:
            texts = [sequence.token_ids for sequence in self.running]
            self._drafts.send(self._graphs.proposer.host_tries(texts), self.rows)
        self._step.run()
        self._output.post()
        return self.drain() if len(self._output) > self._graphs.lag else None

    def drain(self) -> tuple[list[int], list[list[int]]] | None:
        """Return the oldest numbers and tokens that were not handed on yet; None if there are none."""
        if not len(self._output):
            return None
        output = self._output.take()
        return [output[row][0] for row in self.rows], [output[row][1:] for row in self.rows]

    def keep(self, places: list[int]) -> None:
        """Let only the sequences at these places of `running` go on."""
        if 0 < len(places) < len(self.rows):
            self._graphs.proposer.keep_rows(places)
        kept = [self.rows[place] for place in places]
        for row in set(self.rows) - set(kept):
            self._step.buffers.end(row)
        self.rows = kept

    def unload(self, sampling: SamplingBatch) -> StepBuffers:
        """Return the running sequences as buffers of the decode loop; everything must be drained."""
        lengths = [len(sequence.token_ids) - 1 for sequence in self.running]
        return self._step.buffers.unload(self.rows, lengths, self._graphs.margin, sampling)
