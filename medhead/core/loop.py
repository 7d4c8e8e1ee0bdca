"""The decode loop: steps over a batch of ragged sequences that join and leave between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.config import SamplingParams
from medhead.core.acceptance import Accepted, TypicalAcceptance, verify_greedy, verify_sampled, verify_typical
from medhead.core.buffers import StepBuffers
from medhead.core.constraint import BatchConstraints, keep_banned
from medhead.core.gumbel import GumbelNoise, LazyGumbel
from medhead.core.joining import Joining
from medhead.core.lockstep import Lockstep
from medhead.core.sampling import SamplingBatch, reads_nothing
from medhead.core.sequence import Sequence, share_processors
from medhead.core.sequential_accept import sequential_accept
from medhead.core.step import decode_step
from medhead.core.step_times import StepClock, StepTimes
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.model.kv_cache import compact_order
from medhead.model.prompt_inputs import PromptInputs
from medhead.model.target import PREFILL_CHUNK, Target
from medhead.proposers.base import Proposer, VerifyOutput

if TYPE_CHECKING:
    from medhead.compile.captured import CapturedSteps
    from medhead.compile.graph_cache import GraphCache


class DecodeLoop:
    """Decodes sequences until all have ended; others may join between two steps.

    Args:
        target: the target, active (see `Target.active`).
        proposer: fills the trees.
        typical: lossy acceptance; None is exact.
        graphs: captured steps, used where no sequence needs the host to see every token; None for none.
        record_scores: keep the processed scores of every new token.
        record_logits: keep the raw logits of every new token.
        profile: time the parts of every step, see `StepTimes`.

    Attributes:
        sequences: the sequences that still run.
        output: the result of the last step, by row of the batch before that step; None after captured steps.
        prompt_inputs: set before `run` where the prompts hold images: those of all sequences; None for text.
        on_leave: called with a sequence that has ended or was dropped, buffers that still hold it, and its row there.
        lockstep: set before `run` where callbacks look at the whole batch: those of all sequences; none may join later.
        on_output: called with the result of every step but captured ones; None for nothing.
        times: of the parts of all steps; None without `profile`.
        prefill_seconds: time to read prompts and to emit their first tokens.
        decode_seconds: time of all steps.
        capture_seconds: time to make captured steps ready, not part of `decode_seconds`.
        captured_steps: how many steps were captured ones.
        cache_bytes: peak memory of the KV cache.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        typical: TypicalAcceptance | None = None,
        graphs: GraphCache | None = None,
        record_scores: bool = False,
        record_logits: bool = False,
        profile: bool = False,
    ) -> None:
        self.target, self.proposer, self.typical, self.graphs = target, proposer, typical, graphs
        self.record_scores, self.record_logits = record_scores, record_logits
        self.generator = GumbelNoise(target.vocab_size, target.device)
        self.times = StepTimes() if profile else None
        self.prefill_seconds = self.decode_seconds = self.capture_seconds = 0.0
        self.captured_steps, self.cache_bytes = 0, 0
        self.sequences: list[Sequence] = []
        self.output: VerifyOutput | None = None
        self.on_output: Callable[[VerifyOutput], None] | None = None
        self.on_leave: Callable[[Sequence, StepBuffers, int], None] | None = None
        self.lockstep: Lockstep | None = None
        self.prompt_inputs: PromptInputs | None = None
        self._buffers: StepBuffers | None = None
        self._captured: CapturedSteps | None = None
        self._inference_mode = False  # whether the caller of the running step is in inference mode

    def active(self) -> AbstractContextManager[None]:
        """Make the target of this loop active, see `Target.active`: all that decodes runs inside this context."""
        return self.target.active(self.proposer.feature_layers)

    def run(self, sequences: list[Sequence]) -> None:
        """Decode all sequences to their end; their `output_ids` grow."""
        self.join(sequences)
        while self.sequences:
            self.step()

    def join(self, sequences: list[Sequence]) -> None:
        """Read the prompts of more sequences; from the next step on they are decoded with the others."""
        began = time.perf_counter()
        self._leave_captured()
        proposer = self.proposer if self._buffers is None else self.proposer.fork()
        joining = Joining(self.target, proposer, sequences, inputs=self.prompt_inputs)
        while joining.left:
            joining.advance(PREFILL_CHUNK)
        self.add(joining)
        self.prefill_seconds += time.perf_counter() - began

    def add(self, joining: Joining) -> None:
        """Emit the first tokens of sequences whose prompts are read; from the next step on they are decoded with the others."""
        self._leave_captured()
        self._inference_mode = torch.is_inference_mode_enabled()
        sequences = joining.sequences
        with torch.inference_mode():
            buffers = joining.buffers(self._sampling(sequences))
        running = self._decode(sequences, buffers, joining.proposer, joining.read)
        self.cache_bytes = max(self.cache_bytes, buffers.cache.nbytes())
        with torch.inference_mode():
            sequences = self._keep(running, sequences, buffers, joining.proposer)
            if not sequences:
                return
            if joining.proposer is not self.proposer:
                if self._buffers is None:
                    self.proposer.begin(self.target, [])
                self.proposer.merge(joining.proposer)
            self.sequences = self.sequences + sequences
            if self._buffers is None:
                self._buffers = buffers
            else:
                self._buffers.join(buffers, self._sampling(self.sequences))
            self._note_memory()

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Let only the sequences at these places go on, in any order."""
        if len(rows) == len(self.sequences):
            return
        self._notify_leaving(rows)
        if self._captured is not None:
            self._captured.keep(rows)
            self.sequences = self._captured.running
            if self.sequences:
                return
        self._note_memory()
        if not rows:
            self.sequences, self._buffers, self._captured = [], None, None
            return
        assert self._buffers is not None
        self.sequences = self._keep(rows, self.sequences, self._buffers, self.proposer)

    def step(self) -> None:
        """Decode all sequences by one pass; those that end leave. A captured step may be read one step later."""
        self._inference_mode = torch.is_inference_mode_enabled()
        began = time.perf_counter()
        capture_seconds = self.capture_seconds
        if self._may_capture():
            with torch.inference_mode(False), torch.no_grad():
                self._step_captured()
        else:
            self._leave_captured()
            if self.sequences:
                self._step_eager()
        self.decode_seconds += time.perf_counter() - began - (self.capture_seconds - capture_seconds)

    # ---------------------------------------------------------------- the eager way

    def _step_eager(self) -> None:
        assert self._buffers is not None
        with torch.inference_mode():
            self._reread()
        self.keep(self._decode(self.sequences, self._buffers, self.proposer))

    def _keep(
        self, rows: list[int], sequences: list[Sequence], buffers: StepBuffers, proposer: Proposer
    ) -> list[Sequence]:
        """Let only these rows of buffers go on; return their sequences."""
        if 0 < len(rows) < len(sequences):
            rows = compact_order(rows)
            buffers.keep_rows(rows, self._sampling([sequences[row] for row in rows]))
            proposer.keep_rows(rows)
        return [sequences[row] for row in rows]

    def _decode(
        self,
        sequences: list[Sequence],
        buffers: StepBuffers,
        proposer: Proposer,
        read: tuple[Tensor, Tensor] | None = None,
    ) -> list[int]:
        """Decode sequences by one pass, or by what the prompts' pass has read; return the places of those that go on."""
        times = self.times if read is None else None
        mark = StepClock(times, self.target.device) if times is not None else lambda part: None
        mark("other")
        scores: list[list[Tensor]] | None = None

        def accept(tree: TokenTree, logits: Tensor, noise: LazyGumbel | None) -> Accepted:
            nonlocal scores
            accepted, scores = self._accept(sequences, buffers, tree, logits, noise, constraints)
            return accepted

        texts = [sequence.token_ids for sequence in sequences]
        room = 0 if read else self._room(sequences)
        constraints = BatchConstraints.of(sequences, room, proposer)
        max_depth = min(proposer.next_depth, room)
        with torch.inference_mode():
            self.output = output = decode_step(
                self.target, proposer, buffers, self.generator, accept, max_depth, texts, mark, constraints, read
            )
            proposer.update(output)
            if self.on_output is not None:
                self.on_output(output)
        raw = _path_values(output.accepted, output.logits) if self.record_logits else None
        running = self._emit(sequences, output.counts, output.emitted, scores, raw)
        mark("other")
        return running

    def _accept(
        self,
        sequences: list[Sequence],
        buffers: StepBuffers,
        tree: TokenTree,
        logits: Tensor,
        noise: LazyGumbel | None,
        constraints: BatchConstraints | None,
    ) -> tuple[Accepted, list[list[Tensor]] | None]:
        """Return the accepted paths, and the processed scores of every emitted token where they are known."""
        if constraints is not None:
            logits = constraints.mask(tree, logits)
        if not share_processors(sequences):
            values = None if noise is None else noise.prefix(1 + int(tree.depth.max()))
            with self._mode_of_caller():
                if self.lockstep is not None:
                    return self.lockstep.accept(tree, logits, values, constraints is not None)
                return sequential_accept(sequences, tree, logits, values)
        scores = buffers.sampling.process(logits)
        if constraints is not None and sequences[0].processors:
            scores = keep_banned(scores, logits)
        if self.typical is not None:
            accepted = verify_typical(tree, scores, noise, self.typical)
        else:
            accepted = verify_greedy(tree, scores) if noise is None else verify_sampled(tree, scores, noise)
        if not self.record_scores:
            return accepted, None
        with self._mode_of_caller():
            return accepted, _path_values(accepted, scores)

    @contextmanager
    def _mode_of_caller(self) -> Iterator[None]:
        """Leave inference mode unless the caller of `step` is in it: others will see the tensors that are made inside."""
        with torch.inference_mode(self._inference_mode), torch.no_grad():
            yield

    def _emit(
        self,
        sequences: list[Sequence],
        counts: list[int],
        emitted: list[list[int]],
        scores: list[list[Tensor]] | None = None,
        raw: list[list[Tensor]] | None = None,
    ) -> list[int]:
        """Hand every sequence its new tokens, cut where it ends; return the places of those that go on."""
        running = []
        for place, sequence in enumerate(sequences):
            of_tokens = scores[place] if self.record_scores and scores is not None else None
            before = len(sequence.output_ids)
            ended = sequence.append(emitted[place][: counts[place]], of_tokens)
            taken = len(sequence.output_ids) - before
            if raw is not None:
                sequence.logits += raw[place][:taken]
            if not ended:
                running.append(place)
        return running

    def _room(self, sequences: list[Sequence]) -> int:
        """Return the maximum tree depth that tokens left and context allow."""
        wanted = max(sequence.tokens_left for sequence in sequences) - 1
        room = self.target.max_length - max(len(sequence.token_ids) for sequence in sequences) - 1
        length = self.target.length_rope.rereads_at
        before = [] if length is None else [len(one.token_ids) for one in sequences if len(one.token_ids) < length]
        if length is not None and before:  # no tree may go beyond it before the text is read anew
            room = min(room, length - 1 - max(before))
        return max(0, min(wanted, room))

    def _reread(self) -> None:
        """Read all texts anew where `generate` does: one has become long enough for other rotary frequencies."""
        length = self.target.length_rope.rereads_at
        if length is None or not any(len(one.token_ids) == length and one.output_ids for one in self.sequences):
            return
        assert self._buffers is not None
        if self.prompt_inputs is not None:
            raise MedheadError(f"a text with images cannot go on beyond {length - 1} tokens with {self.target.name}")
        cache, rows = self._buffers.cache, [one.token_ids for one in self.sequences]
        again = self.target.new_cache(len(rows), cache.capacity)
        self.target.prefill(again, rows)
        longest = cache.lengths.longest
        for spec, buffer in cache.buffers.items():
            buffer[:, :, :, :longest] = again.buffers[spec][:, :, :, :longest]

    def _sampling(self, sequences: list[Sequence]) -> SamplingBatch:
        """Return the parameters of sequences; those that are processed node by node need only seed and temperature."""
        local = share_processors(sequences)
        params = [
            one.params if local else SamplingParams(temperature=one.params.temperature, seed=one.params.seed)
            for one in sequences
        ]
        processors = sequences[0].processors if local else type(sequences[0].processors)()
        return SamplingBatch.of(params, [sequence.index for sequence in sequences], processors, self.target.device)

    def _notify_leaving(self, kept: list[int]) -> None:
        """Hand every sequence that leaves to `on_leave`, while its rows are there."""
        if self.on_leave is None:
            return
        buffers = self._buffers if self._captured is None else self._captured.buffers
        running = self.sequences if self._captured is None else self._captured.running
        assert buffers is not None
        for place in set(range(len(running))) - set(kept):
            row = place if self._captured is None else self._captured.rows[place]
            self.on_leave(running[place], buffers, row)

    def _note_memory(self) -> None:
        if self._buffers is not None:
            self.cache_bytes = max(self.cache_bytes, self._buffers.cache.nbytes())

    # ---------------------------------------------------------------- captured steps

    def _may_capture(self) -> bool:
        """Return whether captured steps serve these sequences: the host need not see every token, the context has room."""
        if self.graphs is None or self.graphs.gave_up:
            return False
        if self.typical is not None or self.record_scores or self.record_logits:
            return False
        if not self.sequences or not share_processors(self.sequences):
            return False
        if not reads_nothing(self.sequences[0].processors, self.target.device):
            return False
        if any(
            one.stop_checker.has_criteria or one.needs_logits or one.constraint is not None for one in self.sequences
        ):
            return False
        if self._buffers is not None and self._buffers.cache.position_offset is not None:
            return False
        longest = max(len(sequence.token_ids) for sequence in self.sequences)
        return longest + self.graphs.room_ahead <= self.target.context

    def _step_captured(self) -> None:
        """Run a captured step and hand on what has arrived."""
        from medhead.compile.captured import CapturedSteps

        assert self.graphs is not None
        if self._captured is not None and not self._captured.has_room():
            self._leave_captured()
            if not self.sequences:
                return
        if self._captured is None:
            assert self._buffers is not None
            began = time.perf_counter()
            self._captured = CapturedSteps.of(self.graphs, self._buffers, self.sequences, self.generator)
            self.capture_seconds += time.perf_counter() - began
            if self._captured is None:
                self._step_eager()
                return
            self._buffers, self.output = None, None
            self.cache_bytes = max(self.cache_bytes, self._captured.cache_bytes)
        self._emit_captured(self._captured.step())
        self.captured_steps += 1

    def _emit_captured(self, arrived: tuple[list[int], list[list[int]]] | None) -> None:
        captured = self._captured
        assert captured is not None
        if arrived is not None:
            places = self._emit(captured.running, *arrived)
            self._notify_leaving(places)
            captured.keep(places)
        self.sequences = captured.running
        if not self.sequences:
            self._buffers, self._captured = None, None

    def _leave_captured(self) -> None:
        """Hand on what captured steps still have, and take the sequences back into the loop's own buffers."""
        while self._captured is not None and (arrived := self._captured.drain()) is not None:
            self._emit_captured(arrived)
        if self._captured is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = self._captured.unload(self._sampling(self.sequences))
        self._captured = None


def _path_values(accepted: Accepted, values: Tensor) -> list[list[Tensor]]:
    """Return the float32 values `[vocab]` of the nodes on every row's path, from `[batch, nodes, vocab]`."""
    return [list(values[place, path].float()) for place, path in enumerate(accepted.path)]
