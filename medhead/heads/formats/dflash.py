"""The format of DFlash block heads (2026), and of JetSpec, which is the same with causal attention inside the block.

A block of b slots, [root, mask, mask, ...], predicts b - 1 tokens: slot j predicts the token j places after the root. The
mask is the target's embedding of one token. A layer id means that layer's output. There is no embedding and no output
matrix. The extensions of DFlash2 and DSpark are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.config import HeadsConfig, fitting_config
from medhead.heads.formats.base import CheckpointFormat, decoder_config_json, embedding_row, output_matrix
from medhead.heads.formats.reader import FLOATS, CheckpointReader
from medhead.model.target import Target

_EXTENSIONS = {
    "candidate_selector": "DFlash2's candidate selector",
    "attention_conv": "DFlash2's convolutions",
    "mlp_conv": "DFlash2's convolutions",
    "markov": "DSpark's Markov pair",
    "confidence": "DSpark's confidence head",
}


class DFlash(CheckpointFormat):
    """It holds blocks with one mask token, a root slot that predicts nothing, and no correction."""

    name, kind = "dflash", "block"
    needs = "no draft vocabulary, one mask token and a root slot that predicts nothing (finetune --mask-token)"
    loaded_by = "vLLM, SGLang"

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for the architecture or the section of the configuration."""
        names = " ".join(reader.architectures).lower()
        return "dflash" in names or "dspark" in names or "dflash_config" in reader.config

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read block heads."""
        _refuse_variants(reader)
        reader.config = {**reader.config, **reader.section("dflash_config")}
        reader.check_target(target, hidden_size=target.hidden_size, num_target_layers=target.layers)
        fields = reader.decoder_fields(next(iter(reader.shape("layers.0.self_attn.q_norm.weight")), None))
        slots = reader.number("block_size")
        if slots < 2:
            raise reader.error("block_size in config.json must be at least 2: the root and one mask")
        feature_layers = reader.target_layers(reader.config.get("target_layer_ids"), 0, target)
        mask_token_id, mask = _mask(reader, reader.config.get("mask_token_id"), target)
        norm = reader.take("norm.weight", target.hidden_size) * reader.real("output_multiplier", 1.0)
        causal = reader.config.get("is_causal")
        config = fitting_config(
            target, self.kind, depth=slots - 1, num_layers=reader.number("num_hidden_layers"),
            feature_layers=feature_layers, causal=reader.flag("causal") if causal is None else bool(causal),
            root_slot_predicts=False, mask_token_id=mask_token_id, **fields,
        )  # fmt: skip
        return reader.load(config, self.stored_name, {"norm.weight": norm, "mask_row": mask})

    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Keep the names; the mask is a row of the target's embedding."""
        return None if name == "mask_row" else name

    def refusals(self, heads: Heads, target: Target) -> Iterator[tuple[bool, str]]:
        """Refuse also other masks, a root slot that predicts, and features of no layer."""
        yield from super().refusals(heads, target)
        output_matrix(heads, target)  # refuses a bias
        config, mask = heads.config, heads.config.mask_token_id
        yield config.root_slot_predicts, "its root slot predicts nothing, that of these heads does (root_slot_predicts)"
        own_masks = "its masks are one token's embedding, these heads learnt vectors of their own (mask_token_id is -1)"
        yield mask < 0, own_masks
        row, given = embedding_row(target, mask), heads.state_dict()["mask_row"]
        # the mask was rounded where the heads are stored in a smaller type
        same = row is not None and any(row.to(dtype).to(row).equal(given.to(row)) for dtype in FLOATS)
        yield not same, f"the mask of these heads is not the embedding of token {mask} of {target.name}"
        yield not config.feature_layers, "it reads layers of the target, these heads read its last hidden state"

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Describe the layers, the block, and the layers of the target that it reads."""
        config = heads.config
        return {
            **decoder_config_json(heads, target),
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "layer_types": ["full_attention"] * config.num_layers,
            "sliding_window": None,
            "use_sliding_window": False,
            "num_target_layers": config.num_target_layers,
            "block_size": config.depth + 1,
            "is_causal": config.causal,
            "dflash_config": {
                "block_size": config.depth + 1,
                "mask_token_id": config.mask_token_id,
                "target_layer_ids": list(config.feature_layers),
                "causal": config.causal,
            },
        }


def _refuse_variants(reader: CheckpointReader) -> None:
    for part, extension in _EXTENSIONS.items():
        named = sorted(name for name in reader.names if part in name)
        if named:
            raise reader.error(f"{extension} is not supported: the checkpoint holds the tensor {named[0]}")
    for name in reader.architectures:
        if any(variant in name.lower() for variant in ("dflash2", "dspark")):
            raise reader.error(f"the architecture {name} is not supported, only DFlashDraftModel")
    reader.refuse(("speculators_model_type",), "speculators' form of DFlash is")
    variants = ("use_swa", "attention_sink_bias", "final_logit_softcapping")
    for section in (reader.config, reader.section("dflash_config")):
        reader.refuse(variants, "this variant of DFlash is", section)


def _mask(reader: CheckpointReader, token: Any, target: Target) -> tuple[int, Tensor]:
    """Return the mask's token id and the target's embedding of it."""
    count = target.num_embeddings
    if not isinstance(token, int) or not 0 <= token < count:
        raise reader.error(f"mask_token_id in config.json must be a token from 0 to {count - 1}, got {token!r}")
    row = embedding_row(target, token)
    if row is None or reader.real("input_embedding_scale", 1.0) != 1.0:
        raise reader.error(f"{target.name} or these heads scale embeddings, which the format 'dflash' does not support")
    return token, row.clone()
