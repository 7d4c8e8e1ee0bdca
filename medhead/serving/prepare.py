"""Sequences that get processors, sampling parameters and end tokens as `model.generate` prepares them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria

from medhead.config import SamplingParams
from medhead.core.constraint import new_constraint
from medhead.core.sampling import is_local, signature
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker, token_limit
from medhead.decoder import Decoder, sampling_params
from medhead.generate_options import prompt_inputs
from medhead.generation_config import prepare_generation, stop_strings
from medhead.serving.detokenizer import Detokenizer


class SequencePreparer:
    """Makes the sequences of one decoder; each gets the text that `model.generate` gives with the same parameters.

    Args:
        decoder: of the sequences; fields of its model's generation configuration hold where sampling parameters are None.
        tokenizer: its EOS token ends a text too.

    Attributes:
        stop_strings: strings at which the model's generation configuration ends a text.

    Raises:
        MedheadError: the model's generation configuration asks for what medhead cannot do.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any) -> None:
        self._model, self._target, self._tokenizer = decoder.model, decoder.target, tokenizer
        # the lists of running sequences: those with one list are processed together
        self._shared: WeakValueDictionary[Hashable, LogitsProcessorList] = WeakValueDictionary()
        self.stop_strings = stop_strings(self._model)
        prepare_generation(self._model, [0], SamplingParams(1, min_new_tokens=0), tokenizer)  # raises now, not later

    def new_sequence(self, prompt: list[int], params: SamplingParams, **fields: Any) -> Sequence:
        """Return a sequence that has only its limit; `prepare` completes it, in the thread that decodes."""
        limit = token_limit(params.max_new_tokens, len(prompt), self._target.context)
        return Sequence(list(prompt), list(prompt), StopChecker(limit), params, **fields)

    def prepare(
        self,
        sequence: Sequence,
        stops_at: Callable[[int], bool] | None = None,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> Sequence:
        """Give a sequence its processors, sampling parameters and ends; return it.

        Args:
            sequence: one that `new_sequence` made.
            stops_at: see `StopChecker`; it looks for the stop strings too. None looks for them alone.
            model_inputs: of its prompt, see `Request`.

        Raises:
            MedheadError: the model's generation configuration asks for what medhead cannot do, or the model cannot read
                the images.
        """
        params, limit = sequence.params, sequence.stop_checker.limit
        found = prepare_generation(self._model, sequence.prompt_ids, params, self._tokenizer, model_inputs)
        if model_inputs:
            ids = torch.tensor([sequence.prompt_ids], device=self._target.device)
            sequence.prompt_inputs = prompt_inputs(self._model, ids, found.arguments)
            sequence.has_images = sequence.prompt_inputs is not None
        if stops_at is None and self.stop_strings:
            stops_at = Detokenizer(self._tokenizer, self.stop_strings).stops_at
        criteria = [one for one in found.criteria if not (params.ignore_eos and type(one) is EosTokenCriteria)]
        sequence.stop_checker = StopChecker(limit, params.stop_token_ids, criteria, self._target.device, stops_at)
        if params.grammar is not None:
            ends = StopChecker(limit, criteria=criteria).end_tokens  # stop tokens are ordinary ones for a grammar
            sequence.constraint = new_constraint(params.grammar, self._tokenizer, self._target.vocab_size, ends)
        sequence.local = is_local(found.processors)
        sequence.params, processors = sampling_params(
            found.config, found.processors, params.seed, limit, sequence.local
        )
        if sequence.local:
            processors = self._shared.setdefault(signature(processors), processors)
        sequence.processors = processors
        return sequence
