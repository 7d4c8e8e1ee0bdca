"""`exact`: the same text for every proposer, tree and batch, bit for bit, and the self-test that proves it.

Every row of a pass is computed as if it were alone: attention by `node_attention`, products and activations by `row_products`,
prompts row by row and whole. No list says which model, processor or library this is enough for. At load, and again for another
number of threads, the model verifies a tree with text of its own and one node at a time; all logits must be equal bit for bit.

For CUDA there are the Triton kernel `tree_path_attention` and products of 64 rows, which have not yet run on a GPU. `bitwise` is
refused there unless the environment variable `UNPROVEN` is 1; then the self-test decides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from medhead import user_cache
from medhead.config import EXACT
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model.eval_mode import eval_mode
from medhead.model.fingerprint import parts, sample
from medhead.model.layout import cache_argument
from medhead.model.node_attention import NodeVisits
from medhead.model.pass_key import pass_key
from medhead.model.prompt_reader import read_whole
from medhead.model.row_products import MAX_ROWS, ONE, SIXTEEN, SIXTY_FOUR, RowProducts
from medhead.model.shards import placement
from medhead_kernels import path_attention

if TYPE_CHECKING:
    from medhead.model.kv_cache import TreeCache
    from medhead.model.target import Target

NODES, PREFIX, DEPTH = 33, 12, 6  # of the tree of the self-test, and the tokens before it
SIZES = (2, 5, 16, NODES)  # numbers of its first nodes that are verified together
STEPS = 3  # passes of one token that are compared with transformers
UNPROVEN = "MEDHEAD_UNPROVEN_CUDA_BITWISE"
_PRODUCTS = ((False, None), (True, None), (True, SIXTEEN), (True, ONE))  # what the self-test tries, the cheapest first
_GPU_PRODUCTS = ((False, SIXTY_FOUR, True), (True, SIXTY_FOUR, True))


class Bitwise:
    """What a target with `exact` knows about itself.

    Args:
        target: the target.
        exact: `bitwise`, or `transformers` for the bits of transformers' own plain decoding, which costs more.
        by_default: the option was not given, so it must cost nothing, and it ends without an error where it cannot be kept.

    Attributes:
        exact: as given.
        by_blocks: nodes attend by blocks, see `node_attention`; else as one.
        by_triton: in the form for GPUs, which Triton's interpreter can run on a CPU.
        products: of the number of threads that was proved last.
        matches_transformers: whether its logits were equal to those of transformers, for one prompt and passes of one token.

    Raises:
        MedheadError: the promise cannot be given; says why.
    """

    def __init__(self, target: Target, exact: str = "bitwise", by_default: bool = False) -> None:
        self._target, self.exact, self.by_default = target, exact, by_default
        self._refuse()
        self.by_triton = target.backend.name == "triton"
        self.by_blocks = exact == "bitwise" and (self.by_triton or path_attention.unavailable() is None)
        self._kinds: tuple[Any, ...] = _GPU_PRODUCTS if self.by_triton else _PRODUCTS
        configs: list[Any] = [getattr(module, "config", None) for module in target.model.modules()]
        self._configs = list(
            {id(one): one for one in configs if getattr(one, "_experts_implementation", None)}.values()
        )
        self._proved: dict[int, tuple[RowProducts, bool]] = {}  # by number of threads
        self._testing = False
        self.products, self.matches_transformers = RowProducts(), False

    def _refuse(self) -> None:
        target, place = self._target, placement(self._target.model)
        kind, asked = target.device.type, self.exact == "bitwise" and not self.by_default
        tried = asked and os.environ.get(UNPROVEN) == "1"
        attention = "triton" if kind == "cuda" or (tried and target.backend.name == "triton") else "sdpa"
        reasons = {
            f"it is on {kind}, and the promise is for a CPU": kind != "cpu" and not (kind == "cuda" and asked),
            f"the promise has not yet run on a GPU ({UNPROVEN}=1 tries it)": kind == "cuda" and not tried,
            "its layers hold states (recurrent or convolutional)": target.state_layers is not None,
            "its attention is its own code": target.dense_masks,
            "it is split over processes": target.shards is not None,
            f"its attention is {target.backend.name!r}, and it must be {attention!r}": target.backend.name != attention,
            f"its weights are {place}": place is not None and (self.by_default or place != "offloaded"),
        }
        for reason, holds in reasons.items():
            if holds:
                raise MedheadError(
                    f"exact={self.exact!r} does not go with {target.name}: {reason}; leave the option out"
                )

    def costs_nothing(self) -> bool:
        """Whether passes take no longer than without it.

        Attention is by blocks, there are no experts, which would be computed one by one, and products of 2 to 32 rows agree.
        """
        dims = {spec.dim for spec in self._target.layout.all_specs()}
        experts = any(name.rpartition(".")[2] == "experts" for name, _ in self._target.model.named_modules())
        cheap = all(found.least <= 2 and found.most == MAX_ROWS for found in self.products.classes.values())
        return self.by_blocks and cheap and not experts and not any(dim % path_attention.LANES for dim in dims)

    # ---------------------------------------------------------------- passes

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compute rows independently inside the context: for one pass over nodes."""
        before = [config._experts_implementation for config in self._configs]
        try:
            for config in self._configs:  # grouped products have as many rows as chose the expert
                config._experts_implementation = "eager"
            with self.products if self.products.everywhere else nullcontext():
                yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._experts_implementation = name

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace what depends on the number of rows inside the context; packed copies of weights do not, and stay."""
        with self.products.replaced(self._target.model):
            yield

    def verify(self, cache: TreeCache, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """See `Target.verify`."""
        assert cache.lengths.host is not None, "captured steps are refused"
        try:
            with self.running():
                cache.begin(tree.nodes)
                current = self._target._pass(cache, tree.depth, None, tree.nodes)
                current.visits = NodeVisits(tree, cache.lengths.host, self.by_blocks, self.by_triton)
                return self._target._forward(cache, tree.tokens, tree.depth, current)
        except UnsupportedTargetError:  # a mask, which is made before anything is written
            if not self.by_default:
                raise
            self._target.bitwise = None
            return self._target.verify(cache, tree)

    # ---------------------------------------------------------------- self-test

    def prove(self) -> None:
        """Run the self-test if it was not yet run for this number of threads, and not on this machine.

        Raises:
            MedheadError: it failed, and the option was given.
        """
        if self._testing:
            return
        try:
            self._prove(torch.get_num_threads())
            kept = not self.by_default or self.costs_nothing()
        except Exception:  # the self-test runs code of any model
            if not self.by_default:
                raise
            kept = False
        if not kept:
            self._target.bitwise = None

    def _prove(self, threads: int) -> None:
        if torch.is_autocast_enabled(self._target.device.type):
            raise MedheadError(
                f"exact={self.exact!r} does not go with autocast, which casts by operator; leave one out"
            )
        if threads not in self._proved:
            self._testing = True
            try:
                with torch.inference_mode():
                    self._proved[threads] = self._test(threads)
            finally:
                self._testing = False
        self.products, self.matches_transformers = self._proved[threads]

    def _test(self, threads: int) -> tuple[RowProducts, bool]:
        """Return the products that pass the self-test, and whether logits are those of transformers."""
        file = self._proof_file()
        known = (
            None if file is None else user_cache.read(file, self._parse_proof, "the self-test of `exact` runs again")
        )
        if known is None or (known[0] < 0 and not self.by_default):
            if file is None and self.by_default:
                raise MedheadError(
                    f"{self._cannot(threads)}: other code changed the model, so the self-test would run at every load"
                )
            known = self._try_products()
            if file is not None:
                user_cache.write(file, known)
        else:
            self.products = RowProducts(*self._kinds[known[0]])
            with self._target.active():
                self._find_classes()
        if known[0] < 0 or (known[0] > 0 and self.by_default):
            advice = "try another number of threads, or leave the option out"
            raise MedheadError(f"{self._cannot(threads)}: logits of the self-test differ; {advice}")
        if self.exact == "transformers" and not known[1]:
            advice = "leave packed out, or " if self._target.packed_weights.enabled else ""
            differ = "logits differ from those of transformers"
            raise MedheadError(f"{self._cannot(threads)}: {differ}; {advice}use exact='bitwise'")
        return self.products, known[1]

    def _proof_file(self) -> Path | None:
        """Return where the result of the self-test is kept; None for a model that other code changed."""
        with self._target.active():
            form = (
                self.exact,
                self.by_blocks,
                self._target.packed_weights.enabled,
                self._place(),
                self._triton_version(),
                bool(self._target.fused.forwards),
            )
            key = pass_key(self._target, form)
        if key is None:
            return None
        values = sample([part.detach() for weight in self._target.model.parameters() for part in parts(weight)])
        digest = hashlib.sha256(key.encode() + values).hexdigest()
        return user_cache.cache_folder() / f"exact-{digest[:24]}.json"

    def _parse_proof(self, content: Any) -> tuple[int, bool]:
        index, matches = content
        if type(index) is not int or index not in range(-1, len(self._kinds)):
            raise ValueError(f"{index} is no kind of products")
        return index, bool(matches)

    def _try_products(self) -> tuple[int, bool]:
        """Run the self-test with one kind of products after the other; return the index of the one that passes, -1 for none.

        Also return whether its logits are those of transformers.
        """
        for index, products in enumerate(self._kinds[: 1 if self.by_default else None]):
            self.products = RowProducts(*products)
            with self._target.active():
                differing, prompt = self._differing_nodes()
                ours = self._logits(prompt)
            if not differing:
                return index, not self.by_blocks and self._matches(prompt, ours)
        return -1, False

    def _cannot(self, threads: int) -> str:
        name, dtype = self._target.name, str(self._target.dtype).removeprefix("torch.")
        where = self._place() or f"with {threads} threads on this processor"
        return f"exact={self.exact!r} cannot be promised for {name} in {dtype} {where}"

    def _place(self) -> str:
        """Return the name of the GPU; empty on a CPU."""
        device = self._target.device
        return f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""

    def _triton_version(self) -> str:
        if not self.by_triton:
            return ""
        import triton

        return str(triton.__version__)

    def _differing_nodes(self) -> tuple[int, list[int]]:
        """Return how many nodes of trees differ from the same nodes alone, and the text before them."""
        target, generator = self._target, torch.Generator().manual_seed(1)
        high = min(target.vocab_size, target.num_embeddings)
        parents, depth, cache, first = self._find_classes()
        prompt = [first]
        while len(prompt) < PREFIX:  # the model's own text
            prompt.append(self._draw(self._alone(cache, prompt[-1], len(prompt) - 1), generator, high))
        children = [[node for node in range(1, NODES) if parents[node] == parent] for parent in range(NODES)]
        tokens, alone, stack = [prompt.pop()] + [0] * (NODES - 1), [torch.empty(0)] * NODES, [0]
        while stack:  # depth first: the keys of a node's ancestors are in place
            node = stack.pop()
            alone[node] = self._alone(cache, tokens[node], len(prompt) + depth[node])
            for child in children[node]:
                tokens[child] = self._draw(alone[node], generator, high)
            stack += children[node]
        differing = 0
        for size in SIZES:
            cache.lengths.set([len(prompt)])
            logits = self._verify(cache, torch.tensor(tokens[:size]), parents[:size])
            differing += sum(not torch.equal(logits[0, node], alone[node]) for node in range(size))
        return differing, [*prompt, *tokens[:STEPS]]

    def _find_classes(self) -> tuple[Tensor, list[int], TreeCache, int]:
        """Verify a tree of random tokens, which finds the classes of rows; return its parents, depths, cache and first token."""
        target, generator = self._target, torch.Generator().manual_seed(0)
        parents, depth = _test_parents(generator)
        tokens = torch.randint(0, min(target.vocab_size, target.num_embeddings), (NODES,), generator=generator)
        cache = target.new_cache(1, PREFIX + NODES)
        self._verify(cache, tokens, parents)
        return parents, depth, cache, int(tokens[0])

    def _verify(self, cache: TreeCache, tokens: Tensor, parents: Tensor) -> Tensor:
        """Return the logits `[1, nodes, vocab]` of a tree whose `tokens` and `parents` `[nodes]` are on the host."""
        device = self._target.device
        return self._target.verify(cache, TokenTree.from_parents(tokens.to(device), parents.to(device)))[0]

    def _alone(self, cache: Any, token: int, length: int) -> Tensor:
        """Return the logits `[vocab]` of one token after `length` tokens of the cache."""
        cache.lengths.set([length])
        root = torch.zeros(1, dtype=torch.long)
        return self._verify(cache, root + token, root)[0, 0]

    @staticmethod
    def _draw(logits: Tensor, generator: torch.Generator, high: int) -> int:
        return int(torch.multinomial(logits[:high].float().cpu().softmax(-1), 1, generator=generator))

    def _logits(self, text: list[int]) -> Tensor:
        """Return logits `[1 + STEPS, vocab]`: of a prompt's last token, and of the tokens after it one by one."""
        target, length = self._target, len(text) - STEPS
        cache = target.new_cache(1, len(text))
        logits, _ = read_whole(target, cache, [text[:length]])
        return torch.stack([logits[0], *(self._alone(cache, text[at], at) for at in range(length, len(text)))])

    def _matches(self, text: list[int], ours: Tensor) -> bool:
        """Whether the model itself gives the same logits with a cache of transformers."""
        model, length = self._target.model, len(text) - STEPS
        ids, found = torch.tensor([text], device=self._target.device), []
        given = {cache_argument(model): DynamicCache(config=self._target.config)}
        given |= {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        with eval_mode(model):
            for start, end in [(0, length), *((at, at + 1) for at in range(length, len(text)))]:
                output = model(input_ids=ids[:, start:end], use_cache=True, **given)
                found.append(output.logits[0, -1])
        return torch.equal(torch.stack(found), ours)

    def describe(self) -> str:
        """Return one sentence about the promise."""
        place = self._place() or f"with {torch.get_num_threads()} threads"
        where = f"{str(self._target.dtype).removeprefix('torch.')} {place}"
        also = "the" if self.matches_transformers else "but for rounding the"
        return (
            f"exact {self.exact}: one text for every proposer, tree and batch in {where}; "
            f"greedy text of one prompt is {also} text of transformers generate"
        )


def promise(target: Target, exact: str) -> None:
    """Give a target its `bitwise`, proved; with `auto` only where it costs nothing.

    Raises:
        MedheadError: `exact` is neither `auto` nor one of `EXACT`, or it cannot be promised.
    """
    if exact == "auto":
        with suppress(MedheadError):
            found = Bitwise(target, by_default=True)
            target.bitwise = found if found.costs_nothing() else None  # what is known before the self-test
    elif exact in EXACT:
        target.bitwise = Bitwise(target, exact)
    else:
        raise MedheadError(f"exact must be 'auto', 'bitwise', 'transformers' or None, got {exact!r}")
    if target.bitwise is not None:
        target.bitwise.prove()


def check_exact(target: Target, exact: str | None, way: str) -> None:
    """Raise a MedheadError if a decoder asks for another promise than its target gives, or decodes in a way that breaks it."""
    given = None if target.bitwise is None else target.bitwise.exact
    if exact not in (None, "auto", given):
        raise MedheadError(
            f"exact={exact!r}: this Target was made without it; make it with Target(model, exact={exact!r})"
        )
    if target.bitwise is not None and way not in ("step 'auto'", "step 'loop'"):
        if not target.bitwise.by_default:
            raise MedheadError(f"exact={given!r} does not go with {way}, which changes texts; leave one out")
        target.bitwise = None
    elif target.bitwise is not None and exact == given:
        target.bitwise.by_default = False


def _test_parents(generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Return parents `[NODES]` of a tree with long paths and many branches, and depths."""
    parents, depth = [0], [0]
    for node in range(1, NODES):
        parent = node - 1
        while depth[parent] >= DEPTH or (parent and int(torch.randint(0, 3, (1,), generator=generator)) == 0):
            parent = parents[parent]
        parents.append(parent)
        depth.append(depth[parent] + 1)
    return torch.tensor(parents), depth
