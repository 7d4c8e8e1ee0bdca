"""What was captured, kept for the next generation of the same form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from medhead.compile.backends import WAYS, Run, check_device, make
from medhead.compile.buffers import Buffers
from medhead.compile.step import FixedStep
from medhead.errors import MedheadError
from medhead.model.fingerprint import model_state
from medhead.model.target import Target
from medhead.proposers.base import Proposer

MOST = 4  # plans that are kept; each holds a cache
LEAST_COLUMNS = 256


@dataclass
class Plan:
    """A step made ready, and the buffers it works on."""

    buffers: Buffers
    run: Run


class Plans:
    """Captured steps of one target and proposer, by batch, room and sampling; the newest few are kept.

    Args:
        target: the target.
        proposer: what fills the trees.
        way: a name in `WAYS`.

    Raises:
        MedheadError: the way is unknown, or the proposer, the attention or the devices cannot be part of a captured step.
    """

    def __init__(self, target: Target, proposer: Proposer, way: str) -> None:
        if way not in WAYS:
            raise MedheadError(f"step must be one of loop, {', '.join(WAYS)}; got {way!r}")
        if not proposer.capturable:
            raise MedheadError(
                f"step {way!r} captures the proposers 'heads' (but for mtp) and 'none'; {proposer.name!r} works on the host"
            )
        check_device(way, target.device)
        if target.backend.name == "flash":
            raise MedheadError(
                f"step {way!r} does not go with attention 'flash', which asks the host; use auto or triton"
            )
        devices = {slot.device for pair in target.layout.layers.values() for slot in pair}
        if devices != {target.device}:
            raise MedheadError(f"step {way!r} needs the whole model on one device, it is on {len(devices)}")
        self.target, self.proposer, self.way = target, proposer, way
        self.say: Callable[[str], None] = lambda line: None  # told when something is made that takes a while
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def get(
        self,
        rows: int,
        room: int,
        processors: LogitsProcessorList,
        samples: bool,
        features: Tensor,
        memory: Tensor | None,
    ) -> Plan:
        """A plan for so many rows of up to `room` tokens and nodes, captured now unless there is one.

        Raises:
            MedheadError: the step cannot be captured.
        """
        columns = columns_for(room)
        key = (rows, columns, samples, _signature(processors), features.dtype, model_state(self.target))
        if key not in self._plans:
            if self.way == "compiled":
                self.say(f"compiling a step for {rows} rows of up to {columns:,} tokens (a minute)")
            step = FixedStep(self.target, self.proposer, processors, samples)
            with torch.inference_mode(False), torch.no_grad():
                buffers = Buffers.empty(self.target, rows, columns, self.proposer.steps, features, memory)
                self._plans[key] = Plan(buffers, make(self.way, step, buffers))
            while len(self._plans) > MOST:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def clear(self) -> None:
        """Give the memory back."""
        self._plans.clear()


def columns_for(room: int) -> int:
    """The room rounded up to a power of two, or to a multiple of 2,048: few sizes, and none much too large."""
    if room > 2048:
        return -(-room // 2048) * 2048
    return max(LEAST_COLUMNS, 1 << (room - 1).bit_length())


def _signature(processors: LogitsProcessorList) -> Hashable:
    """What the processors do, so that those of another generation can be told to be the same."""
    return tuple(
        (type(one).__name__, tuple(sorted((k, _plain(v)) for k, v in vars(one).items()))) for one in processors
    )


def _plain(value: Any) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)
