"""Which fields of OpenAI's and vLLM's requests the API supports, read from the schema; as a table and as the page `/docs`."""

from __future__ import annotations

import json
from html import escape

from medhead_app.api.responses_schema import ResponsesRequest
from medhead_app.api.schema import IGNORED, ChatRequest, CompletionRequest, GenerationRequest

BODIES: dict[str, type[GenerationRequest]] = {
    "chat/completions": ChatRequest,
    "completions": CompletionRequest,
    "responses": ResponsesRequest,
}
OTHERS = {
    "GET /v1/models": "the model that is served",
    "GET /health": "200 while requests are served, else 503",
    "GET /metrics": "Prometheus: requests, tokens, passes, accepted length, tokens/s, queue, latencies",
}
PARTS = {  # of the content of a message: which endpoints read them
    "text": (True, True),
    "image_url": (True, True),
    "input_text": (False, True),
    "output_text": (False, True),
    "input_image": (False, True),
    "input_audio": (False, False),
    "input_file": (False, False),
}
PART_LEGEND = (
    "Parts of a message's content. Images are data URLs, in messages of the user, for models that read images; /v1/completions "
    "takes texts and token ids."
)
LEGEND = (
    "yes: the field has its effect. ignored: any value is accepted, no text changes. only ...: these values ask for nothing and "
    "are accepted. no: refused by name. Null is always accepted; fields that are not listed are refused as unknown."
)


def status(kind: type[GenerationRequest], name: str) -> str:
    """Return what a body does with a field: yes, ignored, only with some values, or no."""
    if name in kind.model_fields and name not in kind.left_out:
        return "yes"
    if name in IGNORED:
        return "ignored"
    values = kind.neutral.get(name, ())
    return f"only {' or '.join(json.dumps(value) for value in values)}" if values else "no"


def fields() -> list[str]:
    """Return the names of all fields that a body knows."""
    known = {name for kind in BODIES.values() for name in (*kind.model_fields, *kind.neutral)}
    return sorted(known | set(IGNORED))


def markdown_table() -> str:
    """Return the table for the documentation."""
    rows = []
    for name in fields():
        cells = [status(kind, name) for kind in BODIES.values()]
        rows.append(f"| `{name}` | " + " | ".join(_code(cell) for cell in cells) + " |")
    head = ["| field | " + " | ".join(f"`{name}`" for name in BODIES) + " |", "|---" * (1 + len(BODIES)) + "|"]
    parts = [f"| `{name}` | {_yes(chat)} | {_yes(responses)} |" for name, (chat, responses) in PARTS.items()]
    part_head = ["| part | `chat/completions` | `responses` |", "|---" * 3 + "|"]
    return "\n".join([LEGEND, "", *head, *rows, "", PART_LEGEND, "", *part_head, *parts])


def html_page(name: str) -> str:
    """Return the page `/docs` of a server whose model has this name; it loads nothing."""
    head = "".join(f"<th>POST /v1/{escape(path)}</th>" for path in BODIES)
    rows = "".join(
        f"<tr><td><code>{field}</code></td>"
        + "".join(f"<td>{escape(status(kind, field))}</td>" for kind in BODIES.values())
        + "</tr>"
        for field in fields()
    )
    parts = "".join(
        f"<tr><td><code>{name}</code></td><td>{_yes(chat)}</td><td>{_yes(responses)}</td></tr>"
        for name, (chat, responses) in PARTS.items()
    )
    part_head = "<tr><th>part</th><th>POST /v1/chat/completions</th><th>POST /v1/responses</th></tr>"
    others = "".join(f"<li><code>{path}</code>: {escape(text)}</li>" for path, text in OTHERS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>medhead API</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}"
        "td,th{border-bottom:1px solid #8886;padding:.2rem .8rem .2rem 0;text-align:left}"
        ":root{color-scheme:light dark}</style>"
        f"<h1>medhead API</h1><p>OpenAI's API for the model <code>{escape(name)}</code>.</p><ul>{others}</ul>"
        f"<h2>Fields</h2><p>{escape(LEGEND)}</p><table><tr><th>field</th>{head}</tr>{rows}</table>"
        f"<p>{escape(PART_LEGEND)}</p><table>{part_head}{parts}</table></html>"
    )


def _yes(reads: bool) -> str:
    return "yes" if reads else "no"


def _code(cell: str) -> str:
    values = cell.removeprefix("only ").split(" or ")
    return f"only {' or '.join(f'`{value}`' for value in values)}" if cell.startswith("only ") else cell
