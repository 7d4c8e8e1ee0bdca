"""Keep the token ids of SmolLM2's answers in the repository, because they took hours, and make the answers' file of them again.

usage: python benchmarks/smollm2/answers.py pack answers.jsonl answers.npz
       python benchmarks/smollm2/answers.py unpack prompts.jsonl answers.npz answers.jsonl
       python benchmarks/smollm2/answers.py split answers.jsonl train.jsonl held-out.jsonl

`unpack` writes the bytes that `medhead generate-data` wrote, so that command goes on with the answers that are missing. `split`
holds out a fiftieth, so that two trainings hold out the same answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from medhead.model.loading import load_tokenizer
from medhead_training.data.prompts import cycle_prompts, encode_prompt
from medhead_training.data.resumable import ResumableFile
from medhead_training.generate_data import WRITER, Prompt, line_of


def pack(answers: Path, packed: Path) -> None:
    """Write the token ids of all answers, and the options that they were made with."""
    records = sorted(map(json.loads, answers.read_text(encoding="utf-8").splitlines()), key=lambda one: one["index"])
    meta = json.loads(ResumableFile(answers, WRITER).meta.read_text(encoding="utf-8"))
    np.savez_compressed(
        packed,
        index=np.array([one["index"] for one in records], np.uint32),
        length=np.array([len(one["answer_ids"]) for one in records], np.uint16),
        ids=np.array([token for one in records for token in one["answer_ids"]], np.uint16),
        options=np.array(json.dumps(meta["options"])),
    )
    print(f"{packed}: {len(records)} answers, {sum(len(one['answer_ids']) for one in records):,} tokens")


def unpack(prompts: Path, packed: Path, answers: Path) -> None:
    """Write the answers' file; prompts are those that the answers were given to."""
    with np.load(packed, allow_pickle=False) as data:
        options = json.loads(str(data["options"]))
        ids = np.split(data["ids"], np.cumsum(data["length"])[:-1])
        answered = dict(zip(data["index"].tolist(), ids, strict=True))
    tokenizer, temperatures = load_tokenizer("smollm2"), options["--temperatures"]
    ends = options["generation configuration"]["eos_token_id"]
    ResumableFile(answers, WRITER).start(options)
    with answers.open("wb") as file:
        for index, where, chat in cycle_prompts(prompts, 0, max(answered) + 1, None):
            if index in answered:
                prompt = Prompt(index, chat, encode_prompt(tokenizer, chat, where, 10**6))
                temperature = temperatures[index % len(temperatures)]
                file.write(line_of(prompt, answered[index].tolist(), tokenizer, ends, [], temperature))
            if index == max(answered):
                break
    print(f"{answers}: {len(answered)} answers")


def split(answers: Path, train: Path, held_out: Path) -> None:
    """Write the lines to train on and the held-out ones."""
    lines = answers.read_text(encoding="utf-8").splitlines(keepends=True)
    count = max(1, len(lines) // 50)
    kept = set(np.random.default_rng(0).permutation(len(lines))[:count].tolist())
    for path, wanted in ((train, False), (held_out, True)):
        path.write_text("".join(line for i, line in enumerate(lines) if (i in kept) == wanted), encoding="utf-8")
    print(f"{train}: {len(lines) - count} answers, {held_out}: {count}")


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack, "split": split}[sys.argv[1]](*map(Path, sys.argv[2:]))
