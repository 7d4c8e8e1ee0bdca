"""Clients that are killed or do not read: their requests end, and those of others have the text they have alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from medhead import Decoder
from medhead.model.loading import load_model, load_tokenizer
from medhead.serving import Engine
from medhead_app.listen import run_in_thread
from medhead_app.server import build_app
from medhead_app.service import Service

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
KILLED = """\
import json, sys, urllib.request
body = json.dumps(json.loads(sys.argv[2])).encode()
asked = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
with urllib.request.urlopen(asked) as answer:
    print(answer.readline(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[tuple[str, Service]]:
    """A server of the real engine with batches of 3."""
    model, tokenizer = load_model(folders["model"], "cpu", "float32"), load_tokenizer(folders["model"])
    engine = Engine(Decoder(model, "ngram", tree_size=4), tokenizer, max_rows=3).start()
    service = Service(engine, tokenizer, "tiny")
    with run_in_thread(build_app(service), service) as address:
        yield address, service


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "temperature": 0, "ignore_eos": True, "max_tokens": 24} | fields


def text(address: str) -> str:
    """The text of a client that reads."""
    answer = httpx.post(f"{address}/v1/chat/completions", json=body(), timeout=60).raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def wait_until_idle(service: Service) -> None:
    deadline = time.monotonic() + 60
    while (now := service.engine.statistics()).running or now.waiting:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def test_a_killed_client_leaves_its_place(served: tuple[str, Service]) -> None:
    address, service = served
    alone = text(address)
    ended = dict(service.engine.statistics().ended)
    url, asked = f"{address}/v1/chat/completions", json.dumps(body(stream=True, max_tokens=100, seed=1))
    clients = [
        subprocess.Popen([sys.executable, "-c", KILLED, url, asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)  # more than a batch has rows
    ]
    for process in clients[:3]:
        assert process.stdout is not None
        process.stdout.readline()
    for process in clients:
        process.kill()
        process.communicate()
    assert text(address) == alone
    wait_until_idle(service)
    after = service.engine.statistics().ended
    assert sum(after.values()) >= sum(ended.values()) + 4  # the last client may have died before it asked


def test_a_client_that_does_not_read_holds_nobody_up(served: tuple[str, Service]) -> None:
    address, service = served
    alone = text(address)
    place, asked = urlsplit(address), json.dumps(body(stream=True, max_tokens=100)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    slow = []
    for _ in range(2):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect((place.hostname, place.port))
        one.sendall(f"{head}{len(asked)}\r\n\r\n".encode() + asked)
        slow.append(one)
    assert [text(address) for _ in range(3)] == [alone] * 3
    wait_until_idle(service)  # the engine does not wait for those that do not read
    for one in slow:
        one.close()
    assert text(address) == alone
