"""Types of models: docs/model_types.py compares texts with those of `generate`; refusals name the true reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families import HAS_5_24, tiny
from medhead import Decoder
from medhead.errors import UnsupportedTargetError
from medhead.model.target import Target
from tiny_types import KINDS, tiny_type

ROOT = Path(__file__).parents[2]
FAST = [("causal", "falcon"), ("causal", "mpt"), ("causal", "deepseek_v32"), ("vision", "qwen3_5")]
MORE = [("causal", name) for name in ("bloom", "bart", "roberta", "glm_moe_dsa", "gemma3n_text", "gpt_oss", "xglm")]
MORE += [("vision", name) for name in ("qwen3_5_moe", "lfm2_vl", "lfm3_vl", "gemma4", "qwen3_vl_moe", "internvl")]
needs_5_24 = pytest.mark.skipif(not HAS_5_24, reason="compared with transformers 5.24")


def program() -> Any:
    """docs/model_types.py as a module."""
    spec = importlib.util.spec_from_file_location("model_types_program", ROOT / "docs" / "model_types.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results() -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "docs" / "model_types.jsonl").read_text("utf-8").splitlines()]


@needs_5_24
@pytest.mark.parametrize(
    ("kind", "name"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)], ids=str
)
def test_a_type_gives_the_text_of_generate(kind: str, name: str) -> None:
    if name not in KINDS[kind]:
        pytest.skip(f"this version of transformers has no {name}")
    assert program().compare(name, kind) == {"result": "identical"}


def test_a_different_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Decoder.generate
    monkeypatch.setattr(Decoder, "generate", lambda *args, **options: own(*args, **options).flip(0))
    assert program().compare("llama", "causal")["result"] == "different"


def test_no_type_is_known_to_differ() -> None:
    found = results()
    assert not [one for one in found if one["result"] == "different"]
    same = [one["kind"] for one in found if one["result"] == "identical"]
    assert same.count("causal") >= 150
    assert same.count("vision") >= 65


def test_every_type_of_the_compared_version_has_a_result() -> None:
    found = results()
    if transformers.__version__ not in {one["transformers"] for one in found}:
        pytest.skip("another version of transformers was compared")
    assert {(one["kind"], one["type"]) for one in found} == {(kind, name) for kind in KINDS for name in KINDS[kind]}


def test_reasons_are_sentences_about_the_model() -> None:
    for one in results():
        if one["result"] == "refused":
            assert "list index out of range" not in one["reason"], one
            assert "no output matrix" not in one["reason"], one


@needs_5_24
@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("vision", "paligemma", "its tokens attend to later tokens"),
        ("causal", "gpt_neo", "does not go through transformers' registry"),
        ("causal", "deepseek_v4", r"caches more than keys and values of single tokens \(DeepseekV4"),
        ("causal", "qwen4_exp_text", "reads the layers of transformers' own cache"),
        ("causal", "inkling2_text", "position_bias, sinks"),
        ("causal", "openai-gpt", "fills no cache of transformers"),
    ],
)
def test_a_refusal_names_the_reason(kind: str, name: str, reason: str) -> None:
    if name not in KINDS[kind]:
        pytest.skip(f"this version of transformers has no {name}")
    with pytest.raises(UnsupportedTargetError, match=reason):
        Target(tiny_type(name, kind))


@needs_5_24
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_falcon_with_alibi(attention: str) -> None:
    """Falcon adds the bias twice in its eager attention, and once in the other; texts and trees are those of both."""
    model: Any = tiny("falcon", {"num_key_value_heads": None, "head_dim": None, "alibi": True})
    model.set_attn_implementation(attention)
    rows = program().prompts()
    fixed: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}
    expected = model.generate(**rows, **fixed)
    decoder = Decoder(model, "recycling", tree_size=12)
    assert torch.equal(model.generate(**rows, custom_generate=decoder, **fixed), expected)
    assert torch.equal(model.generate(**rows, **fixed), expected)
    assert not any("forward" in vars(module) for module in model.modules())


@needs_5_24
def test_positions_begin_where_those_of_generate_begin() -> None:
    assert Target(tiny_type("paligemma", "vision"), probe=False).first_position == 1
    assert Target(tiny_type("llama", "causal"), probe=False).first_position == 0


@needs_5_24
def test_an_indexer_selects_keys_beside_an_active_target_too() -> None:
    model: Any = tiny_type("deepseek_v32", "causal")
    ids = torch.randint(3, 99, (2, 13), generator=torch.Generator().manual_seed(1))
    plain = model(ids).logits
    model.config.index_topk, everything = 64, [module for module in model.modules() if hasattr(module, "index_topk")]
    with Target(model).active():
        assert torch.equal(model(ids).logits, plain)
        for module in everything:
            module.index_topk = 64
        assert not torch.allclose(model(ids).logits, plain), "the indexer hides nothing, so the test shows nothing"
