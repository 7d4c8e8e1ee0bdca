"""Types are checked across the packages: a wrong call from medhead into medhead_kernels is reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = """\
from medhead_kernels.sdpa import attention
from torch import zeros

attention(zeros(1), zeros(1), zeros(1), None, "scale")
attention(zeros(1), zeros(1), zeros(1), None, 1.0)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed: pip install 'medhead[test]'")
def test_a_wrong_call_into_the_kernels_is_reported(tmp_path: Path) -> None:
    """In a copy of the four packages, with the checkout's configuration."""
    for name in ("medhead", "kernels", "training", "app"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "medhead" / "planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "-m", "medhead.planted"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith("medhead/planted.py:4: error: ")
    assert '"attention" has incompatible type "str"; expected "float"' in line
