"""The race as HTML: two cards and a verdict."""

from __future__ import annotations

from html import escape

from medhead_app.chat.race import RaceState, Runner
from medhead_app.chat.token_colors import tinted


def race_card(title: str, runner: Runner | None, leads: float = 0.0) -> str:
    """One of the two.

    Args:
        title: what it is called.
        runner: how far it is; None before the race.
        leads: part of its text that is written, 0 to 1, for the bar.
    """
    text = tinted(runner.written.tokens) if runner is not None else ""
    name = escape(runner.result.proposer) if runner is not None and runner.result.passes else ""
    return (
        f'<div class="mh-card"><div class="mh-caption"><b>{escape(title)}</b><span>{name}</span></div>'
        f'<div class="mh-bar-line"><i style="width:{100 * max(0.0, min(leads, 1.0)):.1f}%"></i></div>'
        f'<div class="mh-card-text"><div class="mh-plain">{text}</div></div>'
        f'<div class="mh-card-numbers">{_numbers(runner)}</div></div>'
    )


def cards(standing: RaceState, longest: int) -> tuple[str, str]:
    """Both cards.

    Args:
        standing: how the race stands.
        longest: most tokens of the text; the bars' full length until one has ended.
    """
    ended = [runner.result.new_tokens for runner in (standing.plain, standing.guessing) if runner.done]
    full = max([1, *ended]) if ended else max(1, longest)

    def card(title: str, runner: Runner) -> str:
        return race_card(title, runner, 1.0 if runner.done else runner.result.new_tokens / full)

    return card("Plain decoding", standing.plain), card("Thinking ahead", standing.guessing)


def verdict_line(standing: RaceState | None, failed: str = "") -> str:
    """The line below the cards, of a fixed height."""
    if failed:
        return f'<div class="mh-verdict mh-failed">{escape(failed)}</div>'
    if standing is None:
        return '<div class="mh-verdict mh-quiet">Both get the same prompt, settings and seed.</div>'
    if not standing.done:
        return '<div class="mh-verdict mh-quiet">Running …</div>'
    if standing.ratio is None:
        return f'<div class="mh-verdict mh-quiet">{escape(standing.verdict())}</div>'
    answer = "yes" if standing.identical else "no"
    return (
        f'<div class="mh-verdict" role="status"><span><b class="mh-ratio">{standing.ratio:.2f}×</b> as fast</span>'
        f'<span>identical text: <b class="mh-identical">{answer}</b></span></div>'
    )


def _numbers(runner: Runner | None) -> str:
    if runner is None or not runner.result.new_tokens:
        return "<span>–</span>"
    result = runner.result
    rate = result.new_tokens / result.busy if result.busy > 0 else 0.0
    return (
        f"<span><b>{rate:.0f}</b> tokens/s · <b>{result.busy:.2f}</b> s</span>"
        f"<span><b>{result.new_tokens}</b> tokens in <b>{result.passes}</b> passes</span>"
    )
