"""Mix questions of FOLDER_OF_TRAIN_DATA with the answers that the data itself holds, as more text for SmolLM2's heads.

Heads learn from the distributions of the target at every token, whoever wrote the text. Reading a text is one pass of the
target, while an answer of its own takes one pass for every token.
Usage: python benchmarks/smollm2/texts.py FOLDER_OF_TRAIN_DATA OUTPUT.jsonl
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

# category of general_chat.jsonl, or gsm8k: number of texts
SHARES = {
    "generated-trivia": 500, "llama-summaries": 300, "llama-eli5": 150, "llama-explanations": 150, "llama-blog": 100,
    "llama-wiki": 120, "llama-howto": 60, "generated-common-sense": 150, "llama-song-poems": 60, "llama-paraphrase": 150,
    "llama-synonyms": 30, "llama-sentences": 60, "generated-jokes": 40, "generated-food-stories": 40, "gsm8k": 700,
}  # fmt: skip
CALCULATION = re.compile(r"<<[^>]*>>")  # of the answers of gsm8k
MAX_CHARACTERS = 4000


def texts(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return the questions and answers of every category."""
    found: dict[str, list[dict[str, str]]] = {name: [] for name in SHARES}
    for file in ("general_chat", "gsm8k"):
        for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            category = record.get("cat", file)
            question = record.get("prompt") or record["question"]
            answer = CALCULATION.sub("", record["answer"]).replace("\n#### ", "\nThe answer is ")
            if category in found and len(question) + len(answer) <= MAX_CHARACTERS:
                found[category].append({"prompt": question, "answer": answer})
    return found


def main() -> None:
    """Write the mix in random order."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    rng, mix = random.Random(2), []
    for name, found in texts(folder).items():
        rng.shuffle(found)
        mix += found[: SHARES[name]]
    rng.shuffle(mix)
    output.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in mix), encoding="utf-8")
    print(f"{output}: {len(mix)} texts")


if __name__ == "__main__":
    main()
