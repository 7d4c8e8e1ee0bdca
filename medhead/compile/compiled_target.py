"""A target whose verify pass is compiled, for proposers that work on the host: their steps cannot be one piece.

The pass is recorded with sizes that stay open (nodes, columns, capacity), so that one compiled pass serves trees of every
size and texts of every length; another one serves plain decoding, and two more serve batches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from medhead.compile.trace import compile_fixed, compile_open
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.model.fingerprint import model_state
from medhead.model.kv_cache import TreeCache
from medhead.model.target import Target

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 37, 67, 131, 257, 521)  # sizes to compile with; no two that may differ are equal


class CompiledTarget(Target):
    """See `Target`.

    Attributes:
        say: told when something is compiled, which takes a while.
    """

    compiles = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._state: Hashable = None
        self._ready = False  # the probe's passes are not worth compiling
        kwargs["packed"] = False  # compiled passes have packed weights of their own
        super().__init__(*args, **kwargs)
        self.say: Callable[[str], None] = lambda line: None
        self._passes: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._ready = self.backend.name != "flash"  # which asks the host

    def clear(self) -> None:
        """Give the packed weights back."""
        self._passes.clear()

    def new_cache(self, batch: int, capacity: int) -> TreeCache:
        """See `Target.new_cache`; a text begins, perhaps with other adapters than the one before."""
        self._state = model_state(self)
        return super().new_cache(batch, capacity)

    def verify(self, cache: TreeCache, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """See `Target.verify`.

        Raises:
            MedheadError: the pass is compiled now, and cannot be.
        """
        if not self._ready:
            return super().verify(cache, tree)
        cache.begin(tree.nodes, spare=1)  # never all columns: for those the compiler would make another pass
        words = [tree.ancestor_bitmask] if self._takes_words(tree.nodes) else []
        lengths, places = torch.tensor(cache.lengths, device=self.device), torch.empty(cache.used, device=self.device)
        # strides are not open, not even those of a dimension of one row, and where a storage begins matters too
        of_tree = [
            part.clone(memory_format=torch.contiguous_format)
            for part in (tree.tokens, tree.depth, tree.visible, *words)
        ]
        given = [*of_tree[:3], lengths, places, *of_tree[3:], *cache.parts]
        key = tree.batch > 1, tree.nodes > 1, len(words), tuple(self._feature_layers), self._state
        if key not in self._passes:
            self._passes[key] = self._compile(tree, bool(words), given)
        return self._passes[key](*given)

    def compiled(self, what: str, run: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
        """See `Target.compiled`."""
        self.say(f"compiling {what}")
        with _one_line(what):
            return compile_fixed(run, given)

    def _compile(self, tree: TokenTree, with_words: bool, given: list[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        rows = "one text" if tree.batch == 1 else "batches"
        self.say(f"compiling the pass over {'trees' if tree.nodes > 1 else 'one node'} for {rows} (half a minute)")
        slots = self.layout.slots()

        def run(tokens: Tensor, depth: Tensor, visible: Tensor, lengths: Tensor, places: Tensor, *rest: Tensor) -> Any:
            words, stores = (rest[0], rest[1:]) if with_words else (None, rest)
            left = iter(stores)
            cache = TreeCache.over(self.layout, {slot: [next(left) for _ in range(n)] for slot, n in slots.items()})
            return self.verify_nodes(cache, tokens, depth, visible, words, lengths, places.shape[0])

        with torch.inference_mode(False):
            examples = list(self._examples(tree, given))
        with _one_line(f"the pass of {self.name}"):
            return compile_open(run, examples)

    def _examples(self, tree: TokenTree, given: list[Tensor]) -> Iterator[Tensor]:
        """Tensors like those given, of sizes that tell nodes, rows, columns and capacity apart from everything else."""
        taken = {size for tensor in given for size in tensor.shape} | {self.hidden_size, self.vocab_size}
        rows, nodes, columns, capacity = [prime for prime in _PRIMES if prime not in taken][:4]
        rows, nodes = 1 if tree.batch == 1 else rows, 1 if tree.nodes == 1 else nodes
        sizes = [(rows, nodes), (rows, nodes), (rows, nodes, nodes), (rows,), (columns,)]
        layers = sum(self.layout.slots().values())
        if len(given) > len(sizes) + layers:
            sizes.append((rows, nodes, given[len(sizes)].shape[2]))  # ancestor words
        for tensor, size in zip(given[:-layers], sizes, strict=True):
            yield tensor.new_zeros(size)
        for part in given[-layers:]:
            yield part.new_zeros(rows, part.shape[1], capacity, part.shape[3])


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever a model or the compiler throws, as a MedheadError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MedheadError(f"{what} cannot be compiled ({reason}); decode with step='loop'") from error
