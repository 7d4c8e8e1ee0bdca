"""Mix the prompts of `../shared/data/train` that SmolLM2 answers as training data of its heads.

The shares follow what Spec-Bench asks (questions, mathematics, summaries, long instructions); nothing of `eval` is read.
Usage: python benchmarks/smollm2/prompts.py FOLDER_OF_TRAIN_DATA OUTPUT.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

# category of general_chat.jsonl, or file: number of prompts
SHARES = {
    "generated-trivia": 1300, "llama-summaries": 900, "llama-eli5": 260, "llama-explanations": 260, "llama-blog": 200,
    "llama-wiki": 200, "llama-howto": 97, "generated-common-sense": 250, "llama-song-poems": 250, "llama-paraphrase": 250,
    "llama-synonyms": 60, "llama-sentences": 120, "generated-jokes": 100, "generated-food-stories": 60,
    "gsm8k": 1300, "sgd": 250, "stories_chat": 250,
}  # fmt: skip
MAX_CHARACTERS = 1500


def conversations(folder: Path) -> dict[str, list[list[dict[str, str]]]]:
    """Return the conversations of every category, each ending with a user's message."""
    found: dict[str, list[list[dict[str, str]]]] = {name: [] for name in SHARES}
    for file in ("general_chat", "stories_chat", "gsm8k", "sgd"):
        for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            category = record["cat"] if file == "general_chat" else file
            if "messages" in record:
                turns = record["messages"][:1]
            else:
                turns = [{"role": "user", "content": record.get("prompt") or record["question"]}]
            if category in found and sum(len(turn["content"]) for turn in turns) <= MAX_CHARACTERS:
                found[category].append(turns)
    return found


def main() -> None:
    """Write the mix in random order, without prompts that occur twice."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    rng, seen, mix = random.Random(0), set[str](), []
    for name, wanted in conversations(folder).items():
        rng.shuffle(wanted)
        for messages in wanted[: SHARES[name]]:
            key = json.dumps(messages)
            if key not in seen:
                seen.add(key)
                mix.append(messages)
    rng.shuffle(mix)
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in mix)
    output.write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {len(mix)} prompts")


if __name__ == "__main__":
    main()
