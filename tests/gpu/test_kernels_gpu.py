"""Compiled kernels on a GPU, at real sizes and in a captured graph: `python -m pytest -m gpu`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from test_backends import Problem, check
from test_conformance import random_tree
from test_delta_rule import problem
from test_fused_kernels import (  # noqa: F401  (the same tests, compiled)
    test_activations,
    test_norms_are_those_of_modeling_files,
    test_rotary_positions_are_written_bit_for_bit,
    test_rows_do_not_depend_on_their_number,
)
from test_kernels import CAPPED, moved_rows
from torch import Tensor

from conftest import tiny_llama
from families import ACCEPTED, tiny
from medhead import Decoder
from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead_kernels import causal, delta_rule, reference, sdpa
from medhead_kernels.attn_metadata import AttnParams, additive_mask
from medhead_kernels.backends import BACKENDS, AttnSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 4), (96, 8), (128, 4), (192, 2), (256, 8)])
@pytest.mark.parametrize("name", ["triton", "flash", "sdpa"])
def test_real_sizes(name: str, dim: int, group: int, dtype: torch.dtype) -> None:
    check(name, Problem.random([700, 33, 0], 64, kv_heads=2, group=group, dim=dim, dtype=dtype))


def test_a_captured_launch_reads_lengths_on_the_device() -> None:
    """A graph that is replayed with other lengths, bitmasks and tensors gives the output of a fresh launch."""
    first, second = (Problem.random(lengths, 20, dim=64, seed=n) for n, lengths in enumerate(([300, 20], [7, 300])))
    params, backend = AttnParams(0.125), BACKENDS["triton"]

    def run(problem: Problem) -> Tensor:
        return backend.attention(problem.query, problem.key, problem.value, problem.tree, params)

    expected = run(second)
    run(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(first)
    for name in ("query", "key", "value"):
        getattr(first, name).copy_(getattr(second, name))
    for name in ("lengths", "ancestor_bitmask", "depth"):
        getattr(first.tree, name).copy_(getattr(second.tree, name))
    graph.replay()
    assert torch.equal(out, expected)


def test_the_same_bits_every_time() -> None:
    problem, params = Problem.random([3000], 64, group=4, dim=128, dtype=torch.bfloat16), AttnParams(0.1)
    runs = [
        BACKENDS["triton"].attention(problem.query, problem.key, problem.value, problem.tree, params) for _ in range(5)
    ]
    assert all(torch.equal(runs[0], other) for other in runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_commit_at_real_sizes(dim: int, dtype: torch.dtype) -> None:
    from medhead_kernels.commit import move

    store = torch.randn(16, 3, 4, 512, dim, device="cuda", dtype=dtype)
    path = torch.stack([torch.randperm(63)[:9].sort().values + 1 for _ in range(3)]).cuda()
    path[:, 0] = 0
    lengths = torch.tensor([400, 3, 0], device="cuda")
    expected = moved_rows(store, path, lengths)
    move(store, path, lengths)
    assert torch.equal(store, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("start", "tokens"), [(0, 700), (1024, 1024), (3000, 17), (900, 1)])
def test_prompts_by_flash_kernels(start: int, tokens: int, dtype: torch.dtype) -> None:
    query, key, value = (
        torch.randn(2, heads, count, 128, device="cuda", dtype=dtype)
        for heads, count in ((8, tokens), (2, start + tokens), (2, start + tokens))
    )
    assert causal.is_supported(query, value)
    seen = torch.ones(tokens, start + tokens, dtype=torch.bool, device="cuda").tril(start)
    bias = additive_mask(seen, torch.float32)[None, None]
    expected = reference.attention(query.float(), key.float(), value.float(), bias, 0.1)
    found = sdpa.attention(query, key, value, None, 0.1)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3"])
def test_families_by_the_kernel(family: str, dtype: torch.dtype) -> None:
    """Windows, soft-capping and sinks: the logits of a tree are those of the reference attention of the same target."""
    found = []
    for attention in ("reference", "triton"):
        target = Target(tiny(family, ACCEPTED[family] | CAPPED.get(family, {})).to("cuda", dtype), attention=attention)
        made = random_tree(2, 10, 99, torch.Generator().manual_seed(1))
        tree = TokenTree(made.tokens.cuda(), made.parents.cuda(), made.depth.cuda(), made.max_depth)
        with torch.inference_mode(), target.active():
            cache = target.new_cache(2, 32)
            target.prefill(cache, [[5, 6, 7], list(range(3, 20))])
            found.append(target.verify(cache, tree)[0].float())
    tolerance = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    assert float((found[0] - found[1]).abs().max()) <= tolerance * float(found[0].abs().max())


def test_auto_is_triton_and_gives_the_text_of_sdpa() -> None:
    spec = AttnSpec("cuda", torch.float32, 64, 64)
    assert BACKENDS["triton"].unsupported_reason(spec) is None
    ids = torch.tensor([[5, 9, 13, 5, 9], [7, 8, 7, 8, 7]], device="cuda")
    texts = []
    for attention in ("auto", "sdpa"):
        target = Target(tiny_llama().cuda(), attention=attention)
        texts.append(Decoder(target, "recycling").generate(ids, max_new_tokens=40))
        assert target.backend.name == {"auto": "triton"}.get(attention, attention)
    assert torch.equal(*texts)


@pytest.mark.parametrize(("nodes", "exact"), [(1, True), (16, True), (64, True), (64, False)])
def test_delta_rule_at_real_sizes(nodes: int, exact: bool) -> None:
    from medhead_kernels.tree_delta_rule import delta_rule as kernel

    tree, arguments = problem(nodes, batch=3, key_heads=16, share=2, key=128, value=128)
    expected = delta_rule.reference(*(part.double() for part in arguments), tree.visible)
    given = (part.cuda() for part in (*arguments, tree.ancestor_bitmask))
    for one, other in zip(kernel(*given, tree.max_depth, exact), expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-3, atol=1e-3)
    assert delta_rule.use_triton(torch.device("cuda"), nodes, 128, 128, exact)
