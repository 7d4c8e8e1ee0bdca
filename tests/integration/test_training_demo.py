"""The demo recipe on a handful of sentences: every stage runs, is skipped when done, and resumes when killed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medhead import Decoder
from medhead.errors import MedheadError
from medhead.heads.config import read_config
from medhead_training.demo import __main__ as recipe
from medhead_training.demo import answers as sorting
from medhead_training.demo import corpus, pretrain, repeats


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    animals = ["dog", "cat", "bird", "fish", "horse", "mouse"]
    story = "Once upon a time there was a {0}. The {0} liked to play. One day the {0} found a ball and was happy."
    turns = [
        ("user", "I want a table for {0} people."),
        ("assistant", "Which day?"),
        ("user", "Day {0}."),
        ("assistant", "It is booked."),
    ]
    records = {
        "tinystories": [{"text": story.format(animal)} for animal in animals * 20],
        "sgd": [{"messages": [{"role": r, "content": t.format(n)} for r, t in turns]} for n in range(60)],
        "stories_chat": [{"prompt": f"A story about a {a}.", "answer": story.format(a)} for a in animals * 10],
        "general_chat": [
            {"prompt": f"What is a {a}?", "answer": f"A {a} is an animal that lives here."} for a in animals * 10
        ],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.slow
def test_the_whole_recipe(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--data", str(data), "--eval", str(data), "--output", str(out), "--minutes", "0.08", "--answers", "64"]
    options += [
        "--chats",
        "12",
        "--held-out",
        "12",
        "--heads",
        "block",
        "medusa-parent",
        "--heads-steps",
        "2",
        "--tree",
        "8",
        "3",
    ]
    options += ["--hidden", "128", "--layers", "2", "--vocab-size", "320"]
    assert recipe.main(options) == 0, capsys.readouterr().err
    card = (out / "model" / "README.md").read_text()
    assert "Built with Llama" in card
    assert card.count("\n> ") >= 5
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "A story."}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids["input_ids"]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    for kind in ("block", "medusa-parent"):
        config = read_config(out / "heads" / kind)
        assert (config.tree_size, config.tree_depth) == (8, 3)
        assert len(config.accuracies) == config.depth
        written = [
            (out / "heads" / kind / name).read_text() for name in ("README.md", "adapter_config.json", "training.json")
        ]
        assert "Built with Llama" in written[0]
        assert "license: cc-by-sa-4.0" in written[0]
        assert not any(str(tmp_path) in text for text in written)  # no folder of this machine
        with Decoder(model, heads=out / "heads" / kind) as decoder:
            assert torch.equal(decoder.generate(ids, max_new_tokens=20, do_sample=False), expected)
    weights = (out / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert recipe.main(options) == 0  # everything is there: nothing is trained again
    assert capsys.readouterr().err.count(": done") == 6
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    options[options.index("--answers") + 1] = "65"
    assert recipe.main(options) == 2
    assert "holds a run with --answers 64, not 65" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(folder: str) -> list[str]:
        small = ["--hidden", "128", "--layers", "1", "--vocab-size", "320", "--tokens-per-step", "1024", "--steps", "6"]
        return ["--data", str(data), "--output", str(tmp_path / folder), "--save-minutes", "0", *small]

    assert pretrain.main(options("straight")) == 0
    real, calls = pretrain.batch_at, []

    def killed_at_the_fourth(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "batch_at", killed_at_the_fourth)
    assert pretrain.main(options("killed")) == 130
    assert pretrain.main(options("killed")) == 0
    assert len(calls) == 4 + 3  # three steps were kept
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / f / "model") for f in ("straight", "killed"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, msg=name)


def test_wrong_input(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert recipe.main(["--data", str(tmp_path / "empty"), "--output", str(tmp_path / "o")]) == 2
    assert "tinystories.jsonl does not exist" in capsys.readouterr().err
    assert recipe.main(["--data", str(data), "--output", str(tmp_path / "o"), "--chats", "0"]) == 2
    assert "--chats must be at least 1, got 0" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{broken\n')
    with pytest.raises(MedheadError, match=r"bad.jsonl, line 2 is not JSON"):
        list(corpus.read_jsonl(bad))


@pytest.mark.parametrize("turn", [1, 2, 3, 10, 16])
def test_a_loop_is_an_end_that_repeats_itself(turn: int) -> None:
    begin, words = list(range(1000, 1030)), list(range(turn))
    assert sorting.loop_period(begin + words * (sorting.LOOP_WINDOW // turn + 1)) == turn
    assert sorting.loop_period((words * sorting.LOOP_WINDOW)[: sorting.LOOP_WINDOW]) == turn
    assert sorting.loop_period((words * sorting.LOOP_WINDOW)[: sorting.LOOP_WINDOW - 1]) == 0  # too short to tell
    broken = begin + words * (sorting.LOOP_WINDOW // turn + 1)
    broken[-2] = 5000
    assert sorting.loop_period(broken) == 0
    assert sorting.loop_period(list(range(sorting.MAX_PERIOD + 1)) * 5) == 0  # too long a turn


def test_heads_see_loops_several_times_and_are_measured_with_what_they_have_not_seen(tmp_path: Path) -> None:
    loop, plain = [7, 8] * 30, list(range(60))
    said = {
        "answers": [[*plain, number] for number in range(5)] + [loop],
        "chats": [[*plain, 100 + number] for number in range(6)] + [[9, *loop], loop],
        "asked": [[*plain, 3], loop, [1, 2], [1, 2], [*plain, 200]],
    }
    for name, found in said.items():
        lines = (json.dumps({"prompt_ids": [1], "answer_ids": ids}) + "\n" for ids in found)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = {name: tmp_path / f"{name}.jsonl" for name in (*said, "learnt", "fresh")}

    def read(name: str) -> list[list[int]]:
        return [json.loads(line)["answer_ids"] for line in files[name].read_text().splitlines()]

    found = sorting.write_training_answers(files["answers"], files["chats"], files["learnt"], seed=0)
    learnt = read("learnt")
    assert found == (len(learnt), 2)
    assert learnt.count(loop) == learnt.count([9, *loop]) == sorting.LOOP_COPIES
    assert all([*plain, number] in learnt for number in range(5))
    assert sum([*plain, 100 + number] in learnt for number in range(6)) == 6 // sorting.CHAT_FRACTION
    assert len(learnt) == 5 + 2 + 2 * sorting.LOOP_COPIES
    assert sorting.write_held_out_answers(files["asked"], files["learnt"], files["fresh"], seed=0) == 2
    assert sorted(read("fresh")) == [[*plain, 200], [1, 2]]
    with pytest.raises(MedheadError, match="none can be held out"):
        sorting.write_held_out_answers(files["answers"], files["learnt"], files["fresh"], seed=0)


STORY = (
    "Once there was a girl named Mila. She liked to play. One day Mila found a red ball. "
    'She said, "I am happy." Her friend Mila was happy too. Then they all went home.'
)


@pytest.mark.parametrize("task", repeats.TASKS)
def test_answers_repeat_their_prompts(task: str) -> None:
    names = []
    for seed in range(40):
        name, prompt, answer = repeats.request(STORY, random.Random(seed), (task,))
        names.append(name)
        if name == "edit":
            old, new = re.findall(r"call (\w+) (\w+):", prompt)[0]
            answer = re.sub(rf"\b{new}\b", old, answer)
        assert answer
        assert answer in prompt
    assert task in names


def test_a_target_that_is_there_learns_more(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden", "128", "--layers", "1", "--vocab-size", "320", "--tokens-per-step", "1024", "--steps", "2"]
    assert pretrain.main(["--data", str(data), "--output", str(tmp_path / "first"), *small]) == 0
    first = tmp_path / "first" / "model"
    more = ["--data", str(data), "--eval", str(data), "--init-from", str(first), "--mix", "repeats=1", "sgd=0.5"]
    assert pretrain.main([*more, "--output", str(tmp_path / "more"), *small[-4:]]) == 0
    report = json.loads((tmp_path / "more" / "training.json").read_text())
    assert report["mix"] == {"repeats": 1.0, "sgd": 0.5}
    assert report["validation_loss"].keys() == {"repeats", "sgd"}
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (first, tmp_path / "more" / "model"))
    assert old.config.hidden_size == new.config.hidden_size
    assert not torch.equal(old.lm_head.weight, new.lm_head.weight)
    names = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (first, tmp_path / "more" / "model")]
    assert names[0] == names[1]
    again = [*more, "--output", str(tmp_path / "more"), *small[-4:]]
    again[again.index("sgd=0.5")] = "sgd=1"
    assert pretrain.main(again) == 2
    assert "holds a run with another mix" in capsys.readouterr().err
    for option in ("--tokens-per-step", "--warmup", "--steps"):
        assert pretrain.main([*more, "--output", str(tmp_path / "o"), option, "0"]) == 2
        assert f"{option} must be at least" in capsys.readouterr().err
    for wrong in ("nobody=1", "sgd", "sgd=-1"):
        with pytest.raises(SystemExit, match="2"):
            pretrain.main(["--data", str(data), "--output", str(tmp_path / "o"), "--mix", wrong])
        assert repr(wrong) in capsys.readouterr().err
