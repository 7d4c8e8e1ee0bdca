"""The load test: what it counts, and that it finds errors, different texts and growing memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from app_engine import FakeEngine

from medhead.errors import MedheadError
from medhead.serving.handle import RequestHandle
from medhead.serving.request import Request
from medhead_app.listen import run_in_thread
from medhead_app.load import command as load
from medhead_app.load import report as load_report
from medhead_app.load import server as load_server
from medhead_app.load.clients import ClientResult, LoadGenerator
from medhead_app.load.server import MemoryMonitor
from medhead_app.server import build_app
from medhead_app.service import Service


class Forgetful(FakeEngine):
    """Emits another text for every request."""

    def submit(self, request: Request) -> RequestHandle:
        self.outputs = (f"answer {len(self.handles)}",)
        return super().submit(request)


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Callable[[FakeEngine], str]]:
    with ExitStack() as stack:

        def start(engine: FakeEngine) -> str:
            engine.decoder.target.context = 512
            service = Service(engine.start(), tokenizer, "tiny")  # type: ignore[arg-type]
            return stack.enter_context(run_in_thread(build_app(service), service))

        yield start


def test_a_run_against_a_server(serve: Callable[[FakeEngine], str], tmp_path: Path, capsys: Any) -> None:
    engine = FakeEngine(pause=0.02)
    line = [
        "--url",
        serve(engine),
        "--clients",
        "2",
        "4",
        "--seconds",
        "0.5",
        "--sample",
        "3",
        "--output",
        str(tmp_path),
    ]
    assert load.main(line) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert "| 3/3 |" in table[2]
    results = json.loads((tmp_path / "results.json").read_text())
    few, many = results["runs"]
    assert few["errors"] == many["errors"] == 0
    assert few["requests"] + many["requests"] + 6 == len(engine.handles)
    assert many["requests"] > few["requests"] >= 4
    assert few["new_tokens"] == 6 * few["requests"]
    assert few["accepted_length"] == 2.0
    assert 20 <= few["first_token_ms"]["median"] <= few["first_token_ms"]["p95"] < 500
    assert few["per_token_ms"]["median"] == pytest.approx(40 / 5, rel=0.8)
    assert (tmp_path / "load.png").stat().st_size > 10_000
    asked = [handle.request.params for handle in engine.handles]
    assert len({params.seed for params in asked if params.temperature}) > 4
    assert {params.temperature for params in asked} == {0.0, 0.7, 1.0}


def test_other_texts_are_found(serve: Callable[[FakeEngine], str], capsys: Any) -> None:
    assert load.main(["--url", serve(Forgetful()), "--clients", "2", "--seconds", "0.2", "--sample", "3"]) == 1
    assert "3 of 3 texts differ from those of requests sent alone" in capsys.readouterr().err


def test_errors_are_counted(serve: Callable[[FakeEngine], str], capsys: Any) -> None:
    line = ["--url", serve(FakeEngine(error="broken")), "--clients", "2", "--seconds", "0.2"]
    assert load.main(line) == 1
    assert "2 errors, the first: ValueError: broken" in capsys.readouterr().err
    load_generator = LoadGenerator(serve(FakeEngine(room=0)), "tiny", 1)
    while not load_generator.results:  # a slow machine may not get an answer in one run
        asyncio.run(load_generator.run(0.1))
    assert "status 429" in (load_generator.results[0].error or "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--url", "localhost:1"], "--url must begin with http://"),
        (["--url", "http://127.0.0.1:1"], "no OpenAI-compatible server answers at http://127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1", "--model", "x"], "--model x: options for a server"),
        (["--clients", "0"], "--clients must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be above 0, got 0.0"),
        (["--plain", "--batching-only"], "--plain goes with neither --url nor --batching-only"),
    ],
)
def test_wrong_input_is_one_line(line: list[str], expected: str, capsys: Any) -> None:
    assert load.main(line) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], [(8, []), (1, [])]),
        (["--plain"], [(8, []), (8, ["--proposer", "none"])]),
        (["--batching-only", "--max-rows", "4"], [(4, [])]),
        (["--url", "http://127.0.0.1:1"], [(None, [])]),
    ],
)
def test_the_servers_that_are_loaded(line: list[str], expected: list[tuple[int | None, list[str]]]) -> None:
    assert load.servers(load.build_parser().parse_args(line)) == expected


def test_a_server_that_does_not_start_says_why() -> None:
    said = "import sys; print('loading', file=sys.stderr); print('medhead serve: error: no model', file=sys.stderr)"
    process = subprocess.Popen([sys.executable, "-c", said], stderr=subprocess.PIPE, text=True)
    with pytest.raises(MedheadError, match=r"did not start: medhead serve: error: no model$"):
        load_server.read_url(process)
    process.communicate()


def test_memory_must_be_flat() -> None:
    memory = MemoryMonitor(1)
    memory.samples = [(second, 100 * 2**20 + (2**20 * second if second < 30 else 40 * 2**20)) for second in range(120)]
    flat = load_report.memory_summary(memory, 120)
    assert (flat["growth"], flat["last_mib"]) == (0.0, 140.0)
    assert load_report.memory_summary(memory, 20)["growth"] is None  # too short to say
    memory.samples[100] = (100, 150 * 2**20)
    row = load_report.summary(8, 4, [], [], 120.0) | {"memory": load_report.memory_summary(memory, 120)}
    assert load_report.failures([row]) == ["8 clients, 4 rows: memory changed by 7.1%"]
    assert "| 140 (7.1%) |" in load_report.table([row])


def test_percentiles() -> None:
    assert load_report.percentile([], 0.95) is None
    assert load_report.percentile([3.0], 0.95) == 3.0
    assert load_report.percentile(list(range(1, 101)), 0.95) == 95
    assert load_report.percentile(list(range(1, 21)), 0.95) == 19


def test_times_are_of_what_went_well() -> None:
    good = ClientResult({}, "text", first=0.1, seconds=1.1, tokens=11, passes=5)
    bad = ClientResult({}, "", seconds=9.0, error="oh")
    row = load_report.summary(2, None, [good, bad], [(good, good)], 2.0)
    assert (row["requests"], row["errors"], row["checked"], row["identical"]) == (2, 1, 1, 1)
    assert row["first_token_ms"] == {"median": 100.0, "p95": 100.0}
    assert row["per_token_ms"]["median"] == 100.0
    assert row["tokens_per_second"] == 5.5
