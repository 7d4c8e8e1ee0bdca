"""The layout of FasterDecoding/Medusa and TGI: `medusa_lm_head.safetensors`.

`{k}.{l}.linear.weight/bias` is block l of head k, x + SiLU(Wx + b). `{k}.{L}.weight` is the head's own output matrix
(FasterDecoding, TGI "v1"); where there is none the target's is shared (TGI "v2"). Published configurations say a wrong
number of heads, so the tensors are counted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.formats.export import Exported, output_rows, require
from medhead.heads.formats.source import MEDUSA_FILE, Source, fill, heads_config

if TYPE_CHECKING:
    from medhead.model.target import Target

LAYOUT = "medusa"
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.weight")
_PREFIXES = ("medusa_heads.", "medusa_head.")


def matches(source: Source) -> bool:
    """By the name of the file or the names of the tensors."""
    named = any(_BLOCK.fullmatch(name.split("medusa_heads.")[-1].split("medusa_head.")[-1]) for name in source.names)
    return named or (source.folder / MEDUSA_FILE).is_file()


def read(source: Source, target: Target) -> Heads:
    """Medusa heads, with an output matrix for each if the file holds them."""
    for prefix in _PREFIXES:
        source.rename(prefix)
    found = [match for match in map(_BLOCK.fullmatch, source.names) if match]
    if not found:
        raise source.error("holds no block of a Medusa head: no tensor is called 0.0.linear.weight")
    depth = 1 + max(int(match[1]) for match in found)
    blocks = 1 + max(int(match[2]) for match in found)
    own_output = any(re.fullmatch(r"\d+\.\d+\.weight", name) for name in source.names)
    size = target.hidden_size
    weights: dict[str, Tensor] = {}
    for head in range(depth):
        for block in range(blocks):
            name = f"{head}.{block}.linear"
            weights[f"heads.{name}.weight"] = source.take(f"{name}.weight", size, size)
            weights[f"heads.{name}.bias"] = source.take(f"{name}.bias", size)
        if own_output:
            weights[f"output_matrices.{head}"] = source.take(f"{head}.{blocks}.weight", target.vocab_size, size)
    source.finish()
    return fill(heads_config(target, "medusa", depth=depth, blocks=blocks, own_output=own_output), weights)


def write(heads: Heads, target: Target) -> Exported:
    """With one block a head and the target's output matrix as "v2", else with a matrix for each head."""
    require(heads, LAYOUT, "medusa", whole_vocabulary=True)
    config = heads.config
    weights = heads.state_dict()
    tensors = {name.removeprefix("heads."): tensor for name, tensor in weights.items() if name.startswith("heads.")}
    if config.own_output or config.blocks > 1:
        for head in range(config.depth):
            own = heads.own_output(head)
            tensors[f"{head}.{config.blocks}.weight"] = output_rows(heads, target) if own is None else own
    fields = {
        "base_model_name_or_path": str(target.model.config.name_or_path),
        "medusa_num_heads": config.depth,
        "medusa_num_layers": config.blocks,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    return Exported(fields, tensors, MEDUSA_FILE)
