"""What a pass of the model leaves for heads: its last hidden states, or the outputs of some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class FeatureTaps:
    """Keeps outputs of a model's layers while it listens.

    Args:
        device: where features are put.
        running: whether the pass that runs in this thread is one to listen to.

    Attributes:
        select: `[batch]` row of the hidden states that needs logits, while prefilling; None computes the logits of all.
        layers: the layers that are listened to, and their outputs in the last pass.
    """

    def __init__(self, device: torch.device, running: Callable[[], bool]) -> None:
        self.device, self._running = device, running
        self.select: Tensor | None = None
        self.layers: dict[int, Tensor | None] = {}
        self._hidden: Tensor | None = None

    @contextmanager
    def listening(self, output: nn.Module, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Keep what the output matrix is given, and the outputs of these layers, inside the context."""
        self.layers = dict.fromkeys(layers)
        hooks = [layer.register_forward_hook(partial(self._keep, at)) for at, layer in layers.items()]
        hooks.append(output.register_forward_pre_hook(self._capture))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._hidden, self.select, self.layers = None, None, {}

    @contextmanager
    def selecting(self, rows: Tensor) -> Iterator[None]:
        """Compute the logits of one row `[batch]` of the hidden states alone, inside the context."""
        self.select = rows
        try:
            yield
        finally:
            self.select = None

    def last_hidden(self) -> Tensor:
        """Return the last hidden states of the last pass, `[batch, nodes, hidden]`."""
        assert self._hidden is not None, "only while listening"
        return self._hidden

    def features(self) -> Tensor:
        """Return the features of the last pass, `[batch, nodes, size]`: the layers' outputs, else the last hidden states."""
        if not self.layers:
            return self.last_hidden()
        outputs = [kept.to(self.device) for kept in self.layers.values() if kept is not None]
        assert len(outputs) == len(self.layers), "a layer did not run"
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _keep(self, at: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._running():
            self.layers[at] = output[0] if isinstance(output, tuple) else output

    def _capture(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep what the output matrix is given; while prefilling, pass only one row of it on."""
        if not self._running():
            return None
        hidden = args[0]
        self._hidden = hidden if hidden.device == self.device else hidden.to(self.device)
        if self.select is None:
            return None
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return (hidden[rows, self.select.to(hidden.device)][:, None], *args[1:])
