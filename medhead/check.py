"""Comparison with plain decoding, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CONTEXT = 8  # tokens before a difference that are shown
_NEAR_TIE = 64  # logit gap of a near tie, in units of the data type's epsilon: 0.5 in bfloat16


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
        before: up to 8 new tokens of the row before the difference.
    """

    identical: bool
    row: int | None = None
    position: int | None = None
    token: int | None = None
    plain_token: int | None = None
    logit_gap: float | None = None
    before: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.identical:
            return "identical to plain decoding: yes"
        return (
            f"identical to plain decoding: no; row {self.row}, new token {self.position}: {self.token} instead of "
            f"{self.plain_token}, logit gap {self.logit_gap:.4g}"
        )

    def describe(self, decode: Callable[[list[int]], str], dtype: torch.dtype) -> str:
        """Return the result for people: text, from `decode`, in place of token ids, and the cause in half precision."""
        if self.identical:
            return str(self)
        ours, plain = ("the end" if t is None or t < 0 else repr(decode([t])) for t in (self.token, self.plain_token))
        where = f"after {decode(list(self.before))!r}" if self.before else "at the first token"
        line = f"identical to plain decoding: no; {where}: {ours} instead of {plain}, logit gap {self.logit_gap:.4g}"
        if dtype not in (torch.bfloat16, torch.float16):
            return line
        name = str(dtype).removeprefix("torch.")
        near = abs(self.logit_gap or 0.0) <= _NEAR_TIE * torch.finfo(dtype).eps
        why = f"near tie in {name}" if near else f"sums are rounded in {name}"
        return f"{line}: {why}; use --exact bitwise on a CPU, or --dtype float32"


def compare(ours: Tensor, plain: Tensor, plain_scores: Sequence[Tensor]) -> CheckReport:
    """Compare new tokens with those of plain decoding.

    Args:
        ours: `[batch, tokens]`, the decoder's new tokens.
        plain: `[batch, tokens]`, those of plain decoding.
        plain_scores: processed scores `[batch, vocab]` of every new token of plain decoding.
    """
    longest = max(ours.shape[1], plain.shape[1])
    ours, plain = (
        torch.nn.functional.pad(tokens, (0, longest - tokens.shape[1]), value=-1) for tokens in (ours, plain)
    )
    differs = (ours != plain).nonzero()
    if len(differs) == 0:
        return CheckReport(identical=True)
    row, position = differs[0].tolist()
    token, plain_token = int(ours[row, position]), int(plain[row, position])
    gap = float("nan")
    if position < len(plain_scores) and min(token, plain_token) >= 0:
        scores = plain_scores[position][row]
        gap = float(scores[plain_token] - scores[token])
    before = tuple(plain[row, max(0, position - _CONTEXT) : position].tolist())
    return CheckReport(False, row, position, token, plain_token, gap, before)
