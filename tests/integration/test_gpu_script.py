"""benchmarks/gpu.sh at tiny shapes on a CPU: every part runs and writes what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_here import needs_triton

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PARTS = ("env", "tests", "kernel", "step", "smollm2", "train", "prefill", "bitwise", "compiled")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script is run itself"),
    pytest.mark.skipif(os.name == "nt", reason="it needs bash"),
]


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "SMOLLM2": "", "SMOLLM2_HEADS": "", **environment}
    return subprocess.run(["bash", str(SCRIPT), str(out)], env=env, capture_output=True, text=True, timeout=900)


@needs_triton
def test_every_part_measures_something(tmp_path: Path) -> None:
    done = run(tmp_path, SHAPE="tiny", TRITON_INTERPRET="1", LIMIT="300")
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(PARTS)
    lines = {}
    for name in PARTS:
        text = (tmp_path / f"{name}.log").read_text()
        codes = ("0", "5") if name == "tests" else ("0",)  # without a GPU all are skipped, or none is collected
        assert any(f"== {name}: exit code {code}," in done.stdout for code in codes), text
        lines[name] = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    failed = [line for found in lines.values() for line in found if "error" in line]
    assert {line["what"] for line in failed} == {"cuDNN, prefix only"}, failed
    assert {"skipped": "SmolLM2: SMOLLM2 names no folder"} in lines["smollm2"]
    assert all(line["same_text"] is not False for line in lines["smollm2"] if "same_text" in line)
    assert all(lines[name] for name in PARTS if name != "tests")
    equal = [line for line in lines["bitwise"] if "texts" in line]
    assert len(equal) == 2
    assert all(line[name] == line["texts"] for line in equal for name in ("ngram", "recycling", "hybrid"))


def test_without_a_gpu_it_says_how_to_see_it_run(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "SHAPE=tiny" in done.stdout
