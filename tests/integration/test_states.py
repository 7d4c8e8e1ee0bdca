"""Targets whose layers hold states (recurrent, convolutional, linear attention): trees and texts equal those of transformers."""

from __future__ import annotations

import copy
import itertools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from families import HAS_5_24, STATEFUL, exists, tiny_stateful
from medhead import Decoder, MedheadError
from medhead.core.tree import TokenTree
from medhead.model import target as target_module
from medhead.model.layout import cache_argument
from medhead.model.state_cache import StateCache
from medhead.model.target import Target
from test_conformance import path_to, random_tree
from test_joining import alone, decode

pytestmark = pytest.mark.skipif(not HAS_5_24, reason="needs transformers 5.24")
QUICK = ("qwen3_5_text", "lfm2", "mamba2", "jamba")  # one of each mechanism; the others are slow tests
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in STATEFUL if exists(name)]


class ByToken:
    """A model's own decoding: a prefix is read at once, the tokens after it one by one, each once for all paths."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.argument = cache_argument(model)
        self.known: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Any]] = {}
        self.holders = [(m, name) for m in model.modules() for name in vars(m) if name in ("conv1d_state", "recurrent_states")]

    def __call__(self, prefix: list[int], *paths: list[int]) -> Tensor:
        """Return the logits `[vocab]` after a prefix, which may be empty, and the tokens of paths."""
        return self._after(tuple(prefix), tuple(itertools.chain(*paths)))[0]

    def _after(self, prefix: tuple[int, ...], path: tuple[int, ...]) -> tuple[Tensor, Any]:
        if (prefix, path) not in self.known:
            seen, tokens = len(prefix) + len(path) - 1, path[-1:] or prefix
            before = self._after(prefix, path[:-1])[1] if path and seen else (None, [None] * len(self.holders))
            cache, held = copy.deepcopy(before)
            given: dict[str, Any] = {} if cache is None else {self.argument: cache}
            if cache is None and self.holders:  # RecurrentGemma does not return a cache that it makes
                given = {self.argument: DynamicCache()}
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                given["position_ids"] = torch.arange(seen + 1 - len(tokens), seen + 1)[None]
            for (module, name), value in zip(self.holders, held, strict=True):
                setattr(module, name, value)
            output = self.model(input_ids=torch.tensor([tokens]), use_cache=True, **given)
            cache = getattr(output, self.argument, given.get(self.argument))
            self.known[prefix, path] = output.logits[0, -1], (cache, [getattr(*holder) for holder in self.holders])
        return self.known[prefix, path]


def logits_by_token(model: PreTrainedModel, tree: TokenTree, texts: list[tuple[list[int], list[int]]]) -> Tensor:
    """Return `[batch, nodes, vocab]` logits of every node of a tree after a prefix and tokens of each row."""
    run = ByToken(model)
    nodes = range(tree.nodes)
    rows = enumerate(texts)
    found = [[run(*text, tree.tokens[row, path_to(tree, row, node)].tolist()) for node in nodes] for row, text in rows]
    return torch.stack([torch.stack(row) for row in found])


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_trees_equal_decoding_token_by_token(name: str) -> None:
    """Rows of different length, one of them empty, before and after a commit of different depths."""
    model = tiny_stateful(name, torch.float64)
    target = Target(model)
    random = torch.Generator().manual_seed(1)
    prefixes = [torch.randint(3, 99, (n,), generator=random).tolist() for n in (0, 11, 7)]
    first, second = (random_tree(3, 10, 99, random) for _ in range(2))
    expected = logits_by_token(model, first, [(prefix, []) for prefix in prefixes])
    paths = [path_to(first, row, node) for row, node in enumerate((9, 4, 0))]
    with target.active():
        cache = target.new_cache(3, 16)
        target.prefill(cache, prefixes)
        logits, _ = target.verify(cache, first)
        path = torch.tensor([(path + [0] * 9)[:10] for path in paths])
        counts = torch.tensor([len(path) for path in paths])
        cache.commit(path, counts)
        cache.lengths.advance(counts)
        after, _ = target.verify(cache, second)
        cache.keep_rows([2, 1])
        cache.lengths.keep_rows([2, 1])
        swapped = TokenTree.from_parents(second.tokens[[2, 1]], second.parents[[2, 1]])
        kept, _ = target.verify(cache, swapped)
    accepted = [first.tokens[row, path].tolist() for row, path in enumerate(paths)]
    expected_after = logits_by_token(model, second, list(zip(prefixes, accepted, strict=True)))
    allowed = 1e-5 * float(expected.abs().max())  # some families compute states in float32
    assert float((logits - expected).abs().max()) <= allowed
    assert float((after - expected_after).abs().max()) <= allowed
    assert float((kept - expected_after[[2, 1]]).abs().max()) <= allowed


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Prompts, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def ragged_prompts(seed: int) -> list[list[int]]:
    """Three prompts of different length with repetitions, from which n-grams are proposed."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 99, (length,), generator=random).tolist() for length in (1, 9, 5)]
    return [rows[0], rows[1] * 2, rows[2] * 3]


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_texts_equal_generate(name: str) -> None:
    """Greedy texts of a ragged batch are those of `generate` for each prompt alone, which no padding can reach."""
    model = tiny_stateful(name)
    rows = ragged_prompts(3)
    fixed: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 16}
    expected = [model.generate(**padded([row]), **fixed)[0, len(row) :].tolist() for row in rows]
    decoder = Decoder(model, "recycling", tree_size=12)
    found = model.generate(**padded(rows), custom_generate=decoder, **fixed)[:, 18:].tolist()
    assert found == expected
    assert model.generate(**padded([rows[1]]), **fixed)[0, 18:].tolist() == expected[1]  # the model is as it was


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_join_and_leave(name: str) -> None:
    """See `test_joining`: each row gets the text that plain decoding gives it alone, with a seed too."""
    target = Target(tiny_stateful(name), probe=False)
    random = torch.Generator().manual_seed(4)
    jobs = [
        (torch.randint(3, 99, (length,), generator=random).tolist(), limit, temperature, seed)
        for length, limit, temperature, seed in ((5, 10, 0.0, 0), (1, 7, 0.8, 7), (9, 12, 1.0, 7), (7, 6, 0.0, 0))
    ]
    assert decode(target, "recycling", jobs, [0, 1, 1, 4]) == [alone(target, *job) for job in jobs]
