"""Receipts of `medhead generate`, and `medhead verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medhead.cli import generate, verify


def run(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def receipt(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The receipt of a sampled text of the tiny model in bfloat16."""
    file = tmp_path / "receipt.json"
    options = "--raw --prompt Once --max-new-tokens 20 --temperature 0.9 --seed 3 --proposer recycling --dtype bfloat16"
    given = ["--model", str(folders["model"]), *options.split(), "--exact", "bitwise", "--receipt", str(file)]
    code, _, err = run(generate.main, given, capsys)
    assert code == 0, err
    return file


def change(file: Path, **fields: Any) -> None:
    """Replace fields of a receipt."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_receipt_holds_what_the_text_depends_on(receipt: Path, folders: dict[str, Path]) -> None:
    found = json.loads(receipt.read_text())
    assert found["seed"] == 3
    assert found["options"]["model"] == str(folders["model"])
    assert found["options"]["exact"] == "bitwise"
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert sum(one["tokens"] for one in found["passes"]) >= len(found["output_ids"]) > 0
    assert found["passes"][0]["nodes"] == 1  # the prompt's own pass
    assert max(one["nodes"] for one in found["passes"]) > 1
    assert all(one["smallest_gap"] >= 0 for one in found["passes"])


def test_plain_decoding_reproduces_the_text(receipt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(json.loads(receipt.read_text())["output_ids"])
    code, out, _ = run(verify.main, [str(receipt)], capsys)
    assert (code, out) == (0, f"reproduced: plain decoding gives the same {count} tokens\n")


def test_a_changed_text_is_found(receipt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(receipt.read_text())
    changed, gap = list(found["output_ids"]), found["passes"][0]["smallest_gap"]
    changed[0] += 1
    change(receipt, output_ids=changed)
    code, out, _ = run(verify.main, [str(receipt)], capsys)
    first = f"new token 0 is {changed[0] - 1} here and {changed[0]} in the receipt"
    assert (code, out) == (1, f"not reproduced: {first}; smallest logit gap of that pass: {gap}\n")
    change(receipt, output_ids=found["output_ids"][:-1])
    assert "in the receipt" in run(verify.main, [str(receipt)], capsys)[1]


def test_another_environment_is_said(receipt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(receipt.read_text())
    change(receipt, environment=found["environment"] | {"torch": "1.0"})
    code, _, err = run(verify.main, [str(receipt)], capsys)
    assert code == 0
    assert f"torch is {torch.__version__} here and 1.0 in the receipt" in err


def test_other_weights_are_refused(receipt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(receipt, weights_sha256="0" * 64)
    code, _, err = run(verify.main, [str(receipt)], capsys)
    assert code == 2
    assert "are not those of the receipt" in err


@pytest.mark.parametrize("content", ["no json", "[]", '{"receipt": 9}'])
def test_what_is_no_receipt(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    code, _, err = run(verify.main, [str(file)], capsys)
    assert code == 2
    assert "is no receipt" in err
    assert run(verify.main, [str(tmp_path / "nowhere.json")], capsys)[0] == 2


@pytest.mark.parametrize("more", [["--regex", "a+"], ["--step", "compiled"]])
def test_what_a_receipt_does_not_hold(tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(generate.main, ["--prompt", "x", "--receipt", str(tmp_path / "r.json"), *more], capsys)
    assert code == 2
    assert f"--receipt does not go with {more[0]}" in err
