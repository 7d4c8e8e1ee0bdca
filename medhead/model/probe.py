"""Probe of whether a model verifies a token tree correctly; there is no list of supported names."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from medhead.core.tree import TokenTree
from medhead.errors import UnsupportedTargetError
from medhead.model.attention import windows_seen
from medhead.model.eval_mode import eval_mode
from medhead.model.layout import describe_failure, uses_registry
from medhead_kernels.backends import BACKENDS, Backend

PARENTS = (0, 0, 0, 1, 1, 3, 2)  # two branches of different depth, siblings, a chain of three
PREFIXES = (5, 3)  # two rows of different length
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
WIDEST = 128  # a window, chunk or scale of the configuration up to this size is probed by a longer text
HALF_TOLERANCE = 0.1  # of all other dtypes


class _TreeVerifier(Protocol):
    """What the probe needs of a `medhead.model.target.Target`, which imports this module."""

    model: Any
    config: Any
    name: str
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    num_embeddings: int
    backend: Backend
    dense_masks: bool
    positions_given: bool
    state_layers: Any

    def active(self) -> AbstractContextManager[None]: ...
    def position_arguments(self, position_ids: Tensor) -> dict[str, Any]: ...
    def new_cache(self, batch: int, capacity: int) -> Any: ...
    def prefill(self, cache: Any, rows: list[list[int]], *, chunk: int) -> Tensor: ...
    def verify(self, cache: Any, tree: TokenTree) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def check_target(target: _TreeVerifier) -> None:
    """Compare the logits of a small tree with those of its paths, one by one, under the model's own attention.

    If they differ, or the pass over the tree fails, raise an `UnsupportedTargetError`.
    """
    _check_tree(target, PREFIXES, PARENTS)
    if sizes := _small_sizes(target.config):
        _check_tree(target, (max(sizes) + 3, 3), PARENTS[:4])


def _small_sizes(config: Any) -> list[int]:
    """Return the windows and scales that the configuration names and that are small enough to look beyond."""
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "floor_scale"))
    return [size for size in found if isinstance(size, int) and max(PREFIXES) < size <= WIDEST]


def _check_tree(target: _TreeVerifier, lengths: tuple[int, ...], parents: tuple[int, ...]) -> None:
    """Check a tree after prefixes of these lengths, which are read in at least two chunks."""
    tree, prefixes = _probe_tree(target, lengths, parents)
    expected = _path_logits(target, tree, prefixes)
    try:
        with target.active(), windows_seen() as windows:
            cache = target.new_cache(len(prefixes), max(lengths) + 16)
            target.prefill(cache, prefixes, chunk=max(lengths) // 2 + 1)
            logits, _ = target.verify(cache, tree)
            if target.state_layers is not None:  # layers with states use other functions for one token
                single, _ = target.verify(cache, TokenTree.root(tree.tokens[:, 0]))
                logits, expected = torch.cat([logits, single], 1), torch.cat([expected, expected[:, :1]], 1)
    except UnsupportedTargetError:
        raise
    except Exception as error:
        reason = f"a pass over it fails ({describe_failure(error)})"
        if not uses_registry(target.model):
            reason = f"its attention does not go through transformers' registry, and {reason}"
        raise UnsupportedTargetError(f"{target.name} cannot verify a token tree: {reason}") from error
    logits = logits.float()
    allowed = TOLERANCE.get(target.dtype, HALF_TOLERANCE) * float(expected.abs().max().clamp(min=1e-3))
    difference = float((logits - expected).abs().max()) if logits.shape == expected.shape else float("nan")
    if not difference <= allowed:
        raise UnsupportedTargetError(
            f"{target.name} cannot verify a token tree: a tree's logits differ from its paths' by {difference:.3g} "
            f"(allowed {allowed:.3g}); {_why(target, prefixes[0])}"
        )
    _check_windows(target, windows)


def _why(target: _TreeVerifier, prefix: list[int]) -> str:
    """Return why a tree's logits differ from those of its paths, as far as the model tells."""
    changed = [*prefix[:-1], (prefix[-1] + 1) % min(target.vocab_size, target.num_embeddings)]
    with eval_mode(target.model):
        rows = torch.tensor([prefix, changed], device=target.device)
        one, other = target.model(input_ids=rows, use_cache=False).logits[:, 0].float()
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        return "its tokens attend to later tokens of the prompt"
    parts = (target.config, getattr(target.config, "attn_config", None))
    if any(getattr(part, "alibi", False) for part in parts):
        return "it adds ALiBi by the order of keys in code of its own"
    if not uses_registry(target.model):
        return "its attention does not go through transformers' registry and follows the order of keys"
    if not target.positions_given:
        return "`generate` gives it no positions, and those that it computes itself are not those of a tree's nodes"
    return "its attention ignores transformers' registry, or its layers hold states that no cache of transformers holds"


def _check_windows(target: _TreeVerifier, masked: set[int | None]) -> None:
    """Refuse a window that the cache of transformers' `generate` has, but none of the masks of these windows."""
    try:
        layers = DynamicCache(config=target.config).layers
    except (TypeError, ValueError, AttributeError, KeyError):
        return  # the configuration describes no cache of this kind
    for layer in layers:
        size, own = getattr(layer, "sliding_window", None), type(layer).__module__ != DynamicCache.__module__
        if isinstance(size, int) and (own or size not in masked):
            raise UnsupportedTargetError(
                f"{target.name} cannot verify a token tree: its window of {size} tokens exists only in transformers' cache "
                f"({type(layer).__name__}), not in its attention mask"
            )


def _probe_tree(
    target: _TreeVerifier, lengths: tuple[int, ...], parents: tuple[int, ...]
) -> tuple[TokenTree, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    high = min(target.vocab_size, target.num_embeddings)
    draw = torch.randint(0, high, (len(lengths), max(lengths) + len(parents)), generator=generator)
    prefixes = [row[:length].tolist() for row, length in zip(draw, lengths, strict=True)]
    tokens = draw[:, max(lengths) :].to(target.device)
    return TokenTree.from_parents(tokens, torch.tensor(parents, device=target.device)), prefixes


def _path_logits(target: _TreeVerifier, tree: TokenTree, prefixes: list[list[int]]) -> Tensor:
    """Return `[batch, nodes, vocab]` float32 logits, each node's from an ordinary pass over its prefix and path.

    The pass gets the positions that `generate` gives, which are not a model's own default in every model (RoBERTa's).
    """
    found: list[Tensor] = []
    positions: dict[str, Any] = {}
    with eval_mode(target.model):
        for row, prefix in enumerate(prefixes):
            for path in tree.paths_to(row):
                ids = torch.tensor([[*prefix, int(tree.tokens[row, 0]), *path]], device=target.device)
                if target.positions_given:
                    positions = target.position_arguments(torch.arange(ids.shape[1], device=target.device)[None])
                found.append(target.model(input_ids=ids, use_cache=False, **positions).logits[0, -1].float())
    return torch.stack(found).unflatten(0, (tree.batch, tree.nodes)).to(target.device)


def probe_target(target: _TreeVerifier, attention: str) -> None:
    """Check a target; where its attention does not go through the registry, give the model's own code dense masks."""
    try:
        _check_backend(target, attention)
    except UnsupportedTargetError:
        if attention not in ("auto", "sdpa") or target.dense_masks:
            raise
        target.backend, target.dense_masks = BACKENDS["sdpa"], True
        try:
            _check_states(target)
        except UnsupportedTargetError:
            target.dense_masks = False
            raise  # what this says is the truth, for models of both kinds


def _check_backend(target: _TreeVerifier, attention: str) -> None:
    """Check a target; where a kernel that `auto` chose fails, warn and use `sdpa`."""
    try:
        _check_states(target)
    except UnsupportedTargetError as error:
        if target.backend.needs_dense_mask:
            raise
        if attention != "auto":
            raise UnsupportedTargetError(f"with attention {attention!r} (try 'sdpa'): {error}") from error
        name, target.backend = target.backend.name, BACKENDS["sdpa"]
        _check_states(target)
        reason = f"attention {name!r} fails with this model, so it is 'sdpa', which is slower: {error}"
        warnings.warn(reason, stacklevel=3)


def _check_states(target: _TreeVerifier) -> None:
    """Check a target; where dense forms of layers with states fail, warn and run these layers depth by depth."""
    layers = target.state_layers
    try:
        check_target(target)
    except UnsupportedTargetError as error:
        if layers is None or not layers.dense:
            raise
        dense, layers.dense = layers.dense, {}
        try:
            check_target(target)
        except UnsupportedTargetError:
            layers.dense = dense
            raise
        reason = f"layers with states run once for each depth of a tree, which is slower: at once, {error}"
        warnings.warn(reason, stacklevel=4)
