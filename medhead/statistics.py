"""What a generation did: counts of tokens and passes, and times."""

from __future__ import annotations

from dataclasses import dataclass, field

from medhead.core.step_times import StepTimes


@dataclass
class Statistics:
    """What one generation did.

    Attributes:
        new_tokens: tokens emitted, all rows together.
        passes: verify passes summed over rows, that over the prompt, which gives the first token, included; a row that ended
            takes part only in lockstep, see `core.lockstep`.
        steps: verify passes of the batch, without that over the prompts.
        prompt_tokens: prompt tokens, all rows together, without padding.
        prefill_seconds: time to read the prompts and to emit their first tokens.
        decode_seconds: time of all steps.
        times: the steps' time by part; None unless the decoder profiles.
        captured_steps: how many steps were captured ones.
        cache_bytes: peak memory of the key/value cache.
        packed_bytes: memory of packed copies of weights, see `PackedWeights`.
        capture_seconds: time to make captured steps ready; the next generation of the same form has them.
        lengths: tokens emitted by every pass of every row, in order, for distributions.
    """

    new_tokens: int = 0
    passes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    times: StepTimes | None = None
    cache_bytes: int = 0
    packed_bytes: int = 0
    capture_seconds: float = 0.0
    captured_steps: int = 0
    lengths: list[int] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per verify pass, bonus included; 1.0 is plain decoding."""
        return self.new_tokens / self.passes if self.passes else 0.0

    @property
    def seconds(self) -> float:
        """Prefill and all steps; not the time to capture steps."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens / `seconds`."""
        return self.new_tokens / self.seconds if self.seconds else 0.0
