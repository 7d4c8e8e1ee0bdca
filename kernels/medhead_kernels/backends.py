"""The attention backends by name, all with one signature; each one reports what it does not support."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from medhead_kernels import flash, reference, sdpa
from medhead_kernels.attn_metadata import AttnParams, TreeMetadata
from medhead_kernels.causal import HALF_DTYPES

MAX_NODES = 256  # of a tree, for triton and flash


class BackendError(ValueError):
    """A backend that was requested by name is unknown or does not support the model; the message is one line."""


@dataclass(frozen=True)
class AttnSpec:
    """What a layer requires of a backend."""

    device: str  # type of device, `cpu` or `cuda`
    dtype: torch.dtype
    head_dim: int  # of queries and keys
    value_dim: int
    nodes: int = 1
    window: bool = False  # whether a sliding window hides keys
    softcap: bool = False
    sinks: bool = False

    @classmethod
    def of(cls, query: Tensor, value: Tensor, params: AttnParams) -> AttnSpec:
        """Return the requirements of these tensors and options."""
        options = (option is not None for option in (params.window, params.softcap, params.sinks))
        return cls(query.device.type, query.dtype, query.shape[3], value.shape[3], query.shape[2], *options)


@dataclass
class Backend:
    """Attention of tree nodes over a key/value cache.

    `attention` maps queries `[batch, heads, nodes, head_dim]`, keys `[batch, kv_heads, columns, head_dim]` and values
    `[batch, kv_heads, columns, value_dim]` (views into the cache) to `[batch, nodes, heads, value_dim]` of the query's
    dtype; every node sees its row's prefix and its own ancestors.
    """

    name: str  # value of the option `attention` that selects it
    attention: Callable[[Tensor, Tensor, Tensor, TreeMetadata, AttnParams], Tensor]
    unsupported_reason: Callable[[AttnSpec], str | None]  # why a spec is not supported, or None when it is
    needs_dense_mask: bool = False  # whether `attention` builds a mask of nodes by keys


def _reference(query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams) -> Tensor:
    bias = tree.bias(key.shape[2], params.window, torch.float32)
    return reference.attention(query, key, value, bias, params.scale, params.softcap, params.sinks)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams) -> Tensor:
    return sdpa.attention(query, key, value, tree.bias(key.shape[2], params.window, query.dtype), params.scale)


def _triton(query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams) -> Tensor:
    from medhead_kernels import ops, tree_attention

    if not tree.host_lengths:  # a captured step
        return ops.attention(query, key, value, tree, params)
    with torch.cuda.device_of(query):
        return tree_attention.attention(query, key, value, tree, params)


def _triton_unsupported(spec: AttnSpec) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "it supports CUDA, not ROCm"
    if spec.device != "cuda" and not triton_is_interpreted():
        return f"it needs a CUDA device, not {spec.device} (TRITON_INTERPRET=1 runs it on a CPU, very slowly)"
    if spec.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer (A100, RTX 30 or later)"
    if spec.dtype not in (*HALF_DTYPES, torch.float32):
        return f"it supports bfloat16, float16 and float32, not {_dtype_name(spec.dtype)}"
    if max(spec.head_dim, spec.value_dim) > 256:
        return f"it supports head sizes up to 256, not {max(spec.head_dim, spec.value_dim)}"
    return _too_many_nodes(spec)


def _flash_unsupported(spec: AttnSpec) -> str | None:
    on_cuda = spec.device == "cuda"
    if spec.device not in ("cpu", "cuda"):
        return f"PyTorch has a flash kernel for cpu and cuda, not for {spec.device}"
    if on_cuda and spec.dtype not in HALF_DTYPES:
        return f"flash kernels support bfloat16 and float16, not {_dtype_name(spec.dtype)}"
    if spec.head_dim != spec.value_dim:
        return f"keys and values must have one head size, not {spec.head_dim} and {spec.value_dim}"
    if on_cuda and (spec.head_dim > 256 or spec.head_dim % 8):
        return f"flash kernels support head sizes up to 256 in steps of 8, not {spec.head_dim}"
    softcap = on_cuda and flash.flash_attn_installed()
    return _unsupported_option(spec, softcap=softcap, sinks=True) or _too_many_nodes(spec)


def _unsupported_option(spec: AttnSpec, window: bool = False, softcap: bool = False, sinks: bool = False) -> str | None:
    """Return a reason for the first option that `spec` requires and the backend lacks."""
    for required, supported, option in (
        (spec.window, window, "a sliding window"),
        (spec.softcap, softcap, "soft-capping"),
        (spec.sinks, sinks, "attention sinks"),
    ):
        if required and not supported:
            return f"it does not support {option}"
    return None


def _too_many_nodes(spec: AttnSpec) -> str | None:
    return f"it supports up to {MAX_NODES} nodes, not {spec.nodes}" if spec.nodes > MAX_NODES else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def triton_is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported."""
    from medhead_kernels import tree_attention

    return tree_attention.is_interpreted()


BACKENDS = {
    "sdpa": Backend("sdpa", _sdpa, lambda spec: _unsupported_option(spec, window=True), needs_dense_mask=True),
    "reference": Backend("reference", _reference, lambda spec: None, needs_dense_mask=True),
    "triton": Backend("triton", _triton, _triton_unsupported),
    "flash": Backend("flash", flash.attention, _flash_unsupported),
}


def select_backend(name: str, specs: list[AttnSpec]) -> Backend:
    """Return the backend called `name`; `auto` is triton on CUDA where it supports all layers, else sdpa.

    An unknown name, or a backend that does not support one of `specs`, the model's layers, raises a `BackendError`.
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"attention must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    if name == "auto" and (not specs or any(spec.device != "cuda" for spec in specs)):
        return BACKENDS["sdpa"]
    backend = BACKENDS["triton" if name == "auto" else name]
    reason = next((why for spec in specs if (why := backend.unsupported_reason(spec)) is not None), None)
    if reason is None:
        return backend
    if name != "auto":
        raise BackendError(f"attention {name!r} cannot serve this model: {reason}")
    warnings.warn(f"attention is 'sdpa', which is slower, because 'triton' cannot serve: {reason}", stacklevel=2)
    return BACKENDS["sdpa"]


@lru_cache(maxsize=256)
def cached_unsupported_reason(name: str, spec: AttnSpec) -> str | None:
    """Return `unsupported_reason` of a backend from a cache, for every layer of every pass."""
    return BACKENDS[name].unsupported_reason(replace(spec, nodes=1) if spec.nodes <= MAX_NODES else spec)
