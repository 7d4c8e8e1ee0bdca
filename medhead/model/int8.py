"""int8 weights: each row of a matrix is stored as 8-bit integers and one scale; activations keep their type.

A token's result does not depend on the other tokens of the pass, so a token tree gives the text of plain decoding. Products of
8-bit activations are twice as fast for a tree (`benchmarks/int8`), but on CPUs with AVX2 activations have 7 bits there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.errors import MedheadError, one_line
from medhead.model.layout import decoder_layers, output_matrix

_MAX_ROWS = 4  # that PyTorch's int8 product is fast for; it exists for bfloat16 (with float32 it is three times slower)
_BLOCK = 2**20  # weights converted at once, which stay in the caches


class Int8Linear(nn.Module):
    """A linear layer with symmetric int8 weights, one scale for each row.

    Args:
        linear: the layer to round; its bias is kept as it is.

    Attributes:
        values: `[out, in]` int8.
        scales: `[out]`; the weights are `values * scales[:, None]`.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).to(linear.weight.dtype)
        scales[scales == 0] = 1
        self.register_buffer("values", (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, self.in_features)
        if x.dtype == torch.bfloat16 and len(rows) <= _MAX_ROWS and not torch.is_grad_enabled():
            out = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.values, self.scales)
        else:
            blocks = self.values.split(max(1, _BLOCK // self.in_features))
            rows = rows.to(_product_dtype(x.dtype))
            out = (torch.cat([F.linear(rows, block.to(rows.dtype)) for block in blocks], -1) * self.scales).to(x.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """See `nn.Module.extra_repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type to multiply in: float32 where this CPU has no fast product of a half type, else `dtype`."""
    ops = torch.ops.mkldnn
    halves = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return torch.float32 if dtype in halves and not halves[dtype]() else dtype


def check_weights(weights: str | None, device: torch.device) -> None:
    """Raise a `MedheadError` unless `weights` is None, or `"int8"` and the device is a CPU."""
    if weights not in (None, "int8"):
        raise MedheadError(f"weights must be int8 or not given, got {weights!r}")
    if weights is not None and device.type != "cpu":
        raise MedheadError(
            f"int8 weights run on a CPU, not on {device}; use --device cpu, or a model that torchao or bitsandbytes quantised"
        )


@torch.no_grad()
def quantize_int8(model: Any) -> None:
    """Replace the linear layers of the decoder layers and the output matrix by `Int8Linear`, in place.

    The input embeddings keep their type, also where they were tied to the output matrix.

    Raises:
        MedheadError: the model has no plain linear layers, or its code does not run with others.
    """
    config, name, output = model.config.get_text_config(decoder=True), type(model).__name__, output_matrix(model)
    within = {id(module) for module in decoder_layers(model, int(config.num_hidden_layers)).modules()} | {id(output)}
    found = [
        (parent, key, child)
        for parent in list(model.modules())
        for key, child in parent.named_children()
        if id(child) in within and type(child) is nn.Linear and "weight" in child._parameters
    ]
    if not found:
        raise MedheadError(f"{name} has no plain linear layers (torch.nn.Linear) to round; leave int8 weights out")
    for parent, key, child in found:
        setattr(parent, key, Int8Linear(child))
    model.config.tie_word_embeddings = config.tie_word_embeddings = False
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 160)
        raise MedheadError(f"{name} does not run with int8 weights ({reason}); leave them out") from None
