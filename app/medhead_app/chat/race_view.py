"""HTML of the race: two cards and a verdict."""

from __future__ import annotations

from html import escape

from medhead_app.chat.race import RaceRun, RaceState
from medhead_app.chat.token_colors import color_tokens, display_name

TITLES = ("Plain decoding", "Speculative decoding")


def race_card(title: str, run: RaceRun | None, progress: float = 0.0) -> str:
    """Return the card of a request, None before the race; `progress` is the length of the bar, 0 to 1."""
    text = color_tokens(run.stream.tokens) if run is not None else ""
    proposer = escape(display_name(run.handle.request.proposer or "automatic")) if run is not None else ""
    return (
        f'<div class="mh-card"><div class="mh-caption"><b>{escape(title)}</b><span>{proposer}</span></div>'
        f'<div class="mh-bar-line"><i style="width:{100 * max(0.0, min(progress, 1.0)):.1f}%"></i></div>'
        f'<div class="mh-card-text"><div class="mh-plain">{text}</div></div>'
        f'<div class="mh-card-numbers">{_numbers(run)}</div></div>'
    )


def race_cards(state: RaceState | None, max_new_tokens: int = 1) -> tuple[str, str]:
    """Return both cards; a full bar stands for `max_new_tokens`, or for the length of the text once it is known."""
    if state is None:
        return race_card(TITLES[0], None), race_card(TITLES[1], None)
    runs = state.plain, state.speculative
    lengths = [run.result.new_tokens for run in runs if run.done]
    full = max([1, *lengths]) if lengths else max(1, max_new_tokens)
    plain, speculative = (1.0 if run.done else run.result.new_tokens / full for run in runs)
    return race_card(TITLES[0], state.plain, plain), race_card(TITLES[1], state.speculative, speculative)


def verdict_line(state: RaceState | None, error: str = "") -> str:
    """Return the line below the cards, whose height is fixed."""
    if error:
        return f'<div class="mh-verdict mh-failed">{escape(error)}</div>'
    if state is None:
        return '<div class="mh-verdict mh-quiet">Both requests have the same prompt, settings and seed.</div>'
    if not state.done:
        return '<div class="mh-verdict mh-quiet">Running …</div>'
    if state.speedup is None:
        return '<div class="mh-verdict mh-quiet">Stopped before the end: no result.</div>'
    return (
        f'<div class="mh-verdict" role="status"><span><b class="mh-speedup">{state.speedup:.2f}×</b> as fast</span>'
        f'<span>identical text: <b class="mh-identical">{"yes" if state.identical else "no"}</b></span></div>'
    )


def _numbers(run: RaceRun | None) -> str:
    if run is None or not run.result.new_tokens:
        return "<span>–</span>"
    result = run.result
    rate = result.new_tokens / result.busy if result.busy > 0 else 0.0
    return (
        f"<span><b>{rate:.0f}</b> tokens/s · <b>{result.busy:.2f}</b> s</span>"
        f"<span><b>{result.new_tokens}</b> tokens in <b>{result.passes}</b> passes</span>"
    )
