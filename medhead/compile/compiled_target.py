"""A target whose verify pass is compiled, for proposers that work on the host, whose steps cannot be captured.

The pass is traced with dynamic sizes (nodes, columns, capacity): one compiled pass serves trees of every size and texts of
every length; another one serves plain decoding, and two more serve batches. On a CPU later processes load the pass without
tracing it (`kept_pass`); the first result of a loaded pass is compared with that of the ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from medhead.compile import kept_pass
from medhead.compile.trace import compile_fixed, compile_open
from medhead.core.lengths import Lengths
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.model.fingerprint import model_state
from medhead.model.kv_cache import TreeCache
from medhead.model.pass_key import pass_key
from medhead.model.probe import HALF_TOLERANCE, TOLERANCE
from medhead.model.shards import placement
from medhead.model.target import Target

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 37, 67, 131, 257, 521)  # sizes to trace with: sizes that may differ are unequal


class CompiledTarget(Target):
    """See `Target`.

    Args:
        builds: whether a pass that no earlier process compiled is compiled now; else the ordinary one runs instead.

    Attributes:
        compiles: as `builds`.
        on_progress: told when something is compiled, which takes a while; not when it is loaded.
    """

    def __init__(self, *args: Any, builds: bool = True, **kwargs: Any) -> None:
        self._states: dict[Hashable, int] = {}  # numbers, because a state is long and every pass compares it
        self._state = 0
        self._ready = False  # the probe's passes are not worth compiling
        super().__init__(*args, **kwargs)
        self.length_rope.refuse_step("compiled")
        self.on_progress: Callable[[str], None] = lambda line: None
        self._passes: dict[Any, Callable[..., tuple[Tensor, Tensor]] | None] = {}
        self.compiles = builds
        self.kept_passes = "" if builds else kept_pass.names()
        self._ready = self.backend.name != "flash"  # which asks the host

    def clear(self) -> None:
        """Give back what compiled passes hold."""
        self._passes.clear()
        self._states.clear()

    def new_cache(self, batch: int, capacity: int) -> TreeCache:
        """See `Target.new_cache`; the adapters may have been switched and weights packed again since the last text."""
        state = model_state(self), tuple(map(id, self.packed_weights.tensors().values()))
        self._state = self._states.setdefault(state, len(self._states))
        return super().new_cache(batch, capacity)

    def verify(self, cache: TreeCache, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """See `Target.verify`.

        Raises:
            MedheadError: the pass is compiled now, and cannot be.
        """
        if not self._ready or cache.position_offset is not None:
            return super().verify(cache, tree)
        takes_bitmask = self._takes_bitmask(tree.nodes)
        key = tree.batch > 1, tree.nodes > 1, takes_bitmask, tuple(self.taps.layers), self._state
        if key in self._passes and self._passes[key] is None:
            return super().verify(cache, tree)
        cache.begin(tree.nodes, spare=1)  # spare=1: a completely used cache would trigger a recompilation
        bitmask = [tree.ancestor_bitmask] if takes_bitmask else []
        columns = torch.empty(cache.used, device=self.device)  # only its size is read
        # strides and storage offsets are specialized, even those of dimensions of size 1
        of_tree = [
            part.clone(memory_format=torch.contiguous_format)
            for part in (tree.tokens, tree.depth, tree.visible, *bitmask)
        ]
        given = [*of_tree[:3], cache.lengths.device.clone(), columns, *of_tree[3:], *cache.per_layer]
        if key not in self._passes:
            self.prepared += 1
            run = self._pass_over(bool(bitmask))
            weights = self._weights()
            name = pass_key(self, (key[:-1], sorted(weights))) if self.device.type == "cpu" else None
            kept = None if name is None else self._kept(name, weights, run, given)
            self._passes[key] = kept or (self._compile(tree, weights, run, given, name) if self.compiles else None)
        found = self._passes[key]
        return super().verify(cache, tree) if found is None else found(*given)

    @property
    def in_use(self) -> bool:
        """Whether a compiled pass was run."""
        return any(self._passes.values())

    def compiled(self, what: str, run: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
        """See `Target.compiled`."""
        self.on_progress(f"compiling {what}")
        with _errors_in_one_line(what):
            return compile_fixed(run, given)

    def _pass_over(self, with_bitmask: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the ordinary pass as a function of tensors."""
        specs = self.layout.specs()

        def run(tokens: Tensor, depth: Tensor, visible: Tensor, lengths: Tensor, columns: Tensor, *rest: Tensor) -> Any:
            bitmask, per_layer = (rest[0], rest[1:]) if with_bitmask else (None, rest)
            left = iter(per_layer)
            buffers = {spec: [next(left) for _ in range(n)] for spec, n in specs.items()}
            cache = TreeCache.from_buffers(self.layout, buffers, Lengths(lengths, None))
            cache.columns = columns.shape[0]
            return self.verify_nodes(cache, tokens, depth, None if tokens.shape[1] == 1 else visible, bitmask)

        return run

    def _weights(self) -> dict[str, Tensor]:
        """Return what a pass reads: the model's tensors, and the packed copies, which are made before a pass is traced."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers()) | self.packed_weights.tensors()

    def _kept(
        self, name: str, weights: dict[str, Tensor], run: Callable[..., Any], given: list[Tensor]
    ) -> Callable[..., Any] | None:
        """Return the pass that an earlier process compiled; None without one that finds what the ordinary pass does."""
        kept = kept_pass.load(name, weights, run)
        if kept is None:
            return None
        share = TOLERANCE.get(self.dtype, HALF_TOLERANCE)
        for ours, expected in zip(kept(*given), run(*given), strict=True):
            if not (ours - expected).abs().max() <= share * expected.abs().max().clamp(min=1e-3):
                kept_pass.discard(name)
                return None
        return kept

    def _compile(
        self,
        tree: TokenTree,
        weights: dict[str, Tensor],
        run: Callable[..., Any],
        given: list[Tensor],
        name: str | None,
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        rows = "one text" if tree.batch == 1 else "batches"
        self.on_progress(
            f"compiling the pass over {'trees' if tree.nodes > 1 else 'one node'} for {rows} (a minute or more)"
        )

        def keep(graph: GraphModule) -> Callable[..., Any] | None:
            if name is None:
                return None
            kept_pass.build(name, weights, graph)
            return self._kept(name, weights, run, given)

        with torch.inference_mode(False):
            examples = list(self._examples(tree, given))
        with _errors_in_one_line(f"the pass of {self.name}"):
            return compile_open(run, examples, keep)

    def _examples(self, tree: TokenTree, given: list[Tensor]) -> Iterator[Tensor]:
        """Yield tensors like those given, with sizes that tell nodes, rows, columns and capacity apart."""
        taken = {size for tensor in given for size in tensor.shape} | {self.hidden_size, self.vocab_size}
        rows, nodes, columns, capacity = [prime for prime in _PRIMES if prime not in taken][:4]
        rows, nodes = 1 if tree.batch == 1 else rows, 1 if tree.nodes == 1 else nodes
        sizes = [(rows, nodes), (rows, nodes), (rows, nodes, nodes), (rows,), (columns,)]
        layers = sum(self.layout.specs().values())
        if len(given) > len(sizes) + layers:
            sizes.append((rows, nodes, given[len(sizes)].shape[2]))  # the ancestor bitmask
        for tensor, size in zip(given[:-layers], sizes, strict=True):
            yield tensor.new_zeros(size)
        for part in given[-layers:]:
            yield part.new_zeros(rows, part.shape[1], capacity, part.shape[3])


def may_use_kept_passes(target: Target) -> bool:
    """Whether passes that an earlier process compiled may run instead of the ordinary ones of this target."""
    on_cpu = target.device.type == "cpu" and placement(target.model) is None and target.state_layers is None
    return on_cpu and not target.length_rope.modules and bool(kept_pass.names())


@contextmanager
def _errors_in_one_line(what: str) -> Iterator[None]:
    """Turn whatever a model or the compiler raises into a MedheadError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MedheadError(f"{what} cannot be compiled ({reason}); decode with step='loop'") from error
