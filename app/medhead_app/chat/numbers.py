"""Numbers about a request in words: the live line, and the line below an answer."""

from __future__ import annotations

from html import escape

from medhead.serving.request import Result

ENDS = {
    "length": "stopped at the longest length",
    "cancelled": "stopped by you",
    "timeout": "stopped at the time limit",
    "error": "failed",
}


def speed(result: Result) -> float:
    """Tokens a second since it left the queue."""
    seconds = result.seconds - result.queued
    return result.new_tokens / seconds if seconds > 0 else 0.0


def saved(result: Result) -> float:
    """Part of plain decoding's passes that were not needed, 0 to 1."""
    return 1 - result.passes / result.new_tokens if result.new_tokens else 0.0


def facts(result: Result) -> str:
    """One line about how an answer was made."""
    if not result.new_tokens:
        return ""
    parts = [
        f"{result.new_tokens} tokens",
        f"{speed(result):.0f}/s",
        f"{result.accepted_length:.1f} a pass",
        result.proposer,
    ]
    if result.seed:
        parts.append(f"seed {result.seed}")
    return " · ".join(parts)


def live_line(result: Result | None, state: str = "", failed: bool = False) -> str:
    """HTML of the line that follows a request; with dashes where nothing runs, and nothing else beside a failure."""
    if failed:
        return f'<div class="mh-live"><div class="mh-state mh-failed" role="alert">{escape(state)}</div></div>'
    values = ("–", "–", "–") if result is None or not result.new_tokens else _values(result)
    names = ("tokens/s", "tokens a pass", "passes saved")
    cells = "".join(f"<span><b>{value}</b> {name}</span>" for value, name in zip(values, names, strict=True))
    return (
        f'<div class="mh-live"><div class="mh-numbers">{cells}</div><div class="mh-state">{escape(state)}</div></div>'
    )


def _values(result: Result) -> tuple[str, str, str]:
    return f"{speed(result):.0f}", f"{result.accepted_length:.2f}", f"{100 * saved(result):.0f} %"
