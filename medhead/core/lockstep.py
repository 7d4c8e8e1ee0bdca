"""Acceptance in lockstep, for logits processors and stopping criteria that look at the whole batch.

All rows advance by the same number of tokens in every pass, and every position is decided for all rows together. So
callbacks see exactly the calls of transformers' `generate`: one for each position, in order, with all rows, those that have
ended included. The row with the shortest accepted path decides how many tokens a pass emits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

from medhead.core.acceptance import Accepted
from medhead.core.constraint import keep_banned
from medhead.core.penalties import OutputPenalties
from medhead.core.sampling import draw, is_local
from medhead.core.sequence import Sequence
from medhead.core.sequential_accept import child_with
from medhead.core.stopping import StopChecker
from medhead.core.tree import TokenTree

# Processors that treat every row by its own text and keep no state: rows may be processed one by one, at their own pace.
_PER_ROW_NAMES = (
    "MinLength",
    "MinNewTokensLength",
    "RepetitionPenalty",
    "NoRepeatNGram",
    "SequenceBias",
    "NoBadWords",
    "PrefixConstrained",
    "ForcedBOSToken",
    "ForcedEOSToken",
    "SuppressTokensAtBegin",
    "Watermark",
)
_TRANSFORMERS_OWN = (getattr(lp, f"{name}LogitsProcessor") for name in _PER_ROW_NAMES)
_PER_ROW = (*_TRANSFORMERS_OWN, lp.ExponentialDecayLengthPenalty, OutputPenalties)


def needs_lockstep(processors: LogitsProcessorList, criteria: StoppingCriteriaList, rows: int) -> bool:
    """Return whether a callback may look at the whole batch or keep a state (exact types: a subclass may do anything).

    Args:
        processors: what transformers prepared.
        criteria: what transformers prepared.
        rows: of the batch.
    """
    if not all(is_local([one]) or type(one) in _PER_ROW for one in processors):
        return True
    others = [one for one in criteria if type(one) not in (sc.MaxLengthCriteria, sc.EosTokenCriteria)]
    if rows == 1:  # processors must see no call after the token that a criterion ends the text with
        return bool(others) and not is_local(processors)
    own = any(type(one) not in (sc.StopStringCriteria, sc.MaxTimeCriteria) for one in others)
    return own or (bool(others) and not pads_ended_rows(criteria))


def pads_ended_rows(criteria: StoppingCriteriaList) -> bool:
    """Return whether transformers pads rows that have ended; without end tokens they go on until all have ended."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


class Lockstep:
    """The callbacks of a batch whose rows advance together.

    Args:
        input_ids: `[batch, length]` prompts as the user gave them.
        processors: all logits processors.
        criteria: all stopping criteria.
        pad: token of rows that have ended.
        stop_checker: that of all sequences; its limit becomes the number of new tokens when all rows have ended.
        show_scores: whether criteria see the processed scores of all positions; else they see None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        pad: int,
        stop_checker: StopChecker,
        show_scores: bool,
    ) -> None:
        self.input_ids, self.processors, self.criteria = input_ids, processors, criteria
        self.stop_checker = stop_checker
        self._pad = pad if pads_ended_rows(criteria) else None
        self._scores: tuple[Tensor, ...] | None = () if show_scores else None
        self._unfinished = torch.ones_like(input_ids[:, 0])
        self._new_tokens = torch.zeros_like(self._unfinished)  # of every row, padding excluded

    def accept(
        self, tree: TokenTree, logits: Tensor, noise: Tensor | None, masked: bool = False
    ) -> tuple[Accepted, list[list[Tensor]]]:
        """Accept position by position; also return the processed scores `[vocab]` of every row's emitted tokens.

        Args:
            tree: the verified tree.
            logits: `[batch, nodes, vocab]`.
            noise: `[batch, depths, vocab]` or None.
            masked: whether grammars have masked logits.
        """
        parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
        rows = torch.arange(len(tokens), device=logits.device)
        nodes = [0] * len(tokens)
        path, emitted, scores = list[Tensor](), list[Tensor](), list[Tensor]()
        while len(nodes) == len(tokens):
            path.append(torch.tensor(nodes, device=logits.device))
            processed = self.processors(self.input_ids, logits[rows, path[-1]].float())
            if masked:
                processed = keep_banned(processed, logits[rows, path[-1]])
            emitted.append(self._take(processed, None if noise is None else noise[:, len(emitted)]))
            scores.append(processed)
            if not self._unfinished.any() or self._new_tokens.max() >= self.stop_checker.limit:
                self.stop_checker.limit = int(self._new_tokens.max())
                break
            drawn = emitted[-1].tolist()
            following = map(child_with, parents, tokens, nodes, drawn)
            nodes = [node for node in following if node is not None]  # fewer than rows where a path ends
        counts = torch.full_like(rows, len(path))
        accepted = Accepted(torch.stack(path, 1), counts, torch.stack(emitted, 1), path[-1])
        return accepted, [[column[row] for column in scores] for row in range(len(tokens))]

    def _take(self, processed: Tensor, noise: Tensor | None) -> Tensor:
        """Return the tokens `[batch]` of the next position, and ask the criteria."""
        drawn = draw(processed, noise)
        if self._pad is not None:
            drawn = drawn * self._unfinished + self._pad * (1 - self._unfinished)
            self._new_tokens += self._unfinished
        else:
            self._new_tokens += 1
        self.input_ids = torch.cat([self.input_ids, drawn[:, None]], 1)
        if self._scores is not None:
            self._scores += (processed,)
        self._unfinished = self._unfinished & ~self.criteria(self.input_ids, self._scores)
        return drawn

    def drop_padding(self, sequences: list[Sequence]) -> None:
        """Take the padding of rows that had ended out of their outputs."""
        for sequence, count in zip(sequences, self._new_tokens.tolist(), strict=True):
            del sequence.output_ids[count:]
