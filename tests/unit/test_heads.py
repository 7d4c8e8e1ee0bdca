"""Heads: the PEFT checkpoint, and every refusal of a checkpoint or a configuration."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from conftest import HEADS, noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.heads import HeadsConfig, build_heads, load_heads, save_heads
from medhead.heads.adapter import attach, detach
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.proposers.static_tree import best_static_tree


@pytest.fixture
def loaded(folders: dict[str, Path]) -> tuple[PreTrainedModel, Target]:
    model = LlamaForCausalLM.from_pretrained(folders["model"]).eval()
    return model, Target(model)


@pytest.mark.parametrize(("name", "draft_vocab"), [(name, 20 * (index % 2)) for index, name in enumerate(HEADS)])
def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path: Path, name: str, draft_vocab: int) -> None:
    model = tiny_llama()
    names = [parameter for parameter, _ in model.named_parameters()]
    heads = noise_heads(Target(model, probe=False), name, draft_vocab=draft_vocab)
    save_heads(heads, model, tmp_path / "new" / "heads")
    assert [parameter for parameter, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    files = {path.name for path in (tmp_path / "new" / "heads").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "medhead_config.json"}
    again = load_heads(tmp_path / "new" / "heads", Target(model, probe=False))
    assert again.config == heads.config
    expected = heads.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("kind", ["medusa", "recurrent", "attention", "block_recurrent"])
def test_peft_loads_the_checkpoint(folders: dict[str, Path], loaded: tuple[PreTrainedModel, Target], kind: str) -> None:
    from peft import PeftModel

    model, target = loaded
    ours = load_heads(folders[kind], target)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(ids).logits
    attach(model, build_heads(ours.config))
    wrapped = PeftModel.from_pretrained(model, folders[kind])
    theirs = wrapped.base_model.model.medhead.modules_to_save["default"]
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(wrapped(ids).logits, plain)  # the target is untouched by its heads
    decoder = Decoder(wrapped, heads=theirs)
    expected = Decoder(loaded[1], heads=ours).generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(decoder.generate(ids, max_new_tokens=12, do_sample=False), expected)
    wrapped.unload()
    detach(model)


def broken(source: Path, goal: Path, **fields: Any) -> Path:
    """Copy a heads folder and change fields of its configuration."""
    shutil.copytree(source, goal)
    config = json.loads((goal / "medhead_config.json").read_text())
    (goal / "medhead_config.json").write_text(json.dumps(config | fields))
    return goal


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "another model: their hidden size is 64, LlamaForCausalLM has 32"),
        ({"vocab_size": 1000}, "vocabulary size is 1000"),
        ({"num_target_layers": 9}, "layers is 9"),
        ({"kind": "hydra"}, "kind of the heads must be one of attention, .*, got 'hydra'"),
        ({"inner_size": 30}, "tensors differ"),
        ({"depth": 0}, "depth of the heads must be"),
        ({"depth": "3"}, "depth of the heads must be"),
        ({"correction": "parent"}, "correction of 'recurrent' heads must be one of none, got 'parent'"),
        ({"feature_layers": [2]}, r"layers of the target from 0 to 1, got 2 in \[2\]"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_heads_that_do_not_fit(
    folders: dict[str, Path],
    loaded: tuple[PreTrainedModel, Target],
    tmp_path: Path,
    fields: dict[str, Any],
    message: str,
) -> None:
    folder = broken(folders["recurrent"], tmp_path / "heads", **fields)
    with pytest.raises(MedheadError, match=message) as refusal:
        load_heads(folder, loaded[1])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "hydra"},
            "kind of the heads must be one of attention, block, medusa, recurrent, sequential, got 'hydra'",
        ),
        ({"depth": 0}, "depth of the heads must be a whole number of at least 1, got 0"),
        ({"depth": 2.5}, "depth of the heads must be a whole number"),
        ({"num_layers": -1}, "num_layers of the heads must be"),
        ({"inner_size": 0}, "inner_size of the heads must be"),
        ({"head_dim": 0}, "head_dim of the heads must be"),
        ({"tree_size": 0}, "tree_size of the heads must be"),
        ({"draft_vocab_size": 65}, "draft_vocab_size must be from 0 to vocab_size 64, got 65"),
        ({"draft_vocab_size": -1}, "draft_vocab_size must be from 0"),
        ({"tree_depth": 5}, "tree_depth must be from 0 to the heads' depth 4, got 5"),
        ({"correction": "hope"}, "correction must be one of none, parent, recurrent, got 'hope'"),
        ({"correction": "parent"}, "correction of 'recurrent' heads must be one of none, got 'parent'"),
        ({"kind": "medusa", "correction": "recurrent"}, "'medusa' heads must be one of none, parent, got 'recurrent'"),
        ({"kind": "sequential", "correction": "parent"}, "'sequential' heads must be one of none, got 'parent'"),
        ({"kind": "attention", "correction": "recurrent"}, "'attention' heads must be one of none, got 'recurrent'"),
        ({"kind": "attention", "feature_layers": [2]}, r"layers of the target from 0 to 1, got 2 in \[2\]"),
        ({"kind": "attention", "feature_layers": [0, -1]}, r"got -1 in \[0, -1\]"),
        ({"kind": "block", "feature_layers": ["1"]}, r"got '1' in"),
        ({"kind": "block", "feature_layers": [1, 1]}, r"distinct, got \[1, 1\]"),
        (
            {"kind": "medusa", "feature_layers": [0, 1]},
            r"'medusa' heads read one layer of the target, got feature_layers \[0, 1\]",
        ),
        ({"kind": "attention", "num_heads": 4, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"kind": "block", "head_dim": 7}, "head_dim even, got 4, 2 and 7"),
        (
            {"kind": "attention", "draft_hidden_size": 16},
            "draft_hidden_size 16 for a target of hidden size 32 need an embedding",
        ),
    ],
)
def test_invalid_configurations(fields: dict[str, Any], message: str) -> None:
    given = {"kind": "recurrent", "depth": 4, "hidden_size": 32, "vocab_size": 64, "num_target_layers": 2} | fields
    with pytest.raises(MedheadError, match=message) as refusal:
        build_heads(HeadsConfig(**given))
    assert "\n" not in str(refusal.value)


def test_damaged_folders(folders: dict[str, Path], loaded: tuple[PreTrainedModel, Target], tmp_path: Path) -> None:
    target = loaded[1]
    with pytest.raises(MedheadError, match="does not exist"):
        load_heads(tmp_path / "nowhere", target)
    with pytest.raises(MedheadError, match="holds no medhead_config"):
        load_heads(tmp_path, target)
    folder = broken(folders["medusa"], tmp_path / "heads")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(MedheadError, match="truncated or damaged"):
            load_heads(folder, target)
    weights.unlink()
    with pytest.raises(MedheadError, match="incomplete"):
        load_heads(folder, target)
    (folder / "medhead_config.json").write_text("{not json")
    with pytest.raises(MedheadError, match="cannot be read"):
        load_heads(folder, target)


def test_untrained_medusa_heads_repeat_the_target(target: Target) -> None:
    """Residual blocks that start at zero leave the hidden state as it is, so the output matrix gives the target's logits."""
    config = HeadsConfig("medusa", 2, target.hidden_size, target.vocab_size, target.layers, inner_size=16)
    heads = build_heads(config)
    hidden = torch.randn(3, target.hidden_size)
    for depth in range(2):
        state, context = heads.init_state(hidden, hidden, None)
        _, feature = heads.step(state, torch.zeros(3, target.hidden_size), depth, context)
        assert torch.equal(feature, hidden)


def test_heads_propose_only_their_draft_vocabulary(model: PreTrainedModel, target: Target) -> None:
    fields = asdict(noise_heads(target).config) | {"draft_vocab_size": 7}
    heads = build_heads(HeadsConfig(**fields))
    allowed = torch.tensor([3, 9, 10, 22, 40, 41, 63])
    heads.draft_tokens.copy_(allowed)
    proposer = build_proposer("heads", target, heads=heads, tree_size=20)
    named: set[int] = set()
    update = proposer.update
    proposer.update = lambda seen: named.update(seen.tree.tokens[:, 1:].flatten().tolist())  # type: ignore[method-assign]
    ids = torch.tensor([[5, 9, 13]])
    found = Decoder(target, proposer).generate(ids, max_new_tokens=30, do_sample=False)
    proposer.update = update  # type: ignore[method-assign]
    assert len(named) >= 5
    assert named <= set(allowed.tolist())
    assert torch.equal(found, model.generate(ids, max_new_tokens=30, do_sample=False))


def test_the_best_static_tree_is_the_best_of_all() -> None:
    """Best-first search against the sum over every path that could be."""
    accuracies = [[0.5, 0.2, 0.1], [0.4, 0.3, 0.05], [0.3, 0.1, 0.02]]
    everything: list[tuple[float, tuple[int, ...]]] = []
    level: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for depth in accuracies:
        level = [(value * depth[rank], (*path, rank)) for value, path in level for rank in range(3)]
        everything += level
    values = {path: value for value, path in everything}
    for nodes in (2, 5, 12, 30):
        best = sum(sorted(values.values(), reverse=True)[: nodes - 1])
        found = best_static_tree(accuracies, nodes)
        assert len(found) == nodes - 1
        assert abs(sum(values[tuple(path)] for path in found) - best) < 1e-12
    with pytest.raises(MedheadError):
        best_static_tree([], 8)
