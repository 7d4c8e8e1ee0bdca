"""Model cards of the demo model and its heads, written from what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medhead.config import SamplingParams
from medhead.decoder import Decoder
from medhead.generation_config import generate_arguments

NAME = "Llama-medhead-demo-5M"
SAMPLES = (  # the user's turns
    ("Tell me a short story.",),
    ("Tell me a story about a little girl and a dragon.",),
    ("Write a story about a dog who finds a ball.",),
    (
        "I want to book a table at a restaurant for two people.",
        "In San Jose, at 7 pm tonight.",
        "Yes, please. Thank you.",
    ),
    ("Can you help me find a bus to San Francisco?", "From Fresno, on the 5th of March.", "The first one is fine."),
)

MODEL_CARD = """\
---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

**Built with Llama.** A chat and story model with {parameters:,} parameters, trained from scratch so that medhead has something to
show and to test on a laptop. It tells short stories and holds simple booking dialogues. It knows nothing about the world:
use it for nothing else.

- Architecture: Llama ({config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads}/{config.num_key_value_heads} heads, context {config.max_position_embeddings}, byte-level BPE with {config.vocab_size:,} tokens, tied embeddings).
- Training: {steps:,} steps of {tokens_per_step:,} tokens ({tokens:,} tokens) in {minutes} minutes on 2 CPU cores, bfloat16 autocast, Muon
  for matrices and AdamW for the rest, by `python -m medhead_training.demo`, seed {seed}.
- Validation loss (nats per token): {losses}.

## Text it was trained on

| set | licence |
|---|---|
| TinyStories (roneneldan) | CDLA-Sharing-1.0 |
| stories and general chats of erikhyrkas/snakes, generated with Llama 3.1 | MIT; Llama 3.1 Community Licence (hence "Llama" in the name) |
| Schema-Guided Dialogue (google-research-datasets) | CC-BY-SA-4.0 |

Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.

## Five samples (temperature 0.7, seeds 0 to 4, at most 250 tokens per answer, not selected)

{samples}
"""

BUILT_WITH = (
    "**Built with Llama.** Trained on text that {name} wrote, whose own training text is in part generated with Llama 3.1 "
    "(Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved). "
    "Licence: that of the model, cc-by-sa-4.0."
)


def samples(model: Any, tokenizer: Any) -> list[list[dict[str, str]]]:
    """Return sampled chats, one for each of `SAMPLES`, with the seeds 0, 1, ..."""
    found = []
    with Decoder(model, "none", probe=False) as decoder:
        for seed, turns in enumerate(SAMPLES):
            chat: list[dict[str, str]] = []
            for turn in turns:
                chat.append({"role": "user", "content": turn})
                prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
                arguments = generate_arguments(model, SamplingParams(250, 0.7), tokenizer)
                output = decoder.generate(torch.tensor([prompt]), seed=seed, **arguments)
                text = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
                chat.append({"role": "assistant", "content": text})
            found.append(chat)
    return found


def as_markdown(chat: list[dict[str, str]]) -> str:
    """Return a chat with the user's turns in bold and the model's as quotations."""
    lines = []
    for message in chat:
        if message["role"] == "user":
            lines.append(f"**{message['content']}**")
        else:
            lines.append("\n".join(f"> {line}" for line in message["content"].splitlines() or [""]))
    return "\n\n".join(lines)


def write_model_card(folder: Path, training: dict[str, Any]) -> None:
    """Write `README.md` into the model folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("parameters", "steps", "tokens_per_step", "tokens", "minutes", "seed")
    text = MODEL_CARD.format(
        name=NAME,
        config=model.config,
        losses=", ".join(f"{name} {loss:.3f}" for name, loss in training["validation_loss"].items()) or "not measured",
        samples="\n\n".join(map(as_markdown, samples(model, tokenizer))),
        **{name: training[name] for name in names},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def finish_heads(folder: Path, size: int, depth: int, destination: str) -> None:
    """Give trained heads the demo model's name (instead of a folder), licence and default tree of `size` nodes.

    `destination` is the name of their folder in the package.
    """
    _edit(folder / "medhead_config.json", lambda old: {"tree_size": size, "tree_depth": min(depth, old["depth"])})
    adapter = _edit(folder / "adapter_config.json", lambda old: {"base_model_name_or_path": NAME})
    facts = _edit(folder / "training.json", lambda old: {"model": NAME})
    named = {str(adapter["base_model_name_or_path"]), str(facts.get("model", ""))} - {"", NAME}
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name in sorted(named, key=len, reverse=True):
        card = card.replace(name, NAME)
    card = card.replace(f" --model {NAME}", "").replace(str(folder), f"medhead/assets/{destination}")
    sentence = BUILT_WITH.format(name=NAME)
    if sentence not in card:
        card = card.replace("library_name: peft\n", "library_name: peft\nlicense: cc-by-sa-4.0\n", 1)
        head, title, rest = card.partition("\n# ")
        line, _, body = rest.partition("\n")
        card = f"{head}{title}{line}\n\n{sentence}\n{body}"
    (folder / "README.md").write_text(card, encoding="utf-8")


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change fields of a JSON file; return the fields that it had."""
    old = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(old | change(old), indent=2) + "\n", encoding="utf-8")
    return old
