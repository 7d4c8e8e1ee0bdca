"""Fixtures of the tests in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_browser import CHROMIUM, DESKTOP, FLAGS, Site, is_local, sync_api, wait_for
from page_engine import STORY, ScriptedEngine

from medhead_app.service import Service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    from medhead_app.chat.build import build_page
    from medhead_app.chat.theme import page_options
    from medhead_app.listen import run_in_thread
    from medhead_app.server import build_app

    engine = ScriptedEngine()
    service = Service(engine, engine.tokenizer, "scripted model")  # type: ignore[arg-type]
    with run_in_thread(build_app(service, build_page(service), page_options()), service) as url:
        yield Site(engine, url)


@pytest.fixture
def engine(site: Site) -> ScriptedEngine:
    """Return the engine in its first state, without requests."""
    wait_for(lambda: site.engine.running == 0, 10)
    site.engine.script, site.engine.delay, site.engine.crash = STORY, 0.04, False
    site.engine.max_rows = site.engine.max_queue = 8
    site.engine.requests.clear()
    return site.engine


@pytest.fixture
def opened(browser: Any, site: Site, engine: ScriptedEngine) -> Iterator[Callable[..., Any]]:
    """Open pages; afterwards check that none had an error or a request to another site."""
    contexts, wrong = [], []

    def open_page(options: dict[str, Any] = DESKTOP) -> Any:
        context = browser.new_context(**options, permissions=["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if is_local(request.url, site) else wrong.append(request.url))
        page.goto(site.url)
        page.wait_for_selector(".mh-hello:visible")
        page.wait_for_function("() => localStorage.getItem('medhead:current')")  # the first event has come back
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
