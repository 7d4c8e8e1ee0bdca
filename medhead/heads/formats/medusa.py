"""The two formats of Medusa heads: that of FasterDecoding/Medusa and TGI, and vLLM's.

FasterDecoding and TGI store `medusa_lm_head.safetensors`: `{k}.{l}.linear.weight/bias` is block l of head k,
x + SiLU(Wx + b). `{k}.{L}.weight` is the head's own output matrix (FasterDecoding, TGI "v1"); without it the target's is
shared (TGI "v2"). Published configurations state a wrong number of heads, so the tensors are counted. vLLM stores
`blocks.*`, `lm_heads.*`, and a truncated vocabulary with `token_map`. vLLM 0.32 refuses the `token_map` of its own format
(its loader reports it as not loaded), so exports hold the whole output matrix instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.config import HeadsConfig, fitting_config
from medhead.heads.formats.base import CheckpointFormat, output_matrix
from medhead.heads.formats.reader import MEDUSA_FILE, CheckpointReader
from medhead.model.target import Target

_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.weight")
_VLLM_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


class Medusa(CheckpointFormat):
    """With one block a head and the target's output matrix it writes "v2", else an output matrix for each head."""

    name, kind, weights_file = "medusa", "medusa", MEDUSA_FILE
    needs = "no draft vocabulary"
    loaded_by = "TGI, not vLLM; with output matrices (two blocks a head or more) also FasterDecoding/Medusa and vLLM"

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for the name of the file or for blocks."""
        named = any(_BLOCK.fullmatch(re.sub(r"^.*medusa_heads?\.", "", name)) for name in reader.names)
        return named or (reader.folder / MEDUSA_FILE).is_file()

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read Medusa heads, with an output matrix for each if the file holds them."""
        for prefix in ("medusa_heads.", "medusa_head."):
            reader.rename(prefix)
        depth, num_layers = _count_blocks(reader, _BLOCK, "0.0.linear.weight")
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
            "medusa_fc_bias": True,  # vLLM drops the blocks' biases without it
            "hidden_size": heads.config.hidden_size,
            "vocab_size": heads.config.vocab_size,
        }


class VllmMedusa(CheckpointFormat):
    """It writes one output matrix for all heads unless they bring their own.

    Heads with a draft vocabulary are written with the target's whole output matrix: in vLLM they propose from all tokens.
    """

    name, kind, has_draft_vocab = "vllm-medusa", "medusa", True
    loaded_by = "vLLM, which drafts from all tokens: a draft vocabulary is not kept"

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for blocks, or for output matrices of a model that calls itself Medusa."""
        names = {name.replace("medusa_heads.", "") for name in reader.names}
        declared = reader.config.get("model_type") == "medusa" or "MedusaModel" in reader.architectures
        has_output = any(name.startswith("lm_heads.") for name in names)
        return any(map(_VLLM_BLOCK.fullmatch, names)) or (declared and has_output)

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read Medusa heads with an output matrix for each, or one for all."""
        reader.rename("medusa_heads.")
        reader.check_target(target, hidden_size=target.hidden_size, vocab_size=target.vocab_size)
        depth, num_layers = _count_blocks(reader, _VLLM_BLOCK, "blocks.0.layers.0.weight")
        given: dict[str, Tensor] = {}
        if not reader.flag("medusa_fc_bias"):
            biases = (f"heads.{head}.{layer}.linear.bias" for head in range(depth) for layer in range(num_layers))
            given |= {name: torch.zeros(target.hidden_size) for name in biases}
        tokens, count = None, reader.number("truncated_vocab_size", target.vocab_size)
        if count != target.vocab_size:
            tokens = given["draft_tokens"] = reader.take_token_ids("token_map", count, target)
        reader.drop("token_map")
        tied = reader.flag("original_lm_head")
        if tied:
            reader.rename("lm_head.", "lm_heads.0.")
        for head in range(1 if tied else depth):
            given[f"output_matrices.{head}"] = _output_matrix(reader, f"lm_heads.{head}.weight", tokens, target)
        if tied:
            reader.drop(*(f"lm_heads.{head}.weight" for head in range(1, depth)))
        config = fitting_config(
            target, self.kind, depth=depth, num_layers=num_layers, own_output=True, tie_weights=tied,
            draft_vocab_size=0 if tokens is None else count,
        )  # fmt: skip
        return reader.load(config, self.stored_name, given)

    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Call heads `blocks`, their blocks `layers`, and the output matrices `lm_heads`."""
        if name == "draft_tokens":
            return None
        name = re.sub(r"^output_matrices\.(\d+)$", r"lm_heads.\1.weight", name)
        return re.sub(r"^heads\.(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)

    def refusals(self, heads: Heads, target: Target) -> Iterator[tuple[bool, str]]:
        """Refuse also output matrices that hold the rows of a draft vocabulary only."""
        yield from super().refusals(heads, target)
        config = heads.config
        rows = f"{config.draft_vocab_size} of {config.vocab_size} tokens"
        cut = config.own_output and config.draft_vocab_size > 0
        yield cut, f"vLLM loads no token_map, and the output matrix of these heads has the rows of {rows}"

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Add the target's whole output matrix, where the heads use it."""
        return super().tensors(heads, target) | {"lm_heads.0.weight": output_matrix(heads, target, whole=True)}

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Name sizes and switches."""
        config = heads.config
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_heads": config.depth,
            "num_hidden_layers": config.num_layers,
            "truncated_vocab_size": None,
            "medusa_fc_bias": True,
            "original_lm_head": config.tie_weights or not config.own_output,
        }


def _count_blocks(reader: CheckpointReader, block: re.Pattern[str], example: str) -> tuple[int, int]:
    """Return the numbers of heads and of blocks a head, from the names that match `block`: (head).(block)."""
    found = [match for match in map(block.fullmatch, reader.names) if match]
    if not found:
        raise reader.error(f"holds no block of a Medusa head: no tensor is called {example}")
    return 1 + max(int(match[1]) for match in found), 1 + max(int(match[2]) for match in found)


def _output_matrix(reader: CheckpointReader, name: str, tokens: Tensor | None, target: Target) -> Tensor:
    """Take an output matrix, and cut it to the draft vocabulary where it holds more."""
    full, scale = (target.vocab_size, target.hidden_size), reader.real("logit_scale", 1.0)
    if tokens is None or reader.shape(name) == full:
        matrix = reader.take(name, *full)
        return (matrix if tokens is None else matrix[tokens]) * scale
    return reader.take(name, len(tokens), target.hidden_size) * scale
