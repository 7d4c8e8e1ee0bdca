"""Report of `medhead bench tasks`: rows by task, proposer, temperature and batch size; totals, notes, table and plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from medhead.bench import harness
from medhead.bench.harness import Row
from medhead.bench.measure import MethodResult

PLAIN, TOTAL = "none", "all"
SUMS = ("prompts", "new_tokens", "passes", "seconds", "steps", "decode_seconds", "profiled_steps", "propose_seconds",
        "forward_seconds", "mismatches")  # fmt: skip


def rows_of(task: str, results: list[MethodResult], temperature: float, batch_size: int) -> list[Row]:
    """Return the numbers of one task, plain decoding first as in `results`."""
    return _with_rates(
        {
            "task": task,
            "proposer": result.name,
            "members": list(result.members),
            "tree_size": result.tree_size,
            "temperature": temperature,
            "batch_size": batch_size,
            "prompts": len(result.new_tokens),
            "new_tokens": sum(result.new_tokens),
            "passes": sum(result.passes),
            "seconds": round(sum(result.seconds), 4),
            "repeats": result.repeats,
            "steps": result.steps,
            "decode_seconds": round(result.decode_seconds, 4),
            "profiled_steps": result.profiled_steps,
            "propose_seconds": round(result.parts.get("propose", 0.0), 5),
            "forward_seconds": round(result.parts.get("forward", 0.0), 5),
            "mismatches": result.mismatches,
            "by_prompt": result.accepted_length_by_prompt,
        }
        for result in results
    )


def totals(rows: list[Row]) -> list[Row]:
    """Return the sums over all tasks of one temperature and batch size, plain decoding first."""
    found: dict[str, Row] = {}
    for row in rows:
        start = row | {"task": TOTAL, "by_prompt": []} | dict.fromkeys(SUMS, 0)
        total = found.setdefault(row["proposer"], start)
        for name in SUMS:
            total[name] = round(total[name] + row[name], 5)
    return _with_rates(found.values())


def _with_rates(rows: Iterable[Row]) -> list[Row]:
    """Add the ratios that follow from the sums; the first row is plain decoding."""
    found: list[Row] = []
    for row in rows:
        rate = row["new_tokens"] / row["repeats"] / row["seconds"]
        plain = found[0]["tokens_per_second"] if found else rate
        profiled = 1000 / max(row["profiled_steps"], 1)
        rates = {
            "accepted_length": round(row["new_tokens"] / row["passes"], 4),
            "tokens_per_second": round(rate, 2),
            "speedup_vs_plain": round(rate / plain, 4),
            "step_ms": round(1000 / max(row["steps"], 1) * row["decode_seconds"], 3),
            "propose_ms": round(profiled * row["propose_seconds"], 3),
            "forward_ms": round(profiled * row["forward_seconds"], 3),
        }
        found.append(row | rates)
    return found


def conditions(rows: list[Row]) -> list[tuple[float, int]]:
    """Return the pairs of temperature and batch size, in the order in which they were run."""
    return list(dict.fromkeys((row["temperature"], row["batch_size"]) for row in rows))


def condition_name(temperature: float, batch_size: int) -> str:
    """Return a condition's name in tables."""
    return f"{f'temperature {temperature:g}' if temperature else 'greedy'}, batch {batch_size}"


def by_task(rows: list[Row], temperature: float, batch_size: int) -> dict[str, dict[str, Row]]:
    """Return the rows of one condition by task and proposer."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row["temperature"], row["batch_size"]) == (temperature, batch_size):
            found.setdefault(row["task"], {})[row["proposer"]] = row
    return found


def table(rows: list[Row]) -> str:
    """Return one Markdown table for each condition, tasks by proposers, and a line of milliseconds per step."""
    lines: list[str] = []
    for condition in conditions(rows):
        here = by_task(rows, *condition)
        whole = here[TOTAL]
        if len(here) == 2:  # the total of one task is that task
            del here[TOTAL]
        names = [name for name in whole if name != PLAIN]
        cells = []
        for task, found in here.items():
            prompts, mismatches = found[PLAIN]["prompts"], sum(row["mismatches"] for row in found.values())
            numbers = [f"{found[n]['accepted_length']:.2f} ({found[n]['speedup_vs_plain']:.2f}x)" for n in names]
            cells.append([task, str(prompts), *numbers, f"{mismatches}/{prompts * len(names)}"])
        steps = ", ".join(f"{'plain' if name == PLAIN else name} {row['step_ms']:.1f}" for name, row in whole.items())
        lines += [f"**{condition_name(*condition)}**: accepted length (speedup over plain decoding)", ""]
        lines += [harness.markdown_table(["task", "prompts", *names, "mismatched texts"], cells)]
        lines += ["", f"Milliseconds per step: {steps}.", ""]
    return "\n".join(lines).rstrip()


def compare_hybrid(rows: list[Row]) -> list[str]:
    """Return one line for each condition: the tasks on which the hybrid accepts less than its best member alone."""
    lines = []
    for condition in conditions(rows):
        below, total, sizes = [], "", ""
        for task, found in by_task(rows, *condition).items():
            hybrid = found.get("hybrid")
            members = [found[name] for name in hybrid["members"] if name in found] if hybrid else []
            if hybrid is None or not members:
                continue
            best = max(members, key=lambda row: row["accepted_length"])
            against = f"{hybrid['accepted_length']:.2f} against {best['accepted_length']:.2f} of {best['proposer']}"
            if any(row["tree_size"] != hybrid["tree_size"] for row in members):
                sizes = " (trees of different sizes)"
            if task == TOTAL:
                total = against
            elif hybrid["accepted_length"] < best["accepted_length"]:
                below.append(f"{task} ({against})")
        if total:
            where = (
                f"below its best member's on {', '.join(below)}"
                if below
                else "at least its best member's on every task"
            )
            name = condition_name(*condition)
            lines.append(f"{name}: the hybrid's accepted length{sizes} is {where}; over all tasks {total}")
    return lines


def compare_texts(rows: list[Row]) -> str:
    """Return one line about texts that differ from plain decoding's."""
    tried = [row for row in rows if row["proposer"] != PLAIN and row["task"] != TOTAL]
    mismatches, answers = sum(row["mismatches"] for row in tried), sum(row["prompts"] for row in tried)
    if not mismatches:
        return f"all {answers} texts are identical to plain decoding's"
    where = [
        f"{row['proposer']} on {row['task']}, {condition_name(row['temperature'], row['batch_size'])}: "
        f"{row['mismatches']}/{row['prompts']}"
        for row in tried
        if row["mismatches"]
    ]
    return f"{mismatches} of {answers} texts DIFFER from plain decoding's: " + "; ".join(where)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw accepted length and speedup for each condition, with tasks side by side and a bar for each proposer."""
    found = conditions(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tasks = tasks[:1] if len(tasks) == 2 else tasks  # the total of one task is that task
    names = [name for name in dict.fromkeys(row["proposer"] for row in rows) if name != PLAIN]
    size = (min(16.0, 5 + 1.2 * len(tasks)), 2.4 * len(found) + 1)
    panels = (("accepted_length", "accepted length"), ("speedup_vs_plain", "× plain decoding"))
    with harness.figure(path, title, size, len(found), 2, sharex=True) as axes:
        for line, condition in zip(axes, found, strict=True):
            here = by_task(rows, *condition)
            for axis, (key, axis_label) in zip(line, panels, strict=True):
                for place, name in enumerate(names):
                    at = [index + 0.8 * ((place + 0.5) / len(names) - 0.5) for index in range(len(tasks))]
                    heights = [here[task][name][key] for task in tasks]
                    axis.bar(
                        at, heights, 0.8 / len(names), label=name, color=harness.COLOURS[place % len(harness.COLOURS)]
                    )
                axis.axhline(1, color="#555555", linewidth=0.8)
                axis.set_xticks(range(len(tasks)), tasks, rotation=25, ha="right", fontsize=7)
                axis.set_title(condition_name(*condition), fontsize=9)
                axis.set_ylabel(axis_label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(
            handles, labels, frameon=False, fontsize=8, ncols=len(names), loc="outside lower center"
        )
