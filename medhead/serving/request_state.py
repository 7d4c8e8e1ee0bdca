"""A request that is being served: its row in a lane, and what it has been given so far."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp

from medhead.config import SamplingParams
from medhead.core.gumbel import GumbelNoise
from medhead.core.sequence import Sequence, Settings
from medhead.core.stopping import StopChecker, token_limit
from medhead.model.target import Target
from medhead.proposers.base import VerifyOutput
from medhead.serving.decode_batch import DecodeBatch
from medhead.serving.detokenizer import Output
from medhead.serving.handle import RequestHandle
from medhead.serving.request import Reason, StepOutput, TreeView


class RequestState:
    """One row and its ticket.

    Args:
        ticket: of the request.
        target: the target.
        tokenizer: decodes the output.
        end_tokens: tokens that end a text.
        deadline: on `time.perf_counter`'s clock.
    """

    def __init__(
        self, ticket: RequestHandle, target: Target, tokenizer: Any, end_tokens: frozenset[int], deadline: float
    ) -> None:
        request = ticket.request
        self.ticket, self.deadline, self._end_tokens = ticket, deadline, end_tokens
        self.submitted = time.perf_counter()
        self.output = Output(tokenizer, request.params.stop)
        limit = token_limit(request.params.max_new_tokens, len(request.prompt), target.context)
        self.row = Sequence(0, list(request.prompt), list(request.prompt))
        self.row.own = Settings(
            processors_of(request.params),
            RequestStopChecker(self, limit, end_tokens, target.device),
            noise=GumbelNoise(ticket.result.seed, target.vocab_size, target.device)
            if request.params.temperature > 0
            else None,
            on_tokens=self._emitted,
        )
        self.texts: list[str] = []  # of the tokens of the last pass
        self.fresh: list[int] = []
        self.ended = False

    def _emitted(self, row: Sequence, new: list[int], ended: bool) -> None:
        self.fresh, self.ended = new, ended

    def piece(self, seconds: float, lane: DecodeBatch, place: int) -> StepOutput:
        """What the last pass gave, and the result so far brought up to date."""
        result, now = self.ticket.result, time.perf_counter()
        if result.first_token is None:
            result.first_token = now - self.submitted
        result.new_tokens, result.passes = len(self.row.output), self.row.passes
        result.lengths.append(len(self.fresh))
        result.busy += seconds
        result.seconds = now - self.submitted
        texts, self.texts = self.texts, []
        text = self.output.finish() if self.ended else self.output.take()
        if not self.ticket.request.trace or lane.verified is None:
            return StepOutput(self.fresh, text, seconds=seconds)
        view = look_at_tree(lane.verified, lane.proposer.origins(lane.verified.tree, place), place)
        sources = [_label(view, depth) for depth in range(1, len(self.fresh) + 1)]
        return StepOutput(self.fresh, text, texts, sources, view, seconds)

    @property
    def reason(self) -> Reason:
        """Why it ended, after it has."""
        return "stop" if self.output.stopped or self.row.output[-1] in self._end_tokens else "length"


class RequestStopChecker(StopChecker):
    """Ends a seat's row at end tokens, its limit, and its stop texts."""

    def __init__(self, seat: RequestState, limit: int, end_tokens: frozenset[int], device: torch.device) -> None:
        super().__init__(StoppingCriteriaList(), limit, device)
        self.seat, self.end_tokens = seat, end_tokens

    def take(self, text: list[int], done: int, tokens: Any, scores: list[Tensor] | None) -> tuple[list[int], bool]:
        """See `StopChecker.take`."""
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            self.seat.texts.append(self.seat.output.add(token))
            if self.ends_at(token, done + len(taken)) or self.seat.output.stopped:
                return taken, True
        return taken, False


def processors_of(params: SamplingParams) -> LogitsProcessorList:
    """The request's reshaping of the distribution, in transformers' order."""
    found = LogitsProcessorList()
    if params.temperature == 0:
        return found
    if params.temperature != 1:
        found.append(lp.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k is not None:
        found.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        found.append(lp.TopPLogitsWarper(float(params.top_p)))
    if params.min_p:
        found.append(lp.MinPLogitsWarper(float(params.min_p)))
    return found


def look_at_tree(verified: VerifyOutput, sources: list[str], place: int) -> TreeView:
    """The tree of one row for people who look."""
    tree = verified.tree
    path = verified.accepted.path[place].tolist()[: verified.counts[place]]
    return TreeView(tree.tokens[place].tolist(), tree.parents[place].tolist(), sources, path)


def _label(view: TreeView, depth: int) -> str:
    """Who guessed the token at this depth of the accepted path; the last one is the target's own."""
    if depth >= len(view.accepted):
        return "bonus"
    source = view.sources[view.accepted[depth]]
    return f"heads {depth}" if source == "heads" else source
