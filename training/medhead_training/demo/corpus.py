"""The demo model's text: records of several datasets become chats, and these one packed stream of tokens."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from medhead_training.demo import repeats
from medhead_training.demo.jsonl import read_jsonl

Chat = list[dict[str, str]]

STORY_PROMPTS = (
    "Tell me a short story.",
    "Tell me a story about {topic}.",
    "Write a short story about {topic}.",
    "Can you tell me a bedtime story about {topic}?",
    "I would like a story with {topic} in it.",
    "Please tell me a story.",
)
FILES = {"repeats": "tinystories"}  # datasets that are made from the records of another one
GREETINGS = ("Hello!", "Hi!", "Hi there.", "Hello, who are you?", "Good morning.", "What can you do?")
GREETING_ANSWER = "Hello! I can tell you a short story or help you book something. What would you like?"
_COMMON = frozenset(
    (  # noqa: SIM905
        "once there was named little girl boy very with they their them that this said what were went then "
        "have upon time wanted when happy some from would could like liked played told looked other because "
        "after into over back home"
    ).split()
)


def story_chat(text: str, rng: random.Random) -> Chat:
    """Return a TinyStories text as the answer to a request for it; the topic is a word that it uses at least 3 times."""
    words = re.findall(r"[a-z]{4,}", text.lower())
    topics = sorted({word for word in words if words.count(word) >= 3 and word not in _COMMON})
    names = re.findall(r"named ([A-Z][a-z]+)", text)
    if names and rng.random() < 0.3:
        topic = names[0]
    else:
        topic = "a " + rng.choice(topics) if topics else "a friend"
    prompt = rng.choice(STORY_PROMPTS).format(topic=topic)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text.strip()}]


def is_simple(text: str, max_chars: int) -> bool:
    """Return whether an answer is short prose without tables, code or unusual characters."""
    return 20 < len(text) < max_chars and not re.search(r"[|`{}<>\\]|[^\x00-\x7f“”‘’–—…é]", text)


def record_chat(name: str, record: dict, rng: random.Random, max_chars: int = 1100) -> Chat | None:
    """Return one record of the dataset `name` as a chat, or None if it does not suit the demo model."""
    if name == "tinystories":
        return story_chat(record["text"], rng)
    if name == "repeats":
        return repeats.chat(record["text"], rng)
    if name == "sgd":
        return record["messages"] if len(record["messages"]) > 1 else None
    if not is_simple(record["answer"], max_chars) or len(record["prompt"]) > 300:
        return None
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["answer"].strip()}]


def chats(folder: Path, mix: dict[str, float], seed: int) -> list[Chat]:
    """Return all chats of a training run, shuffled; each dataset is read as often as `mix` says."""
    rng = random.Random(seed)
    found: list[Chat] = []
    for name, times in mix.items():
        records = list(read_jsonl(folder / f"{FILES.get(name, name)}.jsonl"))
        for epoch in range(int(np.ceil(times))):
            keep = min(1.0, times - epoch)
            for record in records:
                if rng.random() < keep and (chat := record_chat(name, record, rng)):
                    found.append(chat)
    for _ in range(len(found) // 200):
        prompt = rng.choice(GREETINGS)
        found.append([{"role": "user", "content": prompt}, {"role": "assistant", "content": GREETING_ANSWER}])
    rng.shuffle(found)
    return found


def pack(tokenizer: PreTrainedTokenizerBase, documents: list[Chat]) -> np.ndarray:
    """Return the token ids of all chats in one uint16 stream; every chat ends with the end token of its last turn."""
    stream: list[np.ndarray] = []
    for start in range(0, len(documents), 1000):
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in documents[start : start + 1000]]
        stream += [np.asarray(ids, dtype=np.uint16) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return np.concatenate(stream)


def opening_prompts(folder: Path, mix: dict[str, float], count: int, seed: int) -> list[Chat]:
    """Return chats that end with the user's turn: openings, and dialogues cut before a random answer."""
    rng = random.Random(seed)
    found: list[Chat] = []
    for chat in chats(folder, dict.fromkeys(mix, 1.0), seed):
        if len(found) >= count:
            break
        turns = [index for index, message in enumerate(chat) if message["role"] == "assistant" and index > 0]
        if turns:
            found.append(chat[: rng.choice(turns)])
    return found
