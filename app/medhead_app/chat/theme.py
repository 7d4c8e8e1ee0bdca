"""How the page looks: theme and style sheet, and what the chat component is made of. Nothing is fetched from elsewhere."""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

ASSETS = Path(__file__).parent / "assets"
EXAMPLES = (
    "Tell me a story about a brave little dog.",
    "Write a short tale in which a girl finds a lost key.",
    "Tell me about a rainy day at the lake.",
)
BLUE = gr.themes.Color(
    c50="#eef6fb",
    c100="#d7eaf6",
    c200="#b0d6ee",
    c300="#83bfe4",
    c400="#56b4e9",
    c500="#1f86c4",
    c600="#0072b2",
    c700="#005d92",
    c800="#064c75",
    c900="#0b3f60",
    c950="#082a41",
    name="medhead-blue",
)
FONT = (
    "ui-sans-serif",
    "system-ui",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "Liberation Sans",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")
# for `demo.load`: the conversation this browser looked at last
READ_CURRENT = """(stored, show) => {
  try { stored = JSON.parse(localStorage.getItem('medhead:c:' + localStorage.getItem('medhead:current'))); }
  catch (error) { stored = null; }
  return [stored, show];
}"""


def asset(name: str) -> str:
    """Text of a file beside the code."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def theme() -> gr.themes.Base:
    """One accent, warm greys, the fonts that the system has."""
    look = gr.themes.Base(
        primary_hue=BLUE, secondary_hue=BLUE, neutral_hue="stone", font=FONT, font_mono=MONO, radius_size="md"
    )
    return look.set(
        body_background_fill="#fbfaf8",
        body_background_fill_dark="#171614",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1f1d1b",
        background_fill_secondary="#f6f4f0",
        background_fill_secondary_dark="#1b1a18",
        border_color_primary="#e6e2db",
        border_color_primary_dark="#35322e",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_shadow="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_info_text_size="*text_xs",
        input_background_fill="#ffffff",
        input_background_fill_dark="#262421",
        input_border_color="#ddd8cf",
        input_border_color_dark="#403c37",
        input_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#262421",
        button_secondary_background_fill_hover="#f1eee8",
        button_secondary_background_fill_hover_dark="#302d29",
        button_transform_hover="none",
        layout_gap="12px",
        form_gap_width="0px",
    )


def look() -> dict[str, Any]:
    """Arguments for `gr.mount_gradio_app(app, build_page(service), path, **look())`, or for `launch`."""
    return {
        "theme": theme(),
        "css": asset("style.css"),
        "head": f"<style>{asset('frame.css')}</style>",
        "footer_links": [],
    }


def chat_template() -> str:
    """HTML that `chat.js` fills."""
    examples = "".join(f'<button type="button" class="mh-example">{escape(example)}</button>' for example in EXAMPLES)
    return (
        '<div class="mh-scroll" tabindex="0" aria-label="Conversation">'
        '<div class="mh-hello"><h2>What shall we talk about?</h2>'
        "<p>The tint of every word shows who guessed it before the model agreed.</p>"
        f'<div class="mh-examples">{examples}</div></div>'
        '<div class="mh-messages"></div></div>'
    )
