"""Captured steps, kept for the next batch of the same form."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch

from medhead.compile.backends import BACKENDS, Run, check_device, make
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise
from medhead.core.sequence import Sequence
from medhead.errors import MedheadError, one_line
from medhead.model.fingerprint import model_state
from medhead.model.shards import placement
from medhead.model.target import Target
from medhead.proposers.base import Proposer
from medhead.proposers.host_drafts import no_drafts

Key = tuple[int, int, Hashable]  # rows, columns, and form of sampling, features and model

MAX_STEPS = 4  # captured steps that are kept; each holds a cache
MIN_COLUMNS = 256
_ROOM = 1024  # new tokens to make room for at a time; a text that grows beyond gets a larger step


@dataclass
class CapturedStep:
    """A step made ready to run, and the buffers it works on."""

    buffers: StepBuffers
    run: Run


class GraphCache:
    """Captured steps of one target and proposer, by batch size, room and sampling; the newest few are kept.

    Args:
        target: the target.
        proposer: fills the trees.
        backend: a name in `BACKENDS`.
        lag: steps by which the host reads later than the device runs; if None 1 on CUDA, and 0 elsewhere and for a proposer
            whose draft tokens the host makes of the text.
        optional: whether the ordinary loop decodes, with a warning, what cannot be captured.

    Attributes:
        on_progress: told when something is made that takes a while.
        gave_up: whether a step could not be captured, so that no other is tried.

    Raises:
        MedheadError: the backend is unknown, or the proposer, the attention, the rotary scaling or the devices cannot be
            part of a captured step.
    """

    def __init__(
        self, target: Target, proposer: Proposer, backend: str, lag: int | None = None, optional: bool = False
    ) -> None:
        if backend not in BACKENDS:
            raise MedheadError(f"step must be one of loop, {', '.join(BACKENDS)}; got {backend!r}")
        if not proposer.capturable:
            raise MedheadError(
                f"step {backend!r} captures the proposers 'hybrid', 'heads' (but for mtp), 'ngram', 'recycling' and 'none'; "
                f"{proposer.name!r} works on the host"
            )
        check_device(backend, target.device)
        if target.backend.name == "flash":
            raise MedheadError(
                f"step {backend!r} does not go with attention 'flash', which reads lengths on the host; use auto or triton"
            )
        target.length_rope.refuse_step(backend)
        devices = {spec.device for spec in target.layout.all_specs()}
        if devices != {target.device}:
            raise MedheadError(f"step {backend!r} needs the whole model on one device, it is on {len(devices)}")
        self.target, self.proposer, self.backend = target, proposer, backend
        self.lag = int(target.device.type == "cuda" and not proposer.takes_drafts) if lag is None else lag
        self.optional, self.gave_up = optional, False
        self.on_progress: Callable[[str], None] = lambda line: None
        self._steps: OrderedDict[Key, CapturedStep] = OrderedDict()
        self._too_large: set[tuple[int, int]] = set()  # rows and columns for which memory ran out

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[CapturedStep]:
        return iter(self._steps.values())

    @property
    def margin(self) -> int:
        """Columns that a sequence may need beyond what the host knows of."""
        return self.proposer.steps * (self.lag + 1) + self.proposer.tree_size

    @property
    def room_ahead(self) -> int:
        """Tokens by which a sequence may grow before the host knows it."""
        return self.proposer.steps * (self.lag + 2)

    def room(self, sequences: list[Sequence]) -> int:
        """Return the tokens and nodes to have room for in a step for these sequences."""
        wanted = max(sequence.tokens_left for sequence in sequences)
        return max(len(sequence.token_ids) for sequence in sequences) + min(wanted, _ROOM) + self.margin

    def fits(self, sequences: list[Sequence]) -> bool:
        """Return whether memory did not run out for a step of their size or a smaller one."""
        rows, columns = rows_for(len(sequences)), columns_for(self.room(sequences))
        return not any(least[0] <= rows and least[1] <= columns for least in self._too_large)

    def get(self, like: StepBuffers, room: int, generator: GumbelNoise) -> CapturedStep:
        """Return a step for the sequences of some buffers, captured now unless there is one, of up to twice the size.

        Args:
            like: the decode loop's buffers.
            room: tokens and nodes of a sequence to have room for.
            generator: of the sampling noise.

        Raises:
            MedheadError: the step cannot be captured.
        """
        rows, columns = rows_for(len(like.roots)), columns_for(room)
        form = (like.sampling.key(), like.features.dtype, model_state(self.target))
        key = self._kept(rows, columns, form) or (rows, columns, form)
        if key not in self._steps:
            if self.backend == "compiled":
                self.on_progress(f"compiling a step for {rows} sequences of up to {columns:,} tokens (a minute)")
            with torch.inference_mode(False), torch.no_grad():
                drafts = no_drafts(rows, self.target.device) if self.proposer.takes_drafts else None
                try:
                    buffers = StepBuffers.allocate(like, rows, columns, self.proposer.steps, drafts)
                except torch.OutOfMemoryError as error:
                    raise MedheadError(
                        f"a captured step for {rows} sequences of up to {columns:,} tokens does not fit in memory "
                        f"({one_line(error, 160)}); decode with step='loop'"
                    ) from error
                run = make(self.backend, self.target, self.proposer, buffers, generator)
                self._steps[key] = CapturedStep(buffers, run)
            while len(self._steps) > MAX_STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _kept(self, rows: int, columns: int, form: Hashable) -> Key | None:
        """Return the key of the smallest kept step that has room for so many rows and columns, at most twice as many."""
        found = [
            key
            for key in self._steps
            if key[2] == form and rows <= key[0] <= 2 * rows and columns <= key[1] <= 2 * columns
        ]
        return min(found, key=lambda key: key[0] * key[1], default=None)

    def give_up(self, error: MedheadError, sequences: list[Sequence]) -> None:
        """Leave steps to the ordinary loop, and warn that it decodes; raise the error unless steps are optional.

        Where memory ran out, that is for steps of this size or larger alone; while others are kept, they are freed and the
        next step tries again. After other errors no step is captured again.
        """
        if not self.optional:
            raise error
        freed, out_of_memory = len(self._steps) > 0, _is_out_of_memory(error)
        self._steps.clear()
        if out_of_memory and freed:
            return
        if out_of_memory:
            self._too_large.add((rows_for(len(sequences)), columns_for(self.room(sequences))))
        self.gave_up = not out_of_memory
        warnings.warn(f"the ordinary loop decodes, which is slower: {error}", stacklevel=2)

    def clear(self) -> None:
        """Give the memory back, and forget where it ran out."""
        self._steps.clear()
        self._too_large.clear()


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory ran out, or that led to the error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def rows_for(sequences: int) -> int:
    """Return the number of sequences, above four rounded up to a multiple of four: few sizes."""
    return sequences if sequences <= 4 else -(-sequences // 4) * 4


def columns_for(room: int) -> int:
    """Return the room rounded up to a power of two, or to a multiple of 2,048: few sizes, and none much too large."""
    if room > 2048:
        return -(-room // 2048) * 2048
    return max(MIN_COLUMNS, 1 << (room - 1).bit_length())


def automatic_backend(device: torch.device) -> str | None:
    """Return the backend that captures steps where none is named: CUDA graphs on CUDA, None elsewhere."""
    return "graph" if device.type == "cuda" and torch.version.hip is None else None


def automatic_graphs(target: Target, proposer: Proposer) -> GraphCache | None:
    """Return captured steps where none are named; None where the device has no such backend or a step cannot be captured."""
    backend = automatic_backend(target.device)
    if backend is None or target.bitwise is not None or target.state_layers is not None or placement(target.model):
        return None
    try:
        return GraphCache(target, proposer, backend, optional=True)
    except MedheadError:  # the reason is told to who names a step
        return None
