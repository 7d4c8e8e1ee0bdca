"""Text that the target writes itself, for training its heads: `python -m medhead.training.demo.answers`.

Heads learn to guess what this very model says, so they are trained on that (self-distillation), not on the raw text.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from medhead.decoder import Decoder
from medhead.errors import MedheadError

from .corpus import Chat, chats, read_jsonl
from .pretrain import MIX

TEMPERATURES = (0.0, 0.7, 1.0)  # a third of the batches each


def prompts(folder: Path, count: int, seed: int) -> list[Chat]:
    """Chats that end with the user's turn: openings, and dialogues cut before a random answer."""
    rng = random.Random(seed)
    found: list[Chat] = []
    for chat in chats(folder, dict.fromkeys(MIX, 1.0), seed):
        turns = [index for index, message in enumerate(chat) if message["role"] == "assistant" and index > 0]
        if turns:
            found.append(chat[: rng.choice(turns)])
        if len(found) == count:
            break
    return found


def write_answers(args: argparse.Namespace) -> None:
    """Generate an answer to every prompt, batch by batch; batches that the file already holds are skipped."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = prompts(args.data, args.count, args.seed)
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][-600:] for chat in asked]
    ids.sort(key=len)
    batches = [ids[start : start + args.batch] for start in range(0, len(ids), args.batch)]
    random.Random(args.seed).shuffle(batches)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = sum(1 for _ in read_jsonl(args.output)) // args.batch if args.output.exists() else 0
    decoder = Decoder(model, "none")
    with args.output.open("a", encoding="utf-8") as file:
        for number, batch in enumerate(tqdm(batches, unit="batch", mininterval=10)):
            if number < done:
                continue
            longest = max(map(len, batch))
            pad = tokenizer.pad_token_id
            inputs = torch.tensor([[pad] * (longest - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            temperature = TEMPERATURES[number % len(TEMPERATURES)]
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            output = model.generate(
                inputs,
                attention_mask=mask,
                custom_generate=decoder,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed + number,
                **sampling,
            )
            for prompt, row in zip(batch, output[:, longest:].tolist(), strict=True):
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                record = {"prompt": prompt, "answer": row[:end], "temperature": temperature}
                file.write(json.dumps(record) + "\n")
            file.flush()


def main(argv: list[str] | None = None) -> int:
    """Run the command; wrong input is one line and exit code 2."""
    options = argparse.ArgumentParser(
        prog="python -m medhead.training.demo.answers",
        description="Let the demo target answer prompts of the training text. Start it again to go on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--model", type=Path, required=True, help="folder of the target")
    options.add_argument("--data", type=Path, required=True, help="folder with the prompts' files (jsonl)")
    options.add_argument("--output", type=Path, required=True, help="file of token ids to write (jsonl)")
    options.add_argument("--count", type=int, default=7680, help="number of prompts")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--max-new-tokens", type=int, default=224)
    options.add_argument("--seed", type=int, default=1)
    try:
        write_answers(options.parse_args(argv))
    except MedheadError as error:
        print(f"answers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
