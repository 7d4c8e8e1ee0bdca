"""A request that is being served: its sequence, its text so far, and the handle that its caller holds."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence
from medhead.core.stopping import token_limit
from medhead.errors import MedheadError
from medhead.model.prompt_inputs import why_no_images
from medhead.model.target import Target
from medhead.proposers import PROPOSERS
from medhead.proposers.base import VerifyOutput
from medhead.serving.detokenizer import Detokenizer
from medhead.serving.handle import RequestHandle
from medhead.serving.logprobs import path_logprobs
from medhead.serving.prepare import SequencePreparer
from medhead.serving.request import Reason, Request, StepOutput, TreeView


class RequestState:
    """One request while it is served.

    Args:
        handle: of the request; its `result.seed` is the seed.
        preparer: makes the sequence.
        tokenizer: decodes the output.
        deadline: on `time.perf_counter`'s clock.
    """

    def __init__(self, handle: RequestHandle, preparer: SequencePreparer, tokenizer: Any, deadline: float) -> None:
        request = handle.request
        self.handle, self.deadline, self._preparer = handle, deadline, preparer
        self.submitted = time.perf_counter()
        stop = request.params.stop + preparer.stop_strings
        self.detokenizer = Detokenizer(tokenizer, stop, request.special_tokens)
        params = replace(request.params, seed=handle.result.seed)
        self.sequence = preparer.new_sequence(request.prompt, params, on_tokens=self._on_tokens)
        self.sequence.needs_logits, self.sequence.cache_salt = request.logprobs is not None, request.cache_salt
        self.new_token_ids: list[int] = []
        self._new_texts: list[str] = []
        self.ended = False

    @property
    def reason(self) -> Reason:
        """Why it ended, after it has."""
        ended = self.sequence.output_ids[-1] in self.sequence.stop_checker.end_tokens
        return "stop" if self.detokenizer.stopped or ended else "length"

    def prepare(self) -> None:
        """Give the sequence its processors and ends, and the model inputs of its request; called in the engine's thread."""
        request = self.handle.request
        self._preparer.prepare(self.sequence, self._stops_at, request.model_inputs)
        if request.model_inputs:
            self.handle.request = replace(request, model_inputs={})  # images are freed once they are read

    def take_output(self, seconds: float, loop: DecodeLoop, row: int) -> StepOutput:
        """Return the output of the last pass, and bring the result up to date.

        Args:
            seconds: of the pass.
            loop: what decoded it.
            row: row of the batch in that pass.
        """
        result, now = self.handle.result, time.perf_counter()
        if result.first_token is None:
            result.first_token = now - self.submitted
        tokens, self.new_token_ids = self.new_token_ids, []
        texts, self._new_texts = self._new_texts, []
        result.new_tokens, result.passes = len(self.sequence.output_ids), self.sequence.passes
        result.lengths.append(len(tokens))
        result.busy += seconds
        result.seconds = now - self.submitted
        text = self.detokenizer.finish() if self.ended else self.detokenizer.take()
        output, top = loop.output, self.handle.request.logprobs
        logprobs = path_logprobs(output, row, tokens, top) if output is not None and top is not None else []
        if not self.handle.request.trace or output is None:
            return StepOutput(tokens, text, seconds=seconds, logprobs=logprobs)
        origins = loop.proposer.origins(output.tree, row)
        if output.drafted:
            own = output.drafted[row]
            origins[own:] = ["grammar"] * (len(origins) - own)
        view = tree_view(output, origins, row)
        sources = [_source(view, depth) for depth in range(1, len(tokens) + 1)]
        return StepOutput(tokens, text, texts, sources, view, seconds, logprobs)

    def _stops_at(self, token: int) -> bool:
        if token in self.handle.request.params.stop_token_ids:  # it ends the text and is no part of it
            self._new_texts.append("")
            return False
        self._new_texts.append(self.detokenizer.add(token))
        return self.detokenizer.stopped

    def _on_tokens(self, sequence: Sequence, new: list[int], ended: bool) -> None:
        self.new_token_ids = self.new_token_ids + new
        self.ended = ended


def tree_view(output: VerifyOutput, sources: list[str], row: int) -> TreeView:
    """Return the tree of one row for display."""
    tree = output.tree
    path = output.accepted.path[row].tolist()[: output.counts[row]]
    return TreeView(tree.tokens[row].tolist(), tree.parents[row].tolist(), sources, path)


def _source(view: TreeView, depth: int) -> str:
    """Return the proposer of the token at this depth of the accepted path; the last token is the target's own."""
    if depth >= len(view.accepted):
        return "bonus"
    source = view.sources[view.accepted[depth]]
    return f"heads {depth}" if source == "heads" else source


def check_request(request: Request, target: Target, has_heads: bool) -> None:
    """Refuse a request that this target and these proposers cannot serve.

    Raises:
        MedheadError: names the field, what was given and what is allowed.
    """
    if not request.prompt:
        raise MedheadError("the prompt is empty: give at least one token")
    if request.model_inputs and (reason := why_no_images(target)) is not None:
        raise MedheadError(f"{', '.join(sorted(request.model_inputs))} cannot be used: {reason}")
    vocabulary = target.num_embeddings
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= vocabulary:
        raise MedheadError(f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}")
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(request.params, name) or ():
            if token >= target.vocab_size:
                raise MedheadError(f"{name}: token id {token} is outside the model's vocabulary of {target.vocab_size}")
    token_limit(request.params.max_new_tokens, len(request.prompt), target.context)
    if request.proposer is not None and request.proposer not in PROPOSERS:
        raise MedheadError(f"no proposer is called {request.proposer!r}; known: {', '.join(sorted(PROPOSERS))}")
    if request.proposer == "heads" and not has_heads:
        raise MedheadError("the proposer 'heads' needs heads, and none are loaded; start with --heads")
