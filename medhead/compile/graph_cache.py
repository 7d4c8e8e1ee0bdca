"""Captured steps, kept for the next batch of the same form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch

from medhead.compile.backends import BACKENDS, Run, check_device, make
from medhead.core.buffers import StepBuffers
from medhead.core.gumbel import GumbelNoise
from medhead.errors import MedheadError
from medhead.model.fingerprint import model_state
from medhead.model.target import Target
from medhead.proposers.base import Proposer

MAX_STEPS = 4  # captured steps that are kept; each holds a cache
MIN_COLUMNS = 256


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
        lag: steps by which the host reads later than the device runs; 1 on CUDA and 0 elsewhere if None.

    Attributes:
        on_progress: told when something is made that takes a while.

    Raises:
        MedheadError: the backend is unknown, or the proposer, the attention, the rotary scaling or the devices cannot be
            part of a captured step.
    """

    def __init__(self, target: Target, proposer: Proposer, backend: str, lag: int | None = None) -> None:
        if backend not in BACKENDS:
            raise MedheadError(f"step must be one of loop, {', '.join(BACKENDS)}; got {backend!r}")
        if not proposer.capturable:
            raise MedheadError(
                f"step {backend!r} captures the proposers 'heads' (but for mtp) and 'none'; {proposer.name!r} works on the host"
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
        self.lag = int(target.device.type == "cuda") if lag is None else lag
        self.on_progress: Callable[[str], None] = lambda line: None
        self._steps: OrderedDict[Hashable, CapturedStep] = OrderedDict()

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

    def get(self, like: StepBuffers, room: int, generator: GumbelNoise) -> CapturedStep:
        """Return a step for the sequences of some buffers, captured now unless there is one.

        Args:
            like: the decode loop's buffers.
            room: tokens and nodes of a sequence to have room for.
            generator: of the sampling noise.

        Raises:
            MedheadError: the step cannot be captured.
        """
        rows, columns = rows_for(len(like.roots)), columns_for(room)
        key = (rows, columns, like.sampling.key(), like.features.dtype, model_state(self.target))
        if key not in self._steps:
            if self.backend == "compiled":
                self.on_progress(f"compiling a step for {rows} sequences of up to {columns:,} tokens (a minute)")
            with torch.inference_mode(False), torch.no_grad():
                buffers = StepBuffers.allocate(like, rows, columns, self.proposer.steps)
                run = make(self.backend, self.target, self.proposer, buffers, generator)
                self._steps[key] = CapturedStep(buffers, run)
            while len(self._steps) > MAX_STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key]

    def clear(self) -> None:
        """Give the memory back."""
        self._steps.clear()


def rows_for(sequences: int) -> int:
    """Return the number of sequences, above four rounded up to a multiple of four: few sizes."""
    return sequences if sequences <= 4 else -(-sequences // 4) * 4


def columns_for(room: int) -> int:
    """Return the room rounded up to a power of two, or to a multiple of 2,048: few sizes, and none much too large."""
    if room > 2048:
        return -(-room // 2048) * 2048
    return max(MIN_COLUMNS, 1 << (room - 1).bit_length())
