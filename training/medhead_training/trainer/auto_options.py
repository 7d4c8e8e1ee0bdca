"""Options that the user left open, chosen from the amount of text.

Few updates are the usual reason for useless heads, so little text is passed more often in smaller batches; the updates with the
best held-out accepted length are kept. Where the loss compares distributions, prompts are text to learn from as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from medhead_training.data.token_store import TokenStore
from medhead_training.trainer.options import TrainOptions

STEPS = 400  # updates that a run should have
TOKENS = 4_000_000  # read in all epochs, if the bounds of the epochs allow it
MIN_EPOCHS, MAX_EPOCHS = 3, 24
MAX_ROWS = 8  # per update
FEW_TOKENS = 500_000  # of answers: below, prompts are learned from, too
VERY_FEW_TOKENS = 20_000  # of answers
HELD_OUT, MIN_HELD_OUT, MAX_HELD_OUT = 0.02, 12, 256  # fraction, documents, documents
MAX_HELD_OUT_SHARE = 0.1  # of few documents
EVALUATIONS = 12  # of a run, at least
# Answer tokens, and tokens per pass with 32 nodes on 64 prompts that no choice above saw: the demo model, greedy, at most 200
# tokens (`benchmarks/small-data`).
MEASURED = ((2_482, 2.14), (233_967, 4.22))


@dataclass(frozen=True)
class TextFacts:
    """Numbers of a training set."""

    documents: int
    tokens: int
    answer_tokens: int
    longest: int  # tokens of the longest document

    @classmethod
    def of(cls, store: TokenStore) -> TextFacts:
        """Return the numbers of a store."""
        return cls(store.documents, store.tokens, store.assistant_tokens, int(np.max(store.lengths)))


def choose(options: TrainOptions, text: TextFacts, context: int, processes: int = 1) -> TrainOptions:
    """Return the options with a value for every one that depends on the text; given values are kept.

    `context` is the number of tokens that the target can read.
    """
    given = options
    epochs = given.epochs or int(np.clip(round(TOKENS / text.tokens), MIN_EPOCHS, MAX_EPOCHS))
    tokens_per_step = text.tokens * epochs / (STEPS * given.gradient_accumulation_steps * processes)
    seq_len = given.seq_len
    if seq_len is None:
        shorter = [size for size in (256, 512) if size >= text.longest and tokens_per_step < 1024]
        seq_len = min(context, max(shorter[0] if shorter else 1024, given.depth + 2))
    batch_size = given.batch_size or int(np.clip(tokens_per_step // seq_len, 1, MAX_ROWS))
    updates = max(1, round(tokens_per_step * STEPS / (batch_size * seq_len)))
    updates = min(given.max_steps or updates, updates)
    everything = text.answer_tokens < FEW_TOKENS and given.loss != "hard"
    # 60 answers teach attention heads more (2.32 tokens per pass, not 2.20); recurrent ones draft faster
    kind = "attention" if text.answer_tokens < VERY_FEW_TOKENS else "recurrent"
    return replace(
        given,
        kind=given.kind or (None if given.init_from else kind),
        epochs=epochs,
        seq_len=seq_len,
        batch_size=batch_size,
        learn_from=("all" if everything else "answers") if given.learn_from == "auto" else given.learn_from,
        weight_decay=(0.1 if text.answer_tokens < FEW_TOKENS else 0.01)
        if given.weight_decay is None
        else given.weight_decay,
        eval_steps=given.eval_steps or min(given.save_steps, max(10, updates // EVALUATIONS)),
    )


def chosen_values(given: TrainOptions, chosen: TrainOptions) -> dict[str, object]:
    """Return names and values of the options that were chosen."""
    names = ("kind", "epochs", "seq_len", "batch_size", "learn_from", "weight_decay", "eval_steps")
    return {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(given, name)}


def held_out_documents(options: TrainOptions, documents: int) -> int:
    """Return how many documents are held out."""
    if documents < 2:
        return 0
    if options.held_out is not None:
        return min(MAX_HELD_OUT, max(1, round(options.held_out * documents))) if options.held_out else 0
    few = min(MIN_HELD_OUT, round(MAX_HELD_OUT_SHARE * documents))
    return max(1, few, min(MAX_HELD_OUT, round(HELD_OUT * documents)))


def expectation(text: TextFacts) -> str:
    """Return one line that says what to expect of such an amount of text, by `MEASURED`."""
    (few, low), (many, high) = MEASURED
    position = np.interp(np.log(max(text.answer_tokens, 1)), np.log([few, many]), [low, high])
    where = "at most" if text.answer_tokens < few else "about" if text.answer_tokens < many else "at least"
    return (
        f"with {text.answer_tokens:,} answer tokens expect {where} {position:.1f} tokens per pass with 32 nodes, if the model is "
        f"like the demo model, where {few:,} gave {low:.1f} and {many:,} gave {high:.1f}"
    )
