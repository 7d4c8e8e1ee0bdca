"""The format of FasterDecoding/Medusa and TGI: `medusa_lm_head.safetensors`.

`{k}.{l}.linear.weight/bias` is block l of head k, x + SiLU(Wx + b). `{k}.{L}.weight` is the head's own output matrix
(FasterDecoding, TGI "v1"); without it the target's is shared (TGI "v2"). Published configurations state a wrong number
of heads, so the tensors are counted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medhead.heads.base import Heads, HeadsConfig
from medhead.heads.formats.base import CheckpointFormat, fitting_config, output_matrix
from medhead.heads.formats.reader import MEDUSA_FILE, CheckpointReader

if TYPE_CHECKING:
    from medhead.model.target import Target

_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.weight")


class Medusa(CheckpointFormat):
    """With one block a head and the target's output matrix it writes "v2", else an output matrix for each head."""

    name, kind, weights_file = "medusa", "medusa", MEDUSA_FILE

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for the name of the file or for blocks."""
        named = any(_BLOCK.fullmatch(re.sub(r"^.*medusa_heads?\.", "", name)) for name in reader.names)
        return named or (reader.folder / MEDUSA_FILE).is_file()

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read Medusa heads, with an output matrix for each if the file holds them."""
        for prefix in ("medusa_heads.", "medusa_head."):
            reader.rename(prefix)
        depth, num_layers = count_blocks(reader, _BLOCK, "0.0.linear.weight")
        own_output = any(re.fullmatch(r"\d+\.\d+\.weight", name) for name in reader.names)
        config = fitting_config(target, self.kind, depth=depth, num_layers=num_layers, own_output=own_output)
        return reader.load(config, self.stored_name, {})

    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Number the output matrix like one more block."""
        if name.startswith("output_matrices."):
            return f"{name.removeprefix('output_matrices.')}.{config.num_layers}.weight"
        return name.removeprefix("heads.")

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Add an output matrix for each head, unless "v2" can hold the heads."""
        tensors, config = super().tensors(heads, target), heads.config
        if config.own_output or config.num_layers > 1:
            for depth in range(config.depth):
                tensors[f"{depth}.{config.num_layers}.weight"] = output_matrix(heads, target, depth)
        return tensors

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Name the number of heads and blocks, and the model, which TGI loads from here."""
        return {
            "base_model_name_or_path": str(target.model.config.name_or_path),
            "medusa_num_heads": heads.config.depth,
            "medusa_num_layers": heads.config.num_layers,
            "hidden_size": heads.config.hidden_size,
            "vocab_size": heads.config.vocab_size,
        }


def count_blocks(reader: CheckpointReader, block: re.Pattern[str], example: str) -> tuple[int, int]:
    """Return the numbers of heads and of blocks a head, from names that match `block`: (head).(block).

    Raises:
        MedheadError: no name matches.
    """
    found = [match for match in map(block.fullmatch, reader.names) if match]
    if not found:
        raise reader.error(f"holds no block of a Medusa head: no tensor is called {example}")
    return 1 + max(int(match[1]) for match in found), 1 + max(int(match[2]) for match in found)
