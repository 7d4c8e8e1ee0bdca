"""Heads ready to decode: the type they compute in, the output rows they name tokens with, their tokens encoded ahead."""

from __future__ import annotations

import time
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.layers import Linear
from medhead_kernels import skinny_gemm as skinny_gemm

if TYPE_CHECKING:
    from medhead.model.target import Target

TABLE_BYTES = 64 * 2**20  # largest table of encoded tokens that is kept


_SHARED: WeakValueDictionary[tuple[Any, ...], OutputHead] = WeakValueDictionary()


def shared_output_head(heads: Heads, target: Target, dtype: torch.dtype | None) -> OutputHead:
    """The output_head of these heads that somebody holds already, so that tables and copies are kept once, else a new one."""
    versions = tuple(0 if p.is_inference() else p._version for p in heads.parameters())
    key = (id(heads), id(target), dtype, versions)
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = OutputHead(heads, target, dtype)
        found.holds = heads, target  # as long as it lives nobody else has their ids
    return found


class OutputHead:
    """Heads, the rows of the output matrix that they name tokens with, and the type they compute in.

    Args:
        heads: the heads; moved to the device, and copied where they have another type.
        target: whose embedding and output matrix they use.
        dtype: the type; None measures which of the target's own and bfloat16 is faster here.
    """

    holds: Any = None

    def __init__(self, heads: Heads, target: Target, dtype: torch.dtype | None) -> None:
        weight, bias = target.output.weight.detach(), getattr(target.output, "bias", None)
        self.tokens = None if heads.draft_tokens is None else heads.draft_tokens.to(target.device)
        if self.tokens is not None:
            weight, bias = weight[self.tokens], None if bias is None else bias[self.tokens]
        self.dtype = dtype or _faster_dtype(weight)
        self.heads = _converted(heads, target.device, self.dtype)
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self._embed, self._count = target.embed, int(target.embedding.num_embeddings)
        self._target_embedding = target.embedding
        self._embeddings: tuple[Any, Tensor] | None = None
        self._matrices: list[skinny_gemm.PackedLinear] = []  # the output matrix first, where packed copies are used
        self.table: Tensor | None = None  # `[vocab, ...]` encoded tokens, where one table serves all depths
        if self.heads.per_path and not self.heads.encodes_by_depth:
            self.table = self._encode_all(self._count, target.device)

    def token(self, tokens: Tensor, depth: int) -> Tensor:
        """What the heads need of token ids at this depth."""
        if self.table is not None:
            return F.embedding(tokens, self.table)
        return self.heads.encode(self._embedded(tokens, depth), depth)

    def logits(self, feature: Tensor, depth: int) -> Tensor:
        """`[..., hidden]` to float32 `[..., draft vocabulary]`."""
        own = self.heads.own_output(depth)
        if own is not None:
            return skinny_gemm.linear(feature, own).float()
        if self._matrices:
            return self._matrices[0](feature).float()
        return skinny_gemm.linear(feature, self.weight, self.bias).float()

    def pack(self) -> None:
        """From now on multiply with packed copies of the weights, the heads' too, where that is faster (`skinny_gemm.PackedLinear`)."""
        if self._matrices:
            return
        self._matrices = [skinny_gemm.PackedLinear(self.weight, self.bias)]
        for layer in self.heads.modules():
            if isinstance(layer, Linear):
                if layer.matrix is None or layer.matrix.weight.data_ptr() != layer.weight.data_ptr():
                    layer.matrix = skinny_gemm.PackedLinear(layer.weight.detach(), layer.bias)
                self._matrices.append(layer.matrix)
        skinny_gemm.PackGroup(self._matrices)
        for matrix in self._matrices:
            matrix.warmup()

    def recheck(self) -> None:
        """A text begins: weights may have been changed since the last one."""
        for matrix in self._matrices:
            matrix.recheck()

    def free(self) -> None:
        """Give the packed copies back; they are made again when they are needed."""
        for matrix in self._matrices:
            matrix.clear()

    @property
    def packable_bytes(self) -> int:
        """DraftCacheView that packed copies of everything would take."""
        layers = [layer.weight for layer in self.heads.modules() if isinstance(layer, Linear)]
        return sum(weight.numel() * weight.element_size() for weight in [self.weight, *layers])

    @property
    def nbytes(self) -> int:
        """DraftCacheView of the packed copies."""
        return sum(matrix.nbytes for matrix in self._matrices)

    def _embedded(self, tokens: Tensor, depth: int) -> Tensor:
        own = self.heads.own_embedding(depth)
        return (self._embed(tokens) if own is None else F.embedding(tokens, own)).to(self.dtype)

    @property
    def embeddings_bytes(self) -> int:
        """DraftCacheView that `embeddings` takes."""
        return self._count * self.heads.config.hidden_size * self.weight.element_size()

    @torch.inference_mode()
    def embeddings(self) -> Tensor:
        """`[vocab, size]`: the target's embedding of every token, as `encode` gets it; made anew when its weights change."""
        weight = self._target_embedding.weight
        key = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self._embeddings is None or self._embeddings[0] != key:
            self._embeddings = key, self._embedded(torch.arange(self._count, device=weight.device), 0)
        return self._embeddings[1]

    @torch.inference_mode()
    def _encode_all(self, count: int, device: torch.device) -> Tensor | None:
        """The encoded tokens of the whole vocabulary, unless that takes too much memory."""
        first = self.heads.encode(self._embedded(torch.zeros(1, dtype=torch.long, device=device), 0), 0)
        if count * first.numel() * first.element_size() > TABLE_BYTES:
            return None
        return self.heads.encode(self._embedded(torch.arange(count, device=device), 0), 0)


def _faster_dtype(weight: Tensor) -> torch.dtype:
    """The target's type, or bfloat16 where a float32 target on a CPU multiplies faster with it."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight.dtype
    return _measured_dtype(*weight.shape, torch.get_num_threads())


@cache
def _measured_dtype(out: int, size: int, threads: int, repeats: int = 16) -> torch.dtype:
    """Measured once a process, so that everybody comes to the same choice; a few ms."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix, vectors = skinny_gemm.PackedLinear(torch.ones(out, size, dtype=dtype)), torch.ones(4, size, dtype=dtype)
        times = []
        with torch.inference_mode():
            matrix(vectors)
            for _ in range(repeats):
                began = time.perf_counter()
                matrix(vectors)
                times.append(time.perf_counter() - began)
        seconds[dtype] = sorted(times)[repeats // 2]
    return min(seconds, key=lambda dtype: seconds[dtype])


def _converted(heads: Heads, device: torch.device, dtype: torch.dtype) -> Heads:
    """The heads on a device; a copy where they have another type, because others may hold them too."""
    if any(parameter.dtype != dtype for parameter in heads.parameters()):
        return deepcopy(heads).to(device=device, dtype=dtype)
    return heads.to(device=device)
