"""Theme, style sheet and template of the page; nothing is loaded from other sites."""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from medhead_app.chat.conversation import MAX_IMAGE_CHARACTERS, MAX_MESSAGE_IMAGES
from medhead_app.images import FORMATS

ASSETS = Path(__file__).parent / "assets"
EXAMPLES = (
    "Tell me a story about a brave little dog.",
    "Write a short tale in which a girl finds a lost key.",
    "Tell me about a rainy day at the lake.",
)
# 50 to 950, and the name
SHADES = "#eef6fb #d7eaf6 #b0d6ee #83bfe4 #56b4e9 #1f86c4 #0072b2 #005d92 #064c75 #0b3f60 #082a41 medhead-blue"
BLUE = gr.themes.Color(*SHADES.split())
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
COLORS = {  # light and dark
    "body_background_fill": ("#fbfaf8", "#171614"),
    "background_fill_primary": ("#ffffff", "#1f1d1b"),
    "background_fill_secondary": ("#f6f4f0", "#1b1a18"),
    "border_color_primary": ("#e6e2db", "#35322e"),
    "block_background_fill": ("transparent", "transparent"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_title_text_color": ("*neutral_600", "*neutral_300"),
    "input_background_fill": ("#ffffff", "#262421"),
    "input_border_color": ("#ddd8cf", "#403c37"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),
    "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
    "button_secondary_background_fill": ("#ffffff", "#262421"),
    "button_secondary_background_fill_hover": ("#f1eee8", "#302d29"),
}
# JavaScript for `page.load`: read the current conversation of this tab, or of the last one, from the browser's storage
READ_CURRENT = """(stored) => {
  const current = sessionStorage.getItem('medhead:current') || localStorage.getItem('medhead:current');
  try { stored = JSON.parse(localStorage.getItem('medhead:c:' + current)); }
  catch (error) { stored = null; }
  return [stored];
}"""


def asset(name: str) -> str:
    """Return the content of a file in `assets/`."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def theme() -> gr.themes.Base:
    """Return the theme: one accent color, warm greys, system fonts."""
    base = gr.themes.Base(
        primary_hue=BLUE, secondary_hue=BLUE, neutral_hue="stone", font=FONT, font_mono=MONO, radius_size="md"
    )
    dark = {f"{name}_dark": color for name, (_, color) in COLORS.items()}
    return base.set(
        **{name: color for name, (color, _) in COLORS.items()} | dark,
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        block_info_text_size="*text_xs",
        input_shadow="none",
        button_primary_text_color="#ffffff",
        button_transform_hover="none",
        layout_gap="12px",
        form_gap_width="0px",
    )


def page_options() -> dict[str, Any]:
    """Return the arguments of `gr.mount_gradio_app` for a page of `build_page`."""
    head = f"<style>{asset('frame.css')}</style>"
    return {"theme": theme(), "css": asset("style.css"), "head": head, "footer_links": []}


def chat_template() -> str:
    """Return the HTML that `chat.js` fills."""
    examples = "".join(f'<button type="button" class="mh-example">{escape(example)}</button>' for example in EXAMPLES)
    return (
        '<div class="mh-scroll" tabindex="0" role="region" aria-label="Conversation">'
        '<div class="mh-hello"><h2>Ask the model something</h2>'
        "<p>The color of a word shows which proposer drafted it before the model accepted it.</p>"
        f'<div class="mh-examples">{examples}</div></div>'
        '<div class="mh-messages"></div>'
        '<div class="mh-removed" hidden>Messages were removed. '
        '<button type="button" class="mh-tool" data-tool="restore">Restore</button></div></div>'
        '<div class="mh-announcer" role="status" aria-live="polite"></div>'
    )


def images_template() -> str:
    """Return the HTML that `images.js` fills."""
    kinds = ",".join(FORMATS)
    return (
        f'<div class="mh-attach" data-count="{MAX_MESSAGE_IMAGES}" data-characters="{MAX_IMAGE_CHARACTERS}">'
        '<button type="button" class="mh-tool mh-add-image" title="Add images to the message; pasting works too">'
        "Add image</button>"
        f'<input type="file" accept="{kinds}" multiple hidden aria-label="Images of the message">'
        '<ul class="mh-attached" aria-label="Images of the message"></ul>'
        '<span class="mh-attach-note" role="status" aria-live="polite"></span></div>'
    )
