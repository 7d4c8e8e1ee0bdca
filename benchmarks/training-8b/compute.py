"""Compute memory and time of training heads on a frozen model of 8B shape on one GPU; nothing is run.

python benchmarks/training-8b/compute.py > benchmarks/training-8b/table.md
"""

from __future__ import annotations

import torch

from medhead.heads import HeadsConfig, build_heads
from medhead.heads.attention_layers import SCORE_BYTES
from medhead_training.objective.chunked import CHUNK_BYTES, CUDA_CHUNK_BYTES, positions_per_chunk
from medhead_training.trainer.options import TrainOptions

HIDDEN, LAYERS, INNER, KV_SIZE, VOCAB = 4096, 32, 14336, 1024, 128256  # Llama-3.1-8B
ROWS, LENGTH = 8, 1024
DRAFT_VOCAB = 32768
PEAK, SHARE, BANDWIDTH = 790e12, 0.5, 3.0e12  # H100 in bfloat16; share of it that products reach (assumed); bytes/s
OPTIONS = TrainOptions()
DEPTH = OPTIONS.depth
LEVELS = sum(OPTIONS.depth_decay**level for level in range(DEPTH))  # unrolled by a step, in the mean over random depths
TOKENS = ROWS * LENGTH
ANCHORS = int(OPTIONS.anchor_fraction * TOKENS)


def config(kind: str) -> HeadsConfig:
    """Return the configuration that `finetune` makes for a model of this shape."""
    block = kind == "block"
    return HeadsConfig(
        kind=kind, depth=DEPTH, hidden_size=HIDDEN, vocab_size=VOCAB, num_target_layers=LAYERS, inner_size=2 * HIDDEN,
        num_layers=2 if block else 1, correction="recurrent" if block else "none", correction_size=3 * HIDDEN // 2,
        feature_layers=[1, 8, 16, 24, 31] if block else [], num_heads=32, num_kv_heads=8, head_dim=128,
        draft_vocab_size=DRAFT_VOCAB,
    )  # fmt: skip


def compute(kind: str) -> dict[str, float]:
    """Return the numbers of one kind of heads: bytes, and operations of a step of `TOKENS` tokens."""
    with torch.device("meta"):
        heads = build_heads(config(kind))
    sizes = {name: parameter.numel() for name, parameter in heads.named_parameters() if parameter.ndim == 2}
    block = kind == "block"
    layer = HIDDEN * (2 * HIDDEN + 2 * KV_SIZE) + 3 * HIDDEN * INNER
    target = TOKENS * LAYERS * (2 * layer + 4 * HIDDEN * LENGTH / 2)
    of_text = sum(n for name, n in sizes.items() if name.startswith("fc") or "k_proj" in name or "v_proj" in name)
    of_slots = sum(n for name, n in sizes.items() if name.startswith("layers"))
    of_levels = sum(n for name, n in sizes.items() if name.startswith("cell")) if block else sum(sizes.values())
    forward = 2 * (TOKENS * of_text * block + ANCHORS * (DEPTH * of_slots + LEVELS * of_levels))
    scores = 2 * ANCHORS * DEPTH * 32 * LENGTH if block else 0  # of all layers' attention to the text
    vocabulary = 4 * HIDDEN * DRAFT_VOCAB * (ANCHORS * LEVELS + TOKENS)  # two products a position, no backward
    count = sum(parameter.numel() for parameter in heads.parameters())
    chunks = ANCHORS * LEVELS / positions_per_chunk(DRAFT_VOCAB, CUDA_CHUNK_BYTES)
    small = ANCHORS * LEVELS / positions_per_chunk(DRAFT_VOCAB, CHUNK_BYTES)
    slot_numbers = 2 * (4 * HIDDEN + 2 * KV_SIZE + 6 * HIDDEN) if block else 0  # kept for backward by two layers
    return {
        "parameters": count,
        "target weights": 2 * (LAYERS * layer + 2 * VOCAB * HIDDEN),
        "heads, gradients, optimizer": 12 * count,
        "features": TOKENS * 2 * HIDDEN * (6 if block else 2),
        "scores held": min(SCORE_BYTES, scores * 2) if block else 0,
        "scores of one layer, if held": scores * 2,
        "activations": 2 * ANCHORS * (DEPTH * slot_numbers + LEVELS * 10 * HIDDEN),
        "logits of a chunk": CUDA_CHUNK_BYTES,
        "target": target,
        "heads forward and backward": 3 * forward + (5 * 2 * 128 * scores if block else 0),
        "vocabulary": vocabulary,
        "matrix reads": 2 * chunks * 2 * HIDDEN * DRAFT_VOCAB / BANDWIDTH,
        "matrix reads in chunks of 64 MiB": 2 * small * 2 * HIDDEN * DRAFT_VOCAB / BANDWIDTH,
    }


def table() -> str:
    """Return two Markdown tables."""
    kinds = {kind: compute(kind) for kind in ("block", "recurrent")}
    memory = ("target weights", "heads, gradients, optimizer", "features", "activations", "scores held",
              "logits of a chunk")  # fmt: skip
    lines = ["| memory in GB (computed, not measured) | block | recurrent |", "|---|--:|--:|"]
    for name in memory:
        lines.append(f"| {name} | " + " | ".join(f"{found[name] / 1e9:.1f}" for found in kinds.values()) + " |")
    sums = (sum(found[name] for name in memory) for found in kinds.values())
    lines.append("| **together** | " + " | ".join(f"**{total / 1e9:.1f}**" for total in sums) + " |")
    scores = kinds["block"]["scores of one layer, if held"]
    lines += ["", f"Scores of one layer would take {scores / 1e9:.1f} GB at once.", ""]
    lines += ["| seconds for a million tokens (computed, not measured) | block | recurrent |", "|---|--:|--:|"]
    products, per_million = ("target", "heads forward and backward", "vocabulary"), 1e6 / TOKENS
    for name in products:
        seconds = (found[name] * per_million / (PEAK * SHARE) for found in kinds.values())
        lines.append(f"| {name} | " + " | ".join(f"{value:.0f}" for value in seconds) + " |")
    sums = (sum(found[name] for name in products) * per_million / (PEAK * SHARE) for found in kinds.values())
    lines.append("| **together** | " + " | ".join(f"**{total:.0f}**" for total in sums) + " |")
    reads = [kinds["block"][name] * per_million for name in ("matrix reads", "matrix reads in chunks of 64 MiB")]
    lines += [
        "",
        f"Reading the output matrix takes {reads[0]:.1f} s, and would take {reads[1]:.1f} s in chunks of 64 MiB.",
        "",
    ]
    lines += [
        f"One GPU with {PEAK / 1e12:.0f} TFLOP/s in bfloat16, of which products are assumed to reach {SHARE:.0%}, and "
        f"{BANDWIDTH / 1e12:.1f} TB/s; Llama-3.1-8B's shape, {ROWS} rows of {LENGTH} tokens, depth {DEPTH}, {DRAFT_VOCAB:,} "
        "draft tokens, all tokens learnt, the target run once for every token of a pass over the text."
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
