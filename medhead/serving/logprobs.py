"""Log probabilities of emitted tokens, from the logits that the verify pass computed anyway."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from medhead.proposers.base import VerifyOutput

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of an emitted token, and those of the most probable ones in its place.

    These are the model's own: temperature 1, before penalties, biases, bans, top-k, top-p and min-p.

    Attributes:
        token: token id.
        logprob: natural logarithm of its probability.
        top: token ids and log probabilities of the most probable tokens, falling.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def path_logprobs(output: VerifyOutput, row: int, tokens: list[int], top: int) -> list[TokenLogprobs]:
    """Return the log probabilities of the tokens that a pass emitted for one row.

    Args:
        output: of the pass.
        row: of its batch.
        tokens: that were emitted, cut where the text ended.
        top: how many of the most probable tokens to list.
    """
    nodes = output.accepted.path[row, : len(tokens)]
    logp = output.logits[row, nodes].float().log_softmax(-1)  # [tokens, vocab]
    chosen = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0].tolist()
    best = logp.topk(min(top, logp.shape[-1]), dim=-1)
    pairs = [list(zip(*one, strict=True)) for one in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenLogprobs(*one) for one in zip(tokens, chosen, pairs, strict=True)]
