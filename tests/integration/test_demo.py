"""The demo model that ships with the package: exact, worth its name, small, and documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medhead import Decoder
from medhead.bench.prompts import BUILT_IN, encode_prompts
from medhead.cli import generate
from medhead.heads.config import read_config
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer

MEDUSA = DEMO_HEADS.parent / "heads-medusa"
BLOCK, ATTENTION = (DEMO_HEADS.parent / f"heads-{kind}" for kind in ("block", "attention"))
OPTIONS = {"max_new_tokens": 64}


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return load_model(DEMO_MODEL, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(DEMO_MODEL)


def batch_of_prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, torch.Tensor]:
    rows = encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in BUILT_IN[:count]], 200)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@pytest.mark.parametrize("heads", [DEMO_HEADS, MEDUSA, BLOCK, ATTENTION])
@pytest.mark.parametrize("count", [1, 4])
def test_greedy_text_is_that_of_transformers(
    demo: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, heads: Path, count: int
) -> None:
    inputs = batch_of_prompts(demo_tokenizer, count)
    expected = demo.generate(**inputs, **OPTIONS, do_sample=False)
    with Decoder(demo, "heads", heads=heads) as decoder:
        assert torch.equal(decoder.generate(**inputs, **OPTIONS, do_sample=False), expected)
        assert decoder.statistics.accepted_length > 1.3


@pytest.mark.parametrize("heads", [DEMO_HEADS, MEDUSA, BLOCK, ATTENTION])
def test_seeded_sampling_is_that_of_plain_decoding(
    demo: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, heads: Path
) -> None:
    inputs = batch_of_prompts(demo_tokenizer, 3)
    with Decoder(demo, heads=heads) as decoder:
        report = decoder.check(**inputs, seed=5, **OPTIONS, do_sample=True, temperature=0.8, top_k=0)
    assert report.identical, report


def test_the_default_heads_guess_two_tokens_ahead(
    demo: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Greedy and at temperature 1: looking at the noise makes sampling as fast as greedy decoding."""
    inputs = batch_of_prompts(demo_tokenizer, 8)
    with Decoder(demo, "heads", heads=DEMO_HEADS) as decoder:
        for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 0, "seed": 1}):
            decoder.generate(**inputs, max_new_tokens=100, **sampling)
            assert decoder.statistics.accepted_length > 2.3


def test_recurrent_heads_beat_medusa_heads(demo: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    inputs, lengths = batch_of_prompts(demo_tokenizer, 8), []
    for heads in (DEMO_HEADS, MEDUSA):
        with Decoder(demo, heads=heads, tree_size=16) as decoder:
            decoder.generate(**inputs, max_new_tokens=60, do_sample=False)
            lengths.append(decoder.statistics.accepted_length)
    assert lengths[0] > lengths[1]


def test_the_command_with_no_options_but_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--prompt", BUILT_IN[0], "--json", "--check", "--max-new-tokens", "80"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["identical"] is True
    assert result["proposer"] == "hybrid"
    assert result["accepted_length"] > 1.5


def test_it_is_small_safe_and_documented() -> None:
    files = [path for path in DEMO_MODEL.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    card = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
    assert "# Llama-" in card
    for said in ("Built with Llama", "CDLA-Sharing-1.0", "CC-BY-SA-4.0", "Validation loss", "Five samples"):
        assert said in card
    for folder, kind in ((DEMO_HEADS, "recurrent"), (MEDUSA, "medusa")):
        assert read_config(folder).kind == kind
        assert "Built with Llama" in (folder / "README.md").read_text(encoding="utf-8")
