"""Models whose layers depend on a text's length: rotary frequencies, scaled queries, windows, the end of the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from families import MLA, exists, tiny
from medhead import Decoder
from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model.target import Target

NEW = Version(transformers.__version__) >= Version("5.24")
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG: dict[str, Any] = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "sliding_window": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", LONG | {"head_dim": None}),
    "phimoe": ("phimoe", LONG | {"rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.2}}),
    "minicpm3": ("minicpm3", MLA | LONG),
    "llama": ("llama", LONG),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "scaled queries": (
        "llama4_text",
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 200,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
            "floor_scale": 32,
            "attn_scale": 1.0,
        },
    ),
}
CASES["phimoe"][1].update(num_local_experts=4, num_experts_per_tok=2)
CASES["dynamic"][1].update(max_position_embeddings=64)


def prompts_of(length: int) -> tuple[Tensor, Tensor]:
    """Return two prompts, the second padded by a third of its length, and their mask."""
    ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, : length // 3] = mask[1, : length // 3] = 0
    return ids, mask


def own_text(model: PreTrainedModel, prompt: Tensor, new: int) -> list[int]:
    """Return what `generate` writes after a prompt alone."""
    model(prompt[None, :2])  # `dynamic` frequencies are those of the longest text until a short one comes
    return model.generate(prompt[None], max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()


@pytest.mark.filterwarnings("ignore:a text reached")
@pytest.mark.parametrize("chunk", [1024, 16])
@pytest.mark.parametrize("length", [50, 70])
@pytest.mark.parametrize("name", CASES)
def test_texts_that_cross_a_length_are_those_of_generate(
    name: str, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = CASES[name]
    if not exists(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    if kind in ("phi3", "phimoe") and not NEW:
        pytest.skip("generate of older versions reads one token anew, not the text")
    monkeypatch.setattr("medhead.model.target.PREFILL_CHUNK", chunk)
    model = tiny(kind, changes)
    model.generation_config.eos_token_id = None
    ids, mask = prompts_of(length)
    expected = [own_text(model, row[kept.bool()], 30) for row, kept in zip(ids, mask, strict=True)]
    for proposer in ("none", "recycling"):
        with Decoder(model, proposer) as decoder:
            found = decoder.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
        assert found[:, length:].tolist() == expected, proposer


def test_a_model_keeps_its_rotary_frequencies() -> None:
    model = tiny(*CASES["dynamic"])
    before = [buffer.clone() for buffer in model.buffers()]
    with Decoder(model, "none") as decoder, pytest.warns(UserWarning, match="a text reached 64 tokens"):
        decoder.generate(prompts_of(60)[0], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_a_text_beyond_the_context_goes_on_and_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny("llama", {"max_position_embeddings": 64})
    model.generation_config.eos_token_id = None
    ids = prompts_of(50)[0][:1]
    for _ in range(2):
        with Decoder(model, "recycling") as decoder:
            found = decoder.generate(ids, max_new_tokens=30, do_sample=False)
        assert found[0, 50:].tolist() == own_text(model, ids[0], 30)
    assert sum("it goes on as in transformers" in str(one.message) for one in recwarn) == 1


def test_a_table_of_positions_ends_a_text_with_a_warning() -> None:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None, "head_dim": None}
    model = tiny("opt", sizes | {"max_position_embeddings": 64})
    with Decoder(model, "none") as decoder:
        with pytest.warns(UserWarning, match="it ends there, because the model has no further positions"):
            found = decoder.generate(prompts_of(50)[0], max_new_tokens=30, do_sample=False, eos_token_id=None)
        assert found.shape[1] == 64
        with pytest.raises(MedheadError, match="the model's context is 64"):
            decoder.generate(prompts_of(64)[0], max_new_tokens=2)


def test_a_window_in_the_cache_alone_is_refused() -> None:
    if not NEW:
        pytest.skip("in older versions moshi's attention does not go through the registry")
    model = tiny("moshi", {"sliding_window": 16, "num_codebooks": 2, "num_key_value_heads": None, "ffn_dim": 48})
    with pytest.raises(UnsupportedTargetError, match="its window of 16 tokens exists only in transformers' cache"):
        Target(model)


def test_the_probe_looks_beyond_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medhead.model.attention.rescale_query", lambda module, query, current: query)
    with pytest.raises(UnsupportedTargetError, match="a tree's logits differ"):
        Target(tiny(*CASES["scaled queries"]))
