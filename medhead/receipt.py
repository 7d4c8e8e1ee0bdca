"""A receipt of one text: what was asked, on what, and what came out, so that others can decode it again.

A receipt proves nothing by itself. `medhead verify` decodes the prompt plainly, one token a pass, with the same options, and
says whether the text is reproduced; with `exact` it is on the same processor, versions and number of threads.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from medhead.errors import MedheadError
from medhead.model.fingerprint import parts, sample
from medhead.proposers.base import VerifyOutput
from medhead_kernels.bench_report import cpu_name

FORM = 1
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve",
)  # fmt: skip
_KEYS = {"receipt", "options", "seed", "environment", "weights_sha256", "prompt_ids", "output_ids", "passes"}


class PassRecorder:
    """Records the passes of one sequence; call it with the result of each.

    Attributes:
        passes: of every pass the nodes of its tree, the tokens that it accepted, and the smallest gap between the two largest
            logits on the accepted path, before sampling.
    """

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []

    def __call__(self, output: VerifyOutput) -> None:
        """Take the result of a pass over one row."""
        tokens = output.counts[0]
        best = output.logits[0, output.accepted.path[0, :tokens]].float().topk(2).values
        gap = float(f"{float((best[:, 0] - best[:, 1]).min()):.6g}")
        self.passes.append({"nodes": output.tree.nodes, "tokens": tokens, "smallest_gap": gap})


def environment() -> dict[str, Any]:
    """Return what the last bit of a text may depend on besides the weights: versions, processor, threads."""
    from medhead import __version__

    return {
        "medhead": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in _FEATURES if name in _cpu_flags()],
        "threads": torch.get_num_threads(),
    }


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names, types and shapes of all weights, as a header holds them, and of 64 values of each."""
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    header = [[name, str(weight.dtype), list(weight.shape)] for name, weight in named]
    digest = hashlib.sha256(json.dumps(header).encode())
    digest.update(sample([part.detach().cpu() for _, weight in named for part in parts(weight)]))
    return digest.hexdigest()


def write_receipt(
    path: str | Path,
    model: nn.Module,
    options: dict[str, Any],
    seed: int,
    prompt_ids: list[int],
    output_ids: list[int],
    passes: list[dict[str, Any]],
) -> None:
    """Write a receipt as JSON.

    Args:
        path: of the file.
        model: whose weights are hashed.
        options: those of `medhead generate` that change the text.
        seed: of the sampling noise.
        prompt_ids: token ids of the prompt.
        output_ids: token ids of the answer.
        passes: see `PassRecorder`.

    Raises:
        MedheadError: the file cannot be written.
    """
    content = {
        "receipt": FORM, "options": options, "seed": seed, "environment": environment(), "weights_sha256": weights_hash(model),
        "prompt_ids": prompt_ids, "output_ids": output_ids, "passes": passes,
    }  # fmt: skip
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise MedheadError(f"the receipt {str(path)!r} cannot be written: {error.strerror or error}") from None


def read_receipt(path: str | Path) -> dict[str, Any]:
    """Return the content of a receipt.

    Raises:
        MedheadError: the file cannot be read, or is no receipt of this form.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MedheadError(f"the receipt {str(path)!r} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise MedheadError(f"{str(path)!r} is no receipt: it is not JSON") from None
    if not isinstance(found, dict) or not found.keys() >= _KEYS or found["receipt"] != FORM:
        raise MedheadError(f"{str(path)!r} is no receipt of form {FORM}, as medhead generate --receipt writes it")
    return found


def other_environment(receipt: dict[str, Any]) -> list[str]:
    """Return a line for every part of the environment that is another one here."""
    here, there = environment(), receipt["environment"]
    return [
        f"{name} is {here[name]} here and {there.get(name)} in the receipt"
        for name in here
        if here[name] != there.get(name)
    ]


def first_difference(receipt: dict[str, Any], output_ids: list[int]) -> str | None:
    """Return where a text differs from that of a receipt and how small the logit gap was there; None where it does not."""
    expected = receipt["output_ids"]
    if expected == output_ids:
        return None
    place = next((at for at, pair in enumerate(zip(expected, output_ids, strict=False)) if len(set(pair)) > 1), None)
    place = min(len(expected), len(output_ids)) if place is None else place
    ours, theirs = (ids[place] if place < len(ids) else "the end" for ids in (output_ids, expected))
    emitted = 0
    for one in receipt["passes"]:
        emitted += one["tokens"]
        if emitted > place:
            gap = f"; smallest logit gap of that pass: {one['smallest_gap']}"
            break
    else:
        gap = ""
    return f"new token {place} is {ours} here and {theirs} in the receipt{gap}"
