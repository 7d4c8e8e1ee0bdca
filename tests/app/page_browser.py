"""Helpers of the tests in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from page_engine import STORY, ScriptedEngine

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
if CHROMIUM is None:
    pytest.skip(
        "no chromium here (apt-get install chromium): the page is not tested in a browser", allow_module_level=True
    )
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytest.importorskip("gradio", reason="gradio is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
ATTACK = (
    "see <b>bold</b> and <script>window.pwned = 1</script> & <img src=x onerror='window.pwned = 2'>"
    "\n\n```html\n<i>code</i>\n```\n"
)
BOX, SEND, STOP = "#mh-message textarea", "#mh-send", "#mh-stop"
LAST = ".mh-assistant:last-child"
WORDS = len(ScriptedEngine().tokenizer(STORY)["input_ids"])
ACCEPTED_LENGTH = WORDS / math.ceil(WORDS / 3)  # accepted length of the scripted engine's proposers


@dataclass
class Site:
    """A served page and its scripted engine, whose script and pace can be changed."""

    engine: ScriptedEngine
    url: str


def is_local(url: str, site: Site) -> bool:
    return url.startswith((site.url, "data:", "blob:"))


def wait_for(condition: Callable[[], Any], seconds: float) -> float:
    """Wait for a condition; return the seconds that took."""
    began = time.perf_counter()
    while not condition():
        assert time.perf_counter() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.perf_counter() - began


def say(page: Any, text: str, until_done: bool = True) -> None:
    before = page.locator(".mh-user").count()
    page.fill(BOX, text)
    page.press(BOX, "Enter")
    page.wait_for_function("before => document.querySelectorAll('.mh-user').length > before", arg=before)
    if until_done:
        done(page)
    else:
        page.wait_for_selector(f"{STOP}:visible")


def done(page: Any) -> None:
    """Wait until an answer is complete."""
    page.wait_for_selector(f"{SEND}:visible")
    page.wait_for_function("() => !document.querySelector('.mh-busy')")


def last_text(page: Any) -> str:
    return page.inner_text(f"{LAST} .mh-body")


def fits(page: Any) -> bool:
    """Return whether the page has no horizontal scroll bar."""
    return page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
