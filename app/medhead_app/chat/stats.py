"""Statistics of a request in words: the live line, and the line below an answer."""

from __future__ import annotations

from html import escape
from typing import Any

from medhead.serving.request import Result
from medhead_app.chat.token_colors import display_name

FINISH_NOTES = {
    "length": "stopped at the token limit",
    "cancelled": "stopped by you",
    "timeout": "stopped at the time limit",
    "error": "failed",
}


def tokens_per_second(result: Result) -> float:
    """Return the tokens per second since the request left the queue."""
    seconds = result.seconds - result.queued
    return result.new_tokens / seconds if seconds > 0 else 0.0


def passes_saved(result: Result) -> float:
    """Return the share of plain decoding's passes that were not needed, from 0 to 1."""
    return 1 - result.passes / result.new_tokens if result.new_tokens else 0.0


def summary(result: Result) -> str:
    """Return one line about an answer."""
    if not result.new_tokens:
        return ""
    parts = [f"{result.new_tokens} tokens", f"{tokens_per_second(result):.0f} tokens/s"]
    parts += [f"accepted length {result.accepted_length:.1f}", display_name(result.proposer)]
    return " · ".join([*parts, f"seed {result.seed}"] if result.seed else parts)


def answer_result(answer: dict[str, Any]) -> Result:
    """Return the statistics that an answer of a conversation carries."""
    lengths = answer.get("lengths", [])
    return Result(new_tokens=sum(lengths), passes=len(lengths), lengths=lengths, seconds=answer.get("seconds", 0.0))


def live_line(result: Result | None, name: str = "", status: str = "") -> str:
    """Return the HTML of the line that follows an answer: numbers, the name of the answer, and its status."""
    values = ("–", "–", "–")
    if result is not None and result.new_tokens:
        saved = f"{100 * passes_saved(result):.0f} %"
        values = (f"{tokens_per_second(result):.0f}", f"{result.accepted_length:.2f}", saved)
    names = ("tokens/s", "accepted length", "passes saved")
    cells = "".join(f"<span><b>{value}</b> {label}</span>" for value, label in zip(values, names, strict=True))
    state = " · ".join(part for part in (name.capitalize(), status) if part)
    return (
        f'<div class="mh-live"><div class="mh-numbers">{cells}</div><div class="mh-status">{escape(state)}</div></div>'
    )


def failed_line(error: str) -> str:
    """Return the HTML of the line with the error that a request failed with."""
    return f'<div class="mh-live"><div class="mh-status mh-failed" role="alert">{escape(error)}</div></div>'
