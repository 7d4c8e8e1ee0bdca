"""The command `medhead load-test`: concurrent clients against the server, with batching and one request at a time."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from medhead.bench.harness import machine, write_results
from medhead.cli.common import Parser, check_range, guarded
from medhead.errors import MedheadError
from medhead_app.load import report
from medhead_app.load.clients import LoadGenerator
from medhead_app.load.server import MemoryMonitor, start_server

PROG = "medhead load-test"
PREFIX_CACHE_GIB = 1 / 32
PLAIN = ["--proposer", "none"]
EXAMPLES = """\
examples:
  medhead load-test --output results                     8 and 32 clients, two minutes each, demo model
  medhead load-test --clients 16 --seconds 30 --model my/model --heads my/heads
  medhead load-test --clients 1 8 --plain --model smollm2 --dtype bfloat16 --exact bitwise
  medhead load-test --url http://127.0.0.1:7860 --clients 8 --seconds 20

All other options are passed on to the server that is started (see medhead serve --help). The clients draw prompts, seeds,
temperatures and lengths, and run on the same machine as the server. Afterwards a sample of the requests is sent again one
at a time, and every text must be identical. The exit code is 1 after errors, different texts, or growing memory.
"""


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog=PROG,
        description="Load the server with concurrent clients; check errors, texts and memory; measure latency and speed.",
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="URL of a running server to use (its memory and batch size are then unknown)")
    parser.add_argument("--key", default="none", help="API key of that server")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32], help="concurrent clients (default: 8 32)")
    parser.add_argument("--seconds", type=float, default=120.0, help="duration of each run (default: 120)")
    parser.add_argument("--max-rows", type=int, default=8, help="largest batch of the server (default: 8)")
    parser.add_argument("--batching-only", action="store_true", help="skip the runs with one request at a time")
    parser.add_argument("--plain", action="store_true",
                        help="also load a server with --proposer none, instead of one request at a time")  # fmt: skip
    parser.add_argument("--sample", type=int, default=24, help="number of requests that are sent again (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: 0)")
    parser.add_argument("--output", help="folder for the table, the JSON file and the plot")
    return parser


def check(args: argparse.Namespace, server_options: list[str]) -> None:
    """Check the options."""
    if args.url is not None and server_options:
        options = " ".join(server_options)
        raise MedheadError(f"{options}: options for a server that is started cannot be used with --url")
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        raise MedheadError(f"--url must begin with http:// or https://, got {args.url!r}")
    if args.plain and (args.url is not None or args.batching_only):
        raise MedheadError("--plain goes with neither --url nor --batching-only; leave one out")
    if args.url is None and find_spec("psutil") is None:
        raise MedheadError("psutil (reads the server's memory) is not installed: pip install 'medhead[app,bench]'")
    check_range(args, "seconds", sys.float_info.min, sys.float_info.max, "above 0")
    for name, low in (("clients", 1), ("max_rows", 1), ("sample", 0)):
        check_range(args, name, low)


def run(args: argparse.Namespace, server_options: list[str]) -> int:
    """Run the load test and print its report; return 1 if a check failed."""
    check(args, server_options)
    rows = []
    for clients in args.clients:
        for max_rows, options in servers(args):
            rows.append(run_one(args, [*server_options, *options], clients, max_rows))
            print(report.table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    table, failures = report.table(rows), report.failures(rows)
    print(table)
    for line in failures:
        print(f"{PROG}: {line}", file=sys.stderr)
    if args.output:
        host = machine()
        title = f"{args.seconds:.0f} seconds each; {host['cpu']}, {host['date']}"
        content: dict[str, Any] = {"machine": host, "options": vars(args), "server_options": server_options}
        content |= {"runs": rows, "failures": failures}
        draw = partial(report.plot, rows, title)
        print(write_results(Path(args.output), title, table, content, "load.png", draw), file=sys.stderr)
    return int(bool(failures))


def servers(args: argparse.Namespace) -> list[tuple[int | None, list[str]]]:
    """Return the batch sizes and further options of the servers that are loaded one after the other."""
    if args.url:
        return [(None, [])]
    more: list[tuple[int | None, list[str]]] = [(1, [])]
    if args.plain:
        more = [(args.max_rows, PLAIN)]
    return [(args.max_rows, []), *([] if args.batching_only else more)]


def run_one(args: argparse.Namespace, server_options: list[str], clients: int, max_rows: int | None) -> dict[str, Any]:
    """Run one number of clients against one server; `max_rows` None stands for the server at `--url`."""
    if max_rows is None:
        return asyncio.run(measure(args, args.url.rstrip("/"), clients, None))
    queue = [] if "--max-queue" in server_options else ["--max-queue", str(max(64, 2 * clients))]
    # a prefix cache that is full before the warm-up of the memory ends
    cache = [] if "--prefix-cache-gib" in server_options else ["--prefix-cache-gib", str(PREFIX_CACHE_GIB)]
    with start_server(["--max-rows", str(max_rows), *queue, *cache, *server_options]) as (url, pid):
        memory = MemoryMonitor(pid)
        with memory.running():
            row = asyncio.run(measure(args, url, clients, max_rows))
    row["plain"] = server_options[-2:] == PLAIN
    return row | {"memory": report.memory_summary(memory, args.seconds)}


async def measure(args: argparse.Namespace, url: str, clients: int, max_rows: int | None) -> dict[str, Any]:
    """Load a server, then send a sample of the requests again alone."""
    load = LoadGenerator(url, await get_model_name(url, args.key), clients, args.key, args.seed)
    seconds = await load.run(args.seconds)
    good = [result for result in load.results if result.error is None]
    sample = random.Random(args.seed).sample(good, min(args.sample, len(good)))
    alone = await load.replay([result.body for result in sample])
    return report.summary(clients, max_rows, load.results, list(zip(sample, alone, strict=True)), seconds)


async def get_model_name(url: str, key: str) -> str:
    """Return the name of the server's model."""
    try:
        async with LoadGenerator(url, "", 1, key).http() as http:
            return str((await http.get("/v1/models", timeout=30)).raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise MedheadError(f"no OpenAI-compatible server answers at {url}: {reason}") from None


def main(argv: list[str] | None = None) -> int:
    """Run `medhead load-test`; return the exit code."""
    args, server_options = build_parser().parse_known_args(argv)
    return guarded(PROG, lambda: run(args, server_options))
