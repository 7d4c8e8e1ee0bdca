"""What a run does by itself: options chosen from the amount of text, and the best update kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medhead_training import finetune
from medhead_training.trainer.auto_options import (
    STEPS,
    TextFacts,
    choose,
    chosen_values,
    expectation,
    held_out_documents,
)
from medhead_training.trainer.best_update import BestUpdate
from medhead_training.trainer.options import TrainOptions

TEXTS = {
    "60 answers": TextFacts(60, 10_662, 2_482, 240),
    "long ones": TextFacts(60, 60_000, 30_000, 2_000),
    "2,000 answers": TextFacts(2_000, 350_000, 82_000, 500),
    "20,000 answers": TextFacts(20_000, 3_200_000, 1_800_000, 600),
    "a million": TextFacts(1_000_000, 200_000_000, 100_000_000, 4_000),
}


def options(**changes: Any) -> TrainOptions:
    return TrainOptions("m", ["d"], "o", **changes)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("processes", [1, 4])
def test_enough_updates(name: str, processes: int) -> None:
    text = TEXTS[name]
    chosen = choose(options(), text, 2048, processes)
    chosen.check()
    assert chosen.epochs is not None
    assert chosen.seq_len is not None
    assert chosen.batch_size is not None
    updates = text.tokens * chosen.epochs / (chosen.seq_len * chosen.batch_size * processes)
    assert updates >= 0.9 * STEPS or (chosen.batch_size == 1 and updates >= 0.9 * STEPS / 4)
    assert 1 <= chosen.batch_size <= 8
    assert chosen.seq_len >= min(text.longest, 1024)
    assert (chosen.learn_from, chosen.weight_decay) == (
        ("all", 0.1) if text.answer_tokens < 500_000 else ("answers", 0.01)
    )
    assert 1 <= held_out_documents(chosen, text.documents) <= min(256, max(text.documents // 10, 1))


def test_what_is_given_stays() -> None:
    given = {
        "kind": "medusa",
        "epochs": 7,
        "seq_len": 300,
        "batch_size": 5,
        "learn_from": "answers",
        "weight_decay": 0.0,
    }
    for text in TEXTS.values():
        chosen = choose(options(**given, eval_steps=3), text, 2048)
        assert chosen == options(**given, eval_steps=3)
        assert chosen_values(options(**given, eval_steps=3), chosen) == {}
        assert choose(options(loss="hard"), text, 2048).learn_from == "answers"
        assert choose(options(), text, 200).seq_len <= 200  # type: ignore[operator]
        assert choose(options(init_from="x"), text, 2048).kind is None
    assert [held_out_documents(options(held_out=share), 100) for share in (0.0, 0.3)] == [0, 30]
    assert held_out_documents(options(), 1) == 0


def test_more_text_is_expected_to_give_more() -> None:
    lengths = [float(expectation(text).split(" tokens per pass")[0].rsplit(" ", 1)[1]) for text in TEXTS.values()]
    assert lengths == sorted(lengths)


def test_the_best_update_is_kept(tmp_path: Path) -> None:
    best = BestUpdate(tmp_path)
    lengths = {10: 1.5, 20: 2.0, 30: 1.9, 40: 2.0, 50: 1.8}
    stops = [best.offer(step, n, lambda n=n: {"w": torch.tensor(n)}, 30, True) for step, n in lengths.items()]
    assert stops == [False, False, False, False, True]
    again = BestUpdate(tmp_path)  # as a resumed run finds it
    assert (again.step, again.length, again.stopped) == (20, 2.0, 50)
    weights = again.weights()
    assert weights is not None
    assert float(weights["w"]) == 2.0
    assert {path.name for path in tmp_path.iterdir()} == {"best.json", "best-20.safetensors"}
    assert not again.offer(20, 2.0, dict, 30, True)  # the same evaluation once more
    again.forget()
    assert not list(tmp_path.iterdir())
    assert again.weights() is None


def test_the_command_chooses_stops_and_keeps_the_best(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real, made = tmp_path / "data.jsonl", finetune.measure_accuracy, []

    def worse_and_worse(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        made.append(1)
        found.accepted_lengths["32"] = 3.0 - len(made) / 10
        return found

    monkeypatch.setattr(finetune, "measure_accuracy", worse_and_worse)
    data.write_text("".join(json.dumps({"prompt": f"A {n}?", "answer": "She went home."}) + "\n" for n in range(40)))
    command = ["--model", str(folders["model"]), "--data", str(data), "--depth", "3", "--no-tensorboard"]
    command += ["--output", str(tmp_path / "heads"), "--eval-steps", "2", "--patience", "3", "--epochs", "24"]
    assert finetune.main([*command, "--kind", "recurrent", "--seq-len", "48"]) == 0
    err = capsys.readouterr().err
    assert "chosen from the amount of text, each can be given: batch-size 1, learn-from all, weight-decay 0.1" in err
    assert "answer tokens expect at most" in err
    facts = json.loads((tmp_path / "heads/training.json").read_text())
    assert (facts["steps"], facts["kept_step"]) == (8, 2)
    assert facts["chosen"] == {"batch_size": 1, "learn_from": "all", "weight_decay": 0.1}
    card = (tmp_path / "heads/README.md").read_text()
    assert "| heads of step | 2, the best on held-out text |" in card
    assert "batch_size 1, learn_from all, weight_decay 0.1" in card
