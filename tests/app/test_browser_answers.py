"""Answers on the page in a real browser: Markdown, versions, Continue, Escape, long texts, two tabs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from page_browser import BOX, LAST, SEND, STOP, done, last_text, say, wait_for
from page_engine import STORY, ScriptedEngine

from medhead_app.chat.conversation import MAX_CHARACTERS

pytestmark = pytest.mark.slow
pytest_plugins = ["page_fixtures"]

MARKDOWN = """# Sorting

Use **sorted** for a *new* list:

```python
words = sorted(["pear", "fig"])
```

| call | result |
|---|---|
| `sorted` | a list |
"""
PASTE = """text => { document.querySelector('#mh-message textarea').focus(); document.execCommand('selectAll');
  document.execCommand('insertText', false, text); }"""


def continuing(engine: ScriptedEngine, story: str = STORY) -> Callable[[Any], str]:
    """Return a script that goes on where the prompt's answer ends."""
    return lambda request: story.removeprefix(engine.tokenizer.decode(request.prompt).split(" <answer>")[-1])


def test_markdown_is_rendered_and_colored(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.script = MARKDOWN
    say(page, "How do I sort?", until_done=False)
    page.wait_for_selector(f"{LAST} h1")
    done(page)
    body = page.locator(f"{LAST} .mh-body")
    for part in ("h1 .mh-token", "strong .mh-token", "td .mh-token", "pre code", "td code"):
        assert body.locator(part).count() > 0, part
    assert body.locator("code .mh-token").count() == 0
    assert page.inner_text(f"{LAST} pre code") == 'words = sorted(["pear", "fig"])\n'
    page.click(f"{LAST} [data-tool=code]")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('words')")


def test_a_cut_answer_is_continued(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.script, engine.delay = continuing(engine), 0.1
    say(page, "Tell me a story.", until_done=False)
    page.wait_for_selector(f"{LAST} .mh-token >> nth=4")
    assert page.is_hidden(f"{LAST} [data-tool=continue]")
    page.press(BOX, "Escape")
    wait_for(lambda: engine.running == 0, 2.0)
    done(page)
    begun = last_text(page).strip()
    assert len(begun) < len(STORY) / 2
    engine.delay = 0.0
    page.reload()  # an answer of a stored conversation can be continued too
    page.click(f"{LAST} [data-tool=continue]")
    page.wait_for_function(
        "length => document.querySelector('.mh-assistant .mh-body').innerText.length > length", arg=len(begun)
    )
    done(page)
    assert last_text(page).strip() == STORY.strip()
    assert page.is_hidden(f"{LAST} [data-tool=continue]")
    assert engine.requests[0].params.seed == engine.requests[1].params.seed
    assert page.locator(".mh-message").count() == 2


def test_answers_have_versions(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay, engine.script = 0.0, "First. "
    say(page, "Question")
    assert page.is_hidden(f"{LAST} .mh-versions")
    for text in ("Second. ", "Third. "):
        engine.script = text
        page.click(f"{LAST} [data-tool=retry]")
        page.wait_for_function(
            "text => document.querySelector('.mh-body > p')?.innerText.trim() === text", arg=text.strip()
        )
        done(page)
    assert page.inner_text(f"{LAST} .mh-version") == "3/3"
    assert page.is_disabled(f"{LAST} [data-tool=later]")
    page.click(f"{LAST} [data-tool=earlier]")
    page.wait_for_selector(f"{LAST} .mh-version:has-text('2/3')")
    assert last_text(page).strip() == "Second."
    assert "Answer 1, version 2" in page.inner_text(".mh-status")
    assert "Answer 1, version 2" in page.inner_text("#mh-chat-panel")
    page.reload()
    page.wait_for_selector(f"{LAST} .mh-version:has-text('2/3')")
    say(page, "Next")
    assert "Second." in engine.tokenizer.decode(engine.requests[-1].prompt)
    assert "Third." not in engine.tokenizer.decode(engine.requests[-1].prompt)


def test_escape_leaves_an_edit_or_a_list_before_it_stops(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    say(page, "First")
    page.hover(".mh-user")
    page.click(".mh-user [data-tool=edit]")
    engine.delay = 0.1
    say(page, "Second", until_done=False)
    page.press(".mh-edit", "Escape")
    page.wait_for_timeout(300)
    assert page.is_visible(STOP)
    page.click("#mh-proposer input")
    page.get_by_role("option", name="n-gram").wait_for()
    page.press("#mh-proposer input", "Escape")
    page.wait_for_timeout(300)
    assert page.is_visible(STOP)
    page.keyboard.press("Escape")
    page.wait_for_selector(f"{SEND}:visible")
    page.get_by_role("tab", name="Race").click()
    page.click("#mh-race")
    page.wait_for_selector("#mh-race-stop:visible")
    wait_for(lambda: engine.running == 2, 10)
    page.keyboard.press("Escape")
    wait_for(lambda: engine.running == 0, 2)


def test_pasted_text_is_never_cut(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    for count, error in ((MAX_CHARACTERS + 1, "at most"), (5_000_000, "is larger than")):
        page.evaluate(PASTE, "x" * count)
        page.press(BOX, "Enter")
        page.wait_for_selector(f":is(.toast-body, .mh-status):has-text('{error}')")
        assert len(page.input_value(BOX)) == count
    long = "first line\nsecond line " + "x" * 150_000
    page.evaluate(PASTE, long)
    page.press(BOX, "Enter")
    done(page)
    page.wait_for_selector(LAST)
    assert page.inner_text(".mh-user .mh-body") == long
    assert page.input_value(BOX) == ""


def test_two_tabs_of_a_conversation_lose_nothing(opened: Any, engine: ScriptedEngine) -> None:
    first = opened()
    say(first, "About dogs")
    second = first.context.new_page()
    second.goto(first.url)
    second.wait_for_selector(LAST)
    engine.delay = 0.1
    say(first, "About cats", until_done=False)
    second.wait_for_selector(".mh-user:has-text('About cats')")  # it follows
    second.fill(BOX, "About birds")
    second.press(BOX, "Enter")
    second.wait_for_selector(".toast-body:has-text('in another tab')")
    assert second.input_value(BOX) == "About birds"
    assert second.locator(".mh-message").count() == 4
    engine.delay = 0.0
    done(first)
    second.wait_for_function(
        "text => document.querySelectorAll('.mh-body')[3].innerText.trim() === text", arg=STORY.strip()
    )
    second.press(BOX, "Enter")
    for page in (first, second):
        page.wait_for_selector(".mh-assistant >> nth=2")
        texts = [" ".join(text.split()) for text in page.locator(".mh-user .mh-body").all_inner_texts()]
        assert texts == ["About dogs", "About cats", "About birds"]
    done(second)
    asked = engine.tokenizer.decode(engine.requests[-1].prompt)
    assert "About cats" in asked


UNSEEN = """() => { const name = 'medhead:c:' + sessionStorage.getItem('medhead:current');
  const stored = JSON.parse(localStorage.getItem(name));
  stored.updated += 1;
  stored.messages.push({ role: 'user', content: 'written elsewhere' });
  localStorage.setItem(name, JSON.stringify(stored)); }"""


def test_what_a_tab_has_not_seen_is_kept_as_a_copy(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    say(page, "About dogs")
    page.evaluate(UNSEEN)  # a tab gets no event for what it stores itself
    say(page, "About cats")
    page.wait_for_function("() => document.querySelectorAll('.mh-open').length === 2")
    page.click(".mh-row:not(.mh-current) .mh-open")
    page.wait_for_selector(".mh-user:has-text('written elsewhere')")
    page.click(".mh-row:not(.mh-current) .mh-open")
    page.wait_for_selector(".mh-user:has-text('About cats')")


def test_tabs_have_their_own_conversations(opened: Any, engine: ScriptedEngine) -> None:
    first = opened()
    engine.delay = 0.0
    say(first, "About dogs")
    second = first.context.new_page()
    second.goto(first.url)
    second.wait_for_selector(LAST)
    second.click(".mh-new")
    second.wait_for_selector(".mh-hello:visible")
    say(second, "About cats")
    first.reload()
    first.wait_for_selector(".mh-user:has-text('About dogs')")
    assert first.inner_text(".mh-current .mh-open") == "About dogs"
