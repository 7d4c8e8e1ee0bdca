"""Compiled passes in the user's cache folder: machine code that later processes load instead of tracing and compiling.

An entry holds no weights. It is given those of the model when it is loaded, and reads them in place.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from medhead.errors import one_line
from medhead.user_cache import build_folder, cache_folder

_CODE, _ABOUT = "pass.pt2", "about.json"
_OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # the code must not depend on the values of weights
    "joint_graph_constant_folding": False,
}

Pass = Callable[..., tuple[Tensor, Tensor]]


def kept_folder() -> Path:
    """Return the folder of all entries. It may be deleted at any time."""
    return cache_folder() / "compiled"


def names() -> str:
    """Return the names of all entries, empty where there is none."""
    try:
        return " ".join(sorted(folder.name for folder in kept_folder().iterdir() if not folder.name.startswith(".")))
    except OSError:
        return ""


def load(name: str, tensors: Mapping[str, Tensor], ordinary: Pass) -> Pass | None:
    """Return the pass of an entry, or None where there is none or it is damaged; a damaged one is deleted.

    Args:
        name: of the entry.
        tensors: the weights by name.
        ordinary: called instead for sizes that the machine code does not serve.
    """
    folder = kept_folder() / name
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if hashlib.sha256((folder / _CODE).read_bytes()).hexdigest() != about["sha256"]:
            raise ValueError("its checksum is wrong")
        compiled = torch._inductor.aoti_load_package(str(folder / _CODE))
        weights = {constant: tensors[weight] for constant, weight in about["weights"].items()}
        compiled.load_constants(weights, check_full_update=True, user_managed=True)
        # an expression of PyTorch's; who can write it here can write the machine code beside it, too
        serves = eval(f"lambda {', '.join(about['sizes'])}: {about['condition']}", {"math": math})
        places = list(about["sizes"].values())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever the loader raises
        warnings.warn(
            f"the compiled pass {folder} cannot be loaded ({one_line(error, 120)}), so it is deleted", stacklevel=2
        )
        discard(name)
        return None

    def run(*given: Tensor, weights: dict[str, Tensor] = weights) -> tuple[Tensor, Tensor]:
        # `weights` stay alive with this function, because the machine code has pointers to them
        if not serves(*[given[part].shape[dimension] for part, dimension in places]):
            return ordinary(*given)
        logits, features = compiled.loader.boxed_run(list(given))
        return logits, features

    return run


def discard(name: str) -> None:
    """Delete an entry."""
    shutil.rmtree(kept_folder() / name, ignore_errors=True)


def build(name: str, tensors: Mapping[str, Tensor], graph: GraphModule) -> None:
    """Compile a traced pass and keep it as an entry; of several processes that do this at once, the first one's is kept.

    A pass that reads other tensors than these, as plain ones, is not kept. This warns where an entry cannot be
    made.

    Args:
        name: of the entry.
        tensors: weights and buffers of the model that was traced, and packed copies, by name.
        graph: its pass, traced with open sizes.
    """
    plain = {weight: part for weight, part in tensors.items() if type(part) in (Tensor, nn.Parameter)}
    names = {id(tensor): weight for weight, tensor in plain.items()}
    constants = [*graph.named_parameters(), *graph.named_buffers()]
    weights = {constant: names.get(id(tensor)) for constant, tensor in constants}
    if None in weights.values():
        return
    try:
        build_folder(kept_folder() / name, lambda folder: _fill(folder, graph, weights))
    except Exception as error:  # of the file system, or an operation that AOTInductor does not know
        where = f"compiled passes cannot be kept in {kept_folder()}"
        warnings.warn(f"{where} ({one_line(error, 120)}); they last for this process", stacklevel=2)


def _fill(folder: Path, graph: GraphModule, weights: dict[str, Any]) -> None:
    from torch._inductor.package import package_aoti

    examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.inference_mode(False), torch.no_grad():
        files: Any = torch._inductor.aot_compile(graph, tuple(examples), options=_OPTIONS)
    package_aoti(str(folder / _CODE), files)
    sizes, condition = _condition(examples)
    digest = hashlib.sha256((folder / _CODE).read_bytes()).hexdigest()
    about = {"sha256": digest, "weights": weights, "sizes": sizes, "condition": condition}
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _condition(examples: list[Any]) -> tuple[dict[str, tuple[int, int]], str]:
    """Return where the open sizes are, as `name: (argument, dimension)`, and the condition on them that was compiled for."""
    places: dict[str, tuple[int, int]] = {}
    symbols: dict[str, Any] = {}
    for part, example in enumerate(examples):
        for dimension, size in enumerate(example.shape):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                symbols.setdefault(str(size), size)
                places.setdefault(str(size), (part, dimension))
    ordered = list(symbols.values())
    found = ordered[0].node.shape_env.produce_guards_expression(ordered) or "True" if ordered else "True"
    for index, name in enumerate(symbols):
        found = found.replace(f"L['t{index}']", name)
    return places, found
