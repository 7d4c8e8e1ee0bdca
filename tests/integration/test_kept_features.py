"""What a frozen target says about its text is computed once: same losses as without, resumable, recomputed if stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from conftest import tiny_llama
from medhead.model.target import Target
from medhead_training import finetune
from medhead_training.data import feature_store
from medhead_training.data.packing import PackedDataset
from medhead_training.data.token_store import TokenStore
from medhead_training.objective import kept_features
from medhead_training.objective.builders import make_heads, wrap_for_training
from medhead_training.objective.kept_features import keep_features
from medhead_training.objective.losses import LOSSES
from medhead_training.objective.module import HeadsModule
from medhead_training.trainer.options import TrainOptions

SMALL: dict[str, Any] = {
    "depth": 3,
    "seq_len": 24,
    "inner_size": 24,
    "correction_size": 20,
    "blocks": 1,
    "draft_vocab": 40,
}


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """30 documents of 3 to 60 random tokens; the first third of each is not the assistant's."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 60, 30)
    mask = np.concatenate([np.arange(n) >= n // 3 for n in lengths])
    folder = tmp_path / "tokens"
    folder.mkdir()
    generator.integers(3, 64, lengths.sum(), dtype=np.int32).tofile(folder / "tokens.bin")
    mask.tofile(folder / "mask.bin")
    np.save(folder / "ends.npy", np.cumsum(lengths))
    meta = {
        "documents": 30,
        "tokens": int(lengths.sum()),
        "assistant_tokens": int(mask.sum()),
        "records": 30,
        "skipped": {},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenStore(folder)


def module_for(store: TokenStore, **changes: Any) -> HeadsModule:
    given = TrainOptions("m", ["d"], "o", **(SMALL | {"kind": "recurrent", "feature_dtype": "float32"} | changes))
    target = Target(tiny_llama(), probe=False)
    wrapped, heads = wrap_for_training(given, target, make_heads(given, target, store))
    return HeadsModule(wrapped, target, heads, given).train()


def dataset(store: TokenStore) -> PackedDataset:
    return PackedDataset(store, range(1, 29), SMALL["seq_len"], seed=3, epochs=2)


def batch_of(rows: PackedDataset, indices: range) -> dict[str, torch.Tensor]:
    found = [rows[index] for index in indices]
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_the_loss_is_what_it_was(store: TokenStore, tmp_path: Path, kind: str, loss: str) -> None:
    module, rows = module_for(store, kind=kind, loss=loss), dataset(store)
    expected = [module(**batch_of(rows, part), seed=1)["loss"] for part in (range(4), range(len(rows) - 4, len(rows)))]
    assert keep_features(module, rows, tmp_path, 1)
    module.target.model.forward = None  # nothing runs it any more
    for part, value in zip((range(4), range(len(rows) - 4, len(rows))), expected, strict=True):
        batch = batch_of(rows, part)
        assert ("teacher" in batch) == (loss == "soft" or (kind == "attention" and loss != "hard"))
        torch.testing.assert_close(module(**batch, seed=1)["loss"], value, rtol=1e-4, atol=1e-5)


def test_a_killed_computation_goes_on(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "GROUP_TOKENS", 100)
    real, calls = kept_features.compute_parts, []

    def compute(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    module, rows, straight = module_for(store), dataset(store), dataset(store)
    for folder in ("killed", "straight"):
        (tmp_path / folder).mkdir()
    keep_features(module, straight, tmp_path / "straight", 1)
    monkeypatch.setattr(kept_features, "compute_parts", compute)
    with pytest.raises(KeyboardInterrupt):
        keep_features(module, rows, tmp_path / "killed", 1)
    assert int((tmp_path / "killed/features/progress").read_text()) >= 300
    with (tmp_path / "killed/features/features.bin").open("ab") as file:
        file.write(b"torn")
    keep_features(module, rows, tmp_path / "killed", 1)
    for name in ("features.bin", "teacher.bin"):
        a, b = ((tmp_path / folder / "features" / name).read_bytes() for folder in ("killed", "straight"))
        assert a == b
    made = len(calls)
    keep_features(module, rows, tmp_path / "killed", 1)
    assert len(calls) == made  # a complete store is used as it is
    (tmp_path / "killed/features/teacher.bin").write_bytes(b"")
    keep_features(module, rows, tmp_path / "killed", 1)
    assert len(calls) > made  # a store without its numbers is not


@pytest.mark.parametrize("stale", ["weights", "documents", "dtype", "draft vocabulary"])
def test_what_is_stale_is_computed_again(store: TokenStore, tmp_path: Path, stale: str) -> None:
    keep_features(module_for(store), dataset(store), tmp_path, 1)
    key = (tmp_path / "features/key").read_text()
    keep_features(module_for(store), dataset(store), tmp_path, 1)
    assert (tmp_path / "features/key").read_text() == key
    module, rows = module_for(store, feature_dtype="bfloat16" if stale == "dtype" else "float32"), dataset(store)
    if stale == "weights":
        with torch.no_grad():
            module.target.model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    elif stale == "documents":
        rows = PackedDataset(store, range(2, 30), SMALL["seq_len"], seed=3, epochs=2)
    elif stale == "draft vocabulary":
        module = module_for(store, draft_vocab=41)
    keep_features(module, rows, tmp_path, 1)
    assert (tmp_path / "features/key").read_text() != key


def test_when_nothing_is_kept(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, once = dataset(store), PackedDataset(store, range(1, 29), SMALL["seq_len"])
    assert not keep_features(module_for(store, features="recompute"), rows, tmp_path, 1)
    assert not keep_features(module_for(store, recipe="joint"), rows, tmp_path, 1)
    assert not keep_features(module_for(store), rows, tmp_path, 2)
    assert not keep_features(module_for(store), once, tmp_path, 1)
    assert not capsys.readouterr().err
    assert keep_features(module_for(store, features="keep"), once, tmp_path, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "features").glob("*.bin"))
    line = f"{once.tokens:,} tokens x {size // once.tokens:,} bytes = {size / 1e9:.3g} GB"
    assert line in capsys.readouterr().err
    monkeypatch.setattr(kept_features, "FREE_SHARE", 0.0)
    keep_features(module_for(store), rows, tmp_path, 1)  # what is there is used
    kept_features.remove_features(tmp_path)
    assert not keep_features(module_for(store), rows, tmp_path, 1)


def test_the_command_keeps_them_until_it_is_done(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"A {n}?", "answer": "She went home."}) + "\n" for n in range(12)))
    command = ["--model", str(folders["model"]), "--data", str(data), "--kind", "recurrent", "--depth", "3"]
    command += ["--seq-len", "48", "--batch-size", "2", "--no-tensorboard", "--epochs", "3"]
    assert finetune.main([*command, "--output", str(tmp_path / "heads")]) == 0
    assert "the target reads the text once" in capsys.readouterr().err
    assert not (tmp_path / "heads/run/features").exists()
    for more in (["--shard"], ["--recipe", "joint"]):
        assert finetune.main([*command, "--output", str(tmp_path / "x"), "--features", "keep", *more]) == 2
        assert "--features must be auto or recompute" in capsys.readouterr().err
