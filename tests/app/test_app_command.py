"""`medhead chat` and `medhead serve`: what they print, how they end, and one line for every wrong input."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_engine import FakeEngine

from conftest import hear_ctrl_c
from medhead.cli import main as cli
from medhead.errors import MedheadError
from medhead_app import command
from medhead_app.listen import bind, run_in_thread, url_of
from medhead_app.server import build_app
from medhead_app.service import Service
from medhead_app.startup import model_name


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    try:
        code = command.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, capsys.readouterr().err


SHARED_OPTIONS = ("--model", "--heads", "--proposer", "--host", "--port", "--auth", "--max-rows", "exit codes")


@pytest.mark.parametrize(
    ("main", "shown", "hidden"),
    [
        (command.main, ("usage: medhead chat ", "--share", "--no-page", *SHARED_OPTIONS), ()),
        (command.serve, ("usage: medhead serve ", *SHARED_OPTIONS), ("--no-page", "--share", "Gradio")),
    ],
)
def test_help_teaches(main: Any, shown: tuple[str, ...], hidden: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert [text for text in shown if text not in out] == []
    assert [text for text in hidden if text in out] == []


def test_serve_needs_no_page(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "gradio" else real(name))
    assert command.serve(["--host", "no such host"]) == 2
    assert capsys.readouterr().err.startswith("medhead serve: error: --host 'no such host' with --port 7860")


def test_the_console_script_knows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["--help"]) == 0
    assert "chat " in capsys.readouterr().out
    assert cli.main(["chat", "--no-page", "--max-rows", "0"]) == 2
    assert "--max-rows must be from 1 to 4096, got 0" in capsys.readouterr().err

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name}", name="fastapi")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["chat"]) == 2
    assert "fastapi is not installed: pip install 'medhead[app]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--auth", "me"], "--auth must be USER:PASSWORD"),
        (["--auth", ":secret"], "--auth must be USER:PASSWORD"),
        (["--share"], "--share makes the page public; leave out --no-page"),
        (["--tree-size", "0"], "--tree-size must be a whole number from 1 to 256, got 0"),
        (["--max-queue", "-1"], "--max-queue must be from 0"),
        (["--time-limit", "nan"], "--time-limit must be above 0, got nan"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens must be at least 1"),
        (["--host", "no such host", "--port", "0"], "is not an address"),
        (["--model", "/does/not/exist", "--port", "0"], "model folder '/does/not/exist' does not exist"),
        (["--heads", "/does/not/exist", "--port", "0"], "/does/not/exist"),
        (["--device", "abacus", "--port", "0"], "device 'abacus' is not available"),
        (["--dtype", "int3", "--port", "0"], "dtype must be auto"),
        (["--tool-parser", "odd"], "argument --tool-parser: invalid choice: 'odd'"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(["--no-page", *arguments], capsys)
    assert code == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert expected in lines[0]


def test_a_busy_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = run(["--no-page", "--port", str(port)], capsys)
    assert code == 2
    assert err == f"medhead chat: error: port {port} of 127.0.0.1 is in use; choose another one with --port\n"


def test_the_page_needs_gradio_and_the_api_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "gradio" else real(name))
    code, err = run(["--port", "0"], capsys)
    assert code == 2
    assert "gradio is not installed: pip install 'medhead[app]' (or serve only the API with --no-page)" in err
    assert command.main(["--no-page", "--host", "no such host"]) == 2
    assert "--host 'no such host' with --port 7860" in capsys.readouterr().err


def test_urls() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url_of(bound))
        assert url_of(bound, "localhost").startswith("http://localhost:")
    with bind("0.0.0.0", 0) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")


def test_models_are_named_by_folder_or_id(folders: dict[str, Path]) -> None:
    assert model_name(str(folders["model"])) == "model"
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


# ---------------------------------------------------------------- the whole program


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Start the program; yield the process, its URL and the lines it has printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", "medhead_app", "--port", "0", *arguments]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hear_ctrl_c)
    printed: list[str] = []
    try:
        assert process.stderr is not None
        for text in process.stderr:
            printed.append(text)
            if "Ctrl-C" in text:
                break
        found = re.search(r"API at (http://\S+)/v1", "".join(printed))
        assert found, "".join(printed)
        yield process, found.group(1), printed
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_serves_the_demo_model_until_ctrl_c() -> None:
    with started("--no-page", "--auth", "me:secret", "--max-rows", "1") as (process, url, printed):
        assert "loading medhead-demo (float32 on cpu) ..." in printed[0]
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            assert b'"status":"ok"' in answer.read()
        body = {"model": "medhead-demo", "messages": [{"role": "user", "content": "Tell me a story."}]}
        key = {"Authorization": "Bearer secret"}
        whole = httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 20}, headers=key, timeout=60)
        assert whole.json()["usage"]["completion_tokens"] == 20
        url, body = f"{url}/v1/chat/completions", body | {"stream": True, "seed": 1, "max_tokens": 900}
        with httpx.stream("POST", url, json=body, headers=key, timeout=60) as reading:
            lines = reading.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)  # while a client reads
            last = [line for line in lines if line][-1]
        _, rest = process.communicate(timeout=20)
    assert "the server is stopping" in last or last == "data: [DONE]"  # the answer may have been that short
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "medhead chat: stopped"
    assert "Traceback" not in rest


# ---------------------------------------------------------------- a page beside the API


@pytest.fixture(scope="module")
def page() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = pytest.importorskip("gradio")
    with gr.Blocks() as blocks:
        gr.Markdown("# hello")
    return blocks


def test_the_page_is_mounted_beside_the_api(page: Any, tokenizer: Any) -> None:
    service = Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]
    with run_in_thread(build_app(service, page, {"css": ".hello { color: red }"}), service) as url:
        shown = httpx.get(url)
        assert shown.status_code == 200
        assert "gradio" in shown.text
        assert ".hello { color: red }" in httpx.get(f"{url}/config").text
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        assert httpx.get(f"{url}/v1/nothing").json()["error"]["code"] == "unknown_url"
        for path in ("docs", "openapi.json", "redoc"):
            assert "swagger" not in httpx.get(f"{url}/{path}").text.lower()


def test_the_page_neither_serves_nor_takes_files(page: Any, tokenizer: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    service = Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]
    with run_in_thread(build_app(service, page), service) as url:
        for path in (secret, Path("/etc/passwd"), Path(__file__)):
            for prefix in ("gradio_api/file=", "file=", "static/..", "gradio_api/stream/.."):
                answer = httpx.get(f"{url}/{prefix}{path}")
                assert answer.status_code in (403, 404, 405), (prefix, path)
        uploaded = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"text")})
        assert uploaded.status_code == 404
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400


def test_open_pages_do_not_keep_it_from_ending(page: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    service = Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]
    with run_in_thread(build_app(service, page), service) as url:
        host, port = url.removeprefix("http://").split(":")
        browser = socket.create_connection((host, int(port)))  # an open page keeps a connection
        browser.sendall(b"GET /gradio_api/heartbeat/somebody HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in browser.recv(1000)
        began = time.perf_counter()
    with browser:
        assert time.perf_counter() - began < 5
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_the_page_asks_for_the_password_too(page: Any, tokenizer: Any) -> None:
    service = Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]
    with run_in_thread(build_app(service, page, auth=("me", "secret")), service) as url:
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, auth=httpx.BasicAuth("me", "secret")).status_code == 200


def test_auth_is_read() -> None:
    assert command.read_auth(None) is None
    assert command.read_auth("me:a:b") == ("me", "a:b")
    with pytest.raises(MedheadError):
        command.read_auth("me:")
