"""Heads written in other projects' formats: read back they compute the same, under the names that engines load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from checkpoint_formulas import LAYERS, D, V
from checkpoint_makers import EXPORTS, IDS, MAKERS, TEXT, logits_in_training, random_heads
from conftest import noise_heads, tiny_llama
from medhead import MedheadError
from medhead.heads import load_heads, save_heads
from medhead.heads.formats import FORMATS, export_heads
from medhead.model.target import Target
from medhead_training.export import main as export_main
from medhead_training.export import write as write_checkpoint
from medhead_training.objective.builders import make_heads
from medhead_training.trainer.options import TrainOptions


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_heads_compute_the_same(deep: PreTrainedModel, deep_target: Target, tmp_path: Path, name: str) -> None:
    checkpoint_format, fields = EXPORTS[name]
    heads = random_heads(deep_target, **fields)
    write_checkpoint(export_heads(heads, deep_target, checkpoint_format), tmp_path / "out", torch.float32)
    again = load_heads(tmp_path / "out", deep_target)
    assert (again.config.kind, again.config.depth) == (heads.config.kind, heads.config.depth)
    if checkpoint_format == "vllm-medusa":  # vLLM drafts from all tokens
        heads.draft_tokens, heads.config.draft_vocab_size = None, 0
    assert again.config.draft_vocab_size == heads.config.draft_vocab_size
    before, after = logits_in_training(heads, deep_target, TEXT), logits_in_training(again, deep_target, TEXT)
    for (anchor, depth, logits), (anchor_after, depth_after, logits_after) in zip(before, after, strict=True):
        assert (anchor, depth) == (anchor_after, depth_after)
        torch.testing.assert_close(logits_after, logits, rtol=1e-4, atol=1e-4)


def test_exported_names_are_the_published_ones(deep_target: Target, tmp_path: Path) -> None:
    """Tensor names, shapes and configuration of exports are those of the checkpoints above, which engines load."""
    pairs = {"eagle3": "eagle3", "dflash": "dflash", "speculator": "speculator", "speculator-tied": "speculator-tied"}
    for export, made in (pairs | {"speculators": "eagle3-speculators"}).items():
        make, fields = MAKERS[made]
        make(tmp_path / made, **fields)
        checkpoint_format, config = EXPORTS[export]
        write_checkpoint(
            export_heads(random_heads(deep_target, **config), deep_target, checkpoint_format),
            tmp_path / export / "out",
            torch.float32,
        )
        expected = {n.removeprefix("speculator.") for n in load_file(tmp_path / made / "model.safetensors")}
        assert set(load_file(tmp_path / export / "out" / "model.safetensors")) == expected
        wanted = json.loads((tmp_path / made / "config.json").read_text())
        given = json.loads((tmp_path / export / "out" / "config.json").read_text())
        assert wanted.keys() - given.keys() <= {"rope_parameters"}, export
        assert wanted["architectures"] == given["architectures"]
        layers = [config.get("transformer_layer_config", {}).keys() for config in (wanted, given)]
        assert layers[0] <= layers[1]
    given = json.loads((tmp_path / "eagle3" / "out" / "config.json").read_text())
    assert given[IDS] == [2, 5, 7]
    assert given["eagle_config"][IDS] == [1, 4, 6]


@pytest.mark.parametrize(
    ("checkpoint_format", "fields", "message"),
    [
        ("eagle3", {"kind": "medusa", "depth": 2}, "holds heads of kind 'attention', these are of kind 'medusa'"),
        ("medusa", {"kind": "medusa", "depth": 2, "correction": "parent"}, "these heads have correction 'parent'"),
        (
            "medusa",
            {"kind": "medusa", "depth": 2, "draft_vocab_size": 9},
            "no draft vocabulary, these heads propose 9 of 64",
        ),
        ("mlp_speculator", {"kind": "sequential", "depth": 2, "draft_vocab_size": 9}, "no draft vocabulary"),
        ("eagle3", {"kind": "attention", "depth": 2, "feature_layers": [1, 2]}, "reads three layers of the target"),
        ("dflash", {"kind": "block", "depth": 2, "feature_layers": [1]}, "root_slot_predicts"),
        (
            "dflash",
            {"kind": "block", "depth": 2, "feature_layers": [1], "root_slot_predicts": False},
            "learnt vectors of their own",
        ),
        ("dflash", {"kind": "block", "depth": 2, "root_slot_predicts": False, "mask_token_id": 3}, "last hidden state"),
        ("dflash", {"kind": "block", "depth": 2, "correction": "recurrent"}, "these heads have correction 'recurrent'"),
        ("gguf", {"kind": "medusa", "depth": 2}, "checkpoint format must be one of vllm-medusa, .*, got 'gguf'"),
    ],
)
def test_heads_that_a_format_cannot_express(
    deep_target: Target, checkpoint_format: str, fields: dict[str, Any], message: str
) -> None:
    heads = random_heads(deep_target, **fields)
    with pytest.raises(MedheadError, match=message) as refusal:
        export_heads(heads, deep_target, checkpoint_format)
    assert "\n" not in str(refusal.value)


def test_whole_vocabularies_and_biases_as_vllm_reads_them(deep_target: Target) -> None:
    """vLLM refuses `d2t` and `t2d` without a draft vocabulary, and drops biases of Medusa's blocks unless told."""
    whole = export_heads(random_heads(deep_target, **EXPORTS["eagle3-whole"][1]), deep_target, "eagle3")
    assert not {"d2t", "t2d"} & whole.tensors.keys()
    assert whole.config["draft_vocab_size"] == V
    medusa = export_heads(random_heads(deep_target, **EXPORTS["medusa-matrices"][1]), deep_target, "medusa")
    assert medusa.config["medusa_fc_bias"] is True


def test_the_configuration_of_speculators(deep: PreTrainedModel, deep_target: Target) -> None:
    """It names the model and the tokens of a pass, which vLLM reads, and says the rest as `eagle3` does."""
    heads = random_heads(deep_target, **EXPORTS["speculators"][1])
    flat, nested = (export_heads(heads, deep_target, name).config for name in ("eagle3", "speculators"))
    assert nested["speculators_model_type"] == "eagle3"
    asked = nested["speculators_config"]
    assert asked["proposal_methods"][0]["speculative_tokens"] == 4
    assert asked["verifier"] == {"name_or_path": deep.config.name_or_path, "architectures": ["LlamaForCausalLM"]}
    said = nested["transformer_layer_config"] | nested
    assert {name: said[name] for name in flat.keys() - {"architectures", "eagle_config"}}.items() <= flat.items()
    assert "eagle_config" not in said


def test_a_draft_vocabulary_as_vllm_reads_it(deep: PreTrainedModel, deep_target: Target, tmp_path: Path) -> None:
    """vLLM 0.32 refuses the `token_map` of its own Medusa format: the whole output matrix is written, or nothing."""
    checkpoint_format, fields = EXPORTS["vllm-medusa-cut"]
    cut = export_heads(random_heads(deep_target, **fields), deep_target, checkpoint_format)
    assert "token_map" not in cut.tensors
    assert cut.config["truncated_vocab_size"] is None
    assert torch.equal(cut.tensors["lm_heads.0.weight"], deep.lm_head.weight)
    make, made = MAKERS["vllm-truncated"]
    make(tmp_path / "truncated", **made)
    with pytest.raises(MedheadError, match=r"vLLM loads no token_map, .* has the rows of 30 of 64 tokens"):
        export_heads(load_heads(tmp_path / "truncated", deep_target), deep_target, checkpoint_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_finetune_masks_with_a_token_become_dflash(
    deep: PreTrainedModel, deep_target: Target, tmp_path: Path, dtype: torch.dtype
) -> None:
    """`finetune --mask-token` makes what the format needs, whatever type the heads are stored in."""
    given: dict[str, Any] = {"kind": "block", "depth": 3, "draft_vocab": 0, "correction": "none", "mask_token": 9}
    options = TrainOptions(model="m", data=["d"], output="o", **given)
    save_heads(make_heads(options, deep_target, None), deep, tmp_path / "heads", dtype)  # type: ignore[arg-type]
    exported = export_heads(load_heads(tmp_path / "heads", deep_target), deep_target, "dflash")
    assert (exported.config["block_size"], exported.config["dflash_config"]["mask_token_id"]) == (4, 9)
    for changes, message in (
        ({"mask_token": V}, f"--mask-token must be from -1 to {V - 1}, .* got {V}"),
        ({"kind": "recurrent"}, "--mask-token goes with --kind block, got --kind recurrent"),
    ):
        wrong = TrainOptions(model="m", data=["d"], output="o", **(given | changes))
        with pytest.raises(MedheadError, match=message):
            make_heads(wrong, deep_target, None)  # type: ignore[arg-type]


def test_the_table_of_formats(deep_target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """Help and errors name the formats that hold a kind of heads."""
    with pytest.raises(SystemExit):
        export_main(["--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, one in FORMATS.items():
        assert [name, one.kind] in [line[:2] for line in lines]
    heads = random_heads(deep_target, kind="medusa", depth=2)
    with pytest.raises(MedheadError, match=r"these are of kind 'medusa': give one of vllm-medusa, medusa$"):
        export_heads(heads, deep_target, "eagle3")
    with pytest.raises(MedheadError, match=r"no format holds them$"):
        export_heads(noise_heads(deep_target, "recurrent"), deep_target, "eagle3")


def test_a_bias_of_the_target_and_another_mask_are_refused(deep_target: Target) -> None:
    heads = random_heads(deep_target, **EXPORTS["dflash"][1])
    heads.set_mask(torch.zeros(D))
    with pytest.raises(MedheadError, match="is not the embedding of token 9"):
        export_heads(heads, deep_target, "dflash")
    biased = Target(tiny_llama(num_hidden_layers=LAYERS), probe=False)
    biased.output.bias = torch.nn.Parameter(torch.ones(V))
    with pytest.raises(MedheadError, match="has a bias"):
        export_heads(random_heads(biased, **EXPORTS["vllm-medusa"][1]), biased, "vllm-medusa")


def test_the_export_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(folders["model"]), tmp_path / "new" / "out"
    common = ["--heads", str(folders["medusa"]), "--model", model, "--format", "vllm-medusa", "--output", str(out)]
    assert export_main([*common, "--dtype", "bfloat16"]) == 0
    assert "tensors in the format vllm-medusa" in capsys.readouterr().out
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before = (out / "model.safetensors").read_bytes()
    assert export_main(common) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(SystemExit) as ended:
        export_main([*common[:4], "--format", "gguf", "--output", str(tmp_path / "x")])
    assert ended.value.code == 2
    recurrent = ["--heads", str(folders["recurrent"]), *common[2:6], "--output", str(tmp_path / "x")]
    assert export_main(recurrent) == 2
    assert "these are of kind 'recurrent'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_heads_with_one_mask_token_are_stored_and_read_back(
    deep: PreTrainedModel, deep_target: Target, tmp_path: Path
) -> None:
    heads = random_heads(deep_target, **EXPORTS["dflash"][1])
    save_heads(heads, deep, tmp_path / "heads")
    again = load_heads(tmp_path / "heads", deep_target)
    assert again.config == heads.config
    assert torch.equal(again.mask_row, deep.model.embed_tokens.weight[9])
    assert noise_heads(deep_target, "block").mask_row is None
