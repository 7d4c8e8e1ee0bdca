"""Comparison with plain decoding, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from medhead.decoder import Decoder


@dataclass(frozen=True)
class CheckReport:
    """Result of a comparison with plain decoding.

    Attributes:
        identical: every token of every row is the same.
        row: row of the first difference, None if there is none.
        position: index of the first new token of that row that differs, from 0.
        token: token of the decoder there; -1 if its text had ended.
        plain_token: token of plain decoding there; -1 if its text had ended.
        logit_gap: plain decoding's processed score of its own token minus that of the decoder's token. In half precision a
            small gap is rounding: a pass over more nodes sums in another order.
    """

    identical: bool
    row: int | None = None
    position: int | None = None
    token: int | None = None
    plain_token: int | None = None
    logit_gap: float | None = None

    def __str__(self) -> str:
        if self.identical:
            return "identical to plain decoding: yes"
        return (
            f"identical to plain decoding: no; row {self.row}, new token {self.position}: {self.token} instead of "
            f"{self.plain_token}, logit gap {self.logit_gap:.4g}"
        )


def check(decoder: Decoder, input_ids: Tensor, seed: int = 0, **arguments: Any) -> CheckReport:
    """Decode `input_ids` with the decoder's proposer and with plain decoding, and compare token by token.

    Both use the sampling seed `seed`; `arguments` are those of `model.generate`.
    """
    arguments |= {"seed": seed}
    width = input_ids.shape[1]
    ours = decoder.generate(input_ids, **arguments)[:, width:]
    statistics = decoder.statistics
    with decoder.using("none"):
        plain = decoder.generate(input_ids, return_dict_in_generate=True, output_scores=True, **arguments)
    decoder.statistics = statistics
    theirs = plain.sequences[:, width:]
    longest = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=-1) for t in (ours, theirs))
    differs = (ours != theirs).nonzero()
    if len(differs) == 0:
        return CheckReport(identical=True)
    row, position = differs[0].tolist()
    token, plain_token = int(ours[row, position]), int(theirs[row, position])
    gap = float("nan")
    if position < len(plain.scores) and min(token, plain_token) >= 0:
        scores = plain.scores[position][row]
        gap = float(scores[plain_token] - scores[token])
    return CheckReport(False, row, position, token, plain_token, gap)
