"""The part of benchmarks/vllm/check.py that needs no vLLM: what it counts, and which cases and options it takes."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import noise_heads
from medhead import MedheadError
from medhead.model.target import Target

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "vllm" / "check.py"


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_check", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module  # where its dataclass looks
    spec.loader.exec_module(module)
    return module


def test_drafts_are_compared_at_the_same_root_of_the_same_text(check: Any) -> None:
    plain = [{"tokens": [1, 2, 3, 4, 5]}, {"tokens": [1, 2]}]
    vllm = [
        {"tokens": [1, 2, 3, 4, 5], "passes": [(1, [2, 9]), (3, [4, 5]), (5, [6, 6])]},
        {"tokens": [7], "passes": []},
    ]
    ours = [{"tokens": [1, 2, 3, 4, 5], "passes": [(1, [2, 8]), (3, [4])]}, {"tokens": [1, 2], "passes": [(1, [3, 3])]}]
    row = check.compare(plain, vllm, ours)
    assert (row["texts_of_plain_vllm"], row["texts_of_medhead"], row["prompts"]) == (1, 1, 2)
    assert (row["drafts"], row["drafts_equal"]) == (3, 2)  # the last pass of vLLM is behind the text
    assert (row["vllm_tokens"], row["vllm_passes"], row["medhead_tokens"], row["medhead_passes"]) == (4, 2, 5, 3)


def test_our_chain_is_noted_pass_by_pass(check: Any, target: Target) -> None:
    prompt, depth = [3, 1, 4, 1, 5], 3
    whole = target.model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, len(prompt) :].tolist()
    answer = check.run_medhead(target, noise_heads(target, "recurrent"), prompt, 9, depth)
    assert answer["tokens"] == whole
    assert answer["passes"][0][0] == 1
    assert len(answer["passes"][0][1]) == depth
    row = check.compare([answer], [answer], [answer])
    assert row["drafts"] == row["drafts_equal"] > 0
    assert row["medhead_tokens"] == len(whole) - 1 >= row["medhead_passes"]


def test_every_format_of_a_kind_is_a_case(check: Any, target: Target) -> None:
    cut = noise_heads(target, "attention", draft_vocab=9)
    cases = [(case.format, case.vocabulary) for case in check.cases_of("folder", cut)]
    assert cases == [("speculators", "draft"), ("speculators", "all"), ("eagle3", "draft"), ("eagle3", "all")]
    assert not list(check.cases_of("folder", noise_heads(target, "recurrent")))


def test_results_of_other_options_are_not_mixed(check: Any, tmp_path: Path) -> None:
    args = Namespace(model=None, prompts=tmp_path / "p", num_prompts=2, max_new_tokens=8, output=tmp_path)
    content = check.load(args) | {"vllm": "1.0", "plain": []}
    refused = {"heads": "h", "format": "mlp_speculator", "vocabulary": "all", "draft_tokens": 3, "loads": False}
    content["results"] = [refused | {"refused_by": "vLLM", "error": "no such model"}]
    check.save(args, content)
    assert check.load(args) == content
    table = (tmp_path / "table.md").read_text()
    assert "| h | `mlp_speculator` | all tokens | 3 | no (vLLM) | - |" in table
    assert "- h, `mlp_speculator`: refused by vLLM: no such model" in table
    args.num_prompts = 3
    with pytest.raises(MedheadError, match="holds results of other options"):
        check.load(args)
