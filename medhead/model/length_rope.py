"""Rotary positions whose frequencies depend on the length of the text: `longrope` and `dynamic`.

transformers picks one set of frequencies for all tokens of a pass, by the largest position in it. In its `generate` a prompt
is one pass, and every later token another one. So a token of the prompt has the frequencies of the prompt's length, a later one
those of its own index + 1. Here the same holds for every token by itself, whatever is read with it: chunks of a prompt, other
rows, nodes of other depths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model.layout import cache_argument


class LengthRope:
    """Replaces the outputs of a model's rotary modules in a target's passes.

    Args:
        model: the model.
        is_running: whether the target's pass runs in this thread.

    Attributes:
        modules: rotary modules whose frequencies depend on the length; without any nothing is replaced.
        text_lengths: `[batch]` of whole prompts while these are read; None where a token's length is its index + 1.
        longest: largest length of the pass on the host; None where only the device knows it.
        rereads_at: the length from which on `generate` reads a shorter text anew; None for never.
    """

    def __init__(self, model: Any, is_running: Callable[[], bool]) -> None:
        self.modules = [module for module in model.modules() if _kinds(module)]
        self.text_lengths: Tensor | None = None
        self.longest: int | None = None
        self._is_running = is_running
        self.limit = min(map(_least_limit, self.modules), default=1 << 30)  # up to this length nothing is replaced
        self.rereads_at = self.limit + 1 if self.modules and _rereads(model, self.limit) else None

    def refuse_step(self, step: str) -> None:
        """Refuse a captured or compiled step: transformers chooses the frequencies of every pass on the host.

        Raises:
            MedheadError: names the step and the kind of rotary scaling.
        """
        if self.modules:
            kind = min(_kinds(self.modules[0]))
            raise MedheadError(
                f"step {step!r} cannot capture a model whose rotary scaling {kind!r} changes with the length of the text; "
                "decode with step='loop'"
            )

    @contextmanager
    def reading(self, lengths: list[int], device: torch.device) -> Iterator[None]:
        """Take these for the lengths of the whole prompts of the passes inside the context."""
        if self.modules:
            self.text_lengths, self.longest = torch.tensor(lengths, device=device), max(lengths)
        try:
            yield
        finally:
            self.text_lengths = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the outputs inside the context."""
        hooks = [module.register_forward_hook(self._replace, with_kwargs=True) for module in self.modules]
        before = [(dict(module._buffers), _lengths_seen(module)) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, (buffers, lengths) in zip(self.modules, before, strict=True):
                # `dynamic` frequencies stay those of the longest text until a short one comes
                module._buffers.update(buffers)
                vars(module).update(lengths)

    def _replace(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._is_running() or self.longest is None or self.longest <= self.limit:
            return None
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        layer_type, positions = given.get("layer_type"), given["position_ids"]
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        if kind not in ("longrope", "dynamic"):
            return None
        if positions.ndim != 2:
            raise UnsupportedTargetError(f"{kind} frequencies with positions of several dimensions are not supported")
        rest = {name: value for name, value in given.items() if name not in ("x", "position_ids")}
        run = partial(module.forward, given["x"], **rest)
        lengths = (
            positions + 1 if self.text_lengths is None else self.text_lengths[:, None].expand(-1, positions.shape[1])
        )
        if positions.shape[0] != lengths.shape[0]:
            positions = positions.expand_as(lengths)
        return _by_length(kind, run, positions, lengths, _limit(module, layer_type))


def _by_length(
    kind: str, run: Callable[[Tensor], tuple[Tensor, Tensor]], positions: Tensor, lengths: Tensor, limit: int
) -> tuple[Tensor, ...]:
    """Return cosines and sines `[batch, tokens, dim]`, every token's with the frequencies of its length `[batch, tokens]`."""
    lengths = lengths.clamp(min=limit) if kind == "dynamic" else torch.where(lengths > limit, limit + 1, limit)
    found: list[Tensor] | None = None
    for length in lengths.unique().tolist():
        here = lengths == length
        inside = positions.masked_fill(~here, 0)
        if kind == "dynamic" or length <= limit:
            inside = inside.clamp(max=length - 1)  # beyond it is padding
        run(torch.zeros_like(positions))  # `dynamic` goes back to its first frequencies
        if length > limit:  # a further token makes the pass as long as the text
            last = torch.full_like(positions[:, :1], length - 1)
            parts = [part[:, :-1] for part in run(torch.cat([inside, last], 1))]
        else:
            parts = list(run(inside))
        chosen = (
            parts if found is None else [torch.where(here[..., None], *pair) for pair in zip(parts, found, strict=True)]
        )
        found = chosen
    assert found is not None
    return tuple(found)


def _lengths_seen(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}


def _kinds(module: nn.Module) -> set[str]:
    kind = getattr(module, "rope_type", None) if hasattr(module, "config") else None
    kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
    return {one for one in kinds if isinstance(one, str)} & {"longrope", "dynamic"}


def _limit(module: Any, layer_type: str | None) -> int:
    """Return the largest length for which a rotary module keeps its first frequencies."""
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if kind == "dynamic":
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    return int(parameters["original_max_position_embeddings"])


def _least_limit(module: Any) -> int:
    if not isinstance(module.rope_type, dict):
        return _limit(module, None)
    return min(_limit(module, name) for name, kind in module.rope_type.items() if kind in ("longrope", "dynamic"))


class _FilledCache:
    """What `prepare_inputs_for_generation` asks of a cache that holds `length` tokens."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def _rereads(model: Any, limit: int) -> bool:
    """Return whether `generate` drops its cache when the text becomes longer than `limit` (Phi-3 does)."""
    name = cache_argument(model)
    ids = torch.zeros(1, limit + 1, dtype=torch.long, device=model.device)
    try:
        found = model.prepare_inputs_for_generation(ids, **{name: _FilledCache(limit)}, use_cache=True)
    except (TypeError, AttributeError, ValueError):
        return False
    return found.get(name) is None
