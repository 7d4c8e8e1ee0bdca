"""`Decoder`: what users hold. Callable through `model.generate(**inputs, custom_generate=decoder, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from medhead import generate_options as options
from medhead.check import CheckReport, check
from medhead.compile import CapturedLoop, CompiledTarget, Plans
from medhead.core.acceptance import TypicalAcceptance
from medhead.core.gumbel import GumbelNoise
from medhead.core.loop import DecodeLoop, StepTimes
from medhead.core.sequence import Sequence, Settings
from medhead.core.stopping import StopChecker, token_limit
from medhead.core.streaming import ColumnStream
from medhead.errors import MedheadError
from medhead.model.hf_patch import patch_generate, unpatch_generate
from medhead.model.target import Target
from medhead.proposers import Proposer, build_proposer


@dataclass
class Statistics:
    """What one generation did.

    Attributes:
        new_tokens: tokens emitted, all rows together.
        passes: verify passes summed over rows (a row that ended takes no part).
        steps: verify passes of the batch.
        prompt_tokens: prompt tokens, all rows together, without padding.
        prefill_seconds: time to read the prompts.
        decode_seconds: time of all steps.
        times: the steps' time by part.
        cache_bytes: memory of the key/value cache at the end.
        packed_bytes: memory of packed copies of weights, see `PackedWeights`.
        capture_seconds: time to make captured steps ready; the next generation of the same form has them.
        lengths: tokens emitted by every pass of every row, in order, for distributions.
    """

    new_tokens: int = 0
    passes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    times: StepTimes = field(default_factory=StepTimes)
    cache_bytes: int = 0
    packed_bytes: int = 0
    capture_seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per verify pass, bonus included; 1.0 is plain decoding."""
        return self.new_tokens / self.passes if self.passes else 0.0

    @property
    def seconds(self) -> float:
        """Prefill and all steps; not the time to capture steps."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens by total time."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


class Decoder:
    """Decodes a model's text by token trees, exactly.

    Args:
        model: any causal language model of transformers; it is left as it was between calls.
        proposer: a `Proposer`, or the name of a registered one; `hybrid` if None.
        heads: for the proposers `heads` and `hybrid`: heads, the folder of a heads checkpoint, or `mtp` for the
            multi-token-prediction layers in the model's own checkpoint.
        tree_size: nodes of a tree, root included; the proposer's own default if None.
        typical: lossy acceptance (Medusa's); None, the default, is exact. With logits processors that look at the text so
            far (penalties, bans of n-grams, minimal lengths) every node is asked on its own and acceptance stays exact.
        probe: check at once that the model verifies trees correctly.
        attention: backend of the target, see `Target`.
        packed: whether to keep packed copies of the weights on a CPU; None where it pays and memory is free, see `Target`.
        step: how a step is run. `loop`, the default, is the ordinary decode loop. With the proposers `heads` and `none`, a
            step can be captured: `graph` (a CUDA graph), `compiled` (PyTorch's compiler; in a CUDA graph on CUDA), `eager`
            or `recorded` (the same step without a GPU or a compiler, for tests). With other proposers, `compiled` compiles
            the target's pass and the heads' guesses. See `medhead.compile`.
        options: further options of the proposer.

    Raises:
        UnsupportedTargetError: the model cannot verify a tree.
        MedheadError: the proposer or its options are wrong.

    Example:
        >>> decoder = Decoder(model, heads="path/to/heads")
        >>> model.generate(**inputs, custom_generate=decoder, max_new_tokens=200)
    """

    def __init__(
        self,
        model: nn.Module | Target,
        proposer: Proposer | str | None = None,
        *,
        heads: Any = None,
        tree_size: int | None = None,
        typical: TypicalAcceptance | None = None,
        probe: bool = True,
        attention: str = "auto",
        packed: bool | None = None,
        step: str = "loop",
        **options: Any,
    ) -> None:
        self.target = model if isinstance(model, Target) else Target(model, probe, attention, packed)
        self._own_target = self.target is not model
        self.model = self.target.model
        if proposer is None:
            proposer = "heads" if "shape" in options else "hybrid"
        if isinstance(proposer, str):
            if heads is not None and proposer in ("heads", "hybrid"):
                options["heads"] = heads
            proposer = build_proposer(proposer, self.target, tree_size=tree_size, **options)
        elif tree_size is not None or options:
            given = sorted([*options, *(["tree_size"] if tree_size is not None else [])])
            raise MedheadError(f"{', '.join(given)}: options go with a proposer's name; this proposer is made already")
        self.proposer, self.typical, self.heads = proposer, typical, heads
        self._own_proposer = self.proposer
        self.plans: Plans | None = None
        self.compiled_target: CompiledTarget | None = None
        if step == "compiled" and not self.proposer.capturable:
            self.compiled_target = CompiledTarget(self.model, probe=False, attention=self.target.backend.name)
        elif step != "loop":
            self.plans = Plans(self.target, self.proposer, step)
        self.statistics = Statistics()
        self.on_pass: Callable[[Sequence, list[int]], None] | None = (
            None  # called with a row and the tokens of each pass
        )
        self.synchronize = torch.cuda.synchronize if self.target.device.type == "cuda" else None
        patch_generate(self.model)

    # ---------------------------------------------------------------- decoding

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with this decoder; takes the same arguments."""
        return self.model.generate(*args, custom_generate=self, **kwargs)

    @torch.inference_mode()
    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by `model.generate(custom_generate=decoder)` with what it has prepared.

        Args:
            model: must be the decoder's own model.
            input_ids: `[batch, tokens]`, padded on either side.
            logits_processor: prepared processors.
            stopping_criteria: prepared criteria.
            generation_config: prepared configuration.
            streamer: receives one column of tokens at a time.
            tokenizer: taken so that stop strings work; unused here.
            seed: of the sampling noise; drawn from torch's generator if None.
            arguments: other arguments of the model's forward; refused if they would have to be ignored.

        Returns:
            `[batch, tokens]` prompts and output, rows that ended early padded; or transformers' output object with
            `return_dict_in_generate`.

        Raises:
            MedheadError: an option that cannot be honoured, an empty or too long prompt.
        """
        if model is not self.model:
            raise MedheadError("this decoder was made for another model; make a Decoder for each model")
        config: GenerationConfig = generation_config or self.model.generation_config
        processors = LogitsProcessorList() if logits_processor is None else logits_processor
        criteria = StoppingCriteriaList() if stopping_criteria is None else stopping_criteria
        options.check_config(config)
        options.check_arguments(arguments)
        options.check_processors(processors)
        input_ids = input_ids.to(self.target.device)
        options.check_token_ids(input_ids, int(self.target.embedding.num_embeddings))
        texts = options.unpadded_rows(input_ids, arguments.get("attention_mask"))
        padded = input_ids.tolist()
        asked = int(config.max_length) - input_ids.shape[1]
        limit = token_limit(asked, max(map(len, texts)), self.target.context)
        rows = [
            Sequence(index, ids, text, processors=options.row_processors(processors, index))
            for index, (ids, text) in enumerate(zip(padded, texts, strict=True))
        ]
        prompt_tokens = sum(map(len, texts))
        pad = _pad_token(config)
        stream = None if streamer is None else ColumnStream(streamer, len(rows), pad)
        stopper = StopChecker(criteria, limit, self.target.device)
        lengths: list[int] = []
        keep = bool(config.return_dict_in_generate)
        settings = Settings(
            processors,
            stopper,
            noise=self._noise(config, seed),
            typical=self.typical,
            keep_scores=keep and bool(config.output_scores),
            keep_logits=keep and bool(config.output_logits),
            on_tokens=_listener(stream, lengths, self.on_pass),
            synchronize=self.synchronize,
        )
        loop = self._loop(settings)
        try:
            with loop.target.active(self.proposer.feature_layers):
                loop.run(list(rows))
        finally:
            self._count(rows, loop, prompt_tokens, lengths)
            if stream is not None:
                stream.finish()
        return _result(rows, input_ids, pad, config)

    def check(self, input_ids: Tensor, seed: int = 0, **arguments: Any) -> CheckReport:
        """Compare with plain decoding, token by token; see `medhead.check.check`."""
        return check(self, input_ids, seed, **arguments)

    # ---------------------------------------------------------------- life

    @torch.inference_mode()
    def warmup(self, rows: int = 1) -> None:
        """Do now what the first generation of up to `rows` rows would else wait for: measure what passes cost here."""
        target = self.compiled_target or self.target
        GumbelNoise(0, target.vocab_size, target.device).gumbel(
            *torch.zeros(2, 1, dtype=torch.long, device=target.device)
        )
        with target.active(self.proposer.feature_layers):
            self.proposer.warmup(target, rows)

    def close(self) -> None:
        """Leave the model as it was loaded, and give back what captured steps and packed weights hold."""
        if self.plans is not None:
            self.plans.clear()
        if self.compiled_target is not None:
            self.compiled_target.clear()
        if self._own_target:
            self.target.packed_weights.clear()
            self.proposer.free()
        unpatch_generate(self.model)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def using(self, proposer: Proposer | str, **options: Any) -> Iterator[Decoder]:
        """Another proposer for a while."""
        before = self.proposer
        built = build_proposer(proposer, self.target, **options) if isinstance(proposer, str) else proposer
        try:
            self.proposer = built
            yield self
        finally:
            self.proposer = before

    # ---------------------------------------------------------------- inside

    def _loop(self, settings: Settings) -> DecodeLoop:
        """What is captured or compiled serves the decoder's own proposer; another one (`using`) has the ordinary loop."""
        if self.proposer is not self._own_proposer:
            return DecodeLoop(self.target, self.proposer, settings)
        if self.plans is not None:
            return CapturedLoop(self.plans, settings)
        return DecodeLoop(self.compiled_target or self.target, self.proposer, settings)

    def _noise(self, config: GenerationConfig, seed: int | None) -> GumbelNoise | None:
        if not config.do_sample:
            if seed is not None:
                options.check_seed(seed)
            return None
        return GumbelNoise(options.check_seed(seed), self.target.vocab_size, self.target.device)

    def _count(self, rows: list[Sequence], loop: DecodeLoop, prompt_tokens: int, lengths: list[int]) -> None:
        self.statistics = Statistics(
            new_tokens=sum(len(row.output) for row in rows),
            passes=sum(row.passes for row in rows),
            steps=max(row.passes for row in rows),
            prompt_tokens=prompt_tokens,
            prefill_seconds=loop.prefill_seconds,
            decode_seconds=loop.times.total(),
            times=loop.times,
            cache_bytes=loop.cache_bytes,
            packed_bytes=loop.target.packed_weights.nbytes + self.proposer.packed_bytes,
            capture_seconds=loop.capture_seconds,
            lengths=lengths,
        )


def _listener(
    stream: ColumnStream | None, lengths: list[int], also: Callable[[Sequence, list[int]], None] | None
) -> Any:
    def listen(row: Sequence, new: list[int], ended: bool) -> None:
        lengths.append(len(new))
        if also is not None:
            also(row, new)
        if stream is not None:
            stream.add(row, new, ended)

    return listen


def _pad_token(config: GenerationConfig) -> int:
    for value in (getattr(config, "_pad_token_tensor", None), config.pad_token_id, config.eos_token_id, 0):
        if value is not None:
            return int(torch.as_tensor(value).flatten()[0])
    return 0


def _result(
    rows: list[Sequence], input_ids: Tensor, pad: int, config: GenerationConfig
) -> Tensor | GenerateDecoderOnlyOutput:
    longest = max(len(row.output) for row in rows)
    output = torch.full((len(rows), longest), pad, dtype=input_ids.dtype)
    for row in rows:
        output[row.index, : len(row.output)] = torch.tensor(row.output)
    sequences = torch.cat([input_ids, output.to(input_ids.device)], 1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_columns([row.scores for row in rows], longest) if config.output_scores else None,
        logits=_columns([row.logits for row in rows], longest) if config.output_logits else None,
    )


def _columns(rows: list[list[Tensor]], longest: int) -> tuple[Tensor, ...]:
    """One `[batch, vocab]` tensor for each new token; zeros where a row had ended."""
    blank = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.stack([row[at] if at < len(row) else blank for row in rows]) for at in range(longest))
