"""The parts of the page and where they stand; what they do is in `handlers.py`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from medhead_app.chat.answer import AUTOMATIC, PROPOSERS, TREE_SIZES, Settings
from medhead_app.chat.conversation import new_conversation
from medhead_app.chat.numbers import live_line
from medhead_app.chat.picture import describe_lengths, describe_tree, draw_lengths, draw_tree
from medhead_app.chat.race_view import race_card, verdict_line
from medhead_app.chat.theme import EXAMPLES, asset, chat_template
from medhead_app.chat.token_colors import legend
from medhead_app.service import Service


@dataclass
class Parts:
    """The components that events read or write."""

    conversation: gr.State
    stored: gr.JSON
    chats: gr.HTML
    chat: gr.HTML
    live: gr.HTML
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    clear: gr.Button
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider
    seed: gr.Textbox
    proposer: gr.Dropdown
    tree_size: gr.Dropdown
    show_sources: gr.Checkbox
    tree: gr.HTML
    lengths: gr.HTML
    race_prompt: gr.Textbox
    race_start: gr.Button
    race_stop: gr.Button
    race_plain: gr.HTML
    race_guessing: gr.HTML
    race_verdict: gr.HTML

    @property
    def settings(self) -> list[Any]:
        """In the order of `SETTINGS`."""
        return [getattr(self, name) for name in SETTINGS]


SETTINGS = ("system", "temperature", "top_p", "max_new_tokens", "seed", "proposer", "tree_size")


def lay_out(service: Service) -> Parts:
    """Make all parts, inside of a `gr.Blocks`."""
    parts: dict[str, Any] = {"conversation": gr.State(new_conversation), "stored": gr.JSON(visible=False)}
    parts |= _left(service)
    parts |= _right(service)
    with gr.Tabs(elem_classes="mh-tabs"):
        with gr.Tab("Chat", id="chat"):
            parts |= _chat()
        with gr.Tab("Race", id="race"):
            parts |= _race()
    return Parts(**parts)


def _left(service: Service) -> dict[str, Any]:
    """Conversations, and how answers are drawn from the model."""
    default = Settings()
    with gr.Sidebar(width=264, elem_classes="mh-side mh-left"):
        gr.HTML(brand(service.name), elem_classes="mh-brand", apply_default_css=False)
        chats = gr.HTML(
            {"current": ""},
            html_template='<div class="mh-chats"></div>',
            js_on_load=asset("chats.js"),
            apply_default_css=False,
        )
        with gr.Accordion("Answers", open=True, elem_classes="mh-group"):
            system = gr.Textbox(label="System prompt", lines=2, max_lines=4, placeholder="none", max_length=20_000)
            temperature = gr.Slider(0, 2, value=default.temperature, step=0.05, label="Temperature", buttons=[])
            top_p = gr.Slider(0.05, 1, value=default.top_p, step=0.05, label="Top-p", buttons=[])
            longest = gr.Slider(
                1,
                service.max_new_tokens,
                value=min(default.max_new_tokens, service.max_new_tokens),
                step=1,
                label="Longest answer",
                buttons=[],
            )
            seed = gr.Textbox(label="Seed", max_lines=1, placeholder="a new one each time", max_length=20)
    return {
        "chats": chats,
        "system": system,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": longest,
        "seed": seed,
    }


def _right(service: Service) -> dict[str, Any]:
    """Who guesses, and what came of it."""
    names = [name for name in PROPOSERS if name != "heads" or service.engine.has_heads]
    with gr.Sidebar(width=328, position="right", elem_classes="mh-side mh-right"):
        gr.HTML("<h3>Thinking ahead</h3>", elem_classes="mh-heading", apply_default_css=False)
        with gr.Row(elem_classes="mh-pair"):
            proposer = gr.Dropdown(names, value=AUTOMATIC, label="DraftTrie from", min_width=120, elem_id="mh-proposer")
            tree_size = gr.Dropdown(
                [(str(size), size) for size in TREE_SIZES], value=AUTOMATIC, label="Tree budget", min_width=120
            )
        show_sources = gr.Checkbox(True, label="Show where tokens came from")
        tree = gr.HTML(tree_panel(None), elem_classes="mh-panel", apply_default_css=False)
        lengths = gr.HTML(lengths_panel([]), elem_classes="mh-panel", apply_default_css=False)
    return {
        "proposer": proposer,
        "tree_size": tree_size,
        "show_sources": show_sources,
        "tree": tree,
        "lengths": lengths,
    }


def _chat() -> dict[str, Any]:
    empty = {"id": "", "title": "", "busy": False, "messages": [], "keep": None}
    chat = gr.HTML(
        empty, html_template=chat_template(), js_on_load=asset("chat.js"), elem_id="mh-chat", apply_default_css=False
    )
    with gr.Row(elem_classes="mh-strip"):
        live = gr.HTML(live_line(None), elem_classes="mh-live-box", apply_default_css=False)
        gr.HTML(legend(), elem_classes="mh-legend-box", apply_default_css=False)
    with gr.Row(elem_classes="mh-composer"):
        message = gr.Textbox(
            show_label=False,
            container=False,
            placeholder="Write a message",
            lines=1,
            max_lines=6,
            scale=1,
            min_width=80,
            elem_id="mh-message",
            max_length=100_000,
        )
        with gr.Column(scale=0, min_width=84, elem_classes="mh-go"):
            send = gr.Button("Send", variant="primary", elem_id="mh-send")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="mh-stop")
        clear = gr.Button("Clear", variant="secondary", scale=0, min_width=72, elem_id="mh-clear")
    return {"chat": chat, "live": live, "message": message, "send": send, "stop": stop, "clear": clear}


def _race() -> dict[str, Any]:
    with gr.Row(elem_classes="mh-composer"):
        prompt = gr.Textbox(
            EXAMPLES[0],
            show_label=False,
            container=False,
            lines=1,
            max_lines=4,
            scale=1,
            min_width=80,
            placeholder="A prompt for both",
            elem_id="mh-race-prompt",
            max_length=100_000,
        )
        with gr.Column(scale=0, min_width=84, elem_classes="mh-go"):
            start = gr.Button("Race", variant="primary", elem_id="mh-race")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="mh-race-stop")
    with gr.Row(elem_classes="mh-lanes"):
        plain = gr.HTML(race_card("Plain decoding", None), elem_id="mh-race-plain", apply_default_css=False)
        guessing = gr.HTML(race_card("Thinking ahead", None), elem_id="mh-race-guessing", apply_default_css=False)
    verdict = gr.HTML(verdict_line(None), elem_id="mh-race-verdict", apply_default_css=False)
    gr.HTML(legend(), elem_classes="mh-legend-box", apply_default_css=False)
    return {
        "race_prompt": prompt,
        "race_start": start,
        "race_stop": stop,
        "race_plain": plain,
        "race_guessing": guessing,
        "race_verdict": verdict,
    }


def brand(name: str) -> str:
    """The page's head line."""
    return f'<div class="mh-name">medhead</div><div class="mh-model" title="{escape(name)}">{escape(name)}</div>'


def tree_panel(tree: dict[str, Any] | None) -> str:
    """The last tree with its caption."""
    return (
        f'<div class="mh-caption"><b>Last tree</b><span>{describe_tree(tree)}</span></div>'
        f'<div class="mh-tree-box">{draw_tree(tree)}</div>'
    )


def lengths_panel(lengths: list[int]) -> str:
    """The distribution of accepted lengths with its caption."""
    return (
        f'<div class="mh-caption"><b>Tokens a pass</b><span>{describe_lengths(lengths)}</span></div>'
        f'<div class="mh-lengths-box">{draw_lengths(lengths)}</div>'
    )
