"""The command line: what it prints, how it ends, and one line for everything that can be wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import hear_ctrl_c
from medhead.check import compare as compare_texts
from medhead.cli import compare as medhead_compare
from medhead.cli import generate
from medhead.cli.main import BENCHMARKS, COMMANDS
from medhead.cli.main import main as medhead
from medhead.config import ATTENTION_NAMES, PROPOSER_NAMES
from medhead.datastore import build_datastore
from medhead.model import loading
from medhead.model.target import ATTENTIONS
from medhead.proposers import PROPOSERS


def command(folders: dict[str, Path], *more: str, prompt: str | None = "Once upon a time") -> list[str]:
    """Options for the tiny model, with a prompt."""
    given = [] if prompt is None else ["--prompt", prompt]
    return ["--model", str(folders["model"]), *given, "--max-new-tokens", "24", *more]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        code = generate.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["--help"], capsys)
    assert code == 0
    for name in ("--heads", "--tree-size", "--check", "--compare", "--trace", "--json", "examples:", "exit codes"):
        assert name in out


def test_json_says_everything(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(command(folders, "--heads", str(folders["recurrent"]), "--json", "--check"), capsys)
    assert code == 0, err
    result = json.loads(out)
    assert result["identical"] is True
    assert result["new_tokens"] == len(result["token_ids"]) <= 24
    assert result["proposer"] == "hybrid"
    assert result["accepted_length"] == pytest.approx(result["new_tokens"] / result["passes"], abs=1e-3)
    assert set(result) >= {"text", "prompt_tokens", "seconds", "tokens_per_second"}
    assert result["finish_reason"] == "length"


def test_comparing_shows_the_answer_first_and_counts_the_runs(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer streams before anything is timed; the count is updated in place on a terminal alone."""
    plain = run(command(folders), capsys)[1]
    seen: list[str] = []
    compare = medhead_compare.compare
    with monkeypatch.context() as patched:
        patched.setattr(
            medhead_compare, "compare", lambda *given: (seen.extend(capsys.readouterr()), compare(*given))[1]
        )
        code, out, err = run(command(folders, "--compare"), capsys)
    assert (code, seen[0], err) == (0, plain, "")
    assert out.startswith(" ")
    assert seen[1].endswith("medhead: 17 more runs\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, out, err = run(command(folders, "--compare"), capsys)
    lines = err.split("\r")
    assert [line for line in lines if "medhead: run " in line] == [f"medhead: run {n} of 18" for n in range(2, 19)]
    assert lines[-2].strip() == ""
    code, out, err = run(command(folders, "--compare", "--quiet"), capsys)
    assert (code, err) == (0, "")


def test_comparing_as_json(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(command(folders, "--compare", "--json", "--check", "--proposer", "ngram"), capsys)
    found = json.loads(out)
    assert (code, found["identical"]) == (0, True)
    assert list(found["compare"]) == ["medhead ngram", "medhead plain", "transformers generate"]
    assert all(one["identical"] and one["tokens_per_second"] > 0 for one in found["compare"].values())


def test_what_the_statistics_say_about_the_end(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer cut by the limit or by the context, one that ended by itself, and an empty one."""
    load, load_tokenizer, ends = loading.load_model, loading.load_tokenizer, [-1]

    def load_ending(*given: Any) -> Any:
        model = load(*given)
        model.generation_config.eos_token_id = ends
        return model

    def without_end(*given: Any) -> Any:
        tokenizer = load_tokenizer(*given)
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(loading, "load_model", load_ending)
    monkeypatch.setattr(loading, "load_tokenizer", without_end)
    assert ", cut at 24 tokens (--max-new-tokens N for more)" in run(command(folders), capsys)[2]
    assert "tokens (the model's context is full)" in run(command(folders, "--max-new-tokens", "500"), capsys)[2]
    ends[0] = json.loads(run(command(folders, "--json"), capsys)[1])["token_ids"][0]
    code, out, err = run(command(folders), capsys)
    assert (code, "cut at" in err) == (0, False)
    assert ("the answer is empty" in err) == (not out.strip())
    assert json.loads(run(command(folders, "--json"), capsys)[1])["finish_reason"] == "stop"


def test_speculation_that_brings_nothing_says_what_to_do(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, where draft tokens without heads were hardly ever accepted; not with heads, --quiet or --json."""
    without = (["--quiet"], ["--json"], ["--proposer", "none"], ["--heads", str(folders["medusa"])])
    for low, more, said in ((99.0, [], True), (1.0, [], False), *((99.0, more, False) for more in without)):
        monkeypatch.setattr(generate, "LOW_LENGTH", low)
        monkeypatch.setattr(generate, "MIN_PASSES", 1)
        code, _, err = run(command(folders, *more), capsys)
        assert code == 0
        assert err.count("train heads (medhead finetune)") == said, (low, more)


def test_a_difference_is_said_in_words() -> None:
    """Not in token ids; half precision is named as the cause, a near tie by the logit gap."""
    words = {1: "the", 2: " dog", 3: " cat"}
    found = compare_texts(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), [torch.zeros(1, 4)] * 2)
    assert (found.before, found.logit_gap) == ((1,), 0.0)

    def say(gap: float, dtype: torch.dtype, **more: Any) -> str:
        return replace(found, logit_gap=gap, **more).describe(lambda ids: "".join(words[i] for i in ids), dtype)

    begin = "identical to plain decoding: no; after 'the': ' dog' instead of ' cat', logit gap 0.03"
    assert say(0.03, torch.float32) == begin
    assert (
        say(0.03, torch.bfloat16) == begin + ": near tie in bfloat16; use --exact bitwise on a CPU, or --dtype float32"
    )
    assert say(3.0, torch.bfloat16).endswith(
        "logit gap 3: sums are rounded in bfloat16; use --exact bitwise on a CPU, or --dtype float32"
    )
    assert "at the first token: ' dog' instead of the end" in say(0.1, torch.float32, plain_token=-1, before=())


def test_names_in_help_texts_are_those_of_the_registries() -> None:
    assert sorted(PROPOSER_NAMES) == sorted(set(PROPOSERS) & set(PROPOSER_NAMES))
    assert set(ATTENTION_NAMES) == set(ATTENTIONS)


def test_the_text_does_not_depend_on_what_guesses(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for proposer in (
        ["none"],
        ["ngram"],
        ["recycling"],
        ["lookahead", "--lookahead", "3", "3", "2"],
        ["heads", "--heads", str(folders["medusa"]), "--tree-size", "7"],
    ):
        code, out, err = run(
            command(folders, "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--proposer", *proposer), capsys
        )
        assert code == 0, err
        assert "tokens/s" in err
        texts.add(out)
    assert len(texts) == 1
    code, out, _ = run(command(folders, "--temperature", "0.8", "--top-p", "0.9", "--seed", "4", "--quiet"), capsys)
    assert {out} != texts


def test_a_captured_step(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recorded` stands for the two that users are offered, which need a GPU or a compiler."""
    monkeypatch.setattr(generate, "STEPS", ("loop", "recorded"))
    plain = run(command(folders), capsys)[1]
    code, out, err = run(command(folders, "--heads", str(folders["recurrent"]), "--step", "recorded"), capsys)
    assert (code, out) == (0, plain)
    assert err.startswith("[hybrid, ")
    assert "step recorded]" in err
    code, _, err = run(command(folders, "--proposer", "lookahead", "--step", "recorded"), capsys)
    assert code == 2
    assert "'lookahead' works on the host" in err


def test_compiled_pieces_are_announced(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes half a minute in silence, so it is said; here nothing is compiled."""
    monkeypatch.setattr("medhead.compile.compiled_target.compile_open", lambda function, *_: function)
    plain = run(command(folders), capsys)[1]
    code, out, err = run(command(folders, "--proposer", "ngram", "--step", "compiled"), capsys)
    assert (code, out) == (0, plain)
    assert "medhead: compiling the pass over one node for one text" in err
    assert ", compiled pass]" in err


def test_raw_differs_from_chat(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    chat = json.loads(run(command(folders, "--json"), capsys)[1])
    raw = json.loads(run(command(folders, "--json", "--raw"), capsys)[1])
    system = json.loads(run(command(folders, "--json", "--system", "Be kind."), capsys)[1])
    assert raw["prompt_tokens"] < chat["prompt_tokens"] < system["prompt_tokens"]


def test_prompt_from_a_file_and_from_standard_input(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    expected = run(command(folders), capsys)[1]
    assert run(command(folders, "--prompt-file", str(tmp_path / "prompt.txt"), prompt=None), capsys)[1] == expected
    for more in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
        assert run(command(folders, *more, prompt=None), capsys)[1] == expected


def test_compare_and_trace(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(command(folders, "--compare"), capsys)
    assert code == 0, err
    assert "transformers generate" in out
    assert "identical to plain decoding: yes" in out
    plain = run(command(folders), capsys)[1]
    code, out, _ = run(command(folders, "--trace", "--proposer", "recycling"), capsys)
    assert code == 0
    for colour in ("\033[32m", "\033[4m", "\033[0m"):
        out = out.replace(colour, "")
    assert out == plain


def test_recycling_learns_from_run_to_run(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is made and written back only on request, and knowing more changes no token."""
    state = tmp_path / "state.safetensors"
    code, _, err = run(command(folders, "--recycling-state", str(state)), capsys)
    assert (code, "does not exist" in err) == (2, True)
    options = command(folders, "--recycling-state", str(state), "--json")
    results = []
    for more in (["--save-recycling-state"], [], ["--save-recycling-state", "--compare"]):
        before = state.read_bytes() if state.exists() else b""
        code, out, err = run([*options, *more], capsys)
        assert code == 0, err
        assert (state.read_bytes() == before) == (not more)
        results += [] if "--compare" in more else [json.loads(out)]
    first, second = results
    assert first["proposer"] == second["proposer"] == "recycling"
    assert first["token_ids"] == second["token_ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


WRONG: dict[str, tuple[list[str], str]] = {
    "model": (["--model", "./nowhere"], "model folder './nowhere' does not exist"),
    "model folder without a model": (["--model", "{empty}"], "holds no config.json"),
    "heads": (["--heads", "./nowhere"], "heads folder 'nowhere' does not exist"),
    "heads of another model": (["--heads", "{other}"], "trained for another model"),
    "damaged heads": (["--heads", "{damaged_heads}"], "truncated or damaged"),
    "damaged model": (["--model", "{damaged_model}"], "truncated or damaged"),
    "heads without heads": (["--proposer", "heads"], "needs heads"),
    "empty prompt": (["--prompt", "  "], "the prompt is empty"),
    "long prompt": (["--prompt", "dragon " * 200], "the model's context is 160"),
    "datastore": (["--datastore", "./nowhere"], "datastore folder 'nowhere' does not exist"),
    "no datastore": (["--datastore", "{empty}"], "it is not a medhead datastore"),
    "datastore of another tokenizer": (["--datastore", "{store}"], "built with another tokenizer"),
    "datastore for heads": (
        ["--datastore", "{store}", "--proposer", "heads"],
        "--datastore belongs to the proposer 'ngram', not to 'heads'",
    ),
    "lookahead W": (["--lookahead", "0", "4", "5"], "W (window) of at least 1, got 0"),
    "lookahead size": (["--lookahead", "5", "4", "5", "--tree-size", "9"], "needs 30 nodes, the tree has at most 9"),
    "lookahead numbers": (["--lookahead", "5", "4"], "expected 3 arguments"),
    "lookahead for ngram": (
        ["--lookahead", "5", "4", "5", "--proposer", "ngram"],
        "belongs to the proposer 'lookahead'",
    ),
    "two proposers": (["--lookahead", "5", "4", "5", "--recycling-state", "x"], "not to 'lookahead'"),
    "recycling state": (["--recycling-state", "./nowhere"], "'nowhere' does not exist"),
    "recycling state that is none": (["--recycling-state", "{model}/config.json"], "no recycling state"),
    "recycling state to write": (
        ["--recycling-state", "{model}/config.json", "--save-recycling-state"],
        "no recycling state",
    ),
    "recycling state without a folder": (
        ["--recycling-state", "{empty}/deep/x", "--save-recycling-state"],
        "the folder '{empty}/deep' of --recycling-state does not exist",
    ),
    "saving to nowhere": (["--save-recycling-state"], "needs --recycling-state FILE"),
    "two prompts": (["--prompt-file", "x.txt"], "not both"),
    "new tokens": (["--max-new-tokens", "-5"], "--max-new-tokens must be"),
    "temperature": (["--temperature", "-1"], "--temperature must be"),
    "temperature nan": (["--temperature", "nan"], "--temperature must be"),
    "top p": (["--temperature", "1", "--top-p", "1.5"], "--top-p must be"),
    "top k": (["--temperature", "1", "--top-k", "-1"], "--top-k must be"),
    "top k while greedy": (["--top-k", "4"], "need --temperature above 0"),
    "seed": (["--seed", "-2"], "--seed must be"),
    "tree size": (["--tree-size", "1000"], "--tree-size must be a whole number from 1 to 256, got 1000"),
    "no number": (["--tree-size", "many"], "invalid int value"),
    "device": (["--device", "cuda:77"], "is not available"),
    "no device": (["--device", "toaster"], "is not available"),
    "dtype": (["--dtype", "float7"], "dtype must be"),
    "proposer": (["--proposer", "oracle"], "invalid choice"),
    "option": (["--colour"], "unrecognized"),
}


@pytest.fixture(scope="module")
def wrong_folders(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty").mkdir()
    shutil.copytree(folders["recurrent"], root / "other")
    config = root / "other" / "medhead_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 48}))
    for source, goal, name in (
        ("recurrent", "damaged_heads", "adapter_model.safetensors"),
        ("model", "damaged_model", "model.safetensors"),
    ):
        shutil.copytree(folders[source], root / goal)
        weights = root / goal / name
        weights.write_bytes(weights.read_bytes()[:-200])
    build_datastore([[1, 2, 3]], Strange(), root / "store")
    return {path.name: str(path) for path in root.iterdir()} | {"model": str(folders["model"])}


class Strange:
    """A tokenizer as large as the model's, with other tokens."""

    def get_vocab(self) -> dict[str, int]:
        return {f"strange {index}": index for index in range(300)}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_input_gets_one_line(
    folders: dict[str, Path], wrong_folders: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given, says = WRONG[name]
    code, out, err = run(command(folders, *(value.format(**wrong_folders) for value in given)), capsys)
    assert code == 2
    assert out == ""
    assert says.format(**wrong_folders) in err
    assert err.count("\n") == 1
    assert err.startswith("medhead generate: error: ")


def test_bytes_that_are_no_text_are_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(command(folders, "--prompt", "a\udcff", prompt=None), capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "the prompt cannot be read: it is not UTF-8 text" in err
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8", errors=errors))
        code, _, err = run(command(folders, prompt=None), capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert "standard input cannot be read: it is not UTF-8 text" in err


def test_wrong_prompt_files(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, says in (
        (tmp_path / "missing", "No such file"),
        (tmp_path / "binary", "not UTF-8"),
        (tmp_path, "directory"),
    ):
        code, _, err = run(command(folders, "--prompt-file", str(path), prompt=None), capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err


def test_half_precision_that_the_device_lacks(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lacking)
    code, _, err = run(command(folders, "--dtype", "float16"), capsys)
    assert code == 2
    assert "this cpu cannot compute in float16; use --dtype float32" in err


def test_a_failure_is_code_1(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(generate, "make_decoder", fails)
    code, _, err = run(command(folders), capsys)
    assert code == 1
    assert err == "medhead generate: failed: RuntimeError: out of luck (set MEDHEAD_DEBUG=1 for the traceback)\n"


@pytest.mark.slow
def test_ctrl_c_prints_what_there_is(folders: dict[str, Path]) -> None:
    """A real process, a real signal."""
    arguments = command(folders, "--max-new-tokens", "100", "--raw", prompt="Once")
    slow = "import time, medhead.model.target as t; f = t.Target.verify\n"
    slow += "t.Target.verify = lambda *a: (time.sleep(0.2), f(*a))[1]\n"
    slow += f"import sys; from medhead.generate import main; sys.exit(main({arguments!r}))"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=hear_ctrl_c,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert first + out
    assert out.endswith("\n")
    assert "stopped" in err
    assert "tokens/s" in err
    assert "Traceback" not in err


def test_the_console_script(capsys: pytest.CaptureFixture[str], folders: dict[str, Path]) -> None:
    assert medhead(["generate", *command(folders, "--quiet")]) == 0
    assert capsys.readouterr().err == ""
    assert medhead(["--help"]) == medhead(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in (*COMMANDS, *BENCHMARKS))
    assert out.count("examples:") == out.count("exit codes:") == 2
    for wrong in (["fly"], ["bench", "fly"]):
        assert medhead(wrong) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "unknown command 'fly'; choose from " in err


@pytest.mark.parametrize(
    "line",
    ["", "--help", "--version", "fly", "bench --help", "bench fly", "generate --help", "generate --tree-size 0",
     "chat --help", "serve --max-rows 0", "datastore --help"],
)  # fmt: skip
def test_without_a_command_torch_is_not_imported(line: str) -> None:
    code = "import sys, atexit; from medhead.cli.main import main\n"
    code += "atexit.register(lambda: print(*sorted({'torch', 'transformers'} & {*sys.modules}))); main()"
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_public_names_are_imported_at_their_first_use() -> None:
    code = (
        "import sys, medhead; assert 'torch' not in sys.modules; [getattr(medhead, name) for name in medhead.__all__]; "
    )
    code += "from medhead import Decoder; assert Decoder is medhead.Decoder is sys.modules['medhead.decoder'].Decoder; "
    code += "assert {*medhead.__all__} <= {*dir(medhead)}; medhead.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'medhead' has no attribute 'nothing'"


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the command's import, and while it runs."""

    def missing(*args: Any) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot")

    monkeypatch.setattr("medhead.cli.generate.run", missing)
    for name in ("generate", "chat"):
        if name == "chat":
            monkeypatch.setattr("importlib.import_module", missing)
        assert medhead([name]) == 2
        says = f"medhead {name}: error: matplotlib is not installed: pip install 'medhead[bench]'\n"
        assert capsys.readouterr() == ("", says)


WRONG_BY_COMMAND: dict[str, list[str]] = {  # five lines for each command
    "generate": ["--colour", "--model", "--seed many", "--top-k 3", "--prompt-file ./nowhere"],
    "verify": ["", "--colour", "./nowhere", "{file}", "{file} --model"],
    "chat": ["--colour", "--port", "--port many", "--port 70000", "--auth me"],
    "serve": ["--colour", "--port", "--port many", "--port 70000", "--auth me"],
    "generate-data": [
        "",
        "--prompts ./nowhere --output {new}",
        "--prompts {file} --output {new} --batch-size 0",
        "--prompts {file} --output {new} --temperatures hot",
        "--prompts {file} --output {new} --colour",
    ],
    "finetune": [
        "",
        "--model m --data d --output {new} --epochs 0",
        "--model m --data d --output {new} --kind oracle",
        "--config ./nowhere.yaml",
        "--batch-size many",
    ],
    "evaluate": ["--colour", "--num-prompts 0", "--tree-sizes 1", "--temperatures -1", "--model ./nowhere"],
    "export": [
        "",
        "--heads x --model y --format eagle3 --output {file}",
        "--heads x --model y --format oracle --output {new}",
        "--heads x --model ./nowhere --format eagle3 --output {new}",
        "--heads x --model y --format eagle3 --output {new} --dtype float7",
    ],
    "tune": ["--colour", "--num-prompts 0", "--batch-sizes many", "--proposer lookahead --heads x", "--model ./nowhere"],
    "datastore": [
        "",
        "--text ./nowhere --output {new}",
        "--text {file} --output {file}",
        "--text {file} --output {new} --model x --tokenizer y",
        "--text {file} --output {new} --model ./nowhere",
    ],
    "bench": ["--colour", "--num-prompts 0", "--temperature nan", "--output {file}", "--model ./nowhere"],
    "bench speed": ["--colour", "--num-prompts 0", "--temperature nan", "--output {file}", "--model ./nowhere"],
    "bench step": ["--colour", "--shapes giant", "--nodes 1", "--repeats 0", "--output {file}"],
    "bench tasks": ["", "--colour", "--prompts ./nowhere", "--prompts {file} --repeats 0", "--prompts {file} --output {file}"],
    "bench budget": ["--colour", "--num-prompts many", "--repeats 0", "--output {file}", "--model ./nowhere"],
    "bench kernels": ["--colour", "--nodes many", "--nodes 0", "--device toaster", "--backends oracle"],
    "load-test": [
        "--clients 0",
        "--seconds many",
        "--url localhost:1",
        "--url http://127.0.0.1:1",
        "--url http://127.0.0.1:1 --colour",
    ],
}  # fmt: skip


def test_every_command_is_among_them() -> None:
    assert {*WRONG_BY_COMMAND} == {*COMMANDS, *(f"bench {name}" for name in BENCHMARKS)}
    assert all(len({*lines}) == 5 for lines in WRONG_BY_COMMAND.values())


@pytest.mark.parametrize("name", sorted(WRONG_BY_COMMAND))
def test_every_command_teaches_and_refuses(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--help` shows examples; each wrong input gets one line and exit code 2."""
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> tuple[int, str, str]:
        try:
            code = medhead([*name.split(), *words])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    code, out, err = run(["--help"])
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: medhead {name} ")
    assert f"examples:\n  medhead {name}" in out
    prog = "medhead bench speed" if name == "bench" else f"medhead {name}"
    for line in WRONG_BY_COMMAND[name]:
        code, out, err = run(line.format(file=__file__, new=tmp_path / "new").split())
        assert (code, out, err.count("\n")) == (2, "", 1), (line, err)
        assert err.startswith(f"{prog}: error: "), line


def test_answers_are_constrained(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["red", {"is": "green"}]}')
    for options, allowed in (
        (["--json-schema", str(schema)], ['"red"', '{"is": "green"}']),
        (["--regex", "a{5}b"], ["aaaaab"]),
    ):
        code, out, err = run(command(folders, *options, "--json", "--check"), capsys)
        assert code == 0, err
        result = json.loads(out)
        assert result["text"] in allowed
        assert (result["finish_reason"], result["identical"]) == ("stop", True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--json-schema", "missing.json"], "error: --json-schema 'missing.json' cannot be read"),
        (["--regex", "("], "error: --regex '(': the regex is wrong"),
        (["--json-schema", "wrong.json"], "--json-schema 'wrong.json': the JSON schema is wrong: Invalid type: strin"),
        (["--json-schema", "binary.json"], "is not UTF-8 text"),
        (["--regex", "[a-"], "--regex '[a-': the regex is wrong"),
        (["--regex", "a", "--json-schema", "wrong.json"], "give --json-schema or --regex, not both"),
        (["--regex", "a", "--compare"], "--compare does not go with"),
    ],
)
def test_wrong_grammars_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text('{"type": "strin"}')
    Path("binary.json").write_bytes(b"\xff\xfe")
    code, _, err = run(["--prompt", "Hi", *options], capsys)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
