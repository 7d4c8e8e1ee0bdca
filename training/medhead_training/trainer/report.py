"""The model card beside trained heads, and the picture of their accuracy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from medhead.bench.harness import BLUE, GREY, ORANGE, figure, markdown_table
from medhead.heads.config import HeadsConfig
from medhead_training.objective.tree_eval import TREE_SIZES, HeadAccuracy

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
    "They change the speed of {model}, not its text: the model is frozen, and only its own tokens are emitted (exactly in "
    "float32; in half precision a near tie may be rounded differently)."
)
ADAPTED = (
    "**The text is not that of {model} as it was published.** Recipe `{recipe}` trained an adapter (LoRA) on the model together "
    "with the heads: what is emitted is exactly the text of the *adapted* model."
)
MEASURED = """\
## Accuracy

On {anchors:,} tokens of held-out text: how often a draft token is right, given that its path is.

{depths}

Accepted length with the best static tree by number of nodes (root included). The first row simulates decoding along the
held-out text and is what to expect. The second is the mean over all positions, which is larger, since decoding skips what
is easy to draft. The third is this mean if depths were right independently of each other.

{lengths}

`accuracies.json` holds the numbers, `medhead_config.json` the trees.

![accuracy by depth, accepted length by nodes](accuracy.png)
"""
USE = """\
## Usage

```sh
medhead generate --model {model} --heads {folder} --prompt "Why is the sky blue?"
medhead evaluate --model {model} --heads {folder}
```
"""


def write_card(folder: str | Path, config: HeadsConfig, facts: dict[str, Any], measured: HeadAccuracy | None) -> Path:
    """Write `README.md`, a model card with PEFT's front matter, into the heads' folder, and return its path.

    Used of `facts`, if present: `model` (the target's name or folder), `recipe`, `loss`, `steps`, `epochs`, `documents`,
    `tokens`, `answer_tokens`, `minutes`, `resumed`, `seed`, `parameters`, `init_from`, `kept_step`,
    `chosen`. `measured` is None without held-out text.
    """
    folder, model = Path(folder), str(facts.get("model") or "the target")
    recipe = str(facts.get("recipe") or "heads")
    text = ADAPTED if recipe in ("joint", "qlora") else UNCHANGED
    parts = [
        FRONT_MATTER.format(model=json.dumps(model)),
        f"# Heads of kind `{config.kind}` for {model}\n",
        f"Draft heads for medhead, which draft {config.depth} tokens ahead. {text.format(model=model, recipe=recipe)}\n",
        markdown_table(("", ""), _facts(config, facts, recipe), left=2) + "\n",
    ]
    if measured is None:
        parts.append("No text was held out, so the accuracy was not measured.\n")
    else:
        parts.append(MEASURED.format(anchors=measured.anchors, depths=_depths(measured), lengths=_lengths(measured)))
    parts.append(USE.format(model=_quoted(model), folder=_quoted(str(folder))))
    path = folder / "README.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def plot_accuracy(path: Path, measured: HeadAccuracy) -> bool:
    """Plot accuracy by depth and accepted length by nodes; return False and print one line without matplotlib."""
    depths = list(range(1, measured.depth + 1))
    nodes = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    sizes = sorted(map(int, measured.trees))
    mean = [measured.mean_length(measured.best_tree(n)) for n in nodes]
    independent = [measured.independent(n)[1] for n in nodes]
    simulated = [measured.accepted_lengths[str(n)] for n in sizes]
    try:
        with figure(path, f"Heads on {measured.anchors:,} tokens of held-out text", (11, 4), columns=2) as axes:
            left, right = axes[0]
            left.plot(depths, measured.top_k(1), "o-", color=BLUE, label="top-1")
            if measured.ranks >= 5:
                left.plot(depths, measured.top_k(5), "s--", color="#56B4E9", label="top-5")
            left.set(xlabel="depth (tokens ahead)", ylabel="accuracy, given the path above", ylim=(0, 1), xticks=depths)
            right.plot(nodes, mean, "^:", color=GREY, label="mean over all positions")
            right.plot(nodes, independent, "s--", color=ORANGE, label="the same, if depths were independent")
            right.plot(sizes, simulated, "o-", color=BLUE, label="simulated decoding")
            right.set(xlabel="nodes of the static tree", ylabel="predicted accepted length", xticks=[2, *TREE_SIZES])
            right.set_ylim(bottom=1)
            for panel in (left, right):
                panel.legend(frameon=False)
                panel.grid(alpha=0.25)
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'medhead[train]')", file=sys.stderr)
        return False
    return True


def _facts(config: HeadsConfig, facts: dict[str, Any], recipe: str) -> list[list[str]]:
    correction = "" if config.correction == "none" else f", correction `{config.correction}`"
    size, vocab_size = config.draft_vocab_size, config.vocab_size
    layers = ", ".join(map(str, config.feature_layers))
    counts = [("documents", "documents"), ("tokens", "tokens"), ("answer_tokens", "tokens to predict")]
    rows: dict[str, str] = {
        "kind": f"`{config.kind}`{correction}",
        "parameters": f"{facts['parameters']:,}" if "parameters" in facts else "",
        "depth": str(config.depth),
        "draft vocabulary": f"{size:,} of {vocab_size:,} tokens" if size else "all tokens",
        "feature layers": f"{layers} of {config.num_target_layers}" if layers else "",
        "trained on": ", ".join(f"{facts[name]:,} {what}" for name, what in counts if name in facts),
        "initialised from": f"`{facts['init_from']}`" if facts.get("init_from") else "",
        "recipe": f"`{recipe}`",
        "loss": f"`{facts['loss']}`" if "loss" in facts else "",
        **{name: f"{facts[name]:,}" for name in ("steps", "epochs") if name in facts},
        "heads of step": f"{facts['kept_step']:,}, the best on held-out text" if facts.get("kept_step", 0) else "",
        "chosen from the amount of text": ", ".join(f"{n} {v}" for n, v in facts.get("chosen", {}).items()),
        "minutes": f"{facts.get('minutes', '')}{' since the run was last started' if facts.get('resumed') else ''}",
        "seed": str(facts.get("seed", "")),
    }
    return [[name, text] for name, text in rows.items() if text]


def _depths(measured: HeadAccuracy) -> str:
    header = ["depth", *(str(depth + 1) for depth in range(measured.depth))]
    tops = [k for k in (1, 5) if k <= measured.ranks]
    return markdown_table(header, [[f"top-{k}", *(f"{rate:.2f}" for rate in measured.top_k(k))] for k in tops])


def _lengths(measured: HeadAccuracy) -> str:
    sizes = sorted(map(int, measured.trees))
    mean = [measured.chain_length(), *(measured.mean_length(measured.best_tree(nodes)) for nodes in sizes)]
    rows = [
        ["simulated decoding", *(f"{measured.accepted_lengths[name]:.2f}" for name in ("chain", *map(str, sizes)))],
        ["mean over positions", *(f"{length:.2f}" for length in mean)],
        ["if independent", "", *(f"{measured.independent(nodes)[1]:.2f}" for nodes in sizes)],
    ]
    return markdown_table(["nodes", f"{measured.depth + 1}, a chain", *map(str, sizes)], rows)


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
