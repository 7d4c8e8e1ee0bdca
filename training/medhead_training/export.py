"""Write heads for serving engines: `python -m medhead_training.export`.

The layouts are those of `medhead.heads.formats`; what is written computes exactly what the heads compute, and heads that a
layout cannot express are refused. Heads for an engine are trained accordingly: `--correction none` in all layouts,
`--draft-vocab 0` for `medusa`, `mlp_speculator` and `dflash`, a mask token and a silent root slot for `dflash`.

Serving with vLLM: `vllm serve MODEL --speculative-config`, K being the depth of the heads, followed by

    vllm-medusa      '{"method": "medusa", "model": "DIR", "num_speculative_tokens": K}'
    mlp_speculator   '{"method": "mlp_speculator", "model": "DIR", "num_speculative_tokens": K}'
    eagle3           '{"method": "eagle3", "model": "DIR", "num_speculative_tokens": 4}'
    dflash           '{"method": "dflash", "model": "DIR", "num_speculative_tokens": K}'

SGLang takes `--speculative-algorithm EAGLE3` or `DFLASH` with `--speculative-draft-model-path DIR`. TGI takes a folder of
`medusa` or `mlp_speculator` in place of the model, whose name it reads there (`base_model_name_or_path` in config.json).
FasterDecoding/Medusa itself wants an output matrix for each head, which is written for heads of two blocks or more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead.heads import load_heads
from medhead.heads.formats import LAYOUTS, Exported, export_heads
from medhead.model.loading import DTYPES, load_model
from medhead.model.target import Target

EXAMPLES = """\
examples:
  python -m medhead_training.export --heads my/heads --model my/model --layout eagle3 --output my/eagle3
  vllm serve my/model --speculative-config '{"method": "eagle3", "model": "my/eagle3", "num_speculative_tokens": 4}'
"""


def check_output(folder: Path) -> None:
    """Refuse a folder that something lies in.

    Raises:
        MedheadError: it is no folder, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MedheadError(f"--output {str(folder)!r} exists and is not an empty folder; give another one")


def write(exported: Exported, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint into an empty or missing folder.

    Args:
        exported: what to write.
        folder: where to.
        dtype: of tensors of floating point.

    Raises:
        MedheadError: something lies in the folder.
    """
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in exported.tensors.items():
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        tensors[name] = cast.detach().cpu().contiguous().clone()  # safetensors refuses shared storage
    save_file(tensors, folder / exported.weights_file, metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = exported.config | {"dtype": name, "torch_dtype": name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Load model and heads, convert, write."""
    check_output(args.output)
    model = load_model(args.model, torch.device("cpu"), torch.float32, args.trust_remote_code)
    target = Target(model, probe=False)
    with torch.no_grad():
        exported = export_heads(load_heads(args.heads, target), target, args.layout)
        write(exported, args.output, DTYPES[args.dtype])
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {len(exported.tensors)} tensors in the layout {args.layout}, {size / 2**20:.1f} MB")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog="medhead_training.export",
        description="Write heads in the layout of a serving engine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--heads", type=Path, required=True, help="heads checkpoint folder")
    options.add_argument("--model", required=True, help="folder or hub id of the model that the heads belong to")
    options.add_argument("--layout", required=True, choices=sorted(LAYOUTS), help="layout to write")
    options.add_argument("--output", type=Path, required=True, help="folder to write; it must be empty or missing")
    options.add_argument(
        "--dtype", default="float32", choices=sorted(DTYPES), help="type of the weights (default: float32)"
    )
    options.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("medhead_training.export", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
