"""Linear layers whose weights stay in few bits on a CPU, in place of those of a loaded model.

`stored` keeps every weight in the type that its checkpoint has it in, 4 to 16 bits, and so gives the text of float32. `int8` and
`int4` round the weights, so the text is that of the rounded model. Activations keep their type, and a token's result does not
depend on the other tokens of the pass, so a token tree gives the text of plain decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.config import WEIGHTS
from medhead.errors import MedheadError, one_line
from medhead.model.layout import decoder_layers, output_matrix
from medhead_kernels import block_linear
from medhead_kernels.block_linear import Blocks


class BlockLinear(nn.Module):
    """A linear layer that multiplies by `Blocks`, see `medhead_kernels.block_linear`.

    Args:
        blocks: the weight.
        bias: `[out]`, or None.
    """

    def __init__(self, blocks: Blocks, bias: Tensor | None = None) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features = blocks.kind, blocks.out, blocks.data.shape[1]
        self.data, self.scales, self.minimums = (
            nn.Parameter(part, requires_grad=False) for part in (blocks.data, blocks.scales, blocks.minimums)
        )
        self.bias = bias

    @property
    def blocks(self) -> Blocks:
        """The weight."""
        return Blocks(self.data, self.scales, self.minimums, self.kind, self.out_features)

    def rows(self, tokens: Tensor | None = None) -> Tensor:
        """Return rows `[tokens, in]` of the weight in float32; None is all of them."""
        return block_linear.rows(self.blocks, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.rows().to(x.dtype), self.bias)
        out = block_linear.linear(x, self.blocks)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """See `nn.Module.extra_repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def check_weights(weights: str, device: torch.device) -> None:
    """Raise a `MedheadError` unless weights can be kept so: all of `medhead.config.WEIGHTS` but `full` need a CPU."""
    if weights not in WEIGHTS:
        raise MedheadError(f"weights must be {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}, got {weights!r}")
    if weights == "full":
        return
    if device.type != "cpu":
        other = "use --device cpu, or a model that torchao or bitsandbytes quantised"
        raise MedheadError(f"{weights} weights run on a CPU, not on {device}; {other}")
    if (reason := block_linear.unavailable()) is not None:
        raise MedheadError(f"{weights} weights need a kernel of medhead: {reason}; or leave --weights out")


@torch.no_grad()
def use_blocks(model: Any, weights: str, gguf: Path | None = None) -> None:
    """Replace the linear layers of the decoder layers and the output matrix by `BlockLinear`, in place.

    The input embeddings keep their type, also where they were tied to the output matrix.

    Args:
        model: loaded on a CPU.
        weights: `stored`, `int8` or `int4`.
        gguf: the file that it was loaded from, whose integers `stored` keeps.

    Raises:
        MedheadError: the model has no plain linear layers, or its code does not run with others.
    """
    check_weights(weights, model.device)
    config, name, output = model.config.get_text_config(decoder=True), type(model).__name__, output_matrix(model)
    within = {id(module) for module in decoder_layers(model, int(config.num_hidden_layers)).modules()} | {id(output)}
    found = [
        (parent, key, child)
        for parent in list(model.modules())
        for key, child in parent.named_children()
        if id(child) in within and type(child) is nn.Linear and "weight" in child._parameters
    ]
    if not found:
        raise MedheadError(f"{name} has no plain linear layers (torch.nn.Linear); leave --weights out")
    known: Mapping[nn.Module, Blocks] = {}
    if gguf is not None and weights == "stored":
        from medhead.model.gguf_blocks import find_blocks

        known = find_blocks(gguf, [child for _, _, child in found])
    for parent, key, child in found:
        blocks = known.get(child) or _blocks(child.weight, weights)
        setattr(parent, key, BlockLinear(blocks, child.bias))
    model.config.tie_word_embeddings = config.tie_word_embeddings = False
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 160)
        raise MedheadError(f"{name} does not run with {weights} weights ({reason}); leave --weights out") from None


def _blocks(weight: Tensor, weights: str) -> Blocks:
    return block_linear.store(weight) if weights == "stored" else block_linear.round_to(weight, weights)
