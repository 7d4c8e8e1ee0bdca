"""Operators of PyTorch written in C++, compiled on the user's machine when they are first used.

The libraries are kept in `$TORCH_EXTENSIONS_DIR`, or `torch_extensions` in the user's cache folder, as PyTorch keeps those of
others. That folder may be deleted at any time. A C++ compiler with OpenMP (g++ or clang++) is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from medhead_kernels.bench_report import cpu_name

_COMPILE = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-march=native", "-ffp-contract=off", "-w", "-c")
_SECONDS = 600  # after which a compiler is stopped


@cache
def unavailable(name: str) -> str | None:
    """Load the operators of `NAME.cpp` of this package into `torch.ops`; they are compiled first, where they never were.

    Returns None, or one line that says why they cannot be loaded.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        library = library_of(source)
        if not library.exists():
            _compile(source, library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"{source.name} cannot be compiled ({' '.join(str(error).split())[:200]})"
    return None


def library_of(source: Path) -> Path:
    """Return where the library of a file is kept for these versions, this processor and these options."""
    identity = source.read_bytes(), torch.__version__, cpu_name(), torch.backends.cpu.get_cpu_capability(), _COMPILE
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
    return folder / "medhead" / f"{source.stem}-{digest}.so"


def _compile(source: Path, library: Path) -> None:
    program = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)
    if program is None:
        raise OSError("there is no C++ compiler: install g++ or clang++")
    print(
        f"medhead: compiling {source.name} with {Path(program).name} (once, about 20 seconds)",
        file=sys.stderr,
        flush=True,
    )
    torch_folder = Path(torch.__path__[0])
    include = [f"-I{torch_folder / part}" for part in ("include", "include/torch/csrc/api/include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "compiled.o", Path(scratch) / library.name
        _run([program, *_COMPILE, abi, *include, str(source), "-o", str(compiled)])
        # without -fopenmp: OpenMP is that of libtorch, because a second one would have threads of its own
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([program, "-shared", str(compiled), "-o", str(linked), *libraries])
        linked.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [
            f"{command[0]} ended with exit code {done.returncode}"
        ]
        raise OSError(lines[0])
