"""Sampling parameters of one sequence, validated once for the command line, the API and `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medhead.errors import MedheadError
from medhead.grammar import Grammar

MAX_TREE_SIZE = 256
MAX_TEMPERATURE = 100
# names of options, for help texts that import no torch; tests compare them with the registries
PROPOSER_NAMES = ("heads", "hybrid", "lookahead", "ngram", "none", "recycling")
WEIGHTS = ("full", "stored", "int8", "int4")  # how a CPU keeps the weights of linear layers
EXACT = ("bitwise", "transformers")
ATTENTION_NAMES = ("auto", "flash", "reference", "sdpa", "triton")
MAX_PENALTY = 100
MAX_BIASES = 300  # token ids of a logit_bias, as at OpenAI


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled and when it ends.

    Where a field is None, the model's generation configuration decides; without a value there the field has no effect.

    Attributes:
        max_new_tokens: largest number of new tokens.
        temperature: divisor of the logits; 0 is greedy decoding.
        top_p: keep the most probable tokens up to this mass; 1 keeps all.
        top_k: keep this many most probable tokens; 0 keeps all.
        min_p: keep tokens at least this probable, relative to the most probable one; 0 keeps all.
        seed: seed of the sampling noise; None draws one.
        stop: strings at which the text ends; they are not part of the text.
        repetition_penalty: divisor of positive and factor of negative logits of tokens that the text holds; 1 is none.
        no_repeat_ngram_size: n-grams of this size occur once; 0 allows repeats.
        min_new_tokens: end tokens are banned before so many new tokens; 0 bans none.
        presence_penalty: subtracted from the logit of every token that the output holds, from -2 to 2.
        frequency_penalty: subtracted from a token's logit as often as the output holds it, from -2 to 2.
        logit_bias: numbers from -100 to 100 that are added to the logits of token ids, at most 300.
        stop_token_ids: further tokens that end the text; they are not part of the text.
        ignore_eos: end tokens of model and tokenizer do not end the text.
        grammar: what the text must look like; None for any text.

    `logit_bias` and the two penalties follow `repetition_penalty` and precede the temperature.

    Raises:
        MedheadError: a value is out of range; the message names the field, the value and what is allowed.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check_count("max_new_tokens", self.max_new_tokens)
        _check_range("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_range("top_p", self.top_p, 0, 1, exclusive=True)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0, MAX_PENALTY, exclusive=True)
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least=0)
        if self.seed is not None:
            check_seed(self.seed)
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise MedheadError(f"stop must be a tuple of strings, got {self.stop!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_range(name, getattr(self, name), -2, 2)
        _check_bias(self.logit_bias)
        for token in self.stop_token_ids:
            _check_count("a token id of stop_token_ids", token, least=0)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise MedheadError(f"grammar must be a medhead.Grammar, got {type(self.grammar).__name__}")
        if self.grammar is not None and self.ignore_eos:
            raise MedheadError("ignore_eos does not go with a grammar, which says where the text ends; leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


def check_seed(seed: int) -> int:
    """Return the seed if it is a whole number of 64 bits.

    Raises:
        MedheadError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise MedheadError(f"seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    return seed


def check_tree_size(size: int) -> int:
    """Return the number of nodes of a tree if it is allowed.

    Raises:
        MedheadError: it is not.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_TREE_SIZE:
        raise MedheadError(f"tree_size must be a whole number from 1 to {MAX_TREE_SIZE}, got {size!r}")
    return size


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MedheadError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _check_range(name: str, value: Any, low: float, high: float, exclusive: bool = False) -> None:
    if value is None:
        return
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid or (exclusive and value == low):
        allowed = f"above {low} and at most {high}" if exclusive else f"from {low} to {high}"
        raise MedheadError(f"{name} must be {allowed}, got {value!r}")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict) or len(bias) > MAX_BIASES:
        got = f"{len(bias)} token ids" if isinstance(bias, dict) else repr(bias)[:80]
        raise MedheadError(f"logit_bias must map at most {MAX_BIASES} token ids to numbers, got {got}")
    for token, value in bias.items():
        _check_count("a token id of logit_bias", token, least=0)
        if value is None:
            raise MedheadError(f"logit_bias of token {token} must be from -100 to 100, got None")
        _check_range(f"logit_bias of token {token}", value, -100, 100)
