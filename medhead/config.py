"""Parameters that users give, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medhead.errors import MedheadError


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled, and where it ends.

    Attributes:
        max_new_tokens: largest number of new tokens, at least 1.
        temperature: 0 to 100; 0 is greedy decoding.
        top_p: keep the most probable tokens up to this mass, above 0 and at most 1; None keeps all.
        top_k: keep this many of the most probable tokens, at least 1; None keeps all.
        min_p: keep tokens at least this probable relative to the most probable one, 0 to 1; None keeps all.
        seed: 0 to 2**64 - 1; the same seed gives the same text. None draws one.
        stop: texts that end the output; the output does not include them.

    Raises:
        MedheadError: names the field, the value given, and what is allowed.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, _whole(self.max_new_tokens, 1), "a whole number of at least 1")
        _check("temperature", self.temperature, _number(self.temperature, 0, 100), "from 0 to 100")
        top_p, top_k, min_p, seed = self.top_p, self.top_k, self.min_p, self.seed
        _check("top_p", top_p, top_p is None or (_number(top_p, 0, 1) and top_p != 0), "above 0 and at most 1")
        _check("top_k", top_k, top_k is None or _whole(top_k, 1), "a whole number of at least 1")
        _check("min_p", min_p, min_p is None or _number(min_p, 0, 1), "from 0 to 1")
        _check("seed", seed, seed is None or _whole(seed, 0, 2**64), "a whole number from 0 to 2**64 - 1")
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) for text in self.stop)
        _check("stop", self.stop, texts, "a tuple of texts")


def _whole(value: Any, low: int, end: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < end


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise MedheadError(f"{name} must be {expected}, got {value!r}")
