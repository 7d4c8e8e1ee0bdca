"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EngineStatistics:
    """Totals since the engine was started, and its present state."""

    running: int = 0  # requests being decoded
    waiting: int = 0  # requests in the queue
    ended: dict[str, int] = field(default_factory=dict)  # requests that ended, by reason
    prompt_tokens: int = 0  # of requests that ended
    new_tokens: int = 0  # emitted so far
    passes: int = 0  # verify passes, summed over requests
    busy: float = 0.0  # seconds spent in prefill and passes
    prefix_queries: int = 0  # prompt tokens that were looked up in the prefix cache
    prefix_hits: int = 0  # of them those that were found, which are not read again
    prefix_bytes: int = 0  # memory of the prefix cache

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per verify pass, bonus token included."""
        return self.new_tokens / self.passes if self.passes else 0.0
