"""`python -m medhead_app.load`: many clients at once against the server, with batching and one at a time."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from medhead.bench.harness import machine, write_results
from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead_app.load import report
from medhead_app.load.clients import Answered, LoadGenerator
from medhead_app.load.server import Memory, server

PROG = "medhead_app.load"
EXAMPLES = """\
examples:
  python -m medhead_app.load --output results                     8 and 32 clients, two minutes each, demo model
  python -m medhead_app.load --clients 16 --seconds 30 --model my/model --heads my/heads
  python -m medhead_app.load --url http://127.0.0.1:7860 --clients 8 --seconds 20

All other options go to the server that is started (see python -m medhead_app --help). Clients draw prompts, seeds,
temperatures and lengths, and run on the same machine as the server. Afterwards a sample of the requests is sent again, one
at a time: every text must be the same. It ends with 1 when there were errors, other texts, or memory that is not flat.
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog=PROG,
        description="Many clients at once: errors, mixed texts, memory, waiting times, tokens per second.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--url", help="a server that runs already (its memory and rows are then not known)")
    options.add_argument("--key", default="none", help="its API key")
    options.add_argument("--clients", type=int, nargs="+", default=[8, 32], help="at the same time (default: 8 32)")
    options.add_argument("--seconds", type=float, default=120.0, help="of every run (default: 120)")
    options.add_argument("--max-rows", type=int, default=8, help="rows of the batching server (default: 8)")
    options.add_argument("--batching-only", action="store_true", help="leave out the server that does one at a time")
    options.add_argument("--sample", type=int, default=24, help="requests that are sent again alone (default: 24)")
    options.add_argument("--seed", type=int, default=0, help="of what the clients ask")
    options.add_argument("--output", help="folder for table, JSON and picture")
    return options


def check(args: argparse.Namespace, rest: list[str]) -> None:
    """Refuse what cannot be.

    Raises:
        MedheadError: names the option.
    """
    if args.url is not None and rest:
        raise MedheadError(f"{' '.join(rest)}: options of a server that is started; --url names one that runs already")
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        raise MedheadError(f"--url must begin with http:// or https://, got {args.url!r}")
    if args.url is None and find_spec("psutil") is None:
        raise MedheadError("psutil is not installed, which reads the server's memory: pip install 'medhead[app,bench]'")
    for name, value, good in (
        ("--clients", min(args.clients), min(args.clients) >= 1),
        ("--seconds", args.seconds, 0 < args.seconds < float("inf")),
        ("--max-rows", args.max_rows, args.max_rows >= 1),
        ("--sample", args.sample, args.sample >= 0),
    ):
        if not good:
            raise MedheadError(f"{name} is too small: {value}")


def run(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """The command after its options were read; returns what must not be.

    Raises:
        MedheadError: wrong options, or a server that does not start or answer.
    """
    check(args, rest)
    rows = []
    for clients in args.clients:
        for max_rows in [None] if args.url else [args.max_rows] if args.batching_only else [args.max_rows, 1]:
            rows.append(one_run(args, rest, clients, max_rows))
            print(report.table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    text = report.table(rows)
    print(text)
    faults = report.faults(rows)
    for line in faults:
        print(f"{PROG}: {line}", file=sys.stderr)
    if args.output:
        found = machine()
        heading = f"{args.seconds:.0f} seconds each; {found['cpu']}, {found['date']}"
        content = {"machine": found, "options": vars(args), "server_options": rest, "runs": rows, "faults": faults}
        said = write_results(
            Path(args.output), heading, text, content, "load.png", lambda path: report.plot(rows, heading, path)
        )
        print(said, file=sys.stderr)
    return faults


def one_run(args: argparse.Namespace, rest: list[str], clients: int, max_rows: int | None) -> dict[str, Any]:
    """One number of clients against one server.

    Raises:
        MedheadError: the server does not start or answer.
    """
    if max_rows is None:
        return asyncio.run(measure(args, args.url.rstrip("/"), clients, None))
    queue = [] if "--max-queue" in rest else ["--max-queue", str(max(64, 2 * clients))]
    with server(["--max-rows", str(max_rows), *queue, *rest]) as (url, pid):
        memory = Memory(pid)
        with memory.watched():
            row = asyncio.run(measure(args, url, clients, max_rows))
    return row | {"memory": report.memory_summary(memory, args.seconds)}


async def measure(args: argparse.Namespace, url: str, clients: int, max_rows: int | None) -> dict[str, Any]:
    """Ask for a while, then ask a sample again alone.

    Raises:
        MedheadError: the server does not answer.
    """
    crowd = LoadGenerator(url, await model_of(url, args.key), clients, args.key, args.seed)
    seconds = await crowd.ask_for(args.seconds)
    good = [answered for answered in crowd.answers if answered.error is None]
    sample: list[Answered] = random.Random(args.seed).sample(good, min(args.sample, len(good)))
    again = await crowd.ask_alone([answered.asked for answered in sample])
    return report.summary(clients, max_rows, crowd.answers, list(zip(sample, again, strict=True)), seconds)


async def model_of(url: str, key: str) -> str:
    """What the server calls its model.

    Raises:
        MedheadError: it does not answer as it should.
    """
    try:
        async with LoadGenerator(url, "", 1, key).http() as http:
            return str((await http.get("/v1/models", timeout=30)).raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, LookupError, TypeError) as error:
        raise MedheadError(f"no server of this kind answers at {url}: {' '.join(str(error).split())[:150]}") from None


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args, rest = parser().parse_known_args(argv)
    faults: list[str] = []
    return guarded(PROG, lambda: faults.extend(run(args, rest))) or int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
