"""Self-distillation data: what is written, that a killed run ends in the same bytes, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medhead import Decoder
from medhead.compile import kept_pass
from medhead.core.continuous import decode_stream
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker
from medhead_training import generate_data
from medhead_training.data.encode import Encoder
from medhead_training.data.records import read_records

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time"},
    {"question": "She went home.", "answer": "not needed"},
    {"messages": [{"role": "user", "content": "The dragon said"}, {"role": "assistant", "content": "taken off"}]},
    {"turns": ["日本語", "later"]},
    {"text": "A"},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße!"}]},
]
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, PROMPTS)) + "\n")
    return path


def options(folders: dict[str, Path], prompts: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(folders["model"]), "--prompts", str(prompts), "--output", str(output)]
    return [*given, "--batch-size", "2", "--max-new-tokens", "12", *more]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the last line of standard error."""
    try:
        code = generate_data.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    return code, err[-1]


def read(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "data.jsonl"
    code, err = run(options(folders, prompts, output, "--temperatures", "0", "--system", "Be brief."), capsys)
    assert code == 0, err
    assert "tokens/s" in err
    assert "accepted length" in err
    records = read(output)
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    model = AutoModelForCausalLM.from_pretrained(folders["model"], dtype=torch.float32)
    assert [record["index"] for record in records] == list(range(len(PROMPTS)))
    for record in records:
        asked, answer = record["messages"][:-1], record["messages"][-1]
        assert asked[0]["content"] == ("Be kind." if record["index"] == 5 else "Be brief.")
        assert record["prompt_ids"] == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([record["prompt_ids"]])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        assert record["answer_ids"] == expected  # alone and unpadded, it is the same answer
        assert answer == {
            "role": "assistant",
            "content": tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        }
        assert record["temperature"] == 0.0
    by_index = {record["index"]: record["messages"][-2]["content"] for record in records}
    assert by_index == dict(
        enumerate(["Once upon a time", "She went home.", "The dragon said", "日本語", "A", "Grüße!"])
    )
    encoded = [Encoder(tokenizer).encode(record) for record in read_records(output)]  # it is training data
    assert [e.ids for e in encoded] == [r["prompt_ids"] + r["answer_ids"] for r in records]


def test_the_answer_ends_with_its_end_token(
    folders: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tiny model never ends a turn by itself, so a token that it does write is made an end token."""
    assert run(options(folders, prompts, tmp_path / "a.jsonl", "--temperatures", "0"), capsys)[0] == 0
    full = {record["index"]: record["answer_ids"] for record in read(tmp_path / "a.jsonl")}
    end = full[0][4]
    real = generate_data.load_model

    def load(*arguments: Any) -> Any:
        model = real(*arguments)
        model.generation_config.eos_token_id = [end, 1]
        return model

    monkeypatch.setattr(generate_data, "load_model", load)
    assert run(options(folders, prompts, tmp_path / "b.jsonl", "--temperatures", "0"), capsys)[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    for record in read(tmp_path / "b.jsonl"):
        whole = full[record["index"]]
        stop = whole.index(end) if end in whole else len(whole)
        assert record["answer_ids"] == whole[: stop + 1]
        assert record["messages"][-1]["content"] == tokenizer.decode(whole[:stop], skip_special_tokens=True)


def test_the_proposer_does_not_change_the_data(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = set()
    for name, more in (
        ("none", []),
        ("ngram", ["--proposer", "ngram"]),
        ("heads", ["--heads", str(folders["medusa"]), "--tree-size", "5"]),
    ):
        output = tmp_path / f"{name}.jsonl"
        code, err = run(options(folders, prompts, output, "--temperatures", "0.7", "0", *more), capsys)
        assert code == 0, err
        written.add(output.read_bytes())
    assert len(written) == 1


def test_where_compiled_passes_are_kept(
    folders: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decoder runs another target then, which is the one that must be active."""
    written = []
    for names in ("", "a pass of another model"):
        monkeypatch.setattr(kept_pass, "names", lambda names=names: names)
        output = tmp_path / f"{len(written)}.jsonl"
        code, err = run(options(folders, prompts, output, "--temperatures", "0", "--num-answers", "2"), capsys)
        assert code == 0, err
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_counts_temperatures_and_seeds(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def records(name: str, *more: str) -> Records:
        code, err = run(options(folders, prompts, tmp_path / name, *more), capsys)
        assert code == 0, err
        return read(tmp_path / name)

    few = records("few", "--num-answers", "3", "--temperatures", "0.7", "1.1")
    assert [record["temperature"] for record in few] == [0.7, 1.1, 0.7]
    assert [record["index"] for record in few] == [0, 1, 2]
    many = records("many", "--num-answers", "15", "--temperatures", "0.9")
    assert [record["index"] for record in many] == list(range(15))
    answers: dict[int, set[str]] = {}
    for record in many:
        answers.setdefault(record["index"] % 6, set()).add(str(record["answer_ids"]))
    assert [len(answers[n]) for n in range(6)] == [3, 3, 3, 2, 2, 2]  # a prompt that comes again is answered anew
    assert records("other", "--num-answers", "15", "--temperatures", "0.9", "--seed", "7") != many
    short = records("short", "--max-prompt-tokens", "5")
    assert max(len(record["prompt_ids"]) for record in short) == 5
    full = {record["index"]: record["prompt_ids"] for record in many}
    assert all(record["prompt_ids"] == full[record["index"]][-5:] for record in short)


def test_without_a_chat_template(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(folders["model"]).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    given = [*options(folders, prompts, tmp_path / "data.jsonl"), "--model", str(model)]
    assert run([*given, "--system", "Be kind."], capsys) == (
        2,
        "medhead generate-data: error: --system needs a tokenizer with a chat template",
    )
    assert run(given, capsys)[0] == 0
    record = next(record for record in read(tmp_path / "data.jsonl") if record["index"] == 0)
    assert "messages" not in record
    assert record["prompt_ids"] == tokenizer("Once upon a time")["input_ids"]
    assert record["text"] == tokenizer.decode(record["prompt_ids"] + record["answer_ids"], skip_special_tokens=True)
    assert record["text"].startswith("Once upon a time")


# -------------------------------------------------------------------- resuming


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process, a real SIGKILL; then half a line, as a full disk or a power cut leaves it."""
    more = ["--num-answers", "23", "--temperatures", "0.8", "1.0", "--seed", "5"]
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    assert run(options(folders, prompts, straight, *more), capsys)[0] == 0
    slow = "import sys, time; from medhead_training import generate_data as g; line = g.line_of\n"
    slow += "g.line_of = lambda *a: (time.sleep(0.15), line(*a))[1]\n"
    slow += f"sys.exit(g.main({options(folders, prompts, killed, *more)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", slow], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (killed.exists() and killed.read_bytes().count(b"\n") >= 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = killed.read_bytes()
    assert 8 <= left.count(b"\n") < 23
    assert set(left.splitlines()[:-1]) <= set(straight.read_bytes().splitlines())
    killed.write_bytes(left[: -len(left.splitlines()[-1]) // 2])
    code, err = run([*options(folders, prompts, killed, *more), "--batch-size", "5"], capsys)
    assert code == 0, err
    assert killed.read_bytes() == straight.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "killed" in path.name].count("killed.jsonl") == 1
    before = killed.stat().st_mtime_ns
    assert run(options(folders, prompts, killed, *more), capsys) == (0, "")  # nothing is left to do
    assert killed.stat().st_mtime_ns == before


def test_it_goes_on_from_every_place(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--num-answers", "5", "--temperatures", "0.8"]
    straight = tmp_path / "straight.jsonl"
    assert run(options(folders, prompts, straight, *more), capsys)[0] == 0
    whole = straight.read_bytes()
    lines = whole.splitlines(keepends=True)
    for number in range(len(lines)):
        for torn in (b"", lines[number][:1], lines[number][:-1]):
            straight.write_bytes(b"".join(lines[:number]) + torn)
            code, err = run(options(folders, prompts, straight, *more), capsys)
            assert code == 0, err
            assert straight.read_bytes() == whole
    straight.unlink()  # killed before the first line
    assert run(options(folders, prompts, straight, *more), capsys)[0] == 0
    assert straight.read_bytes() == whole


def test_ctrl_c_keeps_what_is_written(
    folders: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = generate_data.line_of, list[int]()

    def interrupted(*arguments: Any) -> bytes:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(generate_data, "line_of", interrupted)
    code, err = run(options(folders, prompts, tmp_path / "data.jsonl"), capsys)
    assert (code, err) == (130, "medhead generate-data: stopped")
    assert len(read(tmp_path / "data.jsonl")) == 4


def test_places_are_filled_as_answers_end(folders: dict[str, Path]) -> None:
    """Count the passes: with 2 places, answers of 2, 3, ... tokens take about half the sum of their lengths."""
    model = AutoModelForCausalLM.from_pretrained(folders["model"], dtype=torch.float32).eval()
    decoder, lengths = Decoder(model, "none"), [2, 13, 3, 4, 2, 5, 3, 2]
    with torch.no_grad():
        alone = [decoder.generate(torch.tensor([[7, 8 + n]]), max_new_tokens=n)[0, 2:].tolist() for n in lengths]
    given = [Sequence([7, 8 + n], [7, 8 + n], StopChecker(n)) for n in lengths]
    loop = decoder.new_loop()
    steps, step = [], loop.step
    loop.step = lambda: (steps.append(len(loop.sequences)), step())[1]  # type: ignore[method-assign]
    with loop.active():
        ended = list(decode_stream(loop, iter(given), 2))
    assert [one.output_ids for one in given] == alone
    assert sorted(map(id, ended)) == sorted(map(id, given))
    assert sum(steps) == sum(lengths) - len(
        lengths
    )  # the prompts give first tokens, no pass holds a sequence that has ended
    assert steps.count(2) >= len(steps) - 2  # both places are taken but at the end


# -------------------------------------------------------------------- refusals


def test_nothing_else_is_overwritten(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(output: Path, *more: str) -> str:
        before = output.read_bytes() if output.is_file() else None
        code, err = run(options(folders, prompts, output, "--temperatures", "0.5", *more), capsys)
        assert code == 2
        assert err.startswith("medhead generate-data: error: ")
        assert before is None or output.read_bytes() == before
        return err

    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"text": "mine"}\n')
    assert "was not written by this command" in refused(foreign)
    foreign.write_text("")
    assert "was not written by this command" in refused(foreign)
    assert "was not written by this command" in refused(tmp_path)
    (tmp_path / "foreign.jsonl.meta.json").write_text('{"written_by": "somebody"}')
    assert "is not from this version of the command" in refused(foreign)
    (tmp_path / "foreign.jsonl.meta.json").write_text("{")
    assert "is not from this version of the command" in refused(foreign)

    own = tmp_path / "own.jsonl"
    assert run(options(folders, prompts, own, "--temperatures", "0.5"), capsys)[0] == 0
    for more, says in (
        (["--seed", "3"], "was started with --seed 0, now it is 3"),
        (["--num-answers", "5"], "was started with --num-answers 6, now it is 5"),
        (["--system", "Be kind."], "--system null"),
        (["--temperatures", "0.5", "0"], "--temperatures"),
        (["--max-new-tokens", "13"], "--max-new-tokens"),
        (["--max-prompt-tokens", "9"], "--max-prompt-tokens"),
        (["--dtype", "bfloat16"], "--dtype"),
        (["--prompts", str(own)], "--prompts"),
    ):
        assert says in refused(own, *more)
    lines = own.read_bytes().splitlines(keepends=True)
    for content in ([lines[1], *lines[1:]], [b"x\n", *lines[1:]], [*lines, lines[0]], [b"5\n"], [b'{"index": 6}\n']):
        own.write_bytes(b"".join(content))
        assert "is not what this command wrote" in refused(own)
    own.write_bytes(lines[0])
    other = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folders["model"])
    model.lm_head.weight.data.mul_(2.0)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(folders["model"]).save_pretrained(other)
    assert "was started with --model" in refused(own, "--model", str(other))


def test_two_processes_do_not_write_to_one_file(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data.jsonl"
    assert run(options(folders, prompts, output), capsys)[0] == 0
    output.write_bytes(b"")
    file = generate_data.ResumableFile(output, generate_data.WRITER)
    with file.open():
        code, err = run(options(folders, prompts, output), capsys)
        assert code == 2
        assert "another process is writing" in err
    assert run(options(folders, prompts, output), capsys)[0] == 0


WRONG: dict[str, tuple[list[str], str]] = {
    "no prompts file": (["--prompts", "./nowhere.jsonl"], "does not exist"),
    "a folder of prompts": (["--prompts", "{folder}"], "cannot be read: Is a directory"),
    "empty prompts": (["--prompts", "{empty}"], "holds no prompt"),
    "a wrong prompt": (["--prompts", "{wrong}"], "line 2: expected `messages`, `prompt`"),
    "no JSON": (["--prompts", "{broken}"], "line 1 is not JSON"),
    "a refused role": (
        ["--prompts", "{roles}"],
        "line 1: the model's chat template refuses these messages: roles are system",
    ),
    "count": (["--num-answers", "0"], "--num-answers must be at least 1"),
    "batch": (["--batch-size", "0"], "--batch-size must be"),
    "new tokens": (["--max-new-tokens", "0"], "--max-new-tokens must be"),
    "prompt tokens": (["--max-prompt-tokens", "0"], "--max-prompt-tokens must be"),
    "context": (["--max-new-tokens", "160"], "do not fit the model's context of 160"),
    "both": (["--max-prompt-tokens", "150"], "and --max-prompt-tokens 150 do not fit the model's context of 160"),
    "temperature": (["--temperatures", "0.5", "nan"], "--temperatures must be"),
    "seed": (["--seed", "-1"], "--seed must be"),
    "tree size": (["--tree-size", "257"], "--tree-size must be"),
    "greedy again": (
        ["--num-answers", "7", "--temperatures", "0.5", "0"],
        "greedy decoding (--temperatures 0) would repeat",
    ),
    "model": (["--model", "./nowhere"], "model folder './nowhere' does not exist"),
    "heads": (["--heads", "./nowhere"], "does not exist"),
    "proposer without heads": (["--proposer", "heads"], "needs heads"),
    "device": (["--device", "toaster"], "is not available"),
    "dtype": (["--dtype", "float7"], "dtype must be"),
    "no number": (["--num-answers", "many"], "invalid int value"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_input_gets_one_line_and_writes_nothing(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"folder": tmp_path}
    for title, content in (
        ("empty", "\n"),
        ("wrong", '{"prompt": "a"}\n{"story": "b"}\n'),
        ("broken", "{\n"),
        ("roles", '{"messages": [{"role": "tool", "content": "a"}]}\n'),
    ):
        places[title] = tmp_path / f"{title}.jsonl"
        places[title].write_text(content)
    given, says = WRONG[name]
    output = tmp_path / "out" / "data.jsonl"
    arguments = options(folders, prompts, output, *(value.format(**places) for value in given))
    try:
        code = generate_data.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not output.parent.exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate_data.main(["--help"])
    out = capsys.readouterr().out
    for name in ("--temperatures", "--heads", "--max-prompt-tokens", "examples:", "exit codes", "start it again"):
        assert name in out


def test_too_large_a_batch(
    folders: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generate_data, "answer_prompts", fails)
    code, err = run(options(folders, prompts, tmp_path / "data.jsonl"), capsys)
    assert code == 2
    assert (
        "--batch-size 2 is too large for the memory of this device; start again with a lower one: the answers are kept"
        in err
    )
