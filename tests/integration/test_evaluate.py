"""The evaluation program: real decoding by proposer, tree and temperature."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import noise_heads
from medhead import Decoder
from medhead.bench.prompts import read_prompts
from medhead.heads import load_heads
from medhead.model import named_models
from medhead.model.loading import load_tokenizer
from medhead.model.named_models import DEMO, NAMED_MODELS, NamedModel
from medhead.model.target import Target
from medhead_training.evaluate import main, static_shape

QUICK = ["--num-prompts", "3", "--max-new-tokens", "12", "--dtype", "float32"]


def results(folder: Path) -> list[dict[str, Any]]:
    """Rows of a finished evaluation."""
    return json.loads((folder / "results.json").read_text())["results"]


def test_a_whole_run(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = [str(folders["recurrent"]), str(folders["medusa"])]
    options = [
        "--model",
        str(folders["model"]),
        "--heads",
        *heads,
        "--tree-sizes",
        "4",
        "9",
        "--output",
        str(tmp_path / "new"),
    ]
    assert main([*options, *QUICK, "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    rows = results(tmp_path / "new")
    per_temperature = 1 + 2 + 2 + 2 * 2  # none, ngram, recycling, and two heads at two sizes
    assert len(rows) == 2 * per_temperature
    assert [row["temperature"] for row in rows] == [0.0] * per_temperature + [1.0] * per_temperature
    assert [row["tree_size"] for row in rows[:per_temperature]] == [1, 4, 9, 4, 9, 4, 9, 4, 9]
    for row in rows:
        assert row["prompts"] == row["identical"] == 3
        assert row["accepted_length"] == pytest.approx(row["new_tokens"] / row["passes"], abs=1e-4)
        assert row["mean_over_prompts"] == pytest.approx(sum(row["accepted_length_by_prompt"]) / 3, abs=1e-3)
        assert row["forward_ms"] > 0
        assert row["propose_ms"] > 0
        assert (row["parameters"] > 0) == bool(row["kind"])
    assert rows[0]["accepted_length"] == 1
    assert out.count("3/3") == len(rows)
    assert "recurrent (recurrent)" in out
    assert (tmp_path / "new" / "table.md").read_text().strip() == out.strip()
    assert (tmp_path / "new" / "accepted_length.png").read_bytes().startswith(b"\x89PNG")


def test_the_numbers_are_those_of_a_decoder(folders: dict[str, Path], tmp_path: Path) -> None:
    options = [
        "--model",
        str(folders["model"]),
        "--heads",
        str(folders["recurrent"]),
        "--tree-sizes",
        "7",
        "--seed",
        "5",
    ]
    options += ["--max-depth", "2", "--width", "3", "--branching", "2"]
    options += ["--proposers", "--temperatures", "0.8", "--output", str(tmp_path)]
    assert main([*options, *QUICK]) == 0
    (row,) = results(tmp_path)
    target = Target(LlamaForCausalLM.from_pretrained(folders["model"]).eval())
    tree = {"tree_size": 7, "max_depth": 2, "width": 3, "branching": 2}
    decoder = Decoder(target, "heads", heads=load_heads(folders["recurrent"], target), **tree)
    tokenizer, lengths, passes = load_tokenizer(folders["model"]), [], 0
    for prompt in read_prompts(None, 3):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 5}
        decoder.generate(ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=12, **sampling)
        lengths.append(decoder.statistics.new_tokens)
        passes += decoder.statistics.passes
    assert row["new_tokens"] == sum(lengths)
    assert row["passes"] == passes


def test_static_trees(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = shutil.copytree(folders["recurrent"], tmp_path / "heads")
    fields = json.loads((heads / "medhead_config.json").read_text())
    options = [
        "--model",
        str(folders["model"]),
        "--heads",
        str(heads),
        "--tree-sizes",
        "4",
        "6",
        "--static",
        "--proposers",
    ]
    options += ["--temperatures", "0", "--output", str(tmp_path / "out"), *QUICK]
    assert main(options) == 0
    assert "no static tree of 4 nodes" in capsys.readouterr().err
    assert [row["static"] for row in results(tmp_path / "out")] == [False, False]
    fields |= {"trees": {"4": [[0], [1], [0, 2], [0, 2, 1]]}, "accuracies": [[0.5, 0.2], [0.4, 0.1]]}
    (heads / "medhead_config.json").write_text(json.dumps(fields))
    assert main(options) == 0
    rows = results(tmp_path / "out")
    assert [(row["static"], row["tree_size"]) for row in rows] == [(False, 4), (True, 5), (False, 6), (True, 6)]
    assert all(row["identical"] == 3 for row in rows)
    found = noise_heads(Target(LlamaForCausalLM.from_pretrained(folders["model"]).eval()))
    found.config.trees = fields["trees"]
    assert static_shape(found, 4, None) == fields["trees"]["4"]
    assert static_shape(found, 4, 2) == [[0], [1], [0, 2]]
    assert static_shape(found, 6, None) is None


def test_heads_that_adapt_the_target_have_a_text_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    from medhead.heads.adapter import save_adapter, wrap

    model = LlamaForCausalLM.from_pretrained(folders["model"]).eval()
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    wrapped, heads = wrap(model, noise_heads(Target(model, probe=False)), lora)
    save_adapter(wrapped, heads, tmp_path / "adapted")
    options = ["--model", str(folders["model"]), "--heads", str(folders["recurrent"]), str(tmp_path / "adapted")]
    options += [
        "--tree-sizes",
        "6",
        "8",
        "--proposers",
        "none",
        "--temperatures",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*options, *QUICK]) == 0
    rows = results(tmp_path / "out")
    assert [Path(row["name"]).name for row in rows] == ["none", "recurrent", "recurrent", "adapted", "adapted"]
    assert all(row["identical"] == 3 for row in rows)  # each target with its own
    assert rows[0]["forward_ms"] > 0


def test_demo_heads_that_do_not_load_are_left_out(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heads-empty").mkdir()
    shutil.copytree(folders["recurrent"], tmp_path / "heads")
    monkeypatch.setitem(NAMED_MODELS, DEMO, NamedModel(folders["model"], "heads"))
    monkeypatch.setattr(named_models, "ASSETS", tmp_path)
    assert main(["--tree-sizes", "4", "--proposers", "--temperatures", "0", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "left out" in err
    assert "heads-empty" in err
    assert "heads (recurrent)" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["--max-depth", "0"], "--max-depth must be at least 1"),
        (["--width", "0"], "--width must be at least 1"),
        (["--branching", "-1"], "--branching must be at least 1"),
        (["--tree-sizes", "1"], "--tree-sizes must be from 2 to 256"),
        (["--temperatures", "-1"], "--temperatures must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--prompts", "nowhere.jsonl"], "cannot be read"),
        (["--heads", "nowhere"], "does not exist"),
        (["--max-new-tokens", "160"], "leaves no room"),
        (["--proposers", "oracle"], "invalid choice"),
        (["--proposers"], "nothing to evaluate"),
        (["--max-depth", "9", "--heads", "RECURRENT"], "these heads predict 4 tokens ahead"),
        (["--output", __file__], "is a file"),
        (["--dtype", "float7"], "dtype must be"),
    ],
)
def test_wrong_input(
    folders: dict[str, Path], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(folders["recurrent"]) if option == "RECURRENT" else option for option in options]
    try:
        code = main(["--model", str(folders["model"]), "--max-new-tokens", "8", *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert says in err
    assert err.strip().count("\n") == 0
