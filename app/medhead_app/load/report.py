"""Results of the load test as JSON, table and plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from medhead.bench.harness import BLUE, GREY, figure, markdown_table
from medhead_app.load.clients import ClientResult
from medhead_app.load.server import MemoryMonitor

MIB = 2**20
Pairs = list[tuple[ClientResult, ClientResult]]
MAX_GROWTH = 0.05  # allowed growth of the memory
WARMUP = 30.0  # seconds after which the memory must be constant
COLUMNS = ("clients", "server", "requests", "errors", "identical text", "tokens/s", "accepted length")
TIMES = ("first token ms: median", "95 %", "per token ms: median", "95 %", "memory MiB (growth)")


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank percentile for a share from 0 to 1; None without values."""
    return float(numpy.quantile(values, share, method="inverted_cdf")) if values else None


def summary(
    clients: int, rows: int | None, results: list[ClientResult], replayed: Pairs, seconds: float
) -> dict[str, Any]:
    """Return the numbers of one run; `replayed` pairs results with those of the same requests sent alone."""
    good = [result for result in results if result.error is None]
    first = [1000 * result.first for result in good if result.first is not None]
    per_token = [
        1000 * (result.seconds - result.first) / (result.tokens - 1)
        for result in good
        if result.first is not None and result.tokens > 1
    ]
    tokens, passes = sum(result.tokens for result in good), sum(result.passes for result in good)
    return {
        "clients": clients,
        "rows": rows,
        "requests": len(results),
        "errors": len(results) - len(good),
        "error_messages": sorted({result.error for result in results if result.error is not None})[:10],
        "checked": len(replayed),
        "identical": sum(alone.error is None and alone.text == result.text for result, alone in replayed),
        "seconds": round(seconds, 2),
        "new_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "accepted_length": round(tokens / passes, 3) if passes else 0.0,
        "first_token_ms": _median_and_p95(first),
        "per_token_ms": _median_and_p95(per_token),
    }


def memory_summary(memory: MemoryMonitor, seconds: float) -> dict[str, Any]:
    """Return the resident memory and its growth after the warm-up; the growth is None in runs shorter than that."""
    growth = memory.growth(WARMUP) if seconds > WARMUP else None
    return {
        "growth": None if growth is None else round(growth, 4),
        "last_mib": round(memory.samples[-1][1] / MIB, 1) if memory.samples else None,
        "over_time": [[round(at, 1), round(size / MIB, 1)] for at, size in memory.samples],
    }


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line for every failed check: errors, different texts, growing memory."""
    lines = []
    for row in rows:
        run = f"{row['clients']} clients, {_server(row)}"
        if row["errors"]:
            lines.append(f"{run}: {row['errors']} errors, the first: {row['error_messages'][0]}")
        if row["identical"] < row["checked"]:
            different = row["checked"] - row["identical"]
            lines.append(f"{run}: {different} of {row['checked']} texts differ from those of requests sent alone")
        growth = row.get("memory", {}).get("growth")
        if growth is not None and growth > MAX_GROWTH:
            lines.append(f"{run}: memory changed by {growth:.1%}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = []
    for row in rows:
        memory = row.get("memory", {})
        growth = "" if memory.get("growth") is None else f" ({memory['growth']:.1%})"
        times = [row[key][which] for key in ("first_token_ms", "per_token_ms") for which in ("median", "p95")]
        cells = [row["clients"], _server(row), row["requests"], row["errors"]]
        cells += [f"{row['identical']}/{row['checked']}", f"{row['tokens_per_second']:.1f}"]
        cells += [f"{row['accepted_length']:.2f}", *("-" if value is None else f"{value:.1f}" for value in times)]
        cells.append(f"{memory['last_mib']:.0f}{growth}" if memory.get("last_mib") else "-")
        lines.append([str(cell) for cell in cells])
    return markdown_table((*COLUMNS, *TIMES), lines, left=0)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot tokens per second, time to the first token, and memory over time."""
    names = [f"{row['clients']} clients\n{_server(row)}" for row in rows]
    colors = [GREY if row["rows"] == 1 or row.get("plain") else BLUE for row in rows]
    with figure(path, title, (14, 4), columns=3) as axes:
        speed, first_token, memory = axes[0]
        speed.bar_label(speed.bar(names, [row["tokens_per_second"] for row in rows], color=colors), fmt="%.0f")
        speed.set_title("tokens per second, all clients", fontsize=10)
        for shift, which, alpha in ((-0.2, "median", 1.0), (0.2, "p95", 0.5)):
            heights = [row["first_token_ms"][which] or 0 for row in rows]
            first_token.bar([index + shift for index in range(len(rows))], heights, 0.4, color=colors, alpha=alpha)
        first_token.set_xticks(range(len(rows)), names)
        first_token.set_title("ms to the first token (pale: 95th percentile)", fontsize=10)
        for row, name, style in zip(rows, names, ("-", "--", ":", "-.") * len(rows), strict=False):
            samples = row.get("memory", {}).get("over_time", [])
            memory.plot([at for at, _ in samples], [size for _, size in samples], style, label=name.replace("\n", ", "))
        memory.set_title("resident memory of the server, MiB, by seconds", fontsize=10)
        memory.set_ylim(bottom=0)
        memory.legend(frameon=False, fontsize=8)


def _server(row: dict[str, Any]) -> str:
    """Return what tells the servers of a load test apart: the rows of a batch, and plain decoding."""
    return f"{row['rows'] or '?'} rows" + (", plain" if row.get("plain") else "")


def _median_and_p95(values: list[float]) -> dict[str, float | None]:
    found = {"median": statistics.median(values) if values else None, "p95": percentile(values, 0.95)}
    return {name: None if value is None else round(value, 2) for name, value in found.items()}
