"""What tasks gave: one row for each task, proposer, temperature and batch; totals, findings, table and picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medhead.bench.task_runs import PLAIN, Setting, Tally

TOTAL = "all"
Row = dict[str, Any]


def rows_of(task: str, tallies: list[Tally], setting: Setting) -> list[Row]:
    """Numbers of one task, plain decoding first.

    Args:
        task: its name.
        tallies: of all proposers, plain decoding first.
        setting: how they were run.
    """
    return _rated(
        {
            "task": task,
            "proposer": tally.proposer,
            "members": list(tally.members),
            "nodes": tally.nodes,
            "temperature": setting.temperature,
            "batch": setting.batch,
            "prompts": len(tally.tokens),
            "tokens": sum(tally.tokens),
            "passes": sum(tally.passes),
            "seconds": round(sum(tally.seconds), 4),
            "repeats": setting.repeats,
            "steps": tally.steps,
            "decode_seconds": round(tally.decode, 4),
            "propose_seconds": round(tally.propose, 4),
            "forward_seconds": round(tally.forward, 4),
            "different": tally.different,
            "by_prompt": [round(tokens / passes, 2) for tokens, passes in zip(tally.tokens, tally.passes, strict=True)],
        }
        for tally in tallies
    )


def totals(rows: list[Row]) -> list[Row]:
    """All tasks of one setting together, plain decoding first: all tokens by all passes, all tokens by all seconds."""
    added = ("prompts", "tokens", "passes", "seconds", "steps", "decode_seconds", "propose_seconds", "forward_seconds")
    found: dict[str, Row] = {}
    for row in rows:
        total = found.setdefault(row["proposer"], row | {"task": TOTAL, "different": 0} | dict.fromkeys(added, 0))
        for name in (*added, "different"):
            total[name] = round(total[name] + row[name], 4)
    for total in found.values():
        total["by_prompt"] = []
    return _rated(found.values())


def _rated(rows: Iterable[Row]) -> list[Row]:
    """Rows of one task and setting with what follows from their sums; the first is plain decoding."""
    found: list[Row] = []
    for row in rows:
        rate = row["tokens"] / row["repeats"] / row["seconds"]
        plain = found[0]["tokens_per_second"] if found else rate
        steps = 1000 / max(row["steps"], 1)
        rates = {
            "tokens_per_pass": round(row["tokens"] / row["passes"], 4),
            "tokens_per_second": round(rate, 2),
            "x_plain": round(rate / plain, 4),
            "step_ms": round(steps * row["decode_seconds"], 3),
            "propose_ms": round(steps * row["propose_seconds"], 3),
            "forward_ms": round(steps * row["forward_seconds"], 3),
        }
        found.append(row | rates)
    return found


def settings_of(rows: list[Row]) -> list[tuple[float, int]]:
    """Temperatures and batches, in the order in which they were run."""
    return list(dict.fromkeys((row["temperature"], row["batch"]) for row in rows))


def named(temperature: float, batch: int) -> str:
    """How a setting is called."""
    return f"{f'temperature {temperature:g}' if temperature else 'greedy'}, batch {batch}"


def table(rows: list[Row]) -> str:
    """For every setting a table of tasks by proposers (tokens a pass, speed in brackets) and one of milliseconds a step."""
    lines: list[str] = []
    for temperature, batch in settings_of(rows):
        here = _by_task(rows, temperature, batch)
        names = [name for name in next(iter(here.values())) if name != PLAIN]
        lines += [f"**{named(temperature, batch)}**: tokens a pass (times plain decoding's tokens a second)", ""]
        lines += ["| task | prompts | " + " | ".join(names) + " | different texts |"]
        lines += ["|---|--:|" + "--:|" * (len(names) + 1)]
        whole = here[TOTAL]
        if len(here) == 2:  # one task is all there is
            del here[TOTAL]
        for task, by_name in here.items():
            cells = [f"{by_name[name]['tokens_per_pass']:.2f} ({by_name[name]['x_plain']:.2f}x)" for name in names]
            different = sum(row["different"] for row in by_name.values())
            prompts = by_name[PLAIN]["prompts"]
            lines.append(f"| {task} | {prompts} | " + " | ".join(cells) + f" | {different}/{prompts * len(names)} |")
        steps = ", ".join(f"{'plain' if name == PLAIN else name} {row['step_ms']:.1f}" for name, row in whole.items())
        lines += ["", f"Milliseconds a step: {steps}.", ""]
    return "\n".join(lines).rstrip()


def findings(rows: list[Row]) -> list[str]:
    """One line for each setting: on which tasks the hybrid accepts less than its best member alone, and in total."""
    lines = []
    for temperature, batch in settings_of(rows):
        below, total, sizes = [], "", ""
        for task, by_name in _by_task(rows, temperature, batch).items():
            hybrid = by_name.get("hybrid")
            members = [by_name[name] for name in hybrid["members"] if name in by_name] if hybrid else []
            if hybrid is None or not members:
                continue
            best = max(members, key=lambda row: row["tokens_per_pass"])
            mine, other = hybrid["tokens_per_pass"], best["tokens_per_pass"]
            against = f"{mine:.2f} against {other:.2f} of {best['proposer']}"
            if any(row["nodes"] != hybrid["nodes"] for row in members):
                sizes = " (trees of different sizes)"
            if task == TOTAL:
                total = against
            elif mine < other:
                below.append(f"{task} ({against})")
        if total:
            where = (
                f"less than its best member on {', '.join(below)}"
                if below
                else "at least as much as its best member everywhere"
            )
            lines.append(f"{named(temperature, batch)}: the hybrid{sizes} accepts {where}; in total {total}")
    return lines


def sameness(rows: list[Row]) -> str:
    """One line about texts that were not plain decoding's."""
    mine = [row for row in rows if row["proposer"] != PLAIN and row["task"] != TOTAL]
    different, answers = sum(row["different"] for row in mine), sum(row["prompts"] for row in mine)
    if not different:
        return f"all {answers} texts are plain decoding's"
    where = [
        f"{row['proposer']} on {row['task']}, {named(row['temperature'], row['batch'])}: {row['different']}/{row['prompts']}"
        for row in mine
        if row["different"]
    ]
    return f"{different} of {answers} texts DIFFER from plain decoding's: " + "; ".join(where)


def _by_task(rows: list[Row], temperature: float, batch: int) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row["temperature"], row["batch"]) == (temperature, batch):
            found.setdefault(row["task"], {})[row["proposer"]] = row
    return found


def plot(rows: list[Row], title: str, path: Path) -> None:
    """A line of panels for each setting: tokens a pass and speed, tasks side by side, a bar for each proposer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = settings_of(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tasks = tasks[:1] if len(tasks) == 2 else tasks  # one task is all there is
    names = [name for name in dict.fromkeys(row["proposer"] for row in rows) if name != PLAIN]
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
    size = (min(16.0, 4 + 1.2 * len(tasks)), 2.4 * len(settings) + 1)
    figure, axes = plt.subplots(len(settings), 2, figsize=size, squeeze=False, sharex=True)
    for line, (temperature, batch) in zip(axes, settings, strict=True):
        here = _by_task(rows, temperature, batch)
        for axis, key, label in zip(line, ("tokens_per_pass", "x_plain"), ("tokens a pass", "× plain"), strict=True):
            for place, name in enumerate(names):
                at = [index + 0.8 * ((place + 0.5) / len(names) - 0.5) for index in range(len(tasks))]
                heights = [here[task][name][key] for task in tasks]
                axis.bar(at, heights, 0.8 / len(names), label=name, color=colours[place % len(colours)])
            axis.axhline(1, color="#555555", linewidth=0.8)
            axis.set_xticks(range(len(tasks)), tasks, rotation=25, ha="right", fontsize=7)
            axis.set_title(named(temperature, batch), fontsize=9)
            axis.set_ylabel(label)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(names), loc="lower center")
    figure.suptitle(textwrap.fill(title, int(15 * size[0])), fontsize=8)
    figure.tight_layout(rect=(0, 0.25 / size[1], 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
