"""From logits to drawn tokens: logits processors, noise, and which processors look at the text so far."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from medhead.core.tree import TokenTree

_MOST_NUMBERS = 2**21  # numbers; beyond, several threads win
# Processors that look at one distribution alone. All others are given each node's own text, one node after the other.
_LOCAL = tuple(
    getattr(lp, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
    )
    if hasattr(lp, name)
)


def is_local(processors: LogitsProcessorList) -> bool:
    """Whether every processor looks at one distribution alone (exact types: a subclass may do anything)."""
    return all(type(processor) in _LOCAL for processor in processors)


def temperature_of(processors: LogitsProcessorList) -> float:
    """The temperature among the processors, 1 if there is none."""
    product = 1.0
    for processor in processors:
        if type(processor) is lp.TemperatureLogitsWarper:
            product *= float(processor.temperature)
    return product


def process_nodes(processors: LogitsProcessorList, logits: Tensor) -> Tensor:
    """Apply local processors to all nodes at once, `[batch, nodes, vocab]` to float32 scores of that shape."""
    logits = logits.float()
    if not processors:
        return logits
    flat = logits.flatten(0, 1)
    no_text = torch.zeros(flat.shape[0], 1, dtype=torch.long, device=flat.device)
    return processors(no_text, flat).view_as(logits)


def draw_nodes(tree: TokenTree, scores: Tensor, noise: Tensor | None) -> Tensor:
    """The target's token at every node of a tree, `[batch, nodes]`.

    Args:
        tree: the verified tree.
        scores: `[batch, nodes, vocab]` processed logits.
        noise: `[batch, depths, vocab]`, of the tokens below every depth; None for greedy decoding.
    """
    if noise is None or tree.nodes == 1:
        return draw(scores, None if noise is None else noise[:, :1])
    return draw(scores, noise.gather(1, tree.depth[..., None].expand(-1, -1, noise.shape[-1])))


def draw(scores: Tensor, noise: Tensor | None) -> Tensor:
    """The target's token for every distribution: argmax, after adding Gumbel noise when sampling.

    Args:
        scores: `[..., vocab]` processed logits.
        noise: same shape or one that broadcasts; None for greedy decoding.
    """
    return first_largest(scores if noise is None else scores + noise)


def first_largest(values: Tensor) -> Tensor:
    """`argmax(-1)` of floating-point numbers. On a CPU numpy finds the same ten times as fast: PyTorch has no vectors for it."""
    if not on_host(values) or values.numel() > _MOST_NUMBERS:
        return values.argmax(-1)
    values = values.detach().float() if values.element_size() < 4 else values.detach()  # no tie is lost or made
    return torch.from_numpy(np.asarray(values.numpy().argmax(-1)))


def on_host(tensor: Tensor) -> bool:
    """Whether the numbers can be looked at now, without waiting: they are on a CPU, and no step is being written down."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
