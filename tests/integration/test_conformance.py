"""Families of transformers: accepted ones verify trees exactly, the others are refused in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from families import ACCEPTED, REFUSED, STATEFUL, exists, tiny
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model.target import Target


def random_tree(batch: int, nodes: int, vocab: int, generator: torch.Generator) -> TokenTree:
    """Return trees with random parents and random tokens."""
    parents = torch.zeros(batch, nodes, dtype=torch.long)
    for node in range(1, nodes):
        parents[:, node] = torch.randint(0, node, (batch,), generator=generator)
    return TokenTree.from_parents(torch.randint(3, vocab, (batch, nodes), generator=generator), parents)


def path_to(tree: TokenTree, row: int, node: int) -> list[int]:
    """Return the nodes from the root to a node."""
    path = [node]
    while path[0]:
        path.insert(0, int(tree.parents[row, path[0]]))
    return path


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, tree: TokenTree, prefixes: list[list[int]]) -> Tensor:
    """Return the logits of every node, by ordinary passes over its path."""
    rows = []
    for row, prefix in enumerate(prefixes):
        paths = [prefix + tree.tokens[row, path_to(tree, row, node)].tolist() for node in range(tree.nodes)]
        rows.append(torch.stack([model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in paths]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_family_verifies_trees_exactly(name: str) -> None:
    if not exists(name):
        pytest.skip(f"this version of transformers has no {name}")
    model = tiny(name, ACCEPTED[name])
    target = Target(model)
    generator = torch.Generator().manual_seed(1)
    prefixes = [torch.randint(3, 99, (n,), generator=generator).tolist() for n in (3, 11, 7)]
    first, second = (random_tree(3, 10, 99, generator) for _ in range(2))
    expected = one_by_one(model, first, prefixes)
    paths = [path_to(first, row, 9) for row in range(3)]
    longer = [prefix + first.tokens[row, paths[row]].tolist() for row, prefix in enumerate(prefixes)]
    expected_next = one_by_one(model, second, longer)
    with torch.inference_mode(), target.active():
        cache = target.new_cache(3, 16)
        target.prefill(cache, prefixes)
        logits, _ = target.verify(cache, first)
        steps = max(map(len, paths))
        path = torch.tensor([p + [0] * (steps - len(p)) for p in paths])
        counts = torch.tensor([len(p) for p in paths])
        cache.commit(path, counts)
        cache.lengths.advance(counts)
        after, _ = target.verify(cache, second)
    scale = float(expected.abs().max())
    assert float((logits - expected).abs().max()) <= 2e-4 * scale
    assert float((after - expected_next).abs().max()) <= 2e-4 * scale


def test_at_least_thirty_families_were_tried() -> None:
    assert sum(exists(name) for name in ACCEPTED) >= 30


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_family_is_refused_in_one_line(name: str) -> None:
    if not exists(name):
        pytest.skip(f"this version of transformers has no {name}")
    with pytest.raises(UnsupportedTargetError) as refusal:
        Target(tiny(name, REFUSED[name]))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert "5.24" in str(refusal.value) or name not in STATEFUL


def test_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedTargetError, match="encoder"):
        Target(T5ForConditionalGeneration(config))


def test_anything_else_is_refused() -> None:
    with pytest.raises(MedheadError, match="Linear"):
        Target(torch.nn.Linear(2, 2))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama", {})
    model.train()
    before = (model.config._attn_implementation, len(model.get_output_embeddings()._forward_pre_hooks))
    target = Target(model)

    def fails() -> None:
        with target.active():
            assert model.config._attn_implementation == "medhead_sdpa"
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert model.training
    assert (model.config._attn_implementation, len(model.get_output_embeddings()._forward_pre_hooks)) == before
    assert isinstance(model.config, LlamaConfig)


def test_a_peft_model_is_a_target() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("llama", {})
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    target = Target(adapted)
    with torch.inference_mode(), target.active():
        cache = target.new_cache(1, 16)
        target.prefill(cache, [[5, 6]])
        logits, _ = target.verify(cache, TokenTree.root(torch.tensor([7])))
    torch.testing.assert_close(logits[:, 0], adapted(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:, 0], plain[:, -1])
