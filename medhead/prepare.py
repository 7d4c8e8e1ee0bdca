"""Sequences that get processors, sampling parameters and end tokens as `model.generate` prepares them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from medhead import generate_options as options
from medhead.config import SamplingParams
from medhead.core.sampling import is_local, signature
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker, token_limit
from medhead.decoder import Decoder, sampling_params
from medhead.errors import MedheadError, one_line
from medhead.generation_config import generate_arguments, stop_strings


@dataclass
class PreparedGeneration:
    """What transformers prepares for `generate`: it is called in the place of a decoder and keeps its arguments."""

    takes_streamer = True  # as a decoder, see `model.hf_patch`
    config: GenerationConfig = field(default_factory=GenerationConfig)
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **arguments: Any,
    ) -> Tensor:
        """Keep the prepared configuration, processors and criteria; decode nothing."""
        self.config, self.processors, self.criteria = generation_config, logits_processor, stopping_criteria
        return input_ids


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
        self._prepare([0], SamplingParams(1, min_new_tokens=0), False)  # raises now, not at the first sequence

    def new_sequence(self, prompt: list[int], params: SamplingParams, **fields: Any) -> Sequence:
        """Return a sequence that has only its limit; `prepare` completes it, in the thread that decodes."""
        limit = token_limit(params.max_new_tokens, len(prompt), self._target.max_length)
        return Sequence(list(prompt), list(prompt), StopChecker(limit), params, **fields)

    def prepare(self, sequence: Sequence, stops_at: Callable[[int], bool] | None = None) -> Sequence:
        """Give a sequence its processors, sampling parameters and ends; return it.

        Args:
            sequence: one that `new_sequence` made.
            stops_at: see `StopChecker`; it looks for the stop strings too. None looks for them as transformers does.

        Raises:
            MedheadError: the model's generation configuration asks for what medhead cannot do.
        """
        params, limit = sequence.params, sequence.stop_checker.limit
        found = self._prepare(sequence.prompt_ids, params, stops_at is None)
        sequence.stop_checker = StopChecker(limit, (), found.criteria, self._target.device, stops_at)
        sequence.local = is_local(found.processors)
        sequence.params, processors = sampling_params(
            found.config, found.processors, params.seed, limit, sequence.local
        )
        if sequence.local:
            processors = self._shared.setdefault(signature(processors), processors)
        sequence.processors = processors
        return sequence

    @torch.inference_mode(False)  # captured steps run outside of inference mode, and use the processors' tensors
    def _prepare(self, prompt: list[int], params: SamplingParams, with_strings: bool) -> PreparedGeneration:
        arguments = generate_arguments(self._model, params, self._tokenizer)
        if not with_strings and arguments.pop("tokenizer", None) is not None:
            arguments["stop_strings"] = None
        ids, prepared = torch.tensor([prompt], device=self._target.device), PreparedGeneration()
        try:
            self._model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=prepared, **arguments)
        except MedheadError:
            raise
        except (ValueError, TypeError) as error:
            raise MedheadError(f"the model's generation configuration cannot be used: {one_line(error, 200)}") from None
        options.check_config(prepared.config, self._model.generation_config)
        return prepared
