"""README and documentation: their examples run, their options exist, their links lead somewhere, and the site builds."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from medhead.cli import main as cli
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted((ROOT / "medhead" / "assets").glob("*/README.md"))
BLOCK = re.compile(
    r"^(?P<mark><!-- [^\n]* -->\n)?```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
FOREIGN_OPTIONS = {"--strict"}  # of other programs, named in the text
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")  # hub ids, for which the demo model stands in
SERVER = "http://127.0.0.1:7860"


class Block(NamedTuple):
    """A block of code on a page, and the comment before it."""

    page: Path
    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        """Whether it is run: Python unless it says no, shell if it says so."""
        return "not run" not in self.mark if self.language == "python" else self.mark == "<!-- runs -->"


def blocks_of(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, one["language"], one["code"], (one["mark"] or "").strip()) for one in found]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in [*PAGES, *CARDS] for block in blocks_of(page)]


def commands_of(code: str) -> list[list[str]]:
    """The words of every medhead command in a block of shell code, `medhead` first."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|)\s", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a quotation over several lines is no command of ours
                continue
            words = [word.removeprefix(".venv/bin/") for word in words]
            if words[:1] == ["medhead"]:
                commands.append(words)
            elif "-m" in words and (module := words[words.index("-m") + 1]).startswith("medhead"):
                commands.append([module, *words[words.index("-m") + 2 :]])
    return commands


@lru_cache
def options_of(command: tuple[str, ...]) -> frozenset[str]:
    """The options that a command's help names; fails if there is no such command."""
    out, code = io.StringIO(), 0
    with redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--help"])
        try:
            if command[0] == "medhead":
                code = cli.main([*command[1:], "--help"])
            else:
                runpy.run_module(command[0], run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code == 0, f"{' '.join(command)}: there is no such command"
    return frozenset(re.findall(r"--[a-z][\w-]*", out.getvalue()))


def split_command(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The command with its subcommands, and its options."""
    count = 1
    while words[0] == "medhead" and count < len(words) and count < 3 and re.fullmatch(r"[a-z][a-z-]*", words[count]):
        count += 1
    return tuple(words[:count]), [word.split("=")[0] for word in words[count:] if word.startswith("--")]


# ---------------------------------------------------------------- text


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_first_commands_are_one_line_each() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    first = [line for line in lines if line.startswith("python3 -m venv ")]
    assert len(first) == 2
    assert "-m medhead.generate --prompt" in first[0]
    assert re.match(r"^python3 -m venv .*-m pytest -n 2$", first[1]), ".ci/run looks for this line"


def links_of(page: Path) -> list[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", link)]


@pytest.mark.parametrize("page", [*PAGES, *CARDS, ROOT / "benchmarks" / "README.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        goal = page if not path else (page.parent / path).resolve()
        assert goal.is_file(), f"{name_of(page)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_included_results_exist(page: Path) -> None:
    for name in re.findall(r'^--8<-- "(.*)"$', page.read_text(encoding="utf-8"), re.MULTILINE):
        assert name.startswith("benchmarks/")
        assert (ROOT / name).is_file(), f"{name_of(page)}: {name}"


def script(path: str) -> Any:
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_of_docs", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("docs/generate.py").main(["--check"]) == 0, capsys.readouterr().err


def test_figures_are_up_to_date() -> None:
    for name, draw in script("docs/figures/draw.py").FIGURES.items():
        assert (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8") == draw(), "run docs/figures/draw.py"


# ---------------------------------------------------------------- commands


SHELL = [block for block in BLOCKS if block.language == "sh"]


@pytest.mark.slow
def test_every_command_and_its_options_exist() -> None:
    found = [(block, *split_command(words)) for block in SHELL for words in commands_of(block.code)]
    assert len(found) > 30
    for block, command, options in found:
        for option in options:
            assert option in options_of(command), f"{name_of(block.page)}: {' '.join(command)} has no {option}"


@pytest.mark.slow
def test_every_option_in_the_text_exists() -> None:
    benchmarks = [("medhead", "bench", name) for name in cli.BENCHMARKS]
    known = frozenset[str]().union(*map(options_of, [*(("medhead", name) for name in cli.COMMANDS), *benchmarks]))
    for page in PAGES:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for code in re.findall(r"`([^`\n]+)`", text):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in known | FOREIGN_OPTIONS, f"{name_of(page)}: {option}"


def filled(code: str, server: str = SERVER) -> str:
    """An example with the demo model and its heads in place of what a reader would have."""
    for name in MODELS:
        code = code.replace(name, str(DEMO_MODEL))
    return code.replace("my-heads", str(DEMO_HEADS)).replace(SERVER, server)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with the files that the examples name."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "manual.txt").write_text("To reset the device, hold the button for ten seconds.\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in SHELL if block.runs), ids=name_of)
def test_shell_examples_run(
    page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks_of(page):
        if block.language != "sh" or not block.runs:
            continue
        for line in filled(block.code).splitlines():
            told, pipe, command = line.rpartition(" | ")
            words, command_words = shlex.split(told), shlex.split(command)
            assert command_words[0] == "medhead", f"{line}: only medhead's commands are run"
            assert not pipe or words[0] == "echo", f"{line}: only echo is piped"
            monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(words[1:]) + "\n"))
            assert cli.main(command_words[1:]) == 0, f"{line}: {capsys.readouterr().err}"


# ---------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of `medhead serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medhead.cli.main", "serve", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                if httpx.get(address + "/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", dict.fromkeys(block.page for block in BLOCKS if block.language == "python" and block.runs), ids=name_of
)
def test_python_examples_run(page: Path, reader: Path, request: pytest.FixtureRequest) -> None:
    blocks = [block for block in blocks_of(page) if block.language == "python" and block.runs]
    needs_server = any(SERVER in block.code for block in blocks)
    address = request.getfixturevalue("server") if needs_server else SERVER
    if page.name == "datastore.md":
        arguments = ["datastore", "--text", "notes", "--output", "my-datastore", "--quiet"]
        assert cli.main(arguments) == 0
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(compile(filled(block.code, address), name_of(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the example needs curl")
def test_the_curl_example_answers(server: str) -> None:
    (code,) = [block.code for block in SHELL if block.page == README and block.code.startswith("curl")]
    done = subprocess.run(["bash", "-c", filled(code, server)], capture_output=True, text=True, timeout=120)
    assert '"chat.completion"' in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------- the walkthrough


def hops(title: str) -> list[str]:
    """The files of one table of the walkthrough, and a check of their number."""
    text = (ROOT / "docs" / "internals" / "walkthrough.md").read_text(encoding="utf-8")
    count, table = re.findall(rf"^## {title}: (\d+) hops\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]
    files = re.findall(r"^\| \d+ \| `([^`]+)` \|", table, re.MULTILINE)
    assert len(files) == int(count)
    return files


class CalledFiles:
    """The files of this checkout whose functions are called while it is active, in all threads started meanwhile."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        if event == "call":
            self.names.add(frame.f_code.co_filename)

    def __enter__(self) -> CalledFiles:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def missing(self, files: list[str]) -> list[str]:
        """Those of these files that were not called."""
        return [name for name in files if str(ROOT / name) not in self.names]


def test_the_walkthrough_of_a_prompt_names_the_files_that_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    with CalledFiles() as called:
        assert cli.main(["generate", "--prompt", "Tell me a short story.", "--max-new-tokens", "8"]) == 0
    assert called.missing(hops("One prompt")) == []


def test_the_walkthrough_of_a_request_names_the_files_that_are_called() -> None:
    testclient = pytest.importorskip("fastapi.testclient", reason="the extra app is not installed")
    from medhead import Decoder
    from medhead.serving import Engine
    from medhead_app.server import build_app
    from medhead_app.service import Service

    model = load_model(DEMO_MODEL, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(DEMO_MODEL)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}], "stream": True, "max_tokens": 8}
    with CalledFiles() as called, Decoder(model, "ngram") as decoder, Engine(decoder, tokenizer) as engine:
        app = build_app(Service(engine, tokenizer, "m"))
        client = testclient.TestClient(app, base_url="http://127.0.0.1")
        assert "[DONE]" in client.post("/v1/chat/completions", json=body).text
    assert called.missing(hops("One API request")) == []


# ---------------------------------------------------------------- the site


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'medhead[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
