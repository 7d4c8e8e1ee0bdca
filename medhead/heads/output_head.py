"""Heads ready to decode: converted to the type they compute in, with their output matrix and a table of encoded tokens."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.layers import Linear
from medhead.model.output_rows import output_rows
from medhead.model.target import Target
from medhead_kernels.packed_linear import PackedLinear

TABLE_BYTES = 64 * 2**20  # size of the largest table of encoded tokens that is kept

_SHARED: WeakValueDictionary[tuple[Any, ...], OutputHead] = WeakValueDictionary()


def shared_output_head(heads: Heads, target: Target, dtype: torch.dtype | None) -> OutputHead:
    """Return the output head of these heads that another proposer holds, so that tables exist once, or a new one."""
    versions = tuple(0 if p.is_inference() else p._version for p in heads.parameters())
    key = (id(heads), id(target), dtype, versions)
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = OutputHead(heads, target, dtype)
        found.key_objects = heads, target  # keeps both alive, so that no other object gets their ids
    return found


class OutputHead:
    """Heads, the rows of the target's output matrix that they use, and the type they compute in.

    The heads are moved to the target's device, and copied if they have another type than `dtype`, by default the target's.

    Attributes:
        tokens: `[draft_vocab_size]` token ids of the output rows, or None for all.
        table: `[vocab, ...]` encoded tokens, or None if one table cannot serve all depths or is too large.
    """

    key_objects: Any = None

    @torch.inference_mode(False)
    def __init__(self, heads: Heads, target: Target, dtype: torch.dtype | None) -> None:
        self.tokens = None if heads.draft_tokens is None else heads.draft_tokens.to(target.device)
        weight, bias = output_rows(target, self.tokens)
        self.dtype = dtype or weight.dtype
        if any(parameter.dtype != self.dtype for parameter in heads.parameters()):
            heads = deepcopy(heads)  # other proposers may hold them too
        self.heads = heads.to(device=target.device, dtype=self.dtype)
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self._embed, self._count = target.embed, target.num_embeddings
        self._packed: list[PackedLinear] = []  # the output matrix and the heads' layers, once packed
        self.table: Tensor | None = None
        if self.heads.path_dependent and not self.heads.encode_uses_depth:
            self.table = self._encode_all(target.device)

    def token(self, tokens: Tensor, depth: int) -> Tensor:
        """Return the result of `Heads.encode` for token ids at a depth."""
        if self.table is not None:
            return F.embedding(tokens, self.table)
        return self.heads.encode(self._embedded(tokens, depth), depth)

    def logits(self, hidden: Tensor, depth: int) -> Tensor:
        """Map `[..., hidden]` to float32 logits `[..., draft vocabulary]`."""
        own = self.heads.own_output(depth)
        if own is not None:
            return F.linear(hidden, own).float()
        if self._packed:
            return self._packed[0](hidden).float()
        return F.linear(hidden, self.weight, self.bias).float()

    def pack(self) -> None:
        """Multiply with packed copies of the output matrix and the heads' weights from now on.

        They are rounded to 8 bits. The target verifies drafts, so rounding does not change the text.
        """
        if self._packed:
            return
        self._packed = [PackedLinear(self.weight, self.bias, rounded=True)]
        for layer in self._linear_layers():
            if layer.packed is None or layer.packed.weight.data_ptr() != layer.weight.data_ptr():
                layer.packed = PackedLinear(layer.weight.detach(), layer.bias, rounded=True)
            self._packed.append(layer.packed)
        for packed in self._packed:  # now, so that the first tree does not take longer than others
            if packed.packable:
                packed.copy()

    def recheck(self) -> None:
        """Compare the packed copies with the weights at their next use: a new text begins, and weights may have changed."""
        for packed in self._packed:
            packed.recheck()

    def free(self) -> None:
        """Free the packed copies; they are made again at their next use."""
        for packed in self._packed:
            packed.clear()

    @property
    def packable_bytes(self) -> int:
        """Bytes that packed copies of all weights would take."""
        weights = [self.weight, *(layer.weight for layer in self._linear_layers())]
        return sum(weight.numel() * 9 // 8 for weight in weights)  # and a scale for 32 numbers of 8 bits

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copies."""
        return sum(packed.nbytes for packed in self._packed)

    def _linear_layers(self) -> list[Linear]:
        return [layer for layer in self.heads.modules() if isinstance(layer, Linear)]

    def _embedded(self, tokens: Tensor, depth: int) -> Tensor:
        own = self.heads.own_embedding(depth)
        return (self._embed(tokens) if own is None else F.embedding(tokens, own)).to(self.dtype)

    @torch.no_grad()
    def _encode_all(self, device: torch.device) -> Tensor | None:
        """Return the encoded tokens of the whole vocabulary, or None if they take more than `TABLE_BYTES`."""
        first = self.heads.encode(self._embedded(torch.zeros(1, dtype=torch.long, device=device), 0), 0)
        if self._count * first.numel() * first.element_size() > TABLE_BYTES:
            return None
        return self.heads.encode(self._embedded(torch.arange(self._count, device=device), 0), 0)
