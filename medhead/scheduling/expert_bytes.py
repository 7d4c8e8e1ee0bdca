"""The weights that a pass over several tokens reads in a mixture of experts: the more tokens, the more experts.

A router sends every token to `top_k` of `experts` experts of each layer. If tokens choose independently and evenly, n tokens are
expected to touch `experts * (1 - (1 - top_k / experts) ** n)` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names in configurations
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class ExpertBytes:
    """Bytes of weights by number of tokens.

    Attributes:
        shared: bytes that every pass reads.
        routed: bytes of all experts of all layers.
        experts: experts of a layer.
        top_k: experts that a token goes to.
    """

    shared: int
    routed: int
    experts: int
    top_k: int

    @classmethod
    def of(cls, model: Any) -> ExpertBytes | None:
        """Return those of a model of transformers; None for one without experts."""
        config = model.config.get_text_config(decoder=True)
        experts, top_k = (_first(config, names) for names in (_EXPERTS, _TOP_K))
        routed = sum(_nbytes(part) for name, part in model.named_modules() if name.endswith(".experts"))
        if not routed or not experts or not top_k or top_k >= experts:
            return None
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        looked_up = 0 if output is None or output.weight is embedding.weight else _nbytes(embedding)
        return cls(_nbytes(model) - routed - looked_up, routed, experts, top_k)

    def __call__(self, tokens: int) -> float:
        """Return the expected bytes of a pass over so many tokens."""
        return self.shared + self.routed * (1 - (1 - self.top_k / self.experts) ** tokens)

    def growth(self, tokens: int) -> float:
        """Return how many times the bytes of one token a pass reads more than those."""
        return self(tokens) / self(1) - 1


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _nbytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
