"""Compiled functions in the user's cache folder, as AOTInductor packages that later processes load instead of compiling.

A package is named by a hash of everything that its machine code and its packed weights depend on, so the package of another
model, version, option or processor is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from medhead.errors import one_line
from medhead.user_cache import build_folder, cache_folder
from medhead_kernels.bench_report import cpu_name

# Inductor packs the weights once, and its own GEMMs of few rows read the packed copy; BLAS repacks the weights on every
# call, which takes longer than the products of a tree's pass (`benchmarks/compiled-cpu`).
CONFIG: dict[str, Any] = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}
_FILE, _REFUSED = "function.pt2", "refused.txt"
_MAX_UNUSED_DAYS = 30  # a package that no process has loaded for longer is deleted

Function = Callable[..., tuple[Tensor, ...]]


def package_folder() -> Path:
    """Return the folder of all packages. It may be deleted at any time."""
    return cache_folder() / "compiled"


def load(key: str) -> Function | None:
    """Return the compiled function of a package, or None where there is none or it is damaged."""
    file = package_folder() / key / _FILE
    try:
        size = int((file.parent / "size").read_text())
        if file.stat().st_size != size:
            raise RuntimeError(f"it has {file.stat().st_size:,} bytes instead of {size:,}")
        loader = torch._inductor.aoti_load_package(str(file)).loader
        os.utime(file.parent)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever the loader throws
        warnings.warn(
            f"the compiled step {file} cannot be loaded ({one_line(error, 120)}); compiling again", stacklevel=2
        )
        discard(key)
        return None

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(loader.boxed_run(list(given)))

    return run


def is_refused(key: str) -> bool:
    """Return whether AOTInductor failed to make this package before."""
    return (package_folder() / key / _REFUSED).exists()


def discard(key: str) -> None:
    """Delete a package."""
    shutil.rmtree(package_folder() / key, ignore_errors=True)


def lacks_gemm(error: Exception) -> bool:
    """Return whether Inductor has no C++ GEMM template for a dtype."""
    return "NoValidChoices" in str(error)


def build(key: str, graph: GraphModule) -> Function | None:
    """Compile a traced function of CPU tensors, keep its package and return it; None where that is not possible.

    Several processes may do this at once: each package is made in a folder of its own, which is then renamed.

    Args:
        key: name of the package.
        graph: the function, with the tensors that it was traced with; it returns a tuple of tensors or nothing.
    """

    def fill(work: Path) -> None:
        try:
            _compile(graph, work / _FILE)
            (work / "size").write_text(str((work / _FILE).stat().st_size))
        except OSError:
            raise
        except Exception as error:  # an operation that AOTInductor does not know
            (work / _FILE).unlink(missing_ok=True)
            (work / _REFUSED).write_text(one_line(error, 500))

    try:
        _delete_unused()
        discard(key)  # parts of one
        build_folder(package_folder() / key, fill)
    except OSError as error:
        warnings.warn(f"compiled steps cannot be kept in {package_folder()}: {error}", stacklevel=2)
        return None
    return load(key)


def graph_key(graph: GraphModule, given: list[Tensor]) -> str:
    """Return the name of the package of a traced function: a hash of its operations, constants and arguments, and `setting`."""
    code = [module.code for module in graph.modules() if isinstance(module, GraphModule)]
    arguments = [(part.dtype, tuple(part.shape), part.stride()) for part in given]
    digest = tensor_digest([*graph.named_parameters(), *graph.named_buffers()])
    return hash_of("graph", code, arguments, digest, setting())


def setting() -> tuple[Any, ...]:
    """Return what machine code depends on besides the function: versions, processor, number of threads, options."""
    return (
        torch.__version__,
        torch.version.git_version,
        platform.platform(),
        cpu_name(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        sorted(CONFIG.items()),
    )


def tensor_digest(named: list[tuple[str, Tensor]]) -> str:
    """Return a hash of the names, layouts and values of CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.stride())).encode())
        if tensor.numel():
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of(*parts: Any) -> str:
    """Return a hash of the representations of some objects."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def _compile(graph: GraphModule, file: Path) -> None:
    """Write the package of a function to a file."""
    from torch._inductor.package import package_aoti

    examples = tuple(node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder")
    options = {"aot_inductor.package": True}
    with torch.inference_mode(False), torch.no_grad():
        try:
            files = torch._inductor.aot_compile(graph, examples, options={**CONFIG, **options})
        except Exception as error:
            if not lacks_gemm(error):
                raise
            files = torch._inductor.aot_compile(graph, examples, options=options)
    package_aoti(str(file), files)


def _delete_unused() -> None:
    """Delete packages, and what processes that were killed left, that nothing has used for a long time."""
    oldest = time.time() - _MAX_UNUSED_DAYS * 86_400
    for folder in package_folder().glob("*"):
        if folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
