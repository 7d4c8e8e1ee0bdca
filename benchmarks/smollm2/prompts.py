"""Mix the prompts of FOLDER_OF_TRAIN_DATA that SmolLM2 answers as training data of its heads.

The shares follow what Spec-Bench asks (questions, mathematics, summaries, long instructions); nothing of `eval` is read.
Two kinds of requests are made here, because the training data has none: translations of German sentences (`german.txt`, written
for this file) and questions about passages (of the articles that the training data holds).
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
    "gsm8k": 1300, "sgd": 250, "stories_chat": 250, "translation": 400, "retrieval": 300,
}  # fmt: skip
MAX_CHARACTERS = 900
SLOTS = {
    "city": [
        "Berlin",
        "Hamburg",
        "München",
        "Köln",
        "Dresden",
        "Wien",
        "Zürich",
        "Leipzig",
        "Bremen",
        "Prag",
        "Paris",
        "Rom",
        "Madrid",
        "Warschau",
    ],
    "day": ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"],
    "name": ["Anna Schneider", "Peter Wolf", "Maria Lange", "Thomas Berg", "Eva Krüger", "Jan Hoffmann", "Ines Vogel"],
    "number": [str(number) for number in range(12, 98)],
    "year": [str(year) for year in range(1950, 2030)],
}
TRANSLATE = ("Translate German to English: {}", "Translate the following German text into English.\n\n{}")
ASK = ("What is {} known for?", "Where is {}?", "Why is {} important?", "What do the passages say about {}?")
ARTICLE = "Write a wiki article about "  # of the category llama-wiki


def one_question(text: str) -> list[dict[str, str]]:
    """Return a conversation of one message."""
    return [{"role": "user", "content": text}]


def translations(rng: random.Random, count: int) -> list[list[dict[str, str]]]:
    """Return requests to translate one or two German sentences, their slots filled in by chance."""
    sentences = (Path(__file__).parent / "german.txt").read_text(encoding="utf-8").splitlines()

    def sentence() -> str:
        return rng.choice(sentences).format(**{name: rng.choice(words) for name, words in SLOTS.items()})

    return [
        one_question(rng.choice(TRANSLATE).format(" ".join(sentence() for _ in range(rng.choice((1, 1, 2))))))
        for _ in range(count)
    ]


def retrievals(rng: random.Random, articles: dict[str, str], count: int) -> list[list[dict[str, str]]]:
    """Return questions about the subject of one of three passages, which are the beginnings of articles."""
    found = []
    for _ in range(count):
        subjects = rng.sample(sorted(articles), 3)
        passages = "\n".join(f"Passage {i + 1}: {articles[one][:250]}" for i, one in enumerate(subjects))
        question = rng.choice(ASK).format(rng.choice(subjects))
        found.append(one_question(f"Answer the question with the passages.\n{passages}\nQuestion: {question}"))
    return found


def conversations(folder: Path) -> dict[str, list[list[dict[str, str]]]]:
    """Return the conversations of every category, each ending with a user's message."""
    found: dict[str, list[list[dict[str, str]]]] = {name: [] for name in SHARES}
    rng, articles = random.Random(1), dict[str, str]()
    for file in ("general_chat", "stories_chat", "gsm8k", "sgd"):
        for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            category = record["cat"] if file == "general_chat" else file
            if category == "llama-wiki" and record["prompt"].startswith(ARTICLE):
                articles[record["prompt"].removeprefix(ARTICLE).rstrip(".")] = record["answer"]
            if "messages" in record:
                turns = record["messages"][:1]
            else:
                turns = one_question(record.get("prompt") or record["question"])
            if category in found and sum(len(turn["content"]) for turn in turns) <= MAX_CHARACTERS:
                found[category].append(turns)
    found["translation"] = translations(rng, SHARES["translation"])
    found["retrieval"] = retrievals(rng, articles, SHARES["retrieval"])
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
