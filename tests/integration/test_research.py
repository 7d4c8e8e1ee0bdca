"""The programs of benchmarks/research on a handful of sentences."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from medhead.core.tree import TokenTree
from medhead_training.demo.repeats import TASKS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "research"))  # they are scripts of no package

import familiar
import repeats
import variety


def test_variety_counts_what_was_not_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [{"prompt_ids": [n], "answer_ids": [1, 2, 3, 4, 5], "temperature": 0.0} for n in (0, 0, 1, 2, 3)]
    other = [{"prompt_ids": [n], "answer_ids": list(range(5 * n, 5 * n + 5)), "temperature": 1.0} for n in range(4)]
    answers, output = tmp_path / "answers.jsonl", tmp_path / "variety.json"
    answers.write_text("".join(json.dumps(record) + "\n" for record in same + other))
    command = ["--answers", str(answers), "--known-tokens", "10", "--test-tokens", "10"]
    (tmp_path / "others.jsonl").write_text("[1, 2]\n")
    assert variety.main([*command, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["0"]["distinct"], found["0"]["new"]) == (0.5, 0.0)
    assert (found["1"]["distinct"], found["1"]["new"]) == (1.0, 1.0)
    assert "| 1 | 4 | 100.0% | 100.0% |" in capsys.readouterr().out
    for wrong, said in (
        ([*command, "--output", str(output)], "exists already"),
        ([*command[:-1], "11"], "lower them"),
        ([*command[:-1], "0"], "must be at least 1"),
        (["--answers", str(tmp_path)], "is not a file"),
        (["--answers", str(tmp_path / "others.jsonl")], "was not written by"),
        ([*command, "--output", str(tmp_path / "nowhere" / "o.json")], "in a folder that does not exist"),
    ):
        assert variety.main(wrong) == 2
        assert said in capsys.readouterr().err


def test_how_far_a_tree_goes_along_a_text() -> None:
    tree = TokenTree.from_parents(torch.tensor([[5, 6, 7, 8, 9, 8]]), torch.tensor([[0, 0, 0, 2, 3, 1]]))
    assert familiar.accepted_length(tree, [7, 8, 9, 1]) == 4
    assert familiar.accepted_length(tree, [7, 8]) == 3  # the text ends
    assert familiar.accepted_length(tree, [6, 8, 9]) == 3
    assert familiar.accepted_length(tree, [1, 7]) == 1


def test_positions_are_as_familiar_as_their_rarest_words() -> None:
    learnt = Counter({(1, 2, 3, 4): 3, (2, 3, 4, 5): 2, (3, 4, 5, 6): 100, (4, 5, 6, 7): 12, (5, 6, 7, 8): 9})
    text = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert familiar.familiarity(text, learnt, 3) == 1  # the rarest of 4 to 7 ends with 5
    assert familiar.familiarity(text, learnt, 4) == 1
    learnt[2, 3, 4, 5] = 30
    assert familiar.familiarity(text, learnt, 4) == 2
    assert familiar.familiarity(text, Counter(), 3) == 0


def test_means_with_equal_shares() -> None:
    """Both guess the same in every class; only the shares differ."""
    of = len(familiar.CLASSES)
    greedy = familiar.summary([[2], [4, 4, 4], *[[]] * (of - 2)])
    sampled = familiar.summary([[2, 2, 2], [4], *[[]] * (of - 3), [9]])
    found = familiar.ratios(greedy, sampled)
    assert greedy["accepted_length"] == 3.5
    assert found["ratio"] == pytest.approx(19 / 5 / 3.5)
    assert found["ratio_with_shares_of_greedy"] == found["ratio_with_shares_of_sampled"] == 1


def test_familiar_and_unfamiliar_text(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt, prompts, output = (tmp_path / name for name in ("learnt.jsonl", "prompts.jsonl", "out"))
    learnt.write_text('{"prompt_ids": [3], "answer_ids": [5, 6, 7, 8, 9]}\n')
    prompts.write_text('{"messages": [{"role": "user", "content": "The dragon said"}]}\n' * 2)
    given = ["--model", str(folders["model"]), "--training-text", str(learnt), "--prompts", str(prompts)]
    given += ["--output", str(output)]
    short = ["--max-new-tokens", "24", "--tree-size", "6", "--width", "2", "--branching", "2"]
    command = [*given, "--heads", str(folders["recurrent"]), *short]
    assert familiar.main(command) == 0
    found = json.loads((output / "familiar.json").read_text())
    assert found["greedy"]["positions"] > 0
    assert 1 <= found["sampled"]["accepted_length"] <= 5
    assert sum(of["share"] for of in found["greedy"]["classes"]) == pytest.approx(1)
    assert (output / "familiar.png").stat().st_size > 1000
    assert "with equal shares of every class" in capsys.readouterr().out
    for wrong, said in (
        (command, "exists already"),
        ([*command[:-6], "--max-new-tokens", "3", "--output", str(tmp_path / "o")], "at least 16"),
        ([*given, "--heads", str(folders["attention"]), "--output", str(tmp_path / "o")], "have a draft cache"),
        ([*command, "--training-text", str(prompts), "--output", str(tmp_path / "o")], "was not written by"),
        ([*command, "--prompts", str(learnt), "--output", str(tmp_path / "o")], "an object with 'messages'"),
        ([*command, "--training-text", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")], "is not a file"),
    ):
        assert familiar.main(wrong) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


STORY = (
    "Once there was a girl named Mila. She liked to play. One day Mila found a red ball. "
    'She said, "I am happy." Her friend Mila was happy too. Then they all went home.'
)


def test_requests_are_written_by_turns_and_never_over_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stories.jsonl").write_text(json.dumps({"text": STORY}) + "\n")
    command = ["--stories", str(tmp_path / "stories.jsonl"), "--output", str(tmp_path / "asked.jsonl"), "--count", "10"]
    assert repeats.main(command) == 0
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [record["category"] for record in asked] == [*TASKS, *TASKS, "repeat", "edit"]
    capsys.readouterr()
    assert repeats.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert repeats.main([*command[:-1], "0"]) == 2
    assert "--count must be at least 1, got 0" in capsys.readouterr().err
    assert repeats.main(["--stories", str(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert "is not a file" in capsys.readouterr().err
    (tmp_path / "stories.jsonl").write_text(json.dumps({"text": "It rained."}) + "\n")
    assert repeats.main([*command[:3], str(tmp_path / "o")]) == 2
    assert "suits the task 'edit'" in capsys.readouterr().err
