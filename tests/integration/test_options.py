"""Options of a training run: file and command line, their types, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from medhead.errors import MedheadError
from medhead_training import finetune
from medhead_training.trainer.options import TrainOptions, read_options

NEEDED = ["--model", "m", "--data", "a.jsonl", "--output", "o"]


def read(*arguments: str) -> TrainOptions:
    return read_options(finetune.parser().parse_args([*NEEDED, *arguments]))


def from_yaml(path: Path, text: str, *arguments: str) -> TrainOptions:
    path.write_text(text)
    return read_options(finetune.parser().parse_args(["--config", str(path), *arguments]))


def test_what_is_not_given_has_its_default() -> None:
    assert read() == TrainOptions(model="m", data=["a.jsonl"], output="o")
    assert read().data is not TrainOptions().data
    assert vars(finetune.parser().parse_args([])) == {"config": None}


def test_the_command_line_beats_the_file(tmp_path: Path) -> None:
    text = """
        model: m
        data: [a.jsonl, b.jsonl]
        output: o
        lr: 2e-4           # YAML 1.1 takes this for text
        adamw-lr: 1
        feature_layers: [0, 3]
        blocks: null
        causal: false
        eval_data: held.jsonl
    """
    options = from_yaml(tmp_path / "run.yaml", text, "--output", "other", "--causal", "--data", "c.jsonl")
    assert (options.model, options.output, options.data) == ("m", "other", ["c.jsonl"])
    assert (options.lr, options.adamw_lr, options.feature_layers, options.blocks) == (2e-4, 1.0, [0, 3], None)
    assert options.causal is True
    assert options.eval_data == ["held.jsonl"]
    assert options.epochs == TrainOptions().epochs


def test_every_option_is_on_the_command_line_and_in_the_file(tmp_path: Path) -> None:
    import yaml

    given = read("--no-causal", "--feature-layers", "1", "2", "--lr", "0.5", "--correction", "parent", "--blocks", "3")
    assert from_yaml(tmp_path / "all.yaml", yaml.safe_dump(asdict(given))) == given
    text = " ".join(finetune.parser().format_help().split())
    assert all(f"--{entry.name.replace('_', '-')}" in text for entry in fields(TrainOptions))
    assert "(default: 0.9)" in text


WRONG_FILES = {
    "unknown": ("depht: 3", "unknown option 'depht'"),
    "a text for a number": ("depth: three", "depth must be int, got 'three'"),
    "a number for a text": ("kind: 3", "kind must be str, got 3"),
    "a fraction for a whole number": ("epochs: 1.5", "epochs must be int, got 1.5"),
    "a truth for a number": ("epochs: true", "epochs must be int, got True"),
    "a number for a truth": ("causal: 1", "causal must be bool, got 1"),
    "nothing where something must be": ("depth_decay: null", "depth_decay must be float, got None"),
    "a list with a wrong part": ("feature_layers: [1, x]", r"feature_layers must be list\[int\], got \[1, 'x'\]"),
    "a list for one": ("model: [a, b]", r"model must be str, got \['a', 'b'\]"),
    "no mapping": ("- depth", "must hold option names and values, got a list"),
    "no YAML": ("a: [", "is not YAML"),
    "not one of the choices": (
        "model: m\ndata: d\noutput: o\noptimizer: sgd",
        "--optimizer must be one of muon, adamw",
    ),
    "an unknown recipe": ("model: m\ndata: d\noutput: o\nrecipe: lora", "--recipe must be one of heads, joint, qlora"),
    "an unknown type": ("model: m\ndata: d\noutput: o\nsave_dtype: fp8", "--save-dtype must be one of float32"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files(tmp_path: Path, name: str) -> None:
    text, message = WRONG_FILES[name]
    with pytest.raises(MedheadError, match=message) as error:
        from_yaml(tmp_path / "run.yaml", text)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MedheadError, match="cannot be read: No such file"):
        read("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(MedheadError, match="cannot be read"):
        read("--config", str(tmp_path / "latin.yaml"))


WRONG_NUMBERS: list[tuple[list[str], str]] = [
    (["--depth", "0"], "--depth must be at least 1, got 0"),
    (["--batch-size", "-2"], "--batch-size must be at least 1"),
    (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps must be at least 1"),
    (["--inner-size", "0"], "--inner-size must be at least 1"),
    (["--blocks", "0"], "--blocks must be at least 1"),
    (["--save-steps", "0"], "--save-steps must be at least 1"),
    (["--eval-steps", "-1"], "--eval-steps must be at least 0"),
    (["--max-steps", "-1"], "--max-steps must be at least 0"),
    (["--held-out", "1"], "--held-out must be from 0 to below 1"),
    (["--warmup-ratio", "1.5"], "--warmup-ratio must be from 0 to below 1"),
    (["--lora-start-ratio", "1"], "--lora-start-ratio must be from 0 to below 1"),
    (["--lora-rank", "0"], "--lora-rank must be at least 1"),
    (["--preservation-weight", "-1"], "--preservation-weight must be at least 0"),
    (["--depth-decay", "nan"], "--depth-decay must be above 0 and at most 1, got nan"),
    (["--anchor-fraction", "0"], "--anchor-fraction must be above 0 and at most 1"),
    (["--lr", "0"], "--lr must be above 0"),
    (["--lr", "nan"], "--lr must be above 0"),
    (["--adamw-lr", "inf"], "--adamw-lr must be above 0"),
    (["--max-grad-norm", "0"], "--max-grad-norm must be above 0"),
    (["--seed", "-1"], "--seed must be from 0"),
    (["--seed", str(2**31)], "--seed must be from 0"),
    (["--draft-vocab", "-2"], "--draft-vocab must be -1, 0 or a number of tokens"),
    (["--depth", "8", "--seq-len", "9"], "--seq-len must be at least 10, 2 more than --depth, got 9"),
    (["--kind", "medussa"], "--kind must be one of attention, block, medusa, recurrent, sequential, got 'medussa'"),
    (["--loss", "mse"], "--loss must be one of hard, soft, kl, .*, got 'mse'"),
    (["--output", ""], "--output is missing"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG_NUMBERS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_numbers(arguments: list[str], message: str) -> None:
    with pytest.raises(MedheadError, match=message):
        read(*arguments)


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_what_must_be_given(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}
    arguments = [part for name, value in given.items() if name != missing for part in (f"--{name}", value)]
    assert finetune.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"medhead finetune: error: --{missing} is missing: give it on the command line or in the --config file\n"
    )


@pytest.mark.parametrize("arguments", [["--depth", "x"], ["--recipe", "lora"], ["--dtype", "fp8"], ["--nonsense"]])
def test_wrong_types_on_the_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        finetune.main([*NEEDED, *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
