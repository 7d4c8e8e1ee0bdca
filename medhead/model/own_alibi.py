"""Models whose own code adds ALiBi, a bias that grows with the order of keys, where no mask can mend it (MPT, Falcon).

The nodes of a tree are stored in their order, so there a key's place is not its position. In a target's passes these models
get the values of their own table at the keys' positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.model.alibi import alibi_slopes
from medhead.model.attention import running_key_positions
from medhead.model.own_code import global_names, global_value, with_globals

_FALCON, _MPT = "build_alibi_tensor", "build_mpt_alibi_tensor"  # what makes the table of a model


class OwnAlibi:
    """Gives a model's own ALiBi the positions of keys in the passes of targets.

    Attributes:
        slopes: see `alibi_slopes`, of a model that its masks mend.
    """

    def __init__(self, model: Any) -> None:
        self._config, self.slopes = model.config, alibi_slopes(model)
        self._bias: Tensor | None = None  # of the running pass of an MPT, `[batch or 1, heads, 1, keys]`
        self._replaced: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        for module in model.modules():
            if getattr(module, "use_alibi", False) and _FALCON in global_names(module):
                build = partial(self._build_falcon, global_value(module, _FALCON))
                self._replaced.append((module, "forward", with_globals(module, {_FALCON: build})))
            elif callable(own := getattr(module, _MPT, None)):
                functional = SimpleNamespace(**vars(F) | {"softmax": self._softmax})
                scope = {"nn": SimpleNamespace(**vars(nn) | {"functional": functional})}
                self._replaced.append((module, _MPT, partial(self._build_mpt, own)))
                self._replaced += [
                    (part, "forward", with_globals(part, scope)) for part in module.modules() if _adds_bias(part)
                ]
        if any("forward" in vars(module) for module, _, _ in self._replaced):  # accelerate's hooks are there
            self._replaced = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace what makes or adds the bias inside the context."""
        self._own_name = self._config._attn_implementation
        before = [vars(module).get(name) for module, name, _ in self._replaced]
        for module, name, function in self._replaced:
            vars(module)[name] = function
        try:
            yield
        finally:
            for (module, name, _), own in zip(self._replaced, before, strict=True):
                vars(module).pop(name) if own is None else vars(module).update({name: own})
            self._bias = None

    def _build_falcon(
        self, own: Callable[..., Tensor], attention_mask: Tensor, num_heads: int, dtype: torch.dtype
    ) -> Tensor:
        """See `build_alibi_tensor` of Falcon: `[batch * heads, 1, keys]`."""
        keys = running_key_positions(attention_mask.device)
        if keys is None:
            return own(attention_mask, num_heads, dtype)
        table = own(torch.ones_like(keys[:1]), num_heads, dtype)[:, 0]  # [heads, positions]
        # Falcon adds the bias to its mask, and to its scores too unless its attention is called sdpa, as it is not here
        table = table / 2 if self._own_name == "sdpa" else table
        bias = table[:, keys].transpose(0, 1)  # [batch or 1, heads, keys]
        return bias.expand(len(attention_mask), -1, -1).flatten(0, 1)[:, None]

    def _build_mpt(
        self, own: Callable[..., Tensor], num_heads: int, sequence_length: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """See `build_mpt_alibi_tensor`, `[heads, 1, keys]`, which knows no rows: zeros here, and the softmax adds the bias."""
        keys = running_key_positions(kwargs.get("device"))
        if keys is None:
            return own(num_heads, sequence_length, *args, **kwargs)
        table = own(num_heads, keys.shape[1], *args, **kwargs)
        self._bias = table[:, 0][:, keys].transpose(0, 1)[:, :, None]
        return torch.zeros_like(table)

    def _softmax(self, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._bias is not None and running_key_positions(scores.device) is not None:
            scores = scores + self._bias.to(scores.device)
        return F.softmax(scores, *args, **kwargs)


def _adds_bias(module: nn.Module) -> bool:
    return "position_bias" in inspect.signature(module.forward).parameters and "softmax" in global_names(module)
