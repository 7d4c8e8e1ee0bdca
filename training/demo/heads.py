"""Train heads of every kind for the demo target: `python -m medhead.training.demo.heads`.

One pass of the frozen target serves all kinds: its hidden states are what heads start from, its own distribution is
what they learn. The cross-entropy with soft targets p over the output matrix W needs p only as W^T p:
`-sum_v p_v log q_v = logsumexp(W f) - f . (W^T p)`, so no second array of the size of the vocabulary is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from medhead.errors import MedheadError
from medhead.heads import Heads, HeadsConfig, build_heads, save_heads
from medhead.target import Target

from .corpus import read_jsonl
from .optim import muon_and_adamw, set_learning_rate

RANKS = 8  # ranks whose accuracy is recorded


def read_answers(path: Path) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and where the answer starts."""
    return [
        (record["prompt"] + record["answer"], len(record["prompt"]))
        for record in read_jsonl(path)
        if len(record["answer"]) > 4
    ]


def batch_of(samples: list[tuple[list[int], int]], step: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Padded ids `[rows, longest]` and the answer's mask, about `tokens` tokens of samples of similar length."""
    rng = random.Random(seed * 1_000_003 + step)
    anchor = rng.randrange(len(samples))
    rows = max(1, tokens // len(samples[anchor][0]))
    start = max(0, min(anchor - rows // 2, len(samples) - rows))  # samples are sorted by length
    chosen = samples[start : start + rows]
    longest = max(len(ids) for ids, _ in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    answer = torch.zeros(len(chosen), longest, dtype=torch.bool)
    for row, (tokens_of_row, begin) in enumerate(chosen):
        ids[row, : len(tokens_of_row)] = torch.tensor(tokens_of_row)
        answer[row, begin : len(tokens_of_row)] = True
    return ids, answer


def anchors_of(answer: Tensor, depth: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and positions `t` to train at: x_{t+1} (the root) up to x_{t+1+depth} lie inside the answer or end it."""
    possible = answer[:, 1:].clone()
    possible[:, -1] = False
    chosen = possible & (torch.rand(possible.shape, generator=generator) < share)
    rows, positions = chosen.nonzero(as_tuple=True)
    return rows, positions


def heads_loss(
    heads: Heads,
    hidden: Tensor,
    ids: Tensor,
    answer: Tensor,
    mean_output: Tensor,
    output: Tensor,
    embedding: Tensor,
    rows: Tensor,
    at: Tensor,
    decay: float,
) -> tuple[Tensor, list[float]]:
    """Soft cross-entropy of all depths at anchors (rows, at), weighted by `decay ** depth`; also each depth's own loss.

    Args:
        heads: what is trained.
        hidden: `[batch, tokens, hidden]` of the target.
        ids: `[batch, tokens]`.
        answer: `[batch, tokens]` bool.
        mean_output: `[batch, tokens, hidden]`: W^T p of the target's distribution at every position.
        output: `[vocab, hidden]`, the frozen output matrix W.
        embedding: `[vocab, hidden]`.
        rows: row of each anchor.
        at: position of each anchor.
        decay: weight of a depth relative to the one before.
    """
    state = heads.start(hidden[rows, at])
    total, weight, losses = hidden.new_zeros(()), 0.0, []
    for depth in range(heads.config.depth):
        inside = at + 1 + depth < ids.shape[1]
        if depth:
            inside &= answer[rows, (at + 1 + depth).clamp(max=ids.shape[1] - 1)]
        rows, at, state = rows[inside], at[inside], state[inside]
        if len(rows) == 0:
            break
        here = at + 1 + depth
        state, feature = heads.advance(state, heads.encode(embedding[ids[rows, here]]), depth)
        logits = feature @ output.T
        loss = (
            torch.logsumexp(logits.float(), -1) - (feature.float() * mean_output[rows, here].float()).sum(-1)
        ).mean()
        total = total + decay**depth * loss
        weight += decay**depth
        losses.append(loss.item())
    return total / weight, losses


def frequent_tokens(samples: list[tuple[list[int], int]], config: HeadsConfig) -> Tensor | None:
    """The most frequent tokens of the answers, in order of their ids; None for the whole vocabulary."""
    if not config.draft_vocab:
        return None
    counts = torch.zeros(config.vocab_size, dtype=torch.long)
    for ids, begin in samples:
        counts += torch.bincount(torch.tensor(ids[begin:]), minlength=config.vocab_size)
    return counts.topk(config.draft_vocab).indices.sort().values


@torch.no_grad()
def measure(heads: Heads, target: Target, samples: list[tuple[list[int], int]], most: int = 200) -> list[list[float]]:
    """`accuracies[d][r]`: how often the rank-r guess at depth d+1 is the target's greedy token, on held-out answers."""
    depth = heads.config.depth
    hits, seen = torch.zeros(depth, RANKS), torch.zeros(depth)
    for ids_of_row, begin in samples[:: max(1, len(samples) // most)]:
        ids = torch.tensor([ids_of_row])
        with target.active():
            hidden = target.read(ids)[1][0]
        state = heads.start(hidden[: len(ids_of_row) - 1])
        at = torch.arange(len(ids_of_row) - 1)
        keep = at >= begin - 1
        state, at = state[keep], at[keep]
        for d in range(depth):
            inside = at + 2 + d < len(ids_of_row)
            state, at = state[inside], at[inside]
            if len(at) == 0:
                break
            state, feature = heads.advance(state, heads.encode(target.embed(ids[0, at + 1 + d])), d)
            top = target.output(feature).topk(RANKS, -1).indices
            hits[d] += (top == ids[0, at + 2 + d][:, None]).float().sum(0)
            seen[d] += len(at)
    return [[round(float(h / max(float(seen[d]), 1)), 4) for h in hits[d]] for d in range(depth)]


def train(args: argparse.Namespace) -> None:
    """Train all kinds at once, resuming where the run was killed; write one checkpoint folder for each."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    target = Target(model)
    samples = read_answers(args.answers)
    random.Random(0).shuffle(samples)
    held_out, samples = samples[: len(samples) // 40], sorted(samples[len(samples) // 40 :], key=lambda s: len(s[0]))
    held_out = [sample for sample in held_out if len(sample[0]) > 40]
    torch.manual_seed(args.seed)
    kinds = {
        name: build_heads(
            HeadsConfig(
                kind=name, depth=args.depth, hidden_size=target.hidden_size, vocab_size=target.vocab_size,
                target_layers=target.layers, target_type=str(model.config.model_type), inner_size=args.inner,
            )
        )
        for name in args.kinds
    }  # fmt: skip
    pairs = {
        name: muon_and_adamw(heads.named_parameters(), args.muon_lr, args.adamw_lr) for name, heads in kinds.items()
    }
    output, embedding = target.output.weight.detach(), target.embedding.weight.detach()
    generator = torch.Generator().manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    state_file, step, spent, trained = args.output / "heads_state.pt", 0, 0.0, 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        step, spent, trained = saved["step"], saved["seconds"], saved["tokens"]
        for name, heads in kinds.items():
            heads.load_state_dict(saved["heads"][name])
            for optimizer, state in zip(pairs[name], saved["optimizers"][name], strict=True):
                optimizer.load_state_dict(state)
        print(f"resuming at step {step}", file=sys.stderr)
    tokens_of_data = sum(len(ids) for ids, _ in samples)
    print(f"{len(samples):,} answers, {tokens_of_data:,} tokens", file=sys.stderr)
    began, saved_at = time.monotonic() - spent, time.monotonic()
    running: dict[str, float] = {}
    bar = tqdm(unit="step", mininterval=10, initial=step)
    while (done := (time.monotonic() - began) / (60 * args.minutes)) < 1.0:
        factor = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        ids, answer = batch_of(samples, step, args.tokens_per_step, args.seed)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), target.active():
            logits, hidden = target.read(ids)
            hidden = hidden.float()
            mean_output = logits.float().softmax(-1).to(torch.bfloat16) @ output.to(torch.bfloat16)
        for name, heads in kinds.items():
            rows, at = anchors_of(answer, args.depth, args.share, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, losses = heads_loss(
                    heads, hidden, ids, answer, mean_output, output, embedding, rows, at, args.decay
                )
            if not torch.isfinite(loss):
                raise MedheadError(f"the loss of {name} is {float(loss)} at step {step}: lower --muon-lr")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            set_learning_rate(pairs[name], factor)
            for optimizer in pairs[name]:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            running[name] = 0.98 * running.get(name, losses[0]) + 0.02 * losses[0]
        step, trained = step + 1, trained + ids.numel()
        bar.update()
        bar.set_postfix({name: f"{value:.3f}" for name, value in running.items()}, refresh=False)
        if time.monotonic() - saved_at > 60 * args.save_minutes:
            state = {
                "step": step, "seconds": time.monotonic() - began, "tokens": trained,
                "heads": {name: heads.state_dict() for name, heads in kinds.items()},
                "optimizers": {name: [o.state_dict() for o in pair] for name, pair in pairs.items()},
            }  # fmt: skip
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
            for name, heads in kinds.items():
                save_heads(heads, model, args.output / "snapshot" / name, torch.bfloat16)
            saved_at = time.monotonic()
    bar.close()
    report = {"tokens_of_answers": tokens_of_data, "tokens_trained": trained, "steps": step, "minutes": args.minutes}
    for name, heads in kinds.items():
        heads.eval()
        heads.config.accuracies = measure(heads, target, held_out)
        heads.config.draft_vocab = min(args.draft_vocab, target.vocab_size)
        heads.draft_tokens = frequent_tokens(samples, heads.config)
        save_heads(heads, model, args.output / name, torch.bfloat16)
        report[name] = {
            "parameters": sum(p.numel() for p in heads.parameters()),
            "top1": [row[0] for row in heads.config.accuracies],
        }
    (args.output / "heads_training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main(argv: list[str] | None = None) -> int:
    """Run the command; wrong input is one line and exit code 2."""
    options = argparse.ArgumentParser(
        prog="python -m medhead.training.demo.heads",
        description="Train heads for the demo target on its own answers. Kill it and start it again: it goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--model", type=Path, required=True, help="folder of the target")
    options.add_argument("--answers", type=Path, required=True, help="what `answers` wrote")
    options.add_argument("--output", type=Path, required=True, help="folder for the checkpoints, one for each kind")
    options.add_argument("--kinds", nargs="+", default=["recurrent", "medusa"])
    options.add_argument("--depth", type=int, default=8)
    options.add_argument("--inner", type=int, default=512)
    options.add_argument("--draft-vocab", type=int, default=2048, help="tokens that the heads may name (0: all)")
    options.add_argument("--minutes", type=float, default=18.0)
    options.add_argument("--tokens-per-step", type=int, default=4096)
    options.add_argument("--share", type=float, default=0.3, help="share of positions trained at in each step")
    options.add_argument("--decay", type=float, default=0.9)
    options.add_argument("--muon-lr", type=float, default=0.02)
    options.add_argument("--adamw-lr", type=float, default=0.003)
    options.add_argument("--save-minutes", type=float, default=3.0)
    options.add_argument("--seed", type=int, default=0)
    try:
        train(options.parse_args(argv))
    except MedheadError as error:
        print(f"heads: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
