"""One training step: what it reads of packed texts, every loss, accumulation, and heads together with an adapter."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from conftest import tiny_llama
from families import ACCEPTED, HAS_5_24, STATEFUL, tiny
from medhead.heads import KINDS
from medhead.model.eval_mode import eval_mode
from medhead.model.target import Target
from medhead_training.objective.builders import find_linear_layers, make_heads, wrap_for_training
from medhead_training.objective.losses import LOSSES
from medhead_training.objective.module import HeadsModule
from medhead_training.objective.unroll import PackedBatch
from medhead_training.trainer.options import TrainOptions
from medhead_training.trainer.trainer import HeadsTrainer, training_arguments

Batch = dict[str, Tensor]
LENGTH = 24


def options(**changes: Any) -> TrainOptions:
    small: dict[str, Any] = {"depth": 3, "seq_len": LENGTH, "inner_size": 24, "correction_size": 20, "blocks": 1}
    small |= {"kind": "recurrent", "draft_vocab": 0, "lora_rank": 4, "lora_dropout": 0.0, "random_depth": False}
    return TrainOptions(**({"model": "m", "data": ["d"], "output": "o"} | small | changes))


def module_for(model: PreTrainedModel, **changes: Any) -> HeadsModule:
    """What the command builds for these options."""
    given = options(**changes)
    target = Target(model, probe=False)
    heads = make_heads(given, target, None)  # type: ignore[arg-type]  # the store is for draft vocabularies
    wrapped, heads = wrap_for_training(given, target, heads)
    return HeadsModule(wrapped, target, heads, given).train()


def texts(rows: list[list[int]], vocab: int, seed: int = 0, asked: int = 0) -> Batch:
    """Random documents of these lengths packed into rows; the first `asked` tokens of each are not the assistant's."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(3, vocab, (len(rows), LENGTH), generator=generator),
        "mask": torch.zeros(len(rows), LENGTH, dtype=torch.bool),
        "document": torch.full((len(rows), LENGTH), -1),
        "position_ids": torch.zeros(len(rows), LENGTH, dtype=torch.long),
    }
    for row, sizes in enumerate(rows):
        at = 0
        for number, size in enumerate(sizes):
            batch["mask"][row, at + asked : at + size] = True
            batch["document"][row, at : at + size] = number
            batch["position_ids"][row, at : at + size] = torch.arange(size)
            at += size
    return batch


def gradients(module: HeadsModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- packing


FAMILIES = ["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "phi3", "gpt2", "deepseek_v3", "opt", "gpt_oss"]
STATES = ["qwen3_5_text", "lfm2"] if HAS_5_24 else []
MIXING = ("opt", "gpt_oss", *STATES)  # make their masks without positions, or hold states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *STATES])
def test_packed_documents_are_read_as_if_alone(family: str, attention: str) -> None:
    model = tiny(family, (ACCEPTED | STATEFUL)[family])
    if attention not in ("eager", model.config._attn_implementation):
        pytest.skip(f"{family} has no {attention}")
    model.set_attn_implementation(attention)
    module = module_for(model, kind="block", feature_layers=[0, 2])
    assert module.supports_packing == (family not in MIXING)
    batch = texts([[9, 1, 7], [2, 16, 6], [24]], 99)
    packed = PackedBatch(batch["input_ids"], batch["mask"], batch["document"])
    with torch.no_grad():
        hidden, features = module.target_states(packed, batch["position_ids"])
    assert hidden.shape == (3, LENGTH, 32)
    assert features.shape == (3, LENGTH, 64)
    for row in range(3):
        for number in range(int(batch["document"][row].max()) + 1):
            here = batch["document"][row] == number
            ids = batch["input_ids"][row, here][None]
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits  # as anyone calls it
            with torch.no_grad(), module.target.listening([0, 2]):
                alone, of_alone = module.target.read_hidden(model, ids, torch.arange(ids.shape[1])[None])
            torch.testing.assert_close(hidden[row, here], alone[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(features[row, here], of_alone[0], rtol=1e-4, atol=1e-5)
            if getattr(model.config, "final_logit_softcapping", None) is None:
                torch.testing.assert_close(module.target.output(hidden[row, here]), logits[0], rtol=1e-4, atol=1e-4)


def test_one_document_a_row_is_the_same_to_learn_from() -> None:
    batch = texts([[9, 1, 7], [2, 16, 6], [24], []], 64)
    found = []
    for packs in (True, False):
        module = module_for(tiny_llama(), recipe="joint", kind="attention", feature_layers=[0, 1])
        random_adapter(module)
        module.supports_packing = packs
        result = module(**batch, seed=1)
        result["loss"].backward()
        found.append({"loss": result["loss"].detach()} | gradients(module))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss: str, draft: bool) -> None:
    module = module_for(tiny_llama(), loss=loss, kind="block", feature_layers=[0, 1])
    if draft:
        tokens = torch.arange(5, 64, 3)
        module.heads.draft_tokens = tokens
        module = HeadsModule(module.model, module.target, module.heads, module.options).train()
    batch = texts([[9, 15], [3, 13]], 64, asked=2)
    optimizer = torch.optim.Adam(module.heads.parameters(), lr=3e-3)
    seen = []
    for _ in range(8):
        found = module(**batch, seed=1)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        seen.append(float(found["loss"].detach()))
    assert all(torch.isfinite(p.grad).all() for p in module.heads.parameters() if p.grad is not None)
    assert all(p.grad is None for p in module.target.model.parameters() if not p.requires_grad)
    assert seen[-1] < seen[0], seen
    assert found["tried"].sum() > 0
    assert (found["hits"] <= found["tried"]).all()


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("loss", ["hard", "kl", "soft"])
def test_the_loss_is_its_definition(loss: str, draft: bool) -> None:
    """At every depth the mean over the anchors whose path gets there, and whose token has a name; depths by weight."""
    module = module_for(tiny_llama(), loss=loss, anchor_fraction=1.0, depth_decay=0.5)
    tokens = torch.arange(5, 64, 3) if draft else torch.arange(64)
    if draft:
        module.heads.draft_tokens = tokens
        module = HeadsModule(module.model, module.target, module.heads, module.options).train()
    batch = texts([[9, 15], [3, 13]], 64, asked=2)
    ids, matrix = batch["input_ids"], module.output
    packed = PackedBatch(ids, batch["mask"], batch["document"])
    hidden, features = module.target_states(packed, batch["position_ids"])
    sums, counts = torch.zeros(3), torch.zeros(3)
    for row, anchor in itertools.product(range(2), range(LENGTH)):
        document, asked = batch["document"][row], batch["mask"][row]
        root = _encoded(module, ids[row, anchor + 1 : anchor + 2], 0)
        state, context = module.heads.init_state(features[row, anchor][None, None], root, None)
        for depth, at in enumerate(range(anchor + 2, min(anchor + 5, LENGTH))):  # of the token to predict
            if not asked[at] or document[at] != document[anchor]:
                break
            state, drafted = module.heads.step(state, _encoded(module, ids[row, at - 1 : at], depth), depth, context)
            q = (matrix @ drafted[0, 0]).log_softmax(-1)
            p = (matrix @ hidden[row, at - 1]).softmax(-1)
            if int(ids[row, at]) in tokens:
                label = tokens.tolist().index(int(ids[row, at]))
                values = {"hard": -q[label], "kl": (p * (p.log() - q)).sum(), "soft": -(p * q).sum()}
                sums[depth] += values[loss].detach()
                counts[depth] += 1
    assert counts.min() > 3
    expected = (sums / counts * torch.tensor([1, 0.5, 0.25]) / 1.75).sum()
    assert float(module(**batch, seed=1)["loss"].detach()) == pytest.approx(float(expected), rel=1e-4)


def _encoded(module: HeadsModule, ids: Tensor, depth: int) -> Tensor:
    return module.heads.encode(module.target.embed(ids)[None], depth)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_gets_gradients_in_every_part(kind: str) -> None:
    module = module_for(tiny_llama(), kind=kind)
    module(**texts([[24], [20]], 64), seed=1)["loss"].backward()
    without = [name for name, p in module.heads.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad is None for name, p in module.named_parameters() if ".medhead." not in name)


def test_random_depths_weigh_as_all_depths_do() -> None:
    module = module_for(tiny_llama(), random_depth=True, depth=3, depth_decay=0.6)
    totals = torch.zeros(3)
    for seed in range(4000):
        depth, weights = module.sample_depth(torch.Generator().manual_seed(seed))
        totals[:depth] += weights
    expected = torch.tensor([1, 0.6, 0.36]) / 1.96
    torch.testing.assert_close(totals / 4000, expected, atol=0.015, rtol=0)


def test_texts_without_anchors_give_no_gradient() -> None:
    for batch in (texts([[2, 2, 1]], 64), texts([[]], 64)):
        module = module_for(tiny_llama(), kind="attention")
        loss = module(**batch, seed=1)["loss"]
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(p.grad is None or not p.grad.any() for p in module.heads.parameters())


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The rows of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> Batch:
        return {name: part[index] for name, part in self.batch.items()}


class Peek(TrainerCallback):
    """Keeps the gradients of every update."""

    def __init__(self, module: HeadsModule) -> None:
        self.module, self.seen = module, []  # type: ignore[var-annotated]

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seen.append(gradients(self.module))


def test_two_batches_of_two_are_one_of_four(tmp_path: Path) -> None:
    """All anchors, and as many in each half: the mean of means is the mean."""
    batch = texts([[14, 10], [10, 14], [24], [24]], 64)
    batch = {name: part[[0, 2, 1, 3]] for name, part in batch.items()}
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        changes = {
            "batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "anchor_fraction": 1.0,
            "max_steps": 1,
            "max_grad_norm": 1e9,
        }
        module = module_for(tiny_llama(), **changes, tensorboard=False)
        arguments = training_arguments(module.options, tmp_path / str(size), torch.device("cpu"))
        trainer = HeadsTrainer(module, arguments, module.options, Rows(batch), dict)
        peek = Peek(module)
        trainer.add_callback(peek)
        trainer.train()
        assert len(peek.seen) == 1
        found.append(peek.seen[0])
    assert found[0].keys() == found[1].keys()
    assert sum(float(gradient.abs().sum()) for gradient in found[0].values()) > 1
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_every_batch_of_every_process_draws_its_own_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = texts([[24]] * 8, 64)
    module = module_for(tiny_llama(), batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    arguments = training_arguments(module.options, tmp_path, torch.device("cpu"))
    trainer = HeadsTrainer(module, arguments, module.options, Rows(batch), dict)
    seeds: list[int] = []
    real = module.forward
    monkeypatch.setattr(module, "forward", lambda seed, **inputs: (seeds.append(seed), real(seed=seed, **inputs))[1])
    trainer.train()
    assert seeds == [0, 1, 2, 3]


# ---------------------------------------------------------------- an adapter on the target


def random_adapter(module: HeadsModule, scale: float = 0.1) -> None:
    """LoRA starts as the identity; this is one that changes something."""
    torch.manual_seed(5)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)


def lora(module: HeadsModule) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if "lora_" in name}


def test_preservation_vanishes_where_the_adapter_is_the_identity() -> None:
    gpt2 = tiny("gpt2", ACCEPTED["gpt2"])
    assert gpt2.config.resid_pdrop > 0  # its own dropout must stay off
    for model, vocab in ((tiny_llama(), 64), (gpt2, 99)):
        module = module_for(model, recipe="joint", lora_dropout=0.3)
        batch = texts([[9, 15], [24]], vocab)
        found = module(**batch, seed=1)
        assert float(found["preservation"]) == pytest.approx(0, abs=1e-6)
        assert float(found["loss"].detach()) == pytest.approx(float(found["heads_loss"]), abs=1e-6)
        assert set(gradient_of_preservation(module, batch)) == set(lora(module))
        assert max(float(g.abs().max()) for g in gradient_of_preservation(module, batch).values()) < 1e-5


def test_preservation_pulls_the_adapter_back() -> None:
    module = module_for(tiny_llama(), recipe="joint", preservation_weight=2.0)
    random_adapter(module)
    batch = texts([[9, 15], [24]], 64, asked=4)
    found = module(**batch, seed=1)
    assert float(found["preservation"]) > 1e-3
    assert float(found["loss"].detach()) == pytest.approx(
        float(found["heads_loss"] + 2 * found["preservation"]), rel=1e-5
    )
    pull = gradient_of_preservation(module, batch)
    assert set(pull) == set(lora(module))  # none in the heads or the target
    before = float(found["preservation"])
    with torch.no_grad():
        for name, parameter in lora(module).items():
            parameter -= 1e-2 * pull[name] / max(float(pull[name].norm()), 1e-9)
    assert float(module(**batch, seed=1)["preservation"]) < before
    # against its definition: KL(target || adapted target) in nats, the mean over the answers' tokens
    logits = module.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    with module.model.disable_adapter():
        original = module.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    p, q = original.log_softmax(-1), logits.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[:, :-1]
    predicted = batch["mask"][:, 1:] & (batch["document"][:, 1:] == batch["document"][:, :-1])
    expected = float(divergence[predicted].mean().detach())
    assert float(module(**batch, seed=1)["preservation"]) == pytest.approx(expected, rel=1e-4)


def gradient_of_preservation(module: HeadsModule, batch: Batch) -> dict[str, Tensor]:
    """Of it alone: what the weight of it changes."""
    found = []
    for weight in (0.0, 1.0):
        module.zero_grad()
        module.options.preservation_weight, kept = weight, module.options.preservation_weight
        torch.manual_seed(0)  # of the adapter's dropout
        module(**batch, seed=1)["loss"].backward()
        module.options.preservation_weight = kept
        found.append(gradients(module))
    module.zero_grad()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] if "lora_" not in name)
    return {name: found[1][name] - found[0][name] for name in found[0] if "lora_" in name}


def test_only_the_adapter_and_the_heads_learn(tmp_path: Path) -> None:
    model, other = tiny_llama(), tiny_llama()
    module = module_for(
        model, recipe="joint", kind="block", feature_layers=[0, 1], max_steps=4, lora_lr=0.01, lora_start_ratio=0.25
    )
    batch = texts([[9, 15], [24], [4, 20], [24]] * 8, 64)
    arguments = training_arguments(module.options, tmp_path, torch.device("cpu"))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    HeadsTrainer(module, arguments, module.options, Rows(batch), dict).train()
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert changed == trained
    assert all("lora_" in name or ".medhead.modules_to_save.default." in name for name in trained)
    assert not [name for name in trained if "lora_" in name and ".medhead." in name]
    ids = batch["input_ids"][:2]
    module.eval()
    assert not torch.allclose(module.model(input_ids=ids).logits, other(ids).logits, atol=1e-3)
    with module.model.disable_adapter():
        assert torch.equal(module.model(input_ids=ids).logits, other(ids).logits)


def test_heads_teach_the_adapter_too() -> None:
    module = module_for(tiny_llama(), recipe="joint", preservation_weight=0.0)
    module(**texts([[24]], 64), seed=1)["loss"].backward()
    reached = {name for name, p in lora(module).items() if p.grad is not None and p.grad.any()}
    assert reached == {name for name in lora(module) if "lora_B" in name}  # A has none while B is zero
    assert "preservation" not in module(**texts([[24]], 64), seed=1)


def test_learning_rates_of_heads_and_adapter(tmp_path: Path) -> None:
    changes = {
        "recipe": "joint",
        "lr": 0.03,
        "adamw_lr": 0.004,
        "lora_lr": 0.0002,
        "warmup_ratio": 0.05,
        "lora_start_ratio": 0.1,
    }
    module = module_for(tiny_llama(), **changes, kind="block", feature_layers=[0, 1])
    arguments = training_arguments(module.options, tmp_path, torch.device("cpu"))
    trainer = HeadsTrainer(module, arguments, module.options, Rows(texts([[24]], 64)), dict)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(100)
    groups = optimizer.param_groups
    assert [bool(group.get("muon")) for group in groups] == [True, False, False]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in lora(module).values()}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in module.parameters() if p.requires_grad}
    assert all(p.ndim == 2 for p in groups[0]["params"])
    rates = []
    for _ in range(100):
        rates.append([group["lr"] for group in groups])
        optimizer.step()
        scheduler.step()
    muon, adamw, adapter = (list(column) for column in zip(*rates, strict=True))
    assert max(muon) == pytest.approx(0.03, rel=0.02)
    assert max(adamw) == pytest.approx(0.004, rel=0.02)
    assert max(adapter) == pytest.approx(0.0002, rel=0.02)
    assert adapter[:10] == [0.0] * 10
    assert min(adapter[10:]) > 0
    assert muon[0] == pytest.approx(0.03 / 5)
    assert muon[-1] == pytest.approx(0.02 * 0.03, rel=0.2)
    assert adapter[-1] == pytest.approx(0.02 * 0.0002, rel=0.2)
    plain = module_for(tiny_llama(), optimizer="adamw", adamw_lr=0.004)
    trainer = HeadsTrainer(plain, arguments, plain.options, Rows(texts([[24]], 64)), dict)
    assert [type(trainer.create_optimizer()), len(trainer.optimizer.param_groups)] == [torch.optim.AdamW, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_gradient_checkpointing_changes_nothing_but_memory(kind: str) -> None:
    batch = texts([[9, 15], [24]], 64)
    found, calls = [], []
    for checkpointing in (False, True):
        module = module_for(tiny_llama(), recipe="joint", kind=kind, gradient_checkpointing=checkpointing)
        random_adapter(module)
        seen: list[int] = []
        module.target.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        result = module(**batch, seed=1)
        result["loss"].backward()
        found.append({"loss": result["loss"].detach()} | gradients(module))
        calls.append(len(seen))
    assert calls == [2, 3]  # adapted, original; and adapted once more, for the backward pass
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-8)


def test_dropout_is_the_adapters_alone() -> None:
    gpt2 = tiny("gpt2", ACCEPTED["gpt2"])
    module = module_for(gpt2, recipe="joint", lora_dropout=0.5)
    active = {name for name, part in module.named_modules() if isinstance(part, torch.nn.Dropout) and part.training}
    assert active
    assert all("lora_dropout" in name for name in active)
    with eval_mode(module):
        assert not [name for name, part in module.named_modules() if part.training]
    assert module.training
    assert active == {n for n, part in module.named_modules() if isinstance(part, torch.nn.Dropout) and part.training}
    frozen = module_for(copy.deepcopy(tiny_llama()))
    assert not [name for name, part in frozen.named_modules() if part.training and name]


def test_layers_of_gpt2_are_found() -> None:
    assert find_linear_layers(tiny("gpt2", ACCEPTED["gpt2"])) == ["c_attn", "c_fc", "c_proj"]
    assert find_linear_layers(tiny_llama()) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
