"""The demo recipe on a handful of sentences: every stage runs, is skipped when done, and resumes when killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from medhead.training.demo import __main__ as recipe
from medhead.training.demo import corpus, pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer

from medhead import Decoder
from medhead.heads.config import read_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    animals = ["dog", "cat", "bird", "fish", "horse", "mouse"]
    story = "Once upon a time there was a {0}. The {0} liked to play. One day the {0} found a ball and was happy."
    turns = [
        ("user", "I want a table for {0} people."),
        ("assistant", "Which day?"),
        ("user", "Day {0}."),
        ("assistant", "It is booked."),
    ]
    records = {
        "tinystories": [{"text": story.format(animal)} for animal in animals * 20],
        "sgd": [{"messages": [{"role": r, "content": t.format(n)} for r, t in turns]} for n in range(60)],
        "stories_chat": [{"prompt": f"A story about a {a}.", "answer": story.format(a)} for a in animals * 10],
        "general_chat": [
            {"prompt": f"What is a {a}?", "answer": f"A {a} is an animal that lives here."} for a in animals * 10
        ],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.slow
def test_the_whole_recipe(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--data", str(data), "--eval", str(data), "--output", str(out), "--minutes", "0.08", "--answers", "64"]
    options += ["--heads", "block", "medusa-parent", "--heads-steps", "2", "--tree", "8", "3"]
    options += ["--hidden", "128", "--layers", "2", "--vocab-size", "320"]
    assert recipe.main(options) == 0, capsys.readouterr().err
    card = (out / "model" / "README.md").read_text()
    assert "Built with Llama" in card
    assert card.count("\n> ") >= 5
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "A story."}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids["input_ids"]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    for kind in ("block", "medusa-parent"):
        config = read_config(out / "heads" / kind)
        assert (config.tree_size, config.tree_depth) == (8, 3)
        assert len(config.accuracies) == config.depth
        written = [
            (out / "heads" / kind / name).read_text() for name in ("README.md", "adapter_config.json", "training.json")
        ]
        assert "Built with Llama" in written[0]
        assert "license: cc-by-sa-4.0" in written[0]
        assert not any(str(tmp_path) in text for text in written)  # no folder of this machine
        with Decoder(model, heads=out / "heads" / kind) as decoder:
            assert torch.equal(decoder.generate(ids, max_new_tokens=20, do_sample=False), expected)
    weights = (out / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert recipe.main(options) == 0  # everything is there: nothing is trained again
    assert capsys.readouterr().err.count(": done") == 4
    assert (out / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(folder: str) -> list[str]:
        small = ["--hidden", "128", "--layers", "1", "--vocab-size", "320", "--tokens-per-step", "1024", "--steps", "6"]
        return ["--data", str(data), "--output", str(tmp_path / folder), "--save-minutes", "0", *small]

    assert pretrain.main(options("straight")) == 0
    real, calls = pretrain.batch_at, []

    def killed_at_the_fourth(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "batch_at", killed_at_the_fourth)
    assert pretrain.main(options("killed")) == 130
    assert pretrain.main(options("killed")) == 0
    assert len(calls) == 4 + 3  # three steps were kept
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / f / "model") for f in ("straight", "killed"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, msg=name)


def test_wrong_input(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert recipe.main(["--data", str(tmp_path / "empty"), "--output", str(tmp_path / "o")]) == 2
    assert "tinystories.jsonl does not exist" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{broken\n')
    with pytest.raises(corpus.MedheadError, match=r"bad.jsonl, line 2 is not JSON"):
        list(corpus.read_jsonl(bad))
