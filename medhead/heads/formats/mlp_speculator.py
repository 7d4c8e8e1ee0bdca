"""The format of `mlp_speculator` (Wertheimer et al. 2024): TGI, IBM's accelerators, and vLLM before it removed them.

Every depth has `emb.{i} [vocab, inner]`, `proj.{i}`, `ln.{i}` and `head.{i} [vocab, inner]`; tied, all depths share one
of each, except that `proj.0`, which takes the target's hidden state, is not shared.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.config import HeadsConfig, fitting_config
from medhead.heads.formats.base import CheckpointFormat, output_matrix
from medhead.heads.formats.reader import CheckpointReader
from medhead.model.target import Target

_ARCHITECTURE = "MLPSpeculatorPreTrainedModel"
_NAMES = {"embeddings": "emb.{}.weight", "norms": "ln.{}", "output_matrices": "head.{}.weight"}


class MlpSpeculator(CheckpointFormat):
    """It stores factored embeddings and output projections multiplied out, as matrices over the vocabulary."""

    name, kind = "mlp_speculator", "sequential"
    needs = "no draft vocabulary"
    loaded_by = "TGI, not vLLM"

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for the model type or the architecture."""
        return reader.config.get("model_type") == self.name or _ARCHITECTURE in reader.architectures

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read sequential heads with embeddings and output matrices of their own."""
        reader.rename("speculator.")
        reader.check_target(target, emb_dim=target.hidden_size, vocab_size=target.vocab_size)
        unset = reader.config.get("inner_dim") in (0, None)
        config = fitting_config(
            target, self.kind, depth=reader.number("n_predict"), own_embedding=True, own_output=True,
            inner_size=target.hidden_size if unset else reader.number("inner_dim"),
            tie_weights=reader.flag("tie_weights"), scale_input=reader.flag("scale_input"),
        )  # fmt: skip
        if config.tie_weights:
            for pattern in ("emb.{}.weight", "ln.{}.weight", "ln.{}.bias", "head.{}.weight", "proj.{}.weight"):
                first = 1 if pattern.startswith("proj") else 0
                _merge_copies(reader, [pattern.format(depth) for depth in range(first, config.depth)])
        return reader.load(config, self.stored_name, {})

    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Shorten the names; `first` is `proj.0`, and encoders and outputs are not stored as they are."""
        part, _, rest = name.partition(".")
        if part == "first":
            return "proj.0.weight"
        if part == "proj":
            return re.sub(r"\d+", lambda index: str(int(index[0]) + 1), name)
        return _NAMES[part].format(rest) if part in _NAMES else None

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Multiply out embeddings and output matrices where the heads use the target's."""
        tensors = super().tensors(heads, target)
        for depth in range(1 if heads.config.tie_weights else heads.config.depth):
            if not heads.config.own_embedding:
                rows = target.embed(torch.arange(heads.config.vocab_size, device=target.device)).detach()
                encoder = heads.get_parameter(f"encoders.{depth}.weight")
                tensors[f"emb.{depth}.weight"] = rows @ encoder.to(rows).T
            if not heads.config.own_output:
                rows = output_matrix(heads, target)
                tensors[f"head.{depth}.weight"] = rows @ heads.get_parameter(f"outputs.{depth}.weight").to(rows)
        return tensors

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Name sizes and switches, and the model, which TGI loads from here."""
        config = heads.config
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": self.name,
            "base_model_name_or_path": str(target.model.config.name_or_path),
            "vocab_size": config.vocab_size,
            "emb_dim": config.hidden_size,
            "inner_dim": config.inner_size,
            "n_predict": config.depth,
            "tie_weights": config.tie_weights,
            "scale_input": config.scale_input,
            "top_k_tokens_per_head": [4, 3, 2, *[1] * config.depth][: config.depth],
        }


def _merge_copies(reader: CheckpointReader, names: list[str]) -> None:
    """Keep one of the tensors that tied depths share, under the first name; it may be stored several times."""
    stored = [name for name in names if name in reader.names]
    for name in stored[1:]:
        if not torch.equal(reader.peek(name), reader.peek(stored[0])):
            raise reader.error(f"config.json says tie_weights, but the tensors {stored[0]} and {name} differ")
    reader.drop(*stored[1:])
    if stored:
        reader.rename(stored[0], names[0])
