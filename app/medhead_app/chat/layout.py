"""The components of the page and their layout; `handlers.py` handles their events."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from medhead_app.chat.conversation import new_conversation
from medhead_app.chat.generation import AUTOMATIC, PROPOSERS, TREE_SIZES, ChatSettings
from medhead_app.chat.race_view import race_cards, verdict_line
from medhead_app.chat.stats import live_line
from medhead_app.chat.svg import describe_lengths, describe_tree, draw_lengths, draw_tree
from medhead_app.chat.theme import EXAMPLES, asset, chat_template, images_template
from medhead_app.chat.token_colors import display_name, legend
from medhead_app.service import Service

SETTINGS = ("system", "temperature", "top_p", "max_new_tokens", "seed", "proposer", "tree_size")
BOX: dict[str, Any] = {"show_label": False, "container": False, "scale": 1, "min_width": 80}


class Components:
    """Creates the page's components inside of a `gr.Blocks`; the attributes are those that events read or write."""

    def __init__(self, service: Service) -> None:
        self.conversation = gr.State(new_conversation)
        self.stored = gr.JSON(visible=False)
        with gr.Sidebar(width=264, elem_classes="mh-side mh-left"):
            default, name, limit = ChatSettings(), escape(service.name), service.max_new_tokens
            title = f'<div class="mh-name">medhead</div><div class="mh-model" title="{name}">{name}</div>'
            _html(title, elem_classes="mh-brand")
            template = '<div class="mh-chats"></div>'
            self.chats = _html({"current": ""}, html_template=template, js_on_load=asset("chats.js"))
            with gr.Accordion("Sampling", open=True, elem_classes="mh-group"):
                self.system = gr.Textbox(label="System prompt", lines=2, max_lines=4, placeholder="none")
                self.temperature = gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", buttons=[])
                self.top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p", buttons=[])
                tokens = min(default.max_new_tokens, limit)
                self.max_new_tokens = gr.Slider(1, limit, tokens, step=1, label="Max new tokens", buttons=[])
                self.seed = gr.Textbox(label="Seed", max_lines=1, placeholder="random")
        with gr.Sidebar(width=328, position="right", elem_classes="mh-side mh-right"):
            proposers = [
                (display_name(name), name) for name in PROPOSERS if name != "heads" or service.engine.has_heads
            ]
            sizes = [(str(size), size) for size in TREE_SIZES]
            _html("<h3>Speculative decoding</h3>", elem_classes="mh-heading")
            with gr.Row(elem_classes="mh-pair"):
                shared: Any = {"value": AUTOMATIC, "min_width": 120}
                self.proposer = gr.Dropdown(proposers, label="Proposer", elem_id="mh-proposer", **shared)
                self.tree_size = gr.Dropdown(sizes, label="Tree size", **shared)
            gr.Checkbox(True, label="Color tokens by source", interactive=True, elem_id="mh-colors")
            self.panel = _html(draw_panel("", None, []), elem_id="mh-chat-panel")
            self.race_panel = _html(draw_panel("", None, []), elem_id="mh-race-panel")
        with gr.Tabs(elem_classes="mh-tabs"):
            with gr.Tab("Chat", id="chat", elem_id="mh-chat-tab"):
                empty = {"id": "", "title": "", "busy": False, "messages": [], "store": None}
                script = asset("chat.js")
                self.chat = _html(empty, html_template=chat_template(), js_on_load=script, elem_id="mh-chat")
                with gr.Row(elem_classes="mh-strip"):
                    self.live = _html(live_line(None), elem_classes="mh-live-box")
                    _html(legend(), elem_classes="mh-legend-box")
                options = {"html_template": images_template(), "js_on_load": asset("images.js"), "elem_id": "mh-images"}
                self.images = _html([], visible=service.takes_images, **options)
                with gr.Row(elem_classes="mh-composer"):
                    self.message = gr.Textbox(
                        label="Message", placeholder="Write a message", max_lines=6, elem_id="mh-message", **BOX
                    )
                    self.send, self.stop = _start_and_stop("Send", "mh-send", "mh-stop")
                    self.clear = gr.Button("Clear", variant="secondary", scale=0, min_width=72, elem_id="mh-clear")
            with gr.Tab("Race", id="race", elem_id="mh-race-tab"):
                plain, speculative = race_cards(None)
                with gr.Row(elem_classes="mh-composer"):
                    named: Any = {"label": "Prompt of the race", "elem_id": "mh-race-prompt"}
                    hint = "A prompt for both"
                    self.race_prompt = gr.Textbox(EXAMPLES[0], placeholder=hint, max_lines=4, **named, **BOX)
                    self.race_start, self.race_stop = _start_and_stop("Start", "mh-race", "mh-race-stop")
                with gr.Row(elem_classes="mh-cards"):
                    self.race_plain = _html(plain, elem_id="mh-race-plain")
                    self.race_speculative = _html(speculative, elem_id="mh-race-speculative")
                self.race_verdict = _html(verdict_line(None), elem_id="mh-race-verdict")
                _html(legend(), elem_classes="mh-legend-box")

    @property
    def settings(self) -> list[Any]:
        """Return the components of the settings, in the order of `SETTINGS`."""
        return [getattr(self, name) for name in SETTINGS]


def draw_panel(name: str, tree: dict[str, Any] | None, lengths: list[int]) -> str:
    """Return the last tree and the histogram of the tokens per pass of one text, whose name is the headline."""
    return (
        f'<h4 class="mh-of">{escape(name.capitalize() or "No answer yet")}</h4>'
        f'<div class="mh-caption"><b>Last tree</b><span>{describe_tree(tree)}</span></div>'
        f'<div class="mh-tree-box" tabindex="0" role="region" aria-label="Last token tree">{draw_tree(tree)}</div>'
        f'<div class="mh-caption"><b>Accepted length</b><span>{describe_lengths(lengths)}</span></div>'
        f'<div class="mh-lengths-box">{draw_lengths(lengths)}</div>'
    )


def _html(value: Any, **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def _start_and_stop(label: str, start_id: str, stop_id: str) -> tuple[gr.Button, gr.Button]:
    with gr.Column(scale=0, min_width=84, elem_classes="mh-go"):
        start = gr.Button(label, variant="primary", elem_id=start_id)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id=stop_id)
    return start, stop
