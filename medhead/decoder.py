"""`Decoder`: what users hold. Callable through `model.generate(**inputs, custom_generate=decoder, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from medhead import generate_options as options
from medhead.check import CheckReport, compare
from medhead.compile import CompiledTarget, GraphCache, automatic_graphs, may_use_kept_passes
from medhead.config import MAX_TEMPERATURE, SamplingParams, check_seed
from medhead.core.acceptance import TypicalAcceptance
from medhead.core.constraint import new_constraint
from medhead.core.context import warn_beyond_context
from medhead.core.gumbel import GumbelNoise
from medhead.core.lockstep import Lockstep, needs_lockstep
from medhead.core.loop import DecodeLoop
from medhead.core.sampling import is_local, take_warpers, temperature_of
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker, token_limit
from medhead.core.streaming import ColumnStream
from medhead.errors import MedheadError
from medhead.generate_output import generate_output, pad_token
from medhead.grammar import Grammar
from medhead.model.bitwise import check_exact
from medhead.model.hf_patch import patch_generate, unpatch_generate
from medhead.model.model_form import num_rows
from medhead.model.shards import placement
from medhead.model.target import Target
from medhead.proposers import Proposer, build_proposer
from medhead.proposers.base import VerifyOutput
from medhead.statistics import Statistics


class Decoder:
    """Decodes a model's text by token trees, exactly.

    Args:
        model: any causal language model of transformers; it is left as it was between calls.
        proposer: a `Proposer`, or the name of a registered one; `hybrid` if None.
        heads: for the proposers `heads` and `hybrid`: heads, the folder of a heads checkpoint, or `mtp` for the
            multi-token-prediction layers in the model's own checkpoint.
        tree_size: nodes of a tree, root included; the proposer's own default if None.
        typical: lossy acceptance (Medusa's); None, the default, is exact. With logits processors that look at the text so
            far (penalties, bans of n-grams, minimal lengths) or at the whole batch every node is asked on its own and
            acceptance stays exact.
        probe: check at once that the model verifies trees correctly.
        attention: backend of the target, see `Target`.
        packed: whether to keep packed copies of the weights on a CPU; None where it pays and memory is free, see `Target`.
        profile: time the parts of every step (`statistics.times`); the device is synchronised around each of them, and `auto`
            captures no step.
        step: how a step is run. `loop` is the ordinary decode loop. `auto`, the default, is `graph` on CUDA where a step can
            be captured, else `loop`, on a CPU with the target's passes that `compiled` compiled before on this machine, if
            any. `compiled` compiles the target's pass and the growth of candidates from heads. With the proposers `hybrid`,
            `heads`, `ngram`, `recycling` and `none`, a step can be captured: `graph` (a CUDA graph), `eager` or `recorded`
            (the same step without a GPU, for tests), and for `heads` and `none` `compiled` on CUDA (PyTorch's compiler,
            inside a CUDA graph). See `medhead.compile`.
        exact: `bitwise` gives one text for every proposer, tree and batch, bit for bit, in every dtype, `transformers` also the
            text of its `generate`; on a CPU. `auto` is `bitwise` in half precision where passes take no longer with it; None
            switches it off. See `Target`; a target that is given keeps its own.
        fused: whether fused kernels replace parts of the model in passes; None does so on CUDA. True also merges products,
            for which the model's parameters become views of one tensor, see `Target`.
        options: further options of the proposer.

    Threads may share a decoder, or have a decoder each on one model: generations of one model take turns, and wait for each
    other. An ordinary `model.generate` in another thread runs at the same time and is not changed; training the model in another
    thread is not possible then, because the model is in eval mode. A generation may be started in a streamer, a processor or a
    criterion of another one in the same thread, but such a callback must not wait for a generation in another thread. While an
    `Engine` serves with the decoder, calls take turns with its steps, and run eagerly. What a call returns are ordinary tensors.

    Attributes:
        proposer: what proposes; `using` replaces it for all threads.
        statistics: of the call that finished last, in any thread.
        on_pass: called with a sequence and its new tokens after every pass of it, in the thread of the call; None for nothing.
        on_output: called with the `VerifyOutput` of every pass but captured ones, in the thread of the call; None for nothing.

    Raises:
        UnsupportedTargetError: the model cannot verify a tree.
        MedheadError: the proposer or its options are wrong.

    Example:
        >>> decoder = Decoder(model, heads="path/to/heads")
        >>> model.generate(**inputs, custom_generate=decoder, max_new_tokens=200)
    """

    takes_streamer = True  # see `model.hf_patch`

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
        step: str = "auto",
        exact: str | None = "auto",
        fused: bool | None = None,
        profile: bool = False,
        **options: Any,
    ) -> None:
        if exact == "auto" and (typical is not None or step not in ("auto", "loop") or fused):
            exact = None
        self.target = model if isinstance(model, Target) else Target(model, probe, attention, packed, exact, fused)
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
        self.graphs: GraphCache | None = None
        self.compiled_target: CompiledTarget | None = None
        check_exact(self.target, exact, "typical acceptance" if typical is not None else f"step {step!r}")
        shared: dict[str, Any] = {
            "probe": False,
            "attention": self.target.backend.name,
            "packed": self.target.packed_weights,
            "fused": False,  # PyTorch's compiler fuses
        }
        if step == "auto":
            if self.target.bitwise is None and may_use_kept_passes(self.target):
                self.compiled_target = CompiledTarget(self.model, builds=False, **shared)
            self.graphs = None if profile else automatic_graphs(self.target, self.proposer)
            step = "loop"
        if step != "loop" and self.target.state_layers is not None:
            raise MedheadError(
                f"step {step!r} does not go with {self.target.name}, whose layers hold states (recurrent or convolutional); "
                "use step='loop'"
            )
        if step != "loop" and (where := placement(self.model)) is not None:
            raise MedheadError(
                f"step {step!r} needs all weights in the memory of one device, those of {self.target.name} are {where}; "
                "use step='loop'"
            )
        if step == "compiled" and (not self.proposer.compilable or self.target.device.type == "cpu"):
            self.compiled_target = CompiledTarget(self.model, **shared)
        elif step != "loop":
            self.graphs = GraphCache(self.target, self.proposer, step)
        self.statistics, self.profile = Statistics(), profile
        self.is_serving = False  # whether an `Engine` that runs was made with this decoder
        self.on_pass: Callable[[Sequence, list[int]], None] | None = None  # called with a sequence and its new tokens
        self.on_output: Callable[[VerifyOutput], None] | None = None
        patch_generate(self.model)

    # ---------------------------------------------------------------- decoding

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with this decoder; takes the same arguments."""
        return self.model.generate(*args, custom_generate=self, **kwargs)

    @torch.no_grad()
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
        grammar: Grammar | list[Grammar | None] | None = None,
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
            tokenizer: for a grammar; transformers needs it for stop strings.
            seed: of the sampling noise; drawn from torch's generator if None.
            grammar: what the texts must look like, one for all prompts or a list with one or None for every prompt; needs
                the tokenizer.
            arguments: other arguments of the model's forward, what a processor made of images for example; refused if they
                would have to be ignored.

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
        options.check_config(config, self.model.generation_config)
        input_ids = input_ids.to(self.target.device)
        prompt_inputs = options.prompt_inputs(self.model, input_ids, arguments)
        options.check_token_ids(input_ids, num_rows(self.target.model.get_input_embeddings()))
        texts = options.unpadded_rows(input_ids, arguments.get("attention_mask"))
        asked = options.length_limit(config, criteria) - input_ids.shape[1]
        limit = token_limit(asked, max(map(len, texts)), self.target.max_length)
        pad, lengths = pad_token(config), list[int]()
        stream = None if streamer is None else ColumnStream(streamer, len(texts), pad)
        keep = bool(config.return_dict_in_generate)
        lockstep, stop_checker = None, StopChecker(limit, criteria=criteria, device=self.target.device)
        grammars = options.row_grammars(grammar, len(texts))
        vocab_size, ends = self.target.vocab_size, stop_checker.end_tokens
        if needs_lockstep(processors, criteria, len(texts)):
            stop_checker = StopChecker(limit)
            show_scores = keep and bool(config.output_scores)
            lockstep = Lockstep(input_ids, processors, criteria, pad, stop_checker, show_scores)
        local = is_local(processors) and lockstep is None
        if config.do_sample and seed is None and self.target.shards is not None:
            seed = self.target.shards.seed(options.seed_or_draw(None))
        params, processors = sampling_params(config, processors, seed, limit, local)

        def on_tokens(sequence: Sequence, new: list[int], ended: bool) -> None:
            lengths.append(len(new))
            if self.on_pass is not None:
                self.on_pass(sequence, new)
            if stream is not None:
                stream.add(sequence.index, new, ended)

        sequences = [
            Sequence(
                prompt_ids,
                text,
                stop_checker,
                params,
                index,
                processors if local else options.row_processors(processors, index),
                local,
                on_tokens,
                constraint=None if own is None else new_constraint(own, tokenizer, vocab_size, ends),
            )
            for index, (prompt_ids, text, own) in enumerate(zip(input_ids.tolist(), texts, grammars, strict=True))
        ]
        prompt_tokens = sum(map(len, texts))
        record = keep and bool(config.output_scores), keep and bool(config.output_logits)
        try:
            with self.target.lock.generation() as nested:
                # an engine or an outer generation goes on later with the state of its sequences in the proposer
                loop = self.new_loop(*record, self.proposer.fork() if nested or self.is_serving else self.proposer)
                loop.lockstep, loop.prompt_inputs, loop.on_output = lockstep, prompt_inputs, self.on_output
                if prompt_inputs is not None and len(sequences) > 1 and self.target.bitwise is not None:
                    raise MedheadError("`exact` reads one prompt with images at a time; call generate for each")
                try:
                    with loop.active():
                        loop.run(sequences)
                    if lockstep is not None:
                        lockstep.drop_padding(sequences)
                finally:
                    self._count(sequences, loop, prompt_tokens, lengths)
        finally:
            if stream is not None:
                stream.finish()
        warn_beyond_context(self.target, sequences, asked)
        with torch.inference_mode(False), torch.no_grad():
            return generate_output(sequences, input_ids, pad, config)

    def new_loop(
        self, record_scores: bool = False, record_logits: bool = False, proposer: Proposer | None = None
    ) -> DecodeLoop:
        """Return a decode loop with this decoder's target, proposer and way to run a step.

        Captured and compiled steps serve the decoder's own proposer; another one (`using`, or `proposer`) is decoded eagerly.
        """
        proposer = self.proposer if proposer is None else proposer
        own = proposer is self._own_proposer
        target = self.compiled_target if own and self.compiled_target is not None else self.target
        graphs = self.graphs if own else None
        return DecodeLoop(target, proposer, self.typical, graphs, record_scores, record_logits, self.profile)

    def check(self, input_ids: Tensor, seed: int = 0, **arguments: Any) -> CheckReport:
        """Decode with this decoder's proposer and with plain decoding, and compare token by token.

        Args:
            input_ids: `[batch, tokens]`.
            seed: sampling seed of both.
            arguments: those of `model.generate`.
        """
        arguments |= {"seed": seed}
        ours = self.generate(input_ids, **arguments)
        statistics = self.statistics
        with self.using("none"):
            plain = self.generate(input_ids, return_dict_in_generate=True, output_scores=True, **arguments)
        self.statistics = statistics
        width = input_ids.shape[1]
        return compare(ours[:, width:], plain.sequences[:, width:], plain.scores)

    # ---------------------------------------------------------------- life

    @torch.inference_mode()
    def warmup(self, rows: int = 1) -> None:
        """Measure the cost of passes over up to `rows` rows now, so that the first generation does not wait for it."""
        target = self.compiled_target or self.target
        zeros = torch.zeros(1, 2, dtype=torch.long, device=target.device)
        GumbelNoise(target.vocab_size, target.device).gumbel(zeros, zeros[:, 0], zeros[:, :1])
        with target.active(self.proposer.feature_layers):
            self.proposer.warmup(target, rows)

    def close(self) -> None:
        """Leave the model as it was loaded, and give back what captured steps and packed weights hold."""
        with self.target.lock:  # another thread may be generating
            if self.graphs is not None:
                self.graphs.clear()
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
        """Another proposer for a while, for all threads that call this decoder."""
        before = self.proposer
        built = build_proposer(proposer, self.target, **options) if isinstance(proposer, str) else proposer
        try:
            self.proposer = built
            yield self
        finally:
            self.proposer = before

    # ---------------------------------------------------------------- inside

    def _count(self, sequences: list[Sequence], loop: DecodeLoop, prompt_tokens: int, lengths: list[int]) -> None:
        self.statistics = Statistics(
            new_tokens=sum(len(one.output_ids) for one in sequences),
            passes=sum(one.passes for one in sequences),
            steps=max(max(one.passes for one in sequences) - 1, 0),
            prompt_tokens=prompt_tokens,
            prefill_seconds=loop.prefill_seconds,
            decode_seconds=loop.decode_seconds,
            times=loop.times,
            cache_bytes=loop.cache_bytes,
            packed_bytes=loop.target.packed_weights.nbytes + loop.proposer.packed_bytes,
            capture_seconds=loop.capture_seconds,
            captured_steps=loop.captured_steps,
            lengths=lengths,
        )


def sampling_params(
    config: GenerationConfig, processors: LogitsProcessorList, seed: int | None, limit: int, local: bool
) -> tuple[SamplingParams, LogitsProcessorList]:
    """Return the sampling parameters of a generation, and the processors that are not part of them."""
    if not config.do_sample:
        if seed is not None:
            check_seed(seed)
        return SamplingParams(limit), processors
    params = SamplingParams(limit, temperature=1.0, seed=options.seed_or_draw(seed))
    if not local:
        return replace(params, temperature=min(float(MAX_TEMPERATURE), temperature_of(processors))), processors
    return take_warpers(processors, params)
