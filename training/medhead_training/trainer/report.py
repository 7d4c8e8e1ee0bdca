"""What training and evaluation write for people: the model card beside the heads, tables and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from medhead.heads.config import HeadsConfig
from medhead_training.tree_eval import NODES, Measured

FRONT_MATTER = """\
---
library_name: peft
base_model: {model}
tags:
- medhead
- speculative-decoding
---
"""
UNCHANGED = (
    "They change how fast {model} writes, not what: the model is frozen, and whatever the heads guess, its own tokens are "
    "what is emitted (exactly in float32; in half precision a near tie may round the other way)."
)
ADAPTED = (
    "**The text is not that of {model} as it was published.** Recipe `{recipe}` trained an adapter (LoRA) on the model together "
    "with the heads: what is emitted is exactly the text of the *adapted* model."
)
MEASURED = """\
## How good they are

On {anchors:,} tokens of held-out text. How often a guess is right, given that the path to it is:

{depths}

Tokens per verify pass with the best static tree of so many nodes (root included). The first row follows decoding along
the held-out text, pass by pass: expect that. The second is the mean over all its positions, which is more, since decoding jumps
over what is easy to guess; the third is what this mean would be if depths were right independently of each other.

{lengths}

`accuracies.json` holds the numbers, `medhead_config.json` the trees.

![accuracy by depth, accepted length by nodes](accuracy.png)
"""
USE = """\
## How to use them

```sh
python -m medhead.generate --model {model} --heads {folder} --prompt "Why is the sky blue?"
python -m medhead_training.evaluate --model {model} --heads {folder}
```
"""


def write_card(folder: str | Path, config: HeadsConfig, facts: dict[str, Any], measured: Measured | None) -> Path:
    """Write `README.md`, a model card with PEFT's front matter.

    Args:
        folder: of the heads.
        config: of the heads.
        facts: what the training knows of itself; of these, what is there is told: `model` (the target's name or folder),
            `recipe`, `loss`, `steps`, `epochs`, `documents`, `tokens`, `answer_tokens`, `minutes`, `resumed`, `seed`,
            `parameters`.
        measured: on held-out text; None if there was none.

    Returns:
        The file.
    """
    folder, model = Path(folder), str(facts.get("model") or "the target")
    recipe = str(facts.get("recipe") or "heads")
    adapted = recipe in ("joint", "qlora")
    parts = [
        FRONT_MATTER.format(model=json.dumps(model)),
        f"# Heads of kind `{config.kind}` for {model}\n",
        f"Extra decoding heads for medhead, which guess {config.depth} tokens ahead. "
        + (ADAPTED if adapted else UNCHANGED).format(model=model, recipe=recipe)
        + "\n",
        _table([["what", ""], *_facts(config, facts, recipe)], left=2),
    ]
    if measured is None:
        parts.append("No text was held out, so nothing is known of how good they are.\n")
    else:
        depths, lengths = _depths(measured), _lengths(measured)
        parts.append(MEASURED.format(anchors=measured.anchors, depths=depths.rstrip(), lengths=lengths.rstrip()))
    parts.append(USE.format(model=_quoted(model), folder=_quoted(str(folder))))
    path = folder / "README.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def plot_accuracy(path: str | Path, measured: Measured) -> bool:
    """Draw accuracy by depth, and accepted length by nodes; says so in one line if matplotlib is not installed.

    Args:
        path: of the picture.
        measured: what to draw.

    Returns:
        Whether there is a picture.
    """
    plt = _pyplot()
    if plt is None:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    depths = range(1, measured.depth + 1)
    left.plot(depths, measured.top(1), "o-", color="#0072B2", label="first guess")
    if measured.ranks >= 5:
        left.plot(depths, measured.top(5), "s--", color="#56B4E9", label="one of the first five")
    left.set(xlabel="depth (tokens ahead)", ylabel="right, given the path above", ylim=(0, 1), xticks=list(depths))
    nodes = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    mean, independent = (
        [measured.length(measured.best_tree(n)) for n in nodes],
        [measured.independent(n)[1] for n in nodes],
    )
    right.plot(nodes, mean, "^:", color="#999999", label="mean over all positions")
    right.plot(nodes, independent, "s--", color="#D55E00", label="the same, if depths were independent")
    sizes = sorted(map(int, measured.trees))
    right.plot(sizes, [measured.walked[str(n)] for n in sizes], "o-", color="#0072B2", label="decoding, pass by pass")
    right.set(xlabel="nodes of the static tree", ylabel="predicted tokens per pass", xticks=[2, *NODES])
    right.set_ylim(bottom=1)
    for axes, place in ((left, "best"), (right, "lower right")):
        axes.legend(frameon=False, loc=place)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Heads on {measured.anchors:,} tokens of held-out text", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def evaluation_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of what `evaluate.Way.summary` returned."""
    lines = [
        "| proposer | parameters | nodes | temperature | tokens/pass | mean over prompts | propose ms | forward ms | same text |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        lines.append(
            f"| {_label(row)} | {parameters} | {row['nodes']} | {row['temperature']:g} "
            f"| {row['tokens_per_pass']:.2f} | {row['mean_over_prompts']:.2f} | {row['propose_ms']:.2f} "
            f"| {row['forward_ms']:.2f} | {row['identical']}/{row['prompts']} |"
        )
    lines += ["", "Same text: as the first proposer of the same target and temperature. Milliseconds are of one step."]
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    """Name of a proposer in table and picture."""
    name = f"{Path(row['name']).name} ({row['kind']})" if row["kind"] else row["name"]
    return f"{name}, static" if row["static"] else name


def plot_evaluation(path: str | Path, rows: list[dict[str, Any]], title: str) -> bool:
    """Draw tokens per pass by nodes of the tree, a panel for each temperature; returns whether there is a picture.

    Args:
        path: of the picture.
        rows: what `evaluate.Way.summary` returned.
        title: of the picture.
    """
    plt = _pyplot()
    if plt is None:
        return False
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(6 * len(temperatures), 4.2), squeeze=False, sharey=True
    )
    for axes, temperature in zip(panels[0], temperatures, strict=True):
        here = [row for row in rows if row["temperature"] == temperature and row["nodes"] > 1]
        lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in here:
            lines.setdefault((row["name"], _label(row)), []).append(row)
        for (_, name), points in lines.items():
            style = "s--" if points[0]["static"] else "o-" if points[0]["kind"] else "^:"
            points.sort(key=lambda row: row["nodes"])
            axes.plot([p["nodes"] for p in points], [p["tokens_per_pass"] for p in points], style, label=name)
        axes.set(xlabel="nodes of the tree", title=f"temperature {temperature:g}" if temperature else "greedy")
        axes.set_ylim(bottom=1)
        axes.set_xticks(sorted({row["nodes"] for row in here}))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens per pass")
    if any(row["nodes"] > 1 for row in rows):
        panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _facts(config: HeadsConfig, facts: dict[str, Any], recipe: str) -> list[list[str]]:
    """Rows of what is known."""
    correction = "" if config.correction == "none" else f", correction `{config.correction}`"
    vocabulary = (
        f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens" if config.draft_vocab_size else "all tokens"
    )
    rows = [["kind", f"`{config.kind}`{correction}"]]
    if "parameters" in facts:
        rows.append(["parameters", f"{facts['parameters']:,}"])
    rows += [["depth", str(config.depth)], ["draft vocabulary", vocabulary]]
    if config.feature_layers:
        rows.append(["reads layers", f"{', '.join(map(str, config.feature_layers))} of {config.num_target_layers}"])
    counts = [("documents", "documents"), ("tokens", "tokens"), ("answer_tokens", "tokens to guess")]
    data = [f"{facts[name]:,} {what}" for name, what in counts if name in facts]
    if data:
        rows.append(["trained on", ", ".join(data)])
    if facts.get("init_from"):
        rows.append(["began with", f"`{facts['init_from']}`"])
    rows += [["recipe", f"`{recipe}`"]]
    rows += [["loss", f"`{facts['loss']}`"]] if "loss" in facts else []
    rows += [[name, f"{facts[name]:,}"] for name in ("steps", "epochs") if name in facts]
    if "minutes" in facts:
        rows.append(
            ["minutes", f"{facts['minutes']}{' since the run was last started' if facts.get('resumed') else ''}"]
        )
    rows += [["seed", str(facts["seed"])]] if "seed" in facts else []
    return rows


def _depths(measured: Measured) -> str:
    head = ["depth", *(str(depth + 1) for depth in range(measured.depth))]
    rows = [["top-1", *(f"{rate:.2f}" for rate in measured.top(1))]]
    if measured.ranks >= 5:
        rows.append(["top-5", *(f"{rate:.2f}" for rate in measured.top(5))])
    return _table([head, *rows])


def _lengths(measured: Measured) -> str:
    sizes = sorted(map(int, measured.trees))
    walked = [measured.walked["chain"], *(measured.walked[str(nodes)] for nodes in sizes)]
    mean = [measured.chain(), *(measured.length(measured.best_tree(nodes)) for nodes in sizes)]
    rows = [
        ["nodes", f"{measured.depth + 1}, a chain", *map(str, sizes)],
        ["decoding, pass by pass", *(f"{length:.2f}" for length in walked)],
        ["mean over positions", *(f"{length:.2f}" for length in mean)],
        ["if independent", "", *(f"{measured.independent(nodes)[1]:.2f}" for nodes in sizes)],
    ]
    return _table(rows)


def _table(rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; columns behind the first `left` are aligned to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * left + "--:|" * (len(rows[0]) - left))
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text


def _pyplot() -> Any:
    """matplotlib for files, or None and one line that says why."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'medhead[train]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
