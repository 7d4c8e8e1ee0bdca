"""From logits to drawn tokens, with the sampling parameters of every sequence of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from medhead.config import MAX_TEMPERATURE, SamplingParams
from medhead.core.gumbel import GumbelNoise, LazyGumbel, chunk_size, seed_halves
from medhead.core.penalties import LogitBias
from medhead.core.tree import TokenTree

_MAX_NUMPY_NUMBERS = 2**21  # beyond, PyTorch's threads are faster than numpy
# Processors that look at one distribution alone. All others are given each node's own text, node after node.
_WARPER_KINDS = ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")
_LOCAL_NAMES = (
    *(f"{kind}LogitsWarper" for kind in _WARPER_KINDS),
    "SuppressTokensLogitsProcessor",
    "LogitNormalization",
)
_LOCAL = tuple(getattr(lp, name) for name in (*_LOCAL_NAMES, "InfNanRemoveLogitsProcessor") if hasattr(lp, name))
_LOCAL += (LogitBias,)
# those of them that check a distribution on the host
_READING = tuple(getattr(lp, f"{kind}LogitsWarper") for kind in ("TopH", "Eta") if hasattr(lp, f"{kind}LogitsWarper"))
# transformers' class, the attribute that holds its number, and the field of SamplingParams; in transformers' order
_WARPERS = (
    (lp.TemperatureLogitsWarper, "temperature"),
    (lp.TopKLogitsWarper, "top_k"),
    (lp.TopPLogitsWarper, "top_p"),
    (lp.MinPLogitsWarper, "min_p"),
)


def is_local(processors: Iterable[Any]) -> bool:
    """Return whether every processor looks at one distribution alone (exact types: a subclass may do anything)."""
    return all(type(processor) in _LOCAL for processor in processors)


def reads_nothing(processors: Iterable[Any], device: torch.device) -> bool:
    """Return whether no local processor reads a tensor on the host or brings one of another device: a step can be captured."""
    held = [value for one in processors for value in vars(one).values() if isinstance(value, Tensor)]
    return not any(type(one) in _READING for one in processors) and all(value.device == device for value in held)


def take_warpers(processors: LogitsProcessorList, params: SamplingParams) -> tuple[SamplingParams, LogitsProcessorList]:
    """Move temperature, top-k, top-p and min-p at the beginning of a list of processors into sampling parameters.

    Args:
        processors: what transformers prepared.
        params: of a sequence that samples; its own warpers are replaced.

    Returns:
        The parameters, and the processors that are left and follow them.
    """
    found: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    kinds = list(_WARPERS)
    for taken, processor in enumerate(processors):
        while kinds and type(processor) is not kinds[0][0]:
            kinds.pop(0)
        if not kinds or not _is_default(processor):
            return replace(params, **found), LogitsProcessorList(processors[taken:])
        name = kinds.pop(0)[1]
        found[name] = getattr(processor, name)
    return replace(params, **found), LogitsProcessorList()


def to_warpers(params: SamplingParams) -> LogitsProcessorList:
    """Return transformers' warpers of sampling parameters, in its order; the inverse of `take_warpers`."""
    off = {"temperature": (1,), "top_k": (None, 0), "top_p": (None, 1), "min_p": (None, 0)}
    warpers: LogitsProcessorList = LogitsProcessorList()
    for kind, name in () if params.greedy else _WARPERS:
        value = getattr(params, name)
        if value not in off[name]:
            warpers.append(kind(value if name == "top_k" else float(value)))
    return warpers


def _is_default(processor: Any) -> bool:
    """Return whether a warper has no other options than its number, and one that `SamplingParams` allows."""
    keep, filled = getattr(processor, "min_tokens_to_keep", 1), getattr(processor, "filter_value", -torch.inf)
    return keep == 1 and filled == -torch.inf and getattr(processor, "temperature", 1) <= MAX_TEMPERATURE


def temperature_of(processors: LogitsProcessorList) -> float:
    """Return the product of the temperatures among the processors, 1 without any."""
    product = 1.0
    for processor in processors:
        if type(processor) is lp.TemperatureLogitsWarper:
            product *= float(processor.temperature)
    return product


@dataclass(eq=False)
class SamplingBatch:
    """Sampling parameters of the sequences of a batch as tensors, so that one step serves any mixture of them."""

    # `[batch, 5]` int64: lower and upper half of the seed, row of the user's batch, top-k, and 1 for a sequence that
    # samples (0: greedy)
    numbers: Tensor
    scales: Tensor  # `[batch, 3]` float32: temperature, top-p's tail mass `1 - top_p`, min-p
    max_top_k: int = 0  # largest top-k in use, 0 without
    uses_temperature: bool = False  # whether a temperature differs from 1
    uses_top_p: bool = False  # whether a sequence uses top-p
    uses_min_p: bool = False  # whether a sequence uses min-p
    sampled: int = 0  # how many sequences sample
    # further local processors of all sequences
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    uniform_temperature: float | None = 1.0  # the temperature for proposers where all sequences have one, else None

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        rows: Sequence[int],
        processors: LogitsProcessorList,
        device: torch.device | str,
    ) -> SamplingBatch:
        """Return the parameters of sequences that are rows `rows` of the user's batch."""
        greedy = SamplingParams()
        params = [greedy if one.greedy else one for one in params]  # other parameters of greedy sequences do nothing
        numbers, scales = [], []
        for one, row in zip(params, rows, strict=True):
            low, high = seed_halves(one.seed or 0)
            numbers.append([low, high, row, one.top_k or 0, int(not one.greedy)])
            scales.append([one.temperature or 1.0, 1 - (one.top_p or 1.0), one.min_p or 0.0])
        extra = temperature_of(processors)
        temperatures = {(one.temperature or 1.0) * extra for one in params}
        return cls(
            torch.tensor(numbers, device=device),
            torch.tensor(scales, dtype=torch.float32, device=device),
            max_top_k=max((one.top_k or 0 for one in params), default=0),
            uses_temperature=any(one.temperature not in (0, 1) for one in params),
            uses_top_p=any(one.top_p is not None and one.top_p < 1 for one in params),
            uses_min_p=any(one.min_p for one in params),
            sampled=sum(not one.greedy for one in params),
            processors=processors,
            uniform_temperature=temperatures.pop() if len(temperatures) == 1 else None,
        )

    def key(self) -> Hashable:
        """Return what a captured step depends on: parameters in use, top-k up to a power of two, and the processors."""
        return (
            max(0, self.max_top_k - 1).bit_length() if self.max_top_k else -1,
            self.uses_temperature,
            self.uses_top_p,
            self.uses_min_p,
            self.sampled > 0,
            signature(self.processors),
        )

    def fixed(self, rows: int) -> SamplingBatch:
        """Return parameters in their own storage for `rows` sequences of a captured step; see `load`."""
        numbers, scales = self.numbers.new_zeros(rows, 5), self.scales.new_zeros(rows, 3)
        scales[:, 0] = 1.0
        top_k = 1 << max(0, self.max_top_k - 1).bit_length() if self.max_top_k else 0
        sampled = rows if self.sampled else 0  # greedy sequences of a captured step get noise of zeros
        return replace(self, numbers=numbers, scales=scales, max_top_k=top_k, sampled=sampled, uniform_temperature=None)

    def over(self, numbers: Tensor, scales: Tensor) -> SamplingBatch:
        """Return the same form of parameters over other tensors."""
        return replace(self, numbers=numbers, scales=scales)

    def load(self, other: SamplingBatch) -> None:
        """Copy the parameters of as many sequences as `other` has."""
        count = len(other.numbers)
        self.numbers[:count].copy_(other.numbers)
        self.scales[:count].copy_(other.scales)

    @property
    def temperature(self) -> float | Tensor:
        """What proposers divide logits by: a number, or `[batch, 1, 1]`."""
        if self.uniform_temperature is not None:
            return self.uniform_temperature
        return self.scales[:, :1, None] * temperature_of(self.processors)

    def process(self, logits: Tensor) -> Tensor:
        """Return the scores that tokens are drawn from, of the shape `[batch, nodes, vocab]` of the logits.

        Temperature, top-k, top-p and min-p are those of transformers' warpers, with a number for every sequence. Without any
        of them the logits keep their values.
        """
        if self.sampled:
            logits = self._warp(logits)
        if self.processors:
            flat = logits.float().flatten(0, 1)
            no_text = torch.zeros(flat.shape[0], 1, dtype=torch.long, device=flat.device)
            return self.processors(no_text, flat).view_as(logits)
        return logits

    def _warp(self, logits: Tensor) -> Tensor:
        scores = logits.float()
        if self.uses_temperature:
            scores = scores / self.scales[:, :1, None]
        if self.max_top_k:
            top_k = self.numbers[:, 3].clamp(max=scores.shape[-1])
            best = scores.topk(min(self.max_top_k, scores.shape[-1]), dim=-1).values
            place = (top_k - 1).clamp(min=0)[:, None, None].expand(-1, scores.shape[1], 1)
            dropped = (scores < best.gather(-1, place)) & (top_k > 0)[:, None, None]
            scores = scores.masked_fill(dropped, -torch.inf)
        if self.uses_top_p:
            tail = self.scales[:, 1, None, None]
            ordered, index = scores.sort(dim=-1, descending=False)
            dropped = (ordered.softmax(-1).cumsum(-1) <= tail) & (tail > 0)
            dropped[..., -1:] = False
            scores = scores.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)
        if self.uses_min_p:
            probs = scores.softmax(-1)
            floor = self.scales[:, 2, None, None] * probs.amax(-1, keepdim=True)
            scores = scores.masked_fill(probs < floor, -torch.inf)
        return scores

    def noise(self, generator: GumbelNoise, lengths: Tensor, depths: int, fixed: bool) -> LazyGumbel | None:
        """Return the noise of the next `depths` tokens of every sequence, zeros for greedy ones; None if all are greedy.

        Args:
            generator: makes the noise.
            lengths: `[batch]` committed tokens; the root follows them, the first drawn token follows the root.
            depths: how many.
            fixed: make all of it at once, in one shape.
        """
        if not self.sampled:
            return None
        numbers, samples = self.numbers, self.numbers[:, 4]
        some_greedy = fixed or self.sampled < len(numbers)

        def make(begin: int, end: int) -> Tensor:
            positions = lengths[:, None] + 1 + torch.arange(begin, end, device=lengths.device)
            made = generator.gumbel(numbers[:, :2], numbers[:, 2], positions)
            return made.mul_(samples[:, None, None]) if some_greedy else made

        if fixed:
            return LazyGumbel.of(make(0, depths))
        return LazyGumbel(make, depths, chunk_size(len(numbers), generator.vocab_size, lengths.device))


def draw_nodes(tree: TokenTree, scores: Tensor, noise: Tensor | None) -> Tensor:
    """Return the target's token at every node of a tree, `[batch, nodes]`.

    Args:
        tree: the verified tree.
        scores: `[batch, nodes, vocab]` processed logits.
        noise: `[batch, depths, vocab]` of the tokens below every depth; None for greedy decoding.
    """
    if noise is None or tree.nodes == 1:
        return draw(scores, None if noise is None else noise[:, :1])
    return draw(scores, noise.gather(1, tree.depth[..., None].expand(-1, -1, noise.shape[-1])))


def draw(scores: Tensor, noise: Tensor | None) -> Tensor:
    """Return the argmax of every distribution `[..., vocab]`, after adding Gumbel noise when sampling."""
    return first_largest(scores if noise is None else scores + noise)


def first_largest(values: Tensor) -> Tensor:
    """Return `argmax(-1)`; on a CPU numpy finds the same index, the first of equals, ten times as fast."""
    if not on_host(values) or values.numel() > _MAX_NUMPY_NUMBERS:
        return values.argmax(-1)
    values = values.detach().float() if values.element_size() < 4 else values.detach()  # exact: ties stay ties
    return torch.from_numpy(np.asarray(values.numpy().argmax(-1)))


def on_host(tensor: Tensor) -> bool:
    """Return whether the tensor can be read now without waiting: it is on a CPU and no step is being traced."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def signature(processors: LogitsProcessorList) -> Hashable:
    """Return a key that is equal for processors of the same types and settings."""
    return tuple(
        (type(one).__name__, tuple(sorted((k, _plain(v)) for k, v in vars(one).items()))) for one in processors
    )


def _plain(value: object) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)
