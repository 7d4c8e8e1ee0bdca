"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from medhead.bench.contestants import PLAIN, TRANSFORMERS
from medhead.bench.measure import PARTS, Measured


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": name,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def label(model: str | None) -> str:
    """A model as tables call it: a folder by its name, wherever it lies."""
    return "demo model" if not model else Path(model).name if Path(model).is_dir() else model


def summary(results: list[Measured]) -> list[dict[str, Any]]:
    """Numbers of every contestant, with ratios to transformers and to plain decoding."""
    rates = {result.name: result.rate for result in results}
    rows = []
    for result in results:
        lengths = [t / p for t, p in zip(result.tokens, result.passes, strict=True) if p]
        rows.append(
            {
                "name": result.name,
                "dtype": result.dtype,
                "nodes": result.nodes,
                "tokens_per_second": round(result.rate, 1),
                "x_transformers": round(result.rate / rates[TRANSFORMERS], 3) if TRANSFORMERS in rates else None,
                "x_plain": round(result.rate / rates[PLAIN], 3) if PLAIN in rates else None,
                "tokens_per_pass": round(result.accepted_length, 3),
                "tokens_per_pass_by_prompt": [round(length, 2) for length in lengths],
                "step_ms": {part: round(ms, 3) for part, ms in result.step_ms().items()},
                "outside_forward": round(result.overhead, 4),
                "identical": result.identical,
                "prompts": len(result.tokens),
                "new_tokens": sum(result.tokens),
                "seconds": round(sum(result.seconds), 3),
                "peak_mib": round(result.peak_bytes / 2**20, 2),
                "cache_mib": round(result.cache_bytes / 2**20, 2),
                "packed_mib": round(result.packed_bytes / 2**20, 2),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], compares_texts: bool = True) -> str:
    """Two Markdown tables: speed, and where the time of a step goes.

    Args:
        rows: what `summary` returned.
        compares_texts: False when sampling: transformers draws other random numbers, so its text is another one.
    """
    lines = [
        "| contestant | type | nodes | tokens/s | × transformers | × plain | tokens/pass | same text | MiB (cache, packed) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours = row["nodes"] > 0
        same = f"{row['identical']}/{row['prompts']}" if ours or compares_texts else "-"
        length = f"{row['tokens_per_pass']:.2f}" if ours else "-"
        lines.append(
            f"| {row['name']} | {row['dtype']} | {row['nodes'] or '-'} | {row['tokens_per_second']:.1f} "
            f"| {_times(row['x_transformers'])} | {_times(row['x_plain'])} | {length} | {same} "
            f"| {row['peak_mib']:.1f} ({row['cache_mib']:.1f}, {row['packed_mib']:.1f}) |"
        )
    lines += ["", "| ms per step | " + " | ".join(PARTS) + " | outside the forward pass |"]
    lines.append("|---|" + "--:|" * (len(PARTS) + 1))
    for row in rows:
        if row["nodes"]:
            parts = " | ".join(f"{row['step_ms'][part]:.2f}" for part in PARTS)
            outside = "-" if row["step_ms"]["whole"] else f"{row['outside_forward']:.0%} of it"
            lines.append(f"| {row['name']} | {parts} | {outside} |")
    return "\n".join(lines)


def write_results(
    folder: Path, heading: str, text: str, content: dict[str, Any], picture: str, draw: Callable[[Path], None]
) -> str:
    """Write results.json, table.md and a picture; returns one line that says so.

    Args:
        folder: where; made if it is not there.
        heading: above the table.
        text: the table.
        content: of the JSON file; paths in it become text.
        picture: name of the picture.
        draw: draws it into a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(f"{heading}\n\n{text}\n", encoding="utf-8")
    try:
        draw(folder / picture)
    except ImportError:
        return f"wrote {folder}/results.json, table.md; no picture: matplotlib is not installed (pip install 'medhead[bench]')"
    return f"wrote {folder}/results.json, table.md, {picture}"


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of tokens per second; and, if several trees were measured, speed and accepted length by nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [row for row in rows if not row["name"].endswith("nodes")]
    sweep = sorted((row for row in rows if row["name"].endswith("nodes")), key=lambda row: row["nodes"])
    figure, axes = plt.subplots(
        1, 2 if sweep else 1, figsize=(12 if sweep else 8, 0.55 * len(bars) + 1.6), squeeze=False
    )
    left = axes[0][0]
    names = [f"{row['name']} ({row['dtype']})" for row in bars]
    colours = ["#0072B2" if row["name"].startswith("medhead") else "#999999" for row in bars]
    drawn = left.barh(names, [row["tokens_per_second"] for row in bars], color=colours)
    left.bar_label(drawn, [f" {_times(row['x_transformers'])}" for row in bars])
    left.invert_yaxis()
    left.set_xlabel("tokens per second (label: × transformers generate)")
    left.margins(x=0.15)
    left.spines[["top", "right"]].set_visible(False)
    if sweep:
        right = axes[0][1]
        nodes = [row["nodes"] for row in sweep]
        right.plot(nodes, [row["x_plain"] for row in sweep], "o-", color="#0072B2", label="× plain decoding")
        right.plot(nodes, [row["tokens_per_pass"] for row in sweep], "s--", color="#D55E00", label="tokens per pass")
        right.set_xlabel("nodes of the tree")
        right.set_ylim(bottom=0)
        right.legend(frameon=False)
        right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
