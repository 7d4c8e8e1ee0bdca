"""The benchmark by task: tasks of a file, truncation, sums, notes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from medhead import Decoder
from medhead.bench.measure import MethodResult, measure
from medhead.bench.task_prompts import Truncation, encode_task, read_tasks
from medhead.bench.task_report import compare_hybrid, compare_texts, rows_of, table, totals
from medhead.bench.tasks import main, methods_of
from medhead.errors import MedheadError
from medhead.model.loading import load_tokenizer
from medhead.model.target import Target
from medhead.proposers import PROPOSERS
from medhead.proposers.base import Proposer, VerifyOutput

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Once upon a time", "Again."]},
    {"question_id": 2, "category": "writing", "turns": ["There was a dragon"]},
    {"question_id": 3, "category": "coding", "turns": ["She went home"]},
    {"question_id": 4, "category": "rag", "turns": ["the dragon said " * 60]},
    {"question_id": 5, "category": "rag", "turns": ["the dragon said"]},
    {"question_id": 6, "category": "rag", "turns": ["She said"]},
]
QUICK = ["--batch-sizes", "1", "--max-new-tokens", "12", "--prompts-per-task", "2"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def run(folders: dict[str, Path], questions: Path, folder: Path, *options: str) -> dict[str, Any]:
    arguments = ["--model", str(folders["model"]), "--prompts", str(questions), "--output", str(folder), *QUICK]
    assert main([*arguments, *options]) == 0
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_a_whole_run(
    folders: dict[str, Path], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every task, proposer, temperature and batch once, and totals; nothing is hidden in the table."""
    heads = ["--heads", str(folders["recurrent"]), "--tree-size", "8", "--batch-sizes", "1", "2", "--title", "a try"]
    content = run(folders, questions, tmp_path / "new", *heads)
    out = capsys.readouterr().out
    rows = content["results"]
    names = ["none", "heads", "ngram", "recycling", "lookahead", "hybrid"]
    assert [(row["temperature"], row["batch_size"], row["task"], row["proposer"]) for row in rows] == [
        (temperature, batch, task, name)
        for temperature in (0, 1)
        for batch in (1, 2)
        for task in ("mt-bench", "rag", "all")
        for name in names
    ]
    for row in rows:
        assert row["prompts"] == (4 if row["task"] == "all" else 2)
        assert row["mismatches"] == 0
        assert row["tree_size"] == {"none": 1, "lookahead": row["tree_size"]}.get(row["proposer"], 8)
        assert row["tree_size"] <= 8
        assert row["step_ms"] > 0
        assert row["forward_ms"] > 0
        assert row["tokens_per_second"] > 0
        assert row["members"] == (["heads", "ngram"] if row["proposer"] == "hybrid" else [])
        if row["proposer"] == "none":
            assert row["accepted_length"] == row["speedup_vs_plain"] == 1
    whole = [row for row in rows if row["task"] == "all" and row["proposer"] == "ngram" and row["batch_size"] == 1]
    parts = [row for row in rows if row["task"] != "all" and row["proposer"] == "ngram" and row["batch_size"] == 1]
    for total, two in zip(whole, (parts[:2], parts[2:]), strict=True):
        assert total["new_tokens"] == sum(row["new_tokens"] for row in two)
        assert total["passes"] == sum(row["passes"] for row in two)
        assert total["accepted_length"] == pytest.approx(total["new_tokens"] / total["passes"], abs=1e-4)
    assert "all 80 texts are identical to plain decoding's" in out
    assert "rag 2, 1 too long and left out" in out
    assert "a try" in out
    assert "trees of 8 nodes" in out
    assert (tmp_path / "new" / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "table.md").read_text().strip() == out.strip()


def test_the_numbers_are_those_of_a_decoder(folders: dict[str, Path], questions: Path, tmp_path: Path) -> None:
    """Tokens and passes of an own loop over the same prompts; proposers keep what they learn within a task only."""
    options = ["--proposers", "recycling", "--tree-size", "6", "--temperatures", "0.8", "--seed", "5"]
    rows = run(folders, questions, tmp_path / "new", *options)["results"]
    target = Target(LlamaForCausalLM.from_pretrained(folders["model"]).eval())
    tokenizer = load_tokenizer(folders["model"])
    for task, texts in {
        "mt-bench": ("Once upon a time", "She went home"),
        "rag": ("the dragon said", "She said"),
    }.items():
        decoder = Decoder(target, "recycling", tree_size=6)
        tokens = passes = 0
        for text in texts:
            chat = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
            sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 5}
            decoder.generate(**ids, max_new_tokens=12, **sampling)
            tokens += decoder.statistics.new_tokens
            passes += decoder.statistics.passes
        row = next(row for row in rows if row["task"] == task and row["proposer"] == "recycling")
        assert (row["new_tokens"], row["passes"]) == (tokens, passes)


def test_repeats_know_nothing_of_each_other(target: Target) -> None:
    """What recycling learnt from an answer would make its repeat easy; the second run takes as many passes as the first."""
    methods, done = methods_of(target, ["recycling"], {"max_new_tokens": 30}, tree_size=8), []
    prompts = [[5, 9, 13], [20, 21], [7, 8]]

    def run(repeats: int, batch_size: int) -> MethodResult:
        return measure(methods, prompts, repeats, batch_size=batch_size, warm=False, progress=done.append)[1]

    once, twice, batch = run(1, 1), run(2, 2), run(1, 2)
    assert twice.passes == [2 * passes for passes in batch.passes]
    assert twice.new_tokens == [2 * tokens for tokens in once.new_tokens]
    assert len(twice.seconds) == 2
    assert done == [1] * 6 + [2, 2, 1, 1] * 2 + [2, 2, 1, 1]


class Broken(Proposer):
    """Changes what is emitted, which no proposer may."""

    def __init__(self, target: Target, tree_size: int = 4) -> None:
        self.seen = 0

    def update(self, verified: VerifyOutput) -> None:
        self.seen += 1
        if self.seen == 20:  # in the second answer
            verified.emitted[0][0] = 3


def test_a_broken_proposer_is_caught(
    folders: dict[str, Path],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(PROPOSERS, "broken", Broken)
    options = ["--proposers", "broken", "ngram", "--temperatures", "0", "--tasks", "rag", "--ignore-eos"]
    rows = run(folders, questions, tmp_path / "new", *options)["results"]
    assert {row["proposer"]: row["mismatches"] for row in rows if row["task"] == "all"} == {
        "none": 0,
        "broken": 1,
        "ngram": 0,
    }
    text = (tmp_path / "new" / "table.md").read_text()
    assert "1 of 4 texts DIFFER from plain decoding's: broken on rag, greedy, batch 1: 1/2" in text
    assert text.splitlines()[6].endswith("| 1/4 |")


def test_tasks_of_a_file(tmp_path: Path, questions: Path) -> None:
    """MT-bench is one task and takes turns; without a category it is chat or text; only what is wanted."""
    tasks = read_tasks(questions)
    assert {name: len(chats) for name, chats in tasks.items()} == {"mt-bench": 3, "rag": 3}
    assert [chat[0]["content"] for chat in tasks["mt-bench"]] == [
        "Once upon a time",
        "She went home",
        "There was a dragon",
    ]
    assert list(read_tasks(questions, ["rag"])) == ["rag"]
    with pytest.raises(MedheadError, match=r"no prompt of qa in .* its tasks: mt-bench, rag"):
        read_tasks(questions, ["rag", "qa"])
    path = tmp_path / "others.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n{"question": "c", "category": "math_reasoning"}\n')
    assert list(read_tasks(path)) == ["chat", "text", "math_reasoning"]
    path.write_text('{"prompt": "a", "category": 3}')
    with pytest.raises(MedheadError, match="category must be a string"):
        read_tasks(path)


def test_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    """The first, the last or both ends stay, whole characters of them; what still does not fit is left out and counted."""
    text = "Once upon a time there was a dragon. She went home."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chat = [{"role": "user", "content": "before"}, {"role": "user", "content": text}]
    kept = {"first": ids[:7], "last": ids[-7:], "ends": ids[:3] + ids[-4:]}
    for keep, expected in kept.items():
        short, cut = Truncation(7, keep)(tokenizer, chat)
        assert cut
        assert short == [chat[0], {"role": "user", "content": tokenizer.decode(expected)}]
    assert Truncation(len(ids))(tokenizer, chat) == (chat, False)
    assert Truncation()(tokenizer, chat) == (chat, False)
    broken, _ = Truncation(1, "first")(tokenizer, [{"role": "user", "content": "日本語日本語"}])
    assert "\ufffd" not in broken[0]["content"]
    chats = [chat[1:], [{"role": "user", "content": "She"}], chat[1:], [{"role": "user", "content": "home"}]]
    whole = encode_task(tokenizer, "t", chats, 3, 12, Truncation())
    assert (len(whole.prompts), whole.left_out, whole.truncated) == (2, 2, 0)
    short_ones = encode_task(tokenizer, "t", chats, 3, 12, Truncation(5))
    assert (len(short_ones.prompts), short_ones.left_out, short_ones.truncated) == (3, 0, 2)


def result(name: str, tokens: list[int], passes: list[int], seconds: float, **more: Any) -> MethodResult:
    numbers = {
        "new_tokens": tokens,
        "passes": passes,
        "seconds": [seconds],
        "steps": sum(passes),
        "decode_seconds": 0.5,
    }
    return MethodResult(name, "float32", 8, **numbers, **more)


def synthetic() -> list[dict[str, Any]]:
    """Two tasks, the second ten times as long."""
    rows = []
    for task, scale, hybrid in (("short", 1, 4), ("long", 10, 60)):
        results = [
            result("none", [20 * scale], [20 * scale], 2.0 * scale),
            result("heads", [20 * scale], [5 * scale], 1.0 * scale),
            result("ngram", [20 * scale], [10 * scale], 0.5 * scale, mismatches=scale > 1),
            result("hybrid", [20 * scale], [hybrid], 2.0 * scale, members=("heads", "ngram")),
        ]
        rows += rows_of(task, results, 0.0, 1)
    return rows + totals(rows)


def test_totals_are_of_all_tokens_and_all_passes() -> None:
    rows = synthetic()
    whole = {row["proposer"]: row for row in rows if row["task"] == "all"}
    assert whole["hybrid"]["accepted_length"] == pytest.approx(220 / 64, abs=1e-4)
    assert whole["ngram"]["speedup_vs_plain"] == pytest.approx(4)
    assert whole["heads"]["tokens_per_second"] == pytest.approx(20)
    assert whole["heads"]["step_ms"] == pytest.approx(1000 / 55, abs=1e-3)
    assert whole["ngram"]["mismatches"] == 1
    assert "| all | 2 | 4.00 (2.00x) | 2.00 (4.00x) | 3.44 (1.00x) | 1/6 |" in table(rows)
    short = [row for row in rows if row["task"] == "short"]
    assert "| all |" not in table(short + totals(short))  # one task is all there is


def test_it_says_where_the_hybrid_loses() -> None:
    rows = synthetic()
    (line,) = compare_hybrid(rows)
    assert line == (
        "greedy, batch 1: the hybrid's accepted length is below its best member's on long (3.33 against 4.00 of heads); "
        "over all tasks 3.44 against 4.00 of heads"
    )
    (line,) = compare_hybrid(
        [row for row in rows if row["task"] == "short"] + totals([r for r in rows if r["task"] == "short"])
    )
    assert "at least its best member's on every task" in line
    assert compare_hybrid([row for row in rows if row["proposer"] != "hybrid"]) == []
    (line,) = compare_hybrid([row | {"tree_size": 64} if row["proposer"] == "hybrid" else row for row in rows])
    assert "accepted length (trees of different sizes) is below its best member's" in line
    assert compare_texts(rows).startswith("1 of 6 texts DIFFER")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompts-per-task", "0"], "--prompts-per-task must be at least 1"),
        (["--truncate", "0"], "--truncate must be at least 1"),
        (["--tree-size", "1"], "--tree-size must be from 2 to 256"),
        (["--temperatures", "0", "-1"], "--temperatures must be"),
        (["--temperatures", "nan"], "--temperatures must be"),
        (["--batch-sizes", "1", "9"], "--batch-sizes must be from 1 to --prompts-per-task 2"),
        (["--seed", "-1"], "--seed must be"),
        (["--tasks", "qa"], "no prompt of qa"),
        (["--prompts", "nowhere.jsonl"], "cannot be read"),
        (["--prompts", __file__], "line 1"),
        (["--heads", "nowhere"], "does not exist"),
        (["--proposers", "heads"], "needs heads"),
        (["--proposers", "oracle"], "invalid choice"),
        (["--max-new-tokens", "160"], "leaves no room"),
        (["--max-new-tokens", "158"], "no prompt fits into 2 tokens"),
        (["--output", __file__], "is a file"),
        (["--dtype", "float7"], "dtype must be"),
        (["--keep", "middle"], "invalid choice"),
    ],
)
def test_wrong_input(
    folders: dict[str, Path], questions: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["--model", str(folders["model"]), "--prompts", str(questions), *QUICK, *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert says in err
    assert [line for line in err.splitlines() if not line.startswith("prompts: ")] == [err.splitlines()[-1]]
