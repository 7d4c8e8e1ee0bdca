"""Sampling parameters of one sequence, validated once for the command line, the API and `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medhead.errors import MedheadError

MAX_TREE_SIZE = 256
MAX_TEMPERATURE = 100
# names of options, for help texts that import no torch; tests compare them with the registries
PROPOSER_NAMES = ("heads", "hybrid", "lookahead", "ngram", "none", "recycling")
ATTENTION_NAMES = ("auto", "flash", "reference", "sdpa", "triton")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled and when it ends.

    Attributes:
        max_new_tokens: largest number of new tokens.
        temperature: divisor of the logits; 0 is greedy decoding.
        top_p: keep the most probable tokens up to this mass; None or 1 keeps all.
        top_k: keep this many most probable tokens; None keeps all.
        min_p: keep tokens at least this probable, relative to the most probable one; None or 0 keeps all.
        seed: seed of the sampling noise; None draws one.
        stop: strings at which the text ends; they are not part of the text.

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

    def __post_init__(self) -> None:
        _check_count("max_new_tokens", self.max_new_tokens)
        _check_range("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_range("top_p", self.top_p, 0, 1, exclusive=True)
        _check_range("min_p", self.min_p, 0, 1)
        if self.top_k is not None:
            _check_count("top_k", self.top_k)
        if self.seed is not None:
            check_seed(self.seed)
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise MedheadError(f"stop must be a tuple of strings, got {self.stop!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0

    def generate_arguments(self) -> dict[str, Any]:
        """Return the arguments of `model.generate` for these parameters, without seed and stop strings."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": not self.greedy}
        if not self.greedy:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
            arguments |= {"min_p": self.min_p} if self.min_p else {}
        return arguments


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


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MedheadError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_range(name: str, value: Any, low: float, high: float, exclusive: bool = False) -> None:
    if value is None:
        return
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid or (exclusive and value == low):
        allowed = f"above {low} and at most {high}" if exclusive else f"from {low} to {high}"
        raise MedheadError(f"{name} must be {allowed}, got {value!r}")
