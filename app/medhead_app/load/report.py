"""What the load program found, as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medhead_app.load.clients import Answered
from medhead_app.load.server import Memory

MIB = 2**20
FLAT = 0.05  # memory may grow by that share
SETTLES = 30.0  # seconds after which memory must be flat
COLUMNS = ("clients", "rows", "requests", "errors", "same text alone", "tokens/s", "tokens/pass")
TIMES = ("first token ms: median", "95 %", "per token ms: median", "95 %")


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that this share of them does not exceed (nearest rank); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered) - 1e-9) - 1))]


def summary(
    clients: int, rows: int | None, answers: list[Answered], alone: list[tuple[Answered, Answered]], seconds: float
) -> dict[str, Any]:
    """Numbers of one run.

    Args:
        clients: who asked at the same time.
        rows: decoded at a time; None if not known.
        answers: all of them.
        alone: answers of a sample, with those to the same requests alone.
        seconds: that it took.
    """
    good = [answered for answered in answers if answered.error is None]
    first = [1000 * answered.first for answered in good if answered.first is not None]
    token = [
        1000 * (answered.seconds - answered.first) / (answered.tokens - 1)
        for answered in good
        if answered.first is not None and answered.tokens > 1
    ]
    tokens, passes = sum(a.tokens for a in good), sum(a.passes for a in good)
    return {
        "clients": clients,
        "rows": rows,
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "error_messages": sorted({a.error for a in answers if a.error is not None})[:10],
        "checked": len(alone),
        "same": sum(again.error is None and before.text == again.text for before, again in alone),
        "seconds": round(seconds, 2),
        "new_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "tokens_per_pass": round(tokens / passes, 3) if passes else 0.0,
        "first_token_ms": {"median": _rounded(statistics.median(first) if first else None), "p95": _p95(first)},
        "per_token_ms": {"median": _rounded(statistics.median(token) if token else None), "p95": _p95(token)},
    }


def memory_summary(memory: Memory, seconds: float) -> dict[str, Any]:
    """Resident memory, and how much its largest is above its smallest after the first half minute (None in shorter runs)."""
    spread = memory.spread(SETTLES) if seconds > SETTLES else None
    return {
        "spread": None if spread is None else round(spread, 4),
        "last_mib": round(memory.seen[-1][1] / MIB, 1) if memory.seen else None,
        "over_time": [[round(at, 1), round(size / MIB, 1)] for at, size in memory.seen],
    }


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be: errors, texts that differ, memory that grows; one line each."""
    found = []
    for row in rows:
        where = f"{row['clients']} clients, {row['rows'] or '?'} rows"
        if row["errors"]:
            found.append(f"{where}: {row['errors']} errors, as {row['error_messages'][0]}")
        if row["same"] < row["checked"]:
            found.append(f"{where}: {row['checked'] - row['same']} of {row['checked']} texts are others than alone")
        spread = row.get("memory", {}).get("spread")
        if spread is not None and spread > FLAT:
            found.append(f"{where}: memory changed by {spread:.1%}")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join((*COLUMNS, *TIMES, "memory MiB (change)")) + " |"]
    lines.append("|" + "--:|" * (len(COLUMNS) + len(TIMES) + 1))
    for row in rows:
        memory = row.get("memory", {})
        change = "" if memory.get("spread") is None else f" ({memory['spread']:.1%})"
        mib = f"{memory['last_mib']:.0f}{change}" if memory.get("last_mib") else "-"
        times = [row[key][which] for key in ("first_token_ms", "per_token_ms") for which in ("median", "p95")]
        cells = [
            row["clients"],
            row["rows"] or "?",
            row["requests"],
            row["errors"],
            f"{row['same']}/{row['checked']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_pass']:.2f}",
            *("-" if value is None else f"{value:.1f}" for value in times),
            mib,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tokens per second, times to the first token, and memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, wait, memory) = plt.subplots(1, 3, figsize=(14, 4))
    names = [f"{row['clients']} clients\n{row['rows'] or '?'} rows" for row in rows]
    colours = ["#999999" if row["rows"] == 1 else "#0072B2" for row in rows]
    speed.bar_label(speed.bar(names, [row["tokens_per_second"] for row in rows], color=colours), fmt="%.0f")
    speed.set_title("tokens per second, all clients", fontsize=10)
    for shift, which, shade in ((-0.2, "median", 1.0), (0.2, "p95", 0.5)):
        heights = [row["first_token_ms"][which] or 0 for row in rows]
        places = [place + shift for place in range(len(rows))]
        wait.bar(places, heights, 0.4, color=colours, alpha=shade, label=f"{which}")
    wait.set_xticks(range(len(rows)), names)
    wait.set_title("ms to the first token (pale: 95th percentile)", fontsize=10)
    for row, name, style in zip(rows, names, ("-", "--", ":", "-.") * len(rows), strict=False):
        seen = row.get("memory", {}).get("over_time", [])
        memory.plot([at for at, _ in seen], [size for _, size in seen], style, label=name.replace("\n", ", "))
    memory.set_title("resident memory of the server, MiB, by seconds", fontsize=10)
    memory.set_ylim(bottom=0)
    memory.legend(frameon=False, fontsize=8)
    for axes in (speed, wait, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _p95(values: list[float]) -> float | None:
    return _rounded(percentile(values, 0.95))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
