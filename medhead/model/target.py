"""The target: any causal language model of transformers, made to verify token trees without touching its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medhead.config import EXACT
from medhead.core.lengths import Lengths
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model.attention import TreePass, attention_name, attention_names, pick_backend, tree_pass
from medhead.model.bitwise import Bitwise, promise
from medhead.model.eval_mode import eval_mode
from medhead.model.feature_taps import FeatureTaps
from medhead.model.find_states import find_layers
from medhead.model.fused import FusedModules
from medhead.model.inference_tensors import replace_inference_tensors
from medhead.model.kv_cache import TreeCache
from medhead.model.layout import (
    attention_configs,
    cache_argument,
    context_length,
    decoder_layers,
    encoder_configs,
    first_position,
    input_device,
    max_length,
    output_matrix,
    uses_registry,
)
from medhead.model.length_rope import LengthRope
from medhead.model.model_form import check_form, model_form, num_rows
from medhead.model.model_lock import ModelLock, model_lock, running_target
from medhead.model.output_rows import output_form
from medhead.model.own_alibi import OwnAlibi
from medhead.model.own_positions import OwnPositions
from medhead.model.packed_linear import PackedWeights
from medhead.model.peft_check import check_adapters, unwrap_peft
from medhead.model.probe import probe_target
from medhead.model.prompt_inputs import PromptInputs, prefill_prompts
from medhead.model.prompt_reader import PromptReader, read_whole
from medhead.model.quantized import check_activations
from medhead.model.query_scale import query_scale_floor
from medhead.model.shards import shard_group
from medhead.model.state_cache import StateCache
from medhead_kernels.backends import BACKENDS, MAX_NODES
from medhead_kernels.causal import HALF_DTYPES

PREFILL_CHUNK = 1024
ATTENTIONS = ("auto", *BACKENDS)


class Target:
    """A model that verifies trees.

    Args:
        model: what `from_pretrained` returned, or a `PeftModel` or `PeftMixedModel` around it.
        probe: check with a small tree that the model verifies trees correctly.
        attention: `sdpa` (PyTorch's kernels with a dense mask; layers with soft-capping or sinks use `reference`), `triton`
            (one split-KV kernel over prefix and tree), `flash` (a flash kernel over the prefix, merged with the tree's own
            block) or `reference` (plain PyTorch); `auto` is `triton` on CUDA where it serves the model, else `sdpa`.
        packed: whether to keep a second copy of the linear layers' weights in the layout of medhead's kernel for CPUs; None
            keeps one where it is faster and memory is free. Or copies to share, see `PackedWeights`.
        exact: `bitwise` computes every row of a pass as if it were alone, on a CPU: logits do not depend on the tree or the
            batch, in any dtype. `transformers` does so with the attention of transformers' plain decoding; slower, without
            packed weights. `auto` is `bitwise` in half precision where passes take no longer with it. See `Bitwise`.
        fused: whether fused Triton kernels replace norms, activations, rotary positions and residual additions; None does so on
            CUDA. True also merges q/k/v and gate/up: parameters become views of one tensor, see `MergedLinear`.

    Attributes:
        bitwise: what `exact` promises; None without it.
        context: longest sequence that the configuration allows (`max_position_embeddings`).
        first_position: position of the first token of a text.
        positions_given: whether `generate` gives the model positions; else it computes them.
        max_length: longest sequence that the model can run; rotary positions go on beyond the context, as in transformers.
        layout: the keys and values that the model caches.
        state_layers: the layers that hold states (recurrent, convolutional, linear attention); None without such layers.

    Raises:
        MedheadError: `model` is not a model of transformers, or it cannot be decoded with these options.
        UnsupportedTargetError: the model cannot verify a tree; says why.
    """

    bitwise: Bitwise | None = None
    compiles = False  # whether passes, and what `compiled` is given, are compiled
    prepared = 0  # passes that were loaded or compiled while they were run
    kept_passes = ""  # names of the compiled passes that may run instead of the ordinary ones

    def __init__(
        self,
        model: nn.Module,
        probe: bool = True,
        attention: str = "auto",
        packed: bool | PackedWeights | None = None,
        exact: str | None = None,
        fused: bool | None = None,
    ) -> None:
        if attention not in ATTENTIONS:
            raise MedheadError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        inner = unwrap_peft(model)
        if not isinstance(inner, PreTrainedModel):
            raise MedheadError(f"a target must be a causal language model of transformers, got {type(inner).__name__}")
        self.model: Any = inner
        self.name = type(inner).__name__
        if getattr(inner.config, "is_encoder_decoder", False):
            raise UnsupportedTargetError(f"{self.name} has an encoder; medhead decodes decoder-only models")
        self.output: Any = output_matrix(inner)
        if not isinstance(self.output, nn.Module):
            raise UnsupportedTargetError(f"{self.name} has no output matrix, so it is not a causal language model")
        self.config = inner.config.get_text_config(decoder=True)
        self.embedding: Any = inner.get_input_embeddings()
        self.num_embeddings, self.device = num_rows(self.embedding), input_device(inner)
        self.vocab_size, self.hidden_size, self.dtype = output_form(inner, self.output, self.device)
        with self.lock:
            check_activations(inner, self.dtype)
        self.shards = shard_group(inner)
        self.layers = int(getattr(self.config, "num_hidden_layers", 0))
        self.context = context_length(self.config)
        self.max_length = max_length(inner, self.context)
        self._configs, self._cache_name = attention_configs(inner), cache_argument(inner)
        self.taps = FeatureTaps(self.device, lambda: running_target.get() is self)
        self._active = self.checked_inputs = False
        packed = False if packed is None and exact == "transformers" else packed
        self._encoders = encoder_configs(inner)
        if exact == "auto" and (self.device.type != "cpu" or self.dtype not in HALF_DTYPES or self._encoders):
            exact = None
        self.packed_weights = (
            packed if isinstance(packed, PackedWeights) else PackedWeights(inner, packed, exact in EXACT)
        )
        self.packed = packed.enabled if isinstance(packed, PackedWeights) else packed
        self._form = model_form(inner)
        self.length_rope = LengthRope(inner, lambda: running_target.get() is self)
        first = first_position(inner)
        self.first_position, self.positions_given = first or 0, first is not None
        self._scale_floor = query_scale_floor(inner)
        self._alibi = OwnAlibi(inner)
        self._own_positions = OwnPositions(inner, lambda: running_target.get() is self)
        check_adapters(inner)
        with self.lock:  # it changes the model's mode for a moment
            self.layout, self.state_layers = find_layers(inner)
        # every mask is a dense tensor for models whose own code adds it to their scores
        self.dense_masks = bool(self.layout.indexers) or not uses_registry(inner)
        self.backend = pick_backend(attention, self.layout, self.dense_masks)
        with self.lock:
            self.fused = FusedModules.of(self, None if fused and exact in EXACT else fused)
            self.fused.check(self)
            if probe:
                probe_target(self, attention)
            if exact is not None:
                promise(self, exact)

    # ---------------------------------------------------------------- passes

    def check_model(self) -> None:
        """Refuse to go on with a model that was changed so that this target no longer fits it.

        Raises:
            MedheadError: names the change, or an adapter that cannot be decoded with.
        """
        check_form(self.model, self._form)
        check_adapters(self.model)

    def follow_model(self, device: torch.device) -> None:
        """Take the model as it is now as unchanged: its owner moved it to another device."""
        self.device = self.taps.device = device
        self._form = model_form(self.model)

    @property
    def lock(self) -> ModelLock:
        """The model's lock; a thread holds it while the target is active or listens."""
        return model_lock(self.model)

    @contextmanager
    def active(self, feature_layers: Sequence[int] = ()) -> Iterator[None]:
        """Replace the model's attention inside the context; passes return the outputs of `feature_layers` as features.

        Without `feature_layers` the features are the last hidden state. Targets of one model in several threads take turns.
        In another thread an ordinary call of the model is not changed, except that the model is in eval mode.
        """
        with self.lock:
            if not self._active:
                if self.bitwise is not None:
                    self.bitwise.prove()
                with self._activated(feature_layers):
                    yield
                return
            if tuple(feature_layers) != tuple(self.taps.layers):
                raise MedheadError(
                    f"{self.name} is read at layers {list(self.taps.layers)} already, asked for {list(feature_layers)}"
                )
            yield

    @contextmanager
    def _activated(self, feature_layers: Sequence[int]) -> Iterator[None]:
        self.check_model()
        self._own_names = [config._attn_implementation for config in self._configs]
        # attention outside the registry adds masks to its scores, as it does by the name "eager"
        outside = self.dense_masks and not self.layout.indexers
        names = [
            name if id(config) in self._encoders else attention_name("eager" if outside else name)
            for config, name in zip(self._configs, self._own_names, strict=True)
        ]
        states = nullcontext() if self.state_layers is None else self.state_layers.active()
        with (
            self.listening(feature_layers),
            self.packed_weights.active(),
            self.fused.active(),
            nullcontext() if self.bitwise is None else self.bitwise.active(),
            eval_mode(self.model),
            self.length_rope.active(),
            self._own_positions.active(),
            self._alibi.active(),
            states,
        ):
            try:
                self._active = True
                with attention_names(self._configs, names):
                    yield
            finally:
                self._active = False
                replace_inference_tensors(self.model)

    @contextmanager
    def listening(self, feature_layers: Sequence[int] = ()) -> Iterator[None]:
        """Keep the features of the target's passes inside the context; nothing else of the model is changed."""
        layers: Any = decoder_layers(self.model, self.layers) if feature_layers else []
        with self.lock, self.taps.listening(self.output, {at: layers[at] for at in feature_layers}):
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Make the passes inside the context those of this target, in this thread."""
        token = running_target.set(self)
        try:
            yield
        finally:
            running_target.reset(token)

    def new_cache(self, batch: int, capacity: int) -> TreeCache:
        """Return an empty cache for `batch` rows of about `capacity` tokens."""
        layers = self.state_layers
        cache = TreeCache(self.layout, batch, capacity) if layers is None else layers.new_cache(batch, capacity)
        cache.lengths = Lengths.of([0] * batch, self.device)
        return cache

    def verify(self, cache: TreeCache, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """Run one pass over all nodes of a tree.

        Where the host does not know the cache's lengths (a captured step), all shapes depend on those of the arguments alone
        and the host reads nothing.

        Returns:
            logits `[batch, nodes, vocab]` and features `[batch, nodes, size]`: the last hidden states (what the output matrix
            reads), or the concatenated outputs of the feature layers.
        """
        if self.bitwise is not None:
            return self.bitwise.verify(cache, tree)
        if isinstance(cache, StateCache):
            cache.begin_tree(tree)
        bitmask = tree.ancestor_bitmask if self._takes_bitmask(tree.nodes) else None
        visible = None if tree.nodes == 1 else tree.visible
        return self.verify_nodes(cache, tree.tokens, tree.depth, visible, bitmask)

    def verify_nodes(
        self, cache: TreeCache, tokens: Tensor, depth: Tensor, visible: Tensor | None, bitmask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Verify the parts of a tree: `tokens` and `depth` `[batch, nodes]`, `visible` `[batch, nodes, nodes]`.

        `visible` is None for one node, `bitmask` the ancestor bitmask where the backend needs it.
        """
        cache.begin(tokens.shape[1])
        current = self._pass(cache, depth, visible, tokens.shape[1])
        if bitmask is not None:
            current.backend, current.ancestor_bitmask = self.backend, bitmask
            current.host_lengths = tuple(cache.lengths.host or ())
        return self._forward(cache, tokens, depth, current)

    def compiled(self, what: str, run: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
        """Return `run`, called `what` in messages, compiled for tensors of the sizes of `given` where passes are compiled.

        It must not read tensors on the host.
        """
        return run

    def prefill(
        self,
        cache: TreeCache,
        rows: list[list[int]],
        on_chunk: Callable[[Tensor, int], None] | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Fill an empty cache with the tokens of each row in chunks; return `[batch, size]` features of every last token.

        Rows may have different lengths; an empty one has zeros as features. `on_chunk` is called with the features
        `[batch, nodes, size]` of every chunk and the position of its first token.
        """
        if self.bitwise is not None:
            return read_whole(self, cache, rows, on_chunk)[1]
        reader = PromptReader(self, cache, rows, on_chunk)
        while reader.left:
            reader.advance(chunk or PREFILL_CHUNK)
        return reader.features

    def read_chunk(self, cache: TreeCache, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Run a pass over the next `tokens` `[batch, nodes]` of prompts, with logits of the nodes `last` `[batch]` alone.

        Returns:
            logits `[batch, vocab]` of the nodes `last`, and features `[batch, nodes, size]`, see `verify`.
        """
        nodes = tokens.shape[1]
        depth = torch.arange(nodes, device=self.device)[None]
        cache.begin(nodes)
        with self.taps.selecting(last):
            logits, features = self._forward(cache, tokens, depth, self._pass(cache, depth, None, nodes))
        return logits[:, 0], features

    def prefill_inputs(
        self, cache: TreeCache, inputs: PromptInputs, on_chunk: Callable[[Tensor, int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fill an empty cache with whole prompts that hold images; see `prefill_prompts`."""
        with self.length_rope.reading(inputs.lengths(), self.device):
            return prefill_prompts(self, cache, inputs, on_chunk)

    def run_prompts(self, cache: TreeCache, arguments: dict[str, Any], last: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model's forward over whole prompts; return the logits of every row's token `last`, and all features."""
        nodes = int(arguments["input_ids"].shape[1])
        current = self._pass(cache, torch.arange(nodes, device=self.device)[None], None, nodes)
        current.prompts = cache.batch_size
        with tree_pass(current), self._running(), self.taps.selecting(last):
            output = self.model(**arguments)
        return output.logits, self.taps.features()

    def own_attention(self) -> AbstractContextManager[None]:
        """Give the model its own attention back inside the context, while the target is active."""
        return attention_names(self._configs, self._own_names)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input embeddings of token ids, `[*tokens.shape, hidden]`."""
        return self.embedding(tokens)

    def read_hidden(self, model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return last hidden states and features of texts `[rows, length]`, with gradients; inside `listening` only.

        `model` is the target's model, or what wraps it. Where `position_ids` start again at 0 a new text begins, which does
        not see the one before, unless the model has `state_layers`.
        """
        # logits of one token
        first = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        with self._running(), self.taps.selecting(first):
            model(input_ids=input_ids, use_cache=False, **self.position_arguments(position_ids))
        return self.taps.last_hidden(), self.taps.features()

    # ---------------------------------------------------------------- inside

    def _pass(self, cache: TreeCache, depth: Tensor, visible: Tensor | None, nodes: int) -> TreePass:
        lengths = None if cache.lengths.uniform else cache.lengths.device
        use_reference, floor = self.backend.name == "reference", self._scale_floor
        length = 0 if floor is None else cache.get_seq_length()
        current = TreePass(
            lengths, cache.used - nodes, depth, visible, nodes, use_reference, scale_floor=floor, cache_length=length
        )
        current.states = cache if isinstance(cache, StateCache) else None
        current.dense, current.alibi = self.dense_masks, self._alibi.slopes
        return current

    def _takes_bitmask(self, nodes: int) -> bool:
        """Whether a kernel backend serves a pass over so many nodes."""
        return not self.backend.needs_dense_mask and nodes <= MAX_NODES

    def _forward(self, cache: TreeCache, tokens: Tensor, depth: Tensor, current: TreePass) -> tuple[Tensor, Tensor]:
        start = current.max_length if current.lengths is None else current.lengths[:, None]
        positions = (depth + start).expand(tokens.shape).contiguous()  # some models view them as a row
        if cache.position_offset is not None:
            positions = positions + cache.position_offset[..., None]
        if self.length_rope.modules and self.length_rope.text_lengths is None:
            host = cache.lengths.host
            self.length_rope.longest = None if host is None else max(host) + tokens.shape[1]
        given = {self._cache_name: cache} | self.position_arguments(positions)
        with tree_pass(current), self._running():
            output = self.model(input_ids=tokens, use_cache=True, **given)
        return output.logits, self.taps.features()

    def position_arguments(self, position_ids: Tensor) -> dict[str, Any]:
        """Return the argument that tells a model positions `[batch, nodes]`; attention-free ones take none."""
        if self.state_layers is not None and not self.state_layers.takes_positions:
            return {}
        if self.first_position:
            position_ids = position_ids + self.first_position
        self._own_positions.positions = position_ids
        return {"position_ids": position_ids}

    @property
    def feature_size(self) -> int:
        """Size of the features of one token."""
        return int(self.hidden_size) * max(1, len(self.taps.layers))
