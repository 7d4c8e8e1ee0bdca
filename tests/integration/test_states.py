"""Targets whose layers hold states (recurrent, convolutional, linear attention): trees and texts equal those of transformers."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from test_conformance import path_to, random_tree
from test_joining import alone, decode
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from conftest import noise_heads
from families import HAS_5_24, STATEFUL, exists, tiny, tiny_stateful
from medhead import Decoder, MedheadError
from medhead.config import SamplingParams
from medhead.core.tree import TokenTree
from medhead.errors import UnsupportedTargetError
from medhead.model import target as target_module
from medhead.model.kv_cache import TreeCache
from medhead.model.layout import cache_argument
from medhead.model.probe import check_target
from medhead.model.state_cache import StateCache
from medhead.model.target import Target
from medhead.serving import Engine, Request

pytestmark = pytest.mark.skipif(not HAS_5_24, reason="needs transformers 5.24")
QUICK = ("qwen3_5_text", "lfm2", "mamba2", "jamba", "recurrent_gemma")  # one of each mechanism; others are slow
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in STATEFUL if exists(name)]


class ByToken:
    """A model's own decoding: a prefix is read at once, the tokens after it one by one, each once for all paths."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.argument = cache_argument(model)
        self.known: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Any]] = {}
        self.holders = [
            (m, name) for m in model.modules() for name in vars(m) if name in ("conv1d_state", "recurrent_states")
        ]

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


DENSE = {  # families whose layers run over all nodes at once
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "lara_mini", "kimi_linear", "bailing_hybrid", "mamba2",
    "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2", "lfm2", "lfm2_moe", "lfm3", "mamba", "falcon_mamba",
    "jamba", "zamba", "recurrent_gemma",
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_all_nodes_at_once_equal_depth_by_depth(name: str) -> None:
    """Logits, and the states after commits, of both forms, of one node too; the probe accepts the dense one without a warning.

    The dense form reads the weights of a layer once for each tree, the other once for each depth.
    """
    target = Target(tiny_stateful(name, torch.float64))
    assert target.state_layers is not None
    assert bool(target.state_layers.dense) == (name in DENSE)
    random = torch.Generator().manual_seed(2)
    prefixes = [torch.randint(3, 99, (n,), generator=random).tolist() for n in (2, 11, 7)]
    tree = random_tree(3, 20, 99, random)
    paths = [path_to(tree, row, node) for row, node in enumerate((19, 8, 0))]
    path, counts = torch.tensor([(path + [0] * 20)[:20] for path in paths]), torch.tensor([len(path) for path in paths])
    reads: list[None] = []
    linear = next(part for part in target.state_layers.modules[0].modules() if isinstance(part, torch.nn.Linear))
    linear.register_forward_hook(lambda *_: reads.append(None))
    found = []
    for dense in (target.state_layers.dense, {}):
        target.state_layers.dense = dense
        with target.active():
            cache = target.new_cache(3, 32)
            target.prefill(cache, prefixes)
            reads.clear()
            logits, _ = target.verify(cache, tree)
            assert len(reads) == (1 if dense else 1 + tree.depth.max())
            cache.commit(path, counts)
            cache.lengths.advance(counts)
            single, _ = target.verify(cache, TokenTree.root(tree.tokens[:, 1]))
            cache.commit(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, dtype=torch.long))
        assert isinstance(cache, StateCache)
        found.append([logits, single, *(cache.states[key] for key in sorted(cache.states, key=str))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_probe_sees_the_dense_form_of_one_token() -> None:
    """It goes through other functions than that of a tree."""
    target = Target(tiny_stateful("mamba2"), probe=False)
    assert target.state_layers is not None

    def wrong(forward: Any) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return forward(hidden_states, *args, **kwargs) * (2 if hidden_states.shape[1] == 1 else 1)

        return run

    check_target(target)
    target.state_layers.dense = {module: wrong(forward) for module, forward in target.state_layers.dense.items()}
    with pytest.raises(UnsupportedTargetError, match="logits differ"):
        check_target(target)


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


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_prompts_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, or one pass where a layer ignores the state that it is given, leave the states of each prompt read alone."""
    target = Target(tiny_stateful(name), probe=False)
    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 99, (n,), generator=random).tolist() for n in (3, 14, 8)]
    with target.active():
        alone = []
        for prompt in prompts:
            alone.append(target.new_cache(1, 32))
            target.prefill(alone[-1], [prompt])
        monkeypatch.setattr(target_module, "PREFILL_CHUNK", 4)
        cache = target.new_cache(3, 32)
        starts: list[int] = []
        target.prefill(cache, prompts, lambda features, start: starts.append(start))
    assert isinstance(cache, StateCache)
    assert starts == ([0, 4, 8, 12] if target.state_layers.in_chunks else [0])
    for row, one in enumerate(alone):
        for key, state in one.states.items():
            torch.testing.assert_close(cache.states[key][row], state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proposer", ["none", "ngram", "lookahead", "recycling", "hybrid"])
def test_every_proposer(proposer: str) -> None:
    model = tiny_stateful("qwen3_5_text")
    rows = ragged_prompts(6)
    fixed: Any = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "seed": 5}):
        plain = Decoder(model, "none").generate(**padded(rows), **fixed, **sampling)
        found = Decoder(model, proposer).generate(**padded(rows), **fixed, **sampling)
        assert found.tolist() == plain.tolist()


@pytest.mark.parametrize("kind", ["recurrent", "block"])
def test_heads(kind: str) -> None:
    model = tiny_stateful("qwen3_5_text")
    target = Target(model)
    rows = ragged_prompts(7)
    fixed: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    plain = Decoder(target, "none").generate(**padded(rows), **fixed)
    found = Decoder(target, "heads", heads=noise_heads(target, kind)).generate(**padded(rows), **fixed)
    assert found.tolist() == plain.tolist()


def test_served_requests(tokenizer: PreTrainedTokenizerBase) -> None:
    """Requests that come while others run get the texts of `generate`."""
    model = tiny_stateful("lfm2")
    prompts = ragged_prompts(8)
    fixed: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    expected = [model.generate(**padded([row]), **fixed)[0, len(row) :].tolist() for row in prompts]
    model.generation_config.eos_token_id = None
    with Engine(Decoder(model, "recycling"), tokenizer, max_rows=2) as engine:
        params = SamplingParams(12)
        handles = [engine.submit(Request(prompt, params, proposer="recycling")) for prompt in prompts]
        found = [[token for output in handle for token in output.tokens] for handle in handles]
    assert found == expected


def test_what_states_cost() -> None:
    """The cache counts their memory; a model without such layers has none, and its passes carry none."""
    target = Target(tiny_stateful("mamba2"), probe=False)
    with torch.inference_mode(), target.active():
        cache = target.new_cache(2, 8)
        before = cache.nbytes()
        target.prefill(cache, [[5, 6], [7]])
    assert cache.nbytes() > before
    ordinary = Target(tiny("llama", {}), probe=False)
    assert ordinary.state_layers is None
    assert type(ordinary.new_cache(1, 8)) is TreeCache


@pytest.mark.parametrize("step", ["eager", "compiled"])
def test_captured_and_compiled_steps_are_refused(step: str) -> None:
    with pytest.raises(MedheadError, match=f"step '{step}'.*states.*step='loop'"):
        Decoder(tiny_stateful("lfm2"), "none", step=step)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_stateful("recurrent_gemma")
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids, use_cache=False).logits
    target = Target(model)
    held = {
        (m, name): vars(m)[name] for m in model.modules() for name in vars(m) if name.endswith(("_state", "_states"))
    }
    with target.active(), pytest.raises(RuntimeError, match="on purpose"):
        raise RuntimeError("on purpose")
    Decoder(target, "ngram").generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(getattr(module, name) is value for (module, name), value in held.items())
    assert torch.equal(model(ids, use_cache=False).logits, plain)
