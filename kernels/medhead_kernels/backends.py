"""The attention backends by name, with one signature, and for each the reason why it cannot serve a case."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from medhead_kernels import reference, sdpa
from medhead_kernels.attn_metadata import Scoring, TreeColumns

MOST_NODES = 256
HALVES = (torch.bfloat16, torch.float16)


class BackendError(ValueError):
    """A backend that was asked for by name cannot serve, said in one line."""


@dataclass(frozen=True)
class Case:
    """What a layer asks of a backend.

    Attributes:
        device: type of device, `cpu` or `cuda`.
        dtype: of queries, keys and values.
        dim: size of a head of queries and keys.
        value_dim: size of a head of values.
        nodes: of the tree.
        window: whether a sliding window hides keys.
        softcap: whether scores are soft-capped.
        sinks: whether heads have sinks.
    """

    device: str
    dtype: torch.dtype
    dim: int
    value_dim: int
    nodes: int = 1
    window: bool = False
    softcap: bool = False
    sinks: bool = False

    @classmethod
    def of(cls, query: Tensor, value: Tensor, scoring: Scoring) -> Case:
        """The case of these tensors and options."""
        options = (one is not None for one in (scoring.window, scoring.softcap, scoring.sinks))
        return cls(query.device.type, query.dtype, query.shape[3], value.shape[3], query.shape[2], *options)


class Backend(ABC):
    """Attention of a token tree over a cache.

    Attributes:
        name: what users call it.
        dense: whether it needs a mask of every node and key.
    """

    name: str
    dense = False

    @abstractmethod
    def why_not(self, case: Case) -> str | None:
        """Why it cannot serve, or None when it can."""

    @abstractmethod
    def attention(self, query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
        """Attention of every node over its row's prefix and its own ancestors.

        Args:
            query: `[batch, heads, nodes, dim]`.
            key: `[batch, key_heads, columns, dim]`, a view into the cache.
            value: `[batch, key_heads, columns, value_dim]`.
            tree: what the columns are.
            scoring: scale, window, soft-capping, sinks.

        Returns:
            `[batch, nodes, heads, value_dim]` of the query's type.
        """


class Reference(Backend):
    """Plain PyTorch with a dense mask; has every option."""

    name, dense = "reference", True

    def why_not(self, case: Case) -> str | None:
        """It serves everything."""
        return None

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
        """See `Backend.attention`."""
        bias = tree.bias(key.shape[2], scoring.window, torch.float32)
        return reference.attention(query, key, value, bias, scoring.scale, scoring.softcap, scoring.sinks)


class Sdpa(Backend):
    """PyTorch's scaled_dot_product_attention with a dense mask."""

    name, dense = "sdpa", True

    def why_not(self, case: Case) -> str | None:
        """PyTorch's kernels have neither soft-capping nor sinks."""
        return _options(case, softcap=False, sinks=False, window=True)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
        """See `Backend.attention`."""
        bias = tree.bias(key.shape[2], scoring.window, query.dtype)
        return sdpa.attention(query, key, value, bias, scoring.scale)


class Triton(Backend):
    """One split-KV kernel over prefix and tree."""

    name = "triton"

    def why_not(self, case: Case) -> str | None:
        """It needs Triton and CUDA (or Triton's interpreter), heads of at most 256, and at most 256 nodes."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if torch.version.hip is not None:
            return "it is made for CUDA and not tried on ROCm"
        if case.device != "cuda" and not _triton_interpreted():
            return f"it needs a CUDA device, not {case.device} (TRITON_INTERPRET=1 runs it there, very slowly)"
        if case.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer (A100, RTX 30 or later)"
        if case.dtype not in (*HALVES, torch.float32):
            return f"it computes in bfloat16, float16 and float32, not {_name(case.dtype)}"
        if max(case.dim, case.value_dim) > 256:
            return f"its largest head size is 256, not {max(case.dim, case.value_dim)}"
        return _too_many(case)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
        """See `Backend.attention`."""
        from medhead_kernels import ops, tree_attention

        if not tree.host_lengths:  # a captured step
            return ops.attention(query, key, value, tree, scoring)
        with torch.cuda.device_of(query):
            return tree_attention.attention(query, key, value, tree, scoring)


class Flash(Backend):
    """A flash kernel over the prefix (flash-attn's, or PyTorch's own), merged with the tree's own block."""

    name = "flash"

    def why_not(self, case: Case) -> str | None:
        """On CUDA the kernels compute in halves only; windows are left to others."""
        from medhead_kernels.flash import flash_attn_installed

        own = case.device == "cuda" and flash_attn_installed()
        if case.device not in ("cpu", "cuda"):
            return f"PyTorch has a flash kernel for cpu and cuda, not for {case.device}"
        if case.device == "cuda" and case.dtype not in HALVES:
            return f"flash kernels compute in bfloat16 and float16, not {_name(case.dtype)}"
        if case.dim != case.value_dim:
            return f"keys and values must have one head size, not {case.dim} and {case.value_dim}"
        if case.device == "cuda" and (case.dim > 256 or case.dim % 8):
            return f"flash kernels serve head sizes up to 256 in steps of 8, not {case.dim}"
        return _options(case, window=False, softcap=own, sinks=True) or _too_many(case)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
        """See `Backend.attention`."""
        from medhead_kernels import flash

        return flash.attention(query, key, value, tree, scoring)


BACKENDS: dict[str, Backend] = {one.name: one for one in (Sdpa(), Reference(), Triton(), Flash())}


def choose(name: str, cases: list[Case]) -> Backend:
    """The backend of that name; `auto` is triton on CUDA where it serves all cases, else sdpa.

    Args:
        name: a name in `BACKENDS`, or `auto`.
        cases: what the model's layers ask, as far as it is known when the model is loaded.

    Raises:
        BackendError: the name is unknown, or the backend of that name cannot serve.
    """
    if name == "auto":
        return _best(cases)
    if name not in BACKENDS:
        raise BackendError(f"attention must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    backend = BACKENDS[name]
    for case in cases:
        reason = backend.why_not(case)
        if reason is not None:
            raise BackendError(f"attention {name!r} cannot serve this model: {reason}")
    return backend


def _best(cases: list[Case]) -> Backend:
    """Triton on CUDA, else sdpa; on CUDA that is the slower path, so it is said."""
    if not cases or any(case.device != "cuda" for case in cases):
        return BACKENDS["sdpa"]
    for case in cases:
        reason = BACKENDS["triton"].why_not(case)
        if reason is not None:
            warnings.warn(
                f"attention is 'sdpa', which is slower, because 'triton' cannot serve: {reason}", stacklevel=3
            )
            return BACKENDS["sdpa"]
    return BACKENDS["triton"]


@lru_cache(maxsize=256)
def refusal(name: str, case: Case) -> str | None:
    """`why_not` of a backend, remembered, for use in every layer of every pass; any number of nodes but too many is alike."""
    return BACKENDS[name].why_not(replace(case, nodes=1)) if case.nodes <= MOST_NODES else BACKENDS[name].why_not(case)


def _options(case: Case, window: bool, softcap: bool, sinks: bool) -> str | None:
    """The first option that is asked for and not among those that can be had."""
    for asked, can, what in (
        (case.window, window, "a sliding window that hides keys"),
        (case.softcap, softcap, "soft-capping"),
        (case.sinks, sinks, "attention sinks"),
    ):
        if asked and not can:
            return f"it does not do {what}"
    return None


def _too_many(case: Case) -> str | None:
    return f"it serves up to {MOST_NODES} nodes, not {case.nodes}" if case.nodes > MOST_NODES else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _triton_interpreted() -> bool:
    from medhead_kernels import tree_attention

    return tree_attention.interpreted()
