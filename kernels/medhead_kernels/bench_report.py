"""What the kernels' benchmark measured, as a table and as a picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: str, copy: float) -> dict[str, Any]:
    """What the numbers were measured on; `copy` in bytes per second."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} CPU thread(s)"
    versions = {}
    for package in ("torch", "triton", "flash-attn"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "copy_gb_per_second": round(copy / 1e9, 1),
        "versions": versions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, then one line for each reason why a contestant is missing."""
    lines = [
        "| context | nodes | group | batch | attention | µs | GB/s | of a copy | × sdpa |",
        "|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["microseconds"] is not None:
            times = "-" if row["x_sdpa"] is None else f"{row['x_sdpa']:.2f}x"
            lines.append(
                f"| {row['context']} | {row['nodes']} | {row['group']} | {row['batch']} | {row['name']} "
                f"| {row['microseconds']:.1f} | {row['gb_per_second']:.1f} | {row['share_of_copy']:.0%} | {times} |"
            )
    missing = sorted({(row["name"], row["why_not"]) for row in rows if row["why_not"]})
    return "\n".join(lines + [f"\nnot run: {name} ({reason})" for name, reason in missing])


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Share of a copy's bandwidth by context, one panel for each number of nodes; group and batch closest to 4 and 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    group = min({row["group"] for row in rows}, key=lambda n: abs(n - 4))
    batch = min(row["batch"] for row in rows)
    drawn = [row for row in rows if (row["group"], row["batch"]) == (group, batch) and row["microseconds"] is not None]
    panels = sorted({row["nodes"] for row in drawn}) or [1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels) + 1, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row["name"] for row in drawn))
    for axis, nodes in zip(axes[0], panels, strict=True):
        for name in names:
            points = sorted(
                (r["context"], r["share_of_copy"]) for r in drawn if (r["nodes"], r["name"]) == (nodes, name)
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_title(f"{nodes} node{'s' if nodes > 1 else ''}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens in the cache")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("bandwidth, share of a copy's")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}; group {group}, batch {batch}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
