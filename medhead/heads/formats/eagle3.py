"""The formats of EAGLE-3 heads (Li et al. 2025): that of vLLM, SGLang and TensorRT-LLM, and that of speculators.

Two conventions for explicit layer ids are in use. At the top level of `config.json` (vLLM, speculators) an id counts hidden
states, so that id i is the input of layer i. Inside `eagle_config` (SGLang, SpecForge) it means the output of layer i.
Without ids the features are the inputs of layers 2, L/2 and L - 3. Exports state the ids in both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medhead.heads.base import Heads
from medhead.heads.config import HeadsConfig, fitting_config
from medhead.heads.formats.base import CheckpointFormat, decoder_config_json, output_matrix
from medhead.heads.formats.reader import CheckpointReader
from medhead.model.target import Target

DEPTH = 8  # such checkpoints name no depth; the heads propose this many tokens
SPECULATIVE_TOKENS = 4  # that speculators' configuration asks of vLLM in every pass, at most
IDS = "eagle_aux_hidden_state_layer_ids"


class Eagle3(CheckpointFormat):
    """It stores the target's rows of the draft vocabulary as `lm_head`; engines take the embedding from the target."""

    name, kind, has_draft_vocab = "eagle3", "attention", True
    needs = "three feature layers"
    loaded_by = "vLLM, SGLang, TensorRT-LLM"

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for a draft vocabulary or the norm of the feature."""
        declared = any("eagle3" in name.lower() for name in reader.architectures)
        declared |= "draft_vocab_size" in reader.config
        named = {"midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight", "d2t"} & reader.names
        return "fc.weight" in reader.names and (declared or bool(named))

    def read(self, reader: CheckpointReader, target: Target) -> Heads:
        """Read attention heads."""
        reader.rename("layers.0.", "midlayer.")
        if inner := reader.section("transformer_layer_config"):  # speculators
            reader.config = {**inner, "norm_before_residual": True, **reader.config}
        _refuse_variants(reader)
        size, fields = reader.number("hidden_size"), reader.decoder_fields(None, rope_theta=10000.0)
        reader.check_target(target, target_hidden_size=target.hidden_size, vocab_size=target.vocab_size)
        given: dict[str, Tensor] = {}
        draft = reader.number("draft_vocab_size", target.vocab_size)
        own_output = draft < target.vocab_size or "lm_head.weight" in reader.names
        if own_output:
            given["output_matrices.0"] = reader.take("lm_head.weight", draft, size) * reader.real("logit_scale", 1.0)
        tokens = _draft_tokens(reader, draft, target)
        if tokens is not None:
            given["draft_tokens"] = tokens
        config = fitting_config(
            target, self.kind, depth=DEPTH, feature_layers=_feature_layers(reader, target),
            draft_hidden_size=0 if size == target.hidden_size else size,
            norm_before_residual=reader.flag("norm_before_residual"),
            own_embedding="embed_tokens.weight" in reader.names, own_output=own_output,
            draft_vocab_size=0 if tokens is None else draft, **fields,
        )  # fmt: skip
        return reader.load(config, self.stored_name, given)

    def stored_name(self, name: str, config: HeadsConfig) -> str | None:
        """Keep the names; the draft vocabulary is stored as `d2t` and `t2d`."""
        renamed = {"draft_tokens": None, "output_matrices.0": "lm_head.weight", "embeddings.0": "embed_tokens.weight"}
        return renamed.get(name, name)

    def refusals(self, heads: Heads, target: Target) -> Iterator[tuple[bool, str]]:
        """Refuse also heads that do not read three layers."""
        yield from super().refusals(heads, target)
        count = len(heads.config.feature_layers)
        yield count != 3, f"it reads three layers of the target, these heads read {count}"

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Add the output matrix and the two maps of a draft vocabulary; vLLM refuses maps without one."""
        tensors = super().tensors(heads, target) | {"lm_head.weight": output_matrix(heads, target)}
        if heads.draft_tokens is not None:
            tokens = heads.draft_tokens.cpu()
            tensors["d2t"] = tokens - torch.arange(len(tokens))
            tensors["t2d"] = torch.zeros(heads.config.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
        return tensors

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Describe the layer and the layers of the target that it reads."""
        config = heads.config
        return {
            **decoder_config_json(heads, target),
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
            "target_hidden_size": config.hidden_size,
            "norm_before_residual": config.norm_before_residual,
            IDS: [layer + 1 for layer in config.feature_layers],
            "eagle_config": {"use_aux_hidden_state": True, IDS: list(config.feature_layers)},
        }


class Speculators(Eagle3):
    """The tensors of `eagle3` under the configuration of the project speculators, which names the model: `vllm serve DIR`."""

    name = "speculators"
    loaded_by = "vLLM, which serves the folder in place of the model"

    def matches(self, reader: CheckpointReader) -> bool:
        """Look for the algorithm that the configuration names."""
        return reader.config.get("speculators_model_type") == "eagle3"

    def tensors(self, heads: Heads, target: Target) -> dict[str, Tensor]:
        """Call the layer as speculators does."""
        return {name.replace("midlayer.", "layers.0."): part for name, part in super().tensors(heads, target).items()}

    def config_json(self, heads: Heads, target: Target) -> dict[str, Any]:
        """Describe the layer in a section of its own, and add how many tokens are drafted, and for which model."""
        layer = super().config_json(heads, target)
        del layer["eagle_config"]
        names = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", IDS)
        fields = {name: layer.pop(name) for name in names}
        tokens = min(heads.config.depth, SPECULATIVE_TOKENS)
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            **fields,
            "transformer_layer_config": layer | {"architectures": ["LlamaForCausalLM"]},
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
                "verifier": {
                    "name_or_path": str(target.model.config.name_or_path),
                    "architectures": [type(target.model).__name__],
                },
            },
        }


def _refuse_variants(reader: CheckpointReader) -> None:
    eagle = reader.section("eagle_config")
    if eagle.get("use_aux_hidden_state", True) is False:
        raise reader.error(
            "EAGLE-3 heads without features of several layers are not supported: config.json has use_aux_hidden_state false"
        )
    for section in (reader.config, eagle):
        reader.refuse(("norm_before_fc", "fc_norm", "use_aux_norm", "norm_output"), "EAGLE-3.1's norms are", section)
    if reader.number("num_hidden_layers", 1) > 1:
        raise reader.error(
            "EAGLE-3 heads of more than one layer are not supported: config.json has num_hidden_layers above 1"
        )


def _feature_layers(reader: CheckpointReader, target: Target) -> list[int]:
    """Return the layers whose outputs are the features."""
    if reader.config.get(IDS):
        return reader.target_layers(reader.config[IDS], -1, target)
    if reader.section("eagle_config").get(IDS):
        return reader.target_layers(reader.section("eagle_config")[IDS], 0, target)
    return reader.target_layers([2, target.layers // 2, target.layers - 3], -1, target)


def _draft_tokens(reader: CheckpointReader, draft: int, target: Target) -> Tensor | None:
    """Return the token id of every row of the output matrix, or None if these are all tokens in order."""
    if "d2t" not in reader.names:
        if draft < target.vocab_size:
            raise reader.error("the tensor d2t is missing: nothing says which tokens the draft vocabulary means")
        reader.drop("t2d")
        return None
    tokens = reader.take_token_ids("d2t", draft, target, offsets=True)
    if "t2d" in reader.names:
        named = reader.take("t2d", target.vocab_size, floating=False).bool().nonzero()[:, 0]
        if not torch.equal(named, tokens.sort().values):
            raise reader.error("the tensors d2t and t2d name different tokens")
    return None if torch.equal(tokens, torch.arange(target.vocab_size)) else tokens
