"""Write heads for serving engines: `python -m medhead_training.export`.

The formats are those of `medhead.heads.formats`; an exported checkpoint computes exactly what the heads compute, but that
`vllm-medusa` keeps no draft vocabulary, and heads that a format cannot express are refused. Heads for an engine are trained
accordingly: `--correction none` for all formats, `--draft-vocab 0` for `medusa`, `mlp_speculator` and `dflash`, and
`--mask-token ID` for `dflash`.

Serving with vLLM: `vllm serve DIR` for a folder of `speculators`, which names the model. For the other formats
`vllm serve MODEL --speculative-config`, K being the depth of the heads, followed by

    vllm-medusa      '{"method": "medusa", "model": "DIR", "num_speculative_tokens": K}'
    eagle3           '{"method": "eagle3", "model": "DIR", "num_speculative_tokens": 4}'
    dflash           '{"method": "dflash", "model": "DIR", "num_speculative_tokens": K}'

vLLM 0.32 loads no `mlp_speculator`. SGLang takes `--speculative-algorithm EAGLE3` or `DFLASH` with
`--speculative-draft-model-path DIR`. TGI takes a folder of `medusa` or `mlp_speculator` in place of the model, whose name it
reads there (`base_model_name_or_path` in config.json). FasterDecoding/Medusa itself needs an output matrix for each
head, which is written for heads of two blocks or more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from medhead.cli.common import Parser, run_command
from medhead.errors import MedheadError
from medhead.heads import load_heads
from medhead.heads.formats import FORMATS, ExportedCheckpoint, export_heads, formats_table
from medhead.heads.formats.reader import CONFIG_FILE
from medhead.model.loading import DTYPES, load_model
from medhead.model.target import Target

EXAMPLES = f"""\
formats, all for heads without a correction (finetune --correction none):
{formats_table()}

examples:
  medhead export --heads my/heads --model my/model --format eagle3 --output my/eagle3
  vllm serve my/model --speculative-config '{{"method": "eagle3", "model": "my/eagle3", "num_speculative_tokens": 4}}'

exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""


def check_output(folder: Path) -> None:
    """Refuse a path that exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MedheadError(f"--output {str(folder)!r} exists and is not an empty folder; give another one")


def write(exported: ExportedCheckpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint into an empty or missing folder, its floating-point tensors as `dtype`."""
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in exported.tensors.items()}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in cast.items()}  # storage must not be shared
    save_file(tensors, folder / exported.weights_file, metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    config = exported.config | {"dtype": name, "torch_dtype": name}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Load model and heads, convert, write."""
    check_output(args.output)
    target = Target(load_model(args.model, torch.device("cpu"), torch.float32, args.trust_remote_code), probe=False)
    with torch.no_grad():
        exported = export_heads(load_heads(args.heads, target), target, args.format)
        write(exported, args.output, DTYPES[args.dtype])
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {len(exported.tensors)} tensors in the format {args.format}, {size / 2**20:.1f} MB")


def parser() -> Parser:
    """Return the options of the command."""
    description = "Write heads in the checkpoint format of a serving engine."
    options = Parser(prog="medhead export", description=description, epilog=EXAMPLES)
    add = options.add_argument
    add("--heads", type=Path, required=True, help="heads checkpoint folder")
    add(
        "--model", required=True, help="the model that the heads belong to: model folder, hub id, GGUF file, or smollm2"
    )
    add("--format", required=True, choices=sorted(FORMATS), help="checkpoint format to write")
    add("--output", type=Path, required=True, help="folder to write; it must be empty or missing")
    add("--dtype", default="float32", choices=sorted(DTYPES), help="type of the weights (default: float32)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
