from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medhead_kernels import bench
from medhead_kernels.attn_metadata import TreeMetadata

SMALL = [
    "--device",
    "cpu",
    "--contexts",
    "40",
    "--nodes",
    "1",
    "70",
    "--groups",
    "2",
    "--batches",
    "2",
    "--kv-heads",
    "1",
]
QUICK = [*SMALL, "--dim", "16", "--seconds", "0.001", "--threads", "1"]


def test_it_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*QUICK, "--backends", "sdpa", "flash", "reference", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "| 40 | 70 | 2 | 2 | flash |" in shown.out
    assert "the numbers say nothing about a GPU" in shown.err
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["name"] for row in content["results"]} == {"sdpa", "flash", "reference"}
    assert all(
        row["microseconds"] > 0 and row["x_sdpa"] > 0 and row["gb_per_second"] >= 0 for row in content["results"]
    )
    assert content["machine"]["copy_gb_per_second"] > 0
    assert (tmp_path / "out" / "bandwidth.png").stat().st_size > 1000
    assert shown.out.strip() in (tmp_path / "out" / "table.md").read_text()


def test_who_cannot_take_part_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medhead_kernels.backends.triton_is_interpreted", lambda: False)
    assert bench.main([*QUICK, "--backends", "sdpa", "triton"]) == 0
    assert "not run: triton (" in capsys.readouterr().out


def test_all_backends_compute_the_same() -> None:
    tensors = bench.random_inputs(bench.AttnShape(37, 70, 2, 2, 1, 16, "float32"), "cpu")
    calls = [call for _, call, _ in bench.timed_calls(["sdpa", "flash", "reference"], *tensors) if call is not None]
    first, *others = (call() for call in calls)
    for other in others:
        torch.testing.assert_close(first, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_flex_attention_computes_the_same(group: int) -> None:
    """Ragged rows; plain, not compiled, which takes minutes on a CPU."""
    from medhead_kernels import flex, reference

    query, key, value, tree = bench.random_inputs(bench.AttnShape(40, 7, group, 3, 2, 16, "float32"), "cpu")
    lengths = (40, 3, 17)
    tree = TreeMetadata(torch.tensor(lengths, dtype=torch.int32), lengths, tree.ancestor_bitmask, tree.depth)
    expected = reference.attention(query, key, value, tree.bias(key.shape[2], None, torch.float32), 0.25)
    torch.testing.assert_close(flex.prepare(query, key, value, tree, 0.25, compiled=False)(), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--contexts", "0"], "--contexts must be at least 1, got 0"),
        (["--kv-heads", "0"], "--kv-heads must be at least 1"),
        (["--max-gib", "0.0000001"], "larger than --max-gib"),
        (["--device", "tpu"], "--device must be auto, cuda or cpu"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*QUICK, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda"]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
