"""Results of the kernel benchmark as a table and as a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: str, copy: float) -> dict[str, Any]:
    """Describe the machine; `copy` is the bandwidth of a copy in bytes per second."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} CPU threads"
    versions = {}
    for package in ("torch", "triton", "flash-attn"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    date = datetime.date.today().isoformat()
    return {"date": date, "device": name, "copy_gb_per_second": round(copy / 1e9, 1), "versions": versions}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table, then one line for each backend that did not run and why."""
    lines = [
        "| context | nodes | group | batch | attention | µs | GB/s | of a copy | × sdpa |",
        "|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["microseconds"] is not None:
            speedup = "-" if row["x_sdpa"] is None else f"{row['x_sdpa']:.2f}x"
            lines.append(
                f"| {row['context']} | {row['nodes']} | {row['group']} | {row['batch']} | {row['name']} "
                f"| {row['microseconds']:.1f} | {row['gb_per_second']:.1f} | {row['share_of_copy']:.0%} | {speedup} |"
            )
    missing = sorted({(row["name"], row["unsupported_reason"]) for row in rows if row["unsupported_reason"]})
    return "\n".join(lines + [f"\nnot run: {name} ({reason})" for name, reason in missing])


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot bandwidth by context for the smallest batch and the group closest to 4, one panel per number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    group = min({row["group"] for row in rows}, key=lambda n: abs(n - 4))
    batch = min(row["batch"] for row in rows)
    drawn = [row for row in rows if (row["group"], row["batch"]) == (group, batch) and row["microseconds"] is not None]
    panels = sorted({row["nodes"] for row in drawn}) or [1]
    size = (3.2 * len(panels) + 1, 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, nodes in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(row["name"] for row in drawn):
            of_name = [row for row in drawn if (row["nodes"], row["name"]) == (nodes, name)]
            points = sorted((row["context"], row["share_of_copy"]) for row in of_name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_title(f"{nodes} node{'s' if nodes > 1 else ''}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens in the cache")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of a copy's bandwidth")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}; group {group}, batch {batch}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
