"""Compare a model's next-token probabilities with rounded weights, and with activations rounded by row, with its own.

The texts are the model's own greedy answers to the first turns of a prompts file. Activations are rounded to 7-bit digits:
with 8 bits the 16-bit sums of an int8 product overflow on CPUs with AVX2.

    python benchmarks/int8/rounding.py --prompts PROMPTS.jsonl --output benchmarks/int8/rounding.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead import load_model, load_tokenizer
from medhead.bench.harness import machine
from medhead.model.block_weights import BlockLinear


class RoundedLinear(nn.Module):
    """`BlockLinear` whose input is rounded to a number of 7-bit digits of its row's largest value."""

    def __init__(self, layer: BlockLinear, digits: int) -> None:
        super().__init__()
        self.layer, self.digits = layer, digits

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        scale = x.abs().amax(-1, keepdim=True) / 63
        steps = 126 ** (self.digits - 1)
        return self.layer((x / scale * steps).round() / steps * scale)


def round_activations(model: Any, digits: int) -> None:
    """Put `RoundedLinear` around every `BlockLinear`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BlockLinear):
                setattr(parent, name, RoundedLinear(child, digits))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, "cpu", "float32")
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    turns = [
        json.loads(line)["turns"][0][:600] for line in lines[:: len(lines) // args.num_prompts][: args.num_prompts]
    ]
    found, texts = {}, []
    with torch.inference_mode():
        for turn in turns:
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": turn}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**chat, max_new_tokens=args.max_new_tokens, do_sample=False)
            texts.append((ids, slice(chat["input_ids"].shape[1] - 1, -1)))

        def log_probs() -> Tensor:
            return torch.cat([model(ids).logits[0, part].log_softmax(-1) for ids, part in texts])

        own, rounded = log_probs(), dict[str, Tensor]()
        for weights in ("int8", "int4"):
            model = load_model(args.model, "cpu", "float32", weights=weights)
            rounded[f"{weights} weights"] = log_probs()
        for digits in (1, 2):
            model = load_model(args.model, "cpu", "float32", weights="int8")
            round_activations(model, digits)
            rounded[f"int8 weights, activations in {7 * digits} bits"] = log_probs()
    for name, other in rounded.items():
        divergence = float(F.kl_div(other, own, log_target=True, reduction="batchmean"))
        same = float((other.argmax(-1) == own.argmax(-1)).double().mean())
        found[name] = {"kl_divergence": round(divergence, 5), "same_most_probable_token": round(same, 4)}
        print(name, found[name], flush=True)
    content = {"machine": machine(), "options": vars(args), "tokens": len(own), "results": found}
    if args.output is not None:
        args.output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
