"""`exact="bitwise"` on a GPU: bits of trees are those of single nodes, and texts those of plain decoding."""

from __future__ import annotations

import pytest
import torch
from test_bitwise import path_logits, random_parents
from test_tree_path_attention import (  # noqa: F401  (the same tests, compiled)
    Nodes,
    test_every_node_is_its_path_alone,
    test_it_is_close_to_dense_attention,
)

from conftest import tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder
from medhead.core.tree import TokenTree
from medhead.model.bitwise import UNPROVEN
from medhead.model.prompt_reader import read_whole
from medhead.model.target import Target
from triton_here import needs_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    needs_triton,
]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNPROVEN, "1")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (32, 8, 128), (8, 1, 256)])
def test_kernel_at_real_sizes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    tree = Nodes.random([1000, 511], 64, dtype, heads, kv_heads, dim)
    out = tree.attend()
    for row in range(2):
        for node in range(64):
            assert torch.equal(tree.alone(row, node).attend()[0, 0], out[row, node])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_logits_of_trees_are_those_of_single_nodes(family: str, dtype: torch.dtype) -> None:
    if not exists(family):
        pytest.skip(f"transformers has no {family} here")
    target = Target(tiny(family, ACCEPTED[family]).to("cuda", dtype), probe=False, exact="bitwise")
    ids = torch.randint(3, 60, (85,), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode(), target.active():
        cache = target.new_cache(1, 120)
        read_whole(target, cache, [ids[:21].tolist()])
        tree = TokenTree.from_parents(ids[20:84], torch.tensor(random_parents(64), device="cuda"))
        expected = path_logits(target, cache, 20, tree)
        for nodes in (2, 9, 33, 64):
            cache.lengths.set([20])
            part = TokenTree.from_parents(tree.tokens[0, :nodes], tree.parents[0, :nodes])
            assert torch.equal(target.verify(cache, part)[0][0], expected[:nodes])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "seed": 3}], ids=str)
def test_texts_are_those_of_plain_decoding(sampling: dict[str, object], dtype: torch.dtype) -> None:
    model = tiny_llama(hidden_size=64, head_dim=64, context=512).to("cuda", dtype)
    target = Target(model, exact="bitwise")
    ids = torch.randint(3, 60, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    given = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None} | sampling
    expected = Decoder(target, "none").generate(ids, **given)
    assert torch.equal(Decoder(target, "recycling").generate(ids, **given), expected)
    for row in range(2):  # a sampled row's noise is that of its place in the batch
        if not sampling:
            alone = Decoder(target, "ngram").generate(ids[row : row + 1], **given)
            assert torch.equal(alone[0], expected[row])
