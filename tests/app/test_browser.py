"""The page in a real browser."""

from __future__ import annotations

from typing import Any

import pytest
from page_browser import (
    ACCEPTED_LENGTH,
    ATTACK,
    BOX,
    DESKTOP,
    LAST,
    PHONE,
    SEND,
    STOP,
    done,
    fits,
    last_text,
    say,
    wait_for,
)
from page_engine import STORY, ScriptedEngine

pytestmark = pytest.mark.slow
pytest_plugins = ["page_fixtures"]

WATCH = """names => {
  const place = (name) => {
    const found = [...document.querySelectorAll(name)].find((node) => node.getClientRects().length);
    const box = found && found.getBoundingClientRect();
    return box ? [name, box.x, box.y, box.width, box.height].join(' ') : name;
  };
  window.seen = [];
  const look = () => {
    const body = document.querySelector('.mh-assistant .mh-body');
    const length = body ? body.innerText.length : 0;
    const now = { length, places: names.map(place) };
    if (!window.seen.length || JSON.stringify(window.seen.at(-1)) !== JSON.stringify(now)) window.seen.push(now);
    requestAnimationFrame(look);
  };
  look();
}"""


def watch(page: Any) -> None:
    """Record in every frame the length of the answer and the positions of the elements that must not move."""
    names = [".mh-strip", ".mh-composer", BOX, ".mh-scroll", ".mh-tabs .tab-wrapper", ".mh-legend", "#mh-clear"]
    if page.viewport_size["width"] > 1000:
        names += [".mh-tree-box", ".mh-lengths-box", ".mh-rows", "#mh-proposer"]
    page.evaluate(WATCH, names)


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_tokens_arrive_one_by_one_and_nothing_moves(opened: Any, options: dict[str, Any]) -> None:
    page = opened(options)
    page.wait_for_timeout(600)  # sidebars slide
    watch(page)
    say(page, "Tell me a story.")
    page.wait_for_timeout(200)
    seen = page.evaluate("() => window.seen")
    lengths = [each["length"] for each in seen]
    assert len(set(lengths)) >= 8
    assert lengths == sorted(lengths)
    assert {tuple(each["places"]) for each in seen} == {tuple(seen[0]["places"])}
    assert last_text(page).strip() == STORY.strip()
    assert fits(page)
    assert "accepted length" in page.inner_text(".mh-live")
    assert page.inner_text(".mh-numbers b >> nth=1").strip() == f"{ACCEPTED_LENGTH:.2f}"


def test_token_sources_and_the_charts(opened: Any) -> None:
    page = opened()
    say(page, "Tell me a story.")
    token = page.locator(f"{LAST} .mh-token.mh-heads").first
    assert token.get_attribute("title") == "heads, depth 1"
    shade = token.evaluate("node => getComputedStyle(node).backgroundColor")
    assert shade not in ("rgba(0, 0, 0, 0)", "transparent")
    assert page.locator("#mh-chat-panel .mh-accepted").count() >= 2
    assert page.locator("#mh-chat-panel .mh-rejected").count() == 2
    assert page.locator("#mh-chat-panel .mh-bar").count() == 2
    page.uncheck("text=Color tokens by source")
    assert token.evaluate("node => getComputedStyle(node).backgroundColor") == "rgba(0, 0, 0, 0)"


def test_stop_frees_the_row_and_keeps_the_text(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.1
    say(page, "Tell me a story.", until_done=False)
    page.wait_for_selector(f"{LAST} .mh-token >> nth=4")
    page.click(STOP)
    wait_for(lambda: engine.running == 0, 1.0)
    page.wait_for_selector(f"{SEND}:visible")
    assert 0 < len(last_text(page)) < len(STORY) / 2
    assert "stopped by you" in page.inner_text(f"{LAST} .mh-summary")


def test_closing_the_page_frees_its_rows(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.1
    say(page, "Tell me a story.", until_done=False)
    page.get_by_role("tab", name="Race").click()
    page.click("#mh-race")
    wait_for(lambda: engine.running == 3, 10)
    page.close()
    wait_for(lambda: engine.running == 0, 1.0)


def test_regenerate_edit_undo_clear_copy(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.005
    say(page, "First question")
    first = engine.requests[-1]
    engine.script = "Another answer. "
    page.click(f"{LAST} [data-tool=retry]")
    page.wait_for_function(
        "() => document.querySelector('.mh-assistant .mh-body')?.innerText.trim() === 'Another answer.'"
    )
    done(page)
    assert engine.requests[-1].prompt == first.prompt
    assert engine.requests[-1].params.seed != first.params.seed
    assert page.locator(".mh-message").count() == 2

    page.click(f"{LAST} [data-tool=copy]")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).trim() === 'Another answer.'")

    page.hover(".mh-user")
    page.click(".mh-user [data-tool=edit]")
    page.fill(".mh-edit", "Second question")
    page.press(".mh-edit", "Enter")
    page.wait_for_function("() => document.querySelector('.mh-user .mh-body').innerText === 'Second question'")
    wait_for(lambda: len(engine.requests) == 3, 5)
    page.wait_for_selector(f"{SEND}:visible")
    assert "Second question" in engine.tokenizer.decode(engine.requests[-1].prompt)
    page.wait_for_selector(f"{LAST} [data-tool=undo]:visible")

    page.click(f"{LAST} [data-tool=undo]")
    page.wait_for_selector(".mh-hello:visible")
    assert page.input_value(BOX) == "Second question"

    say(page, "Third question")
    page.click("#mh-clear")
    page.wait_for_selector(".mh-hello:visible")
    assert page.locator(".mh-message").count() == 0
    page.click(".mh-removed >> text=Restore")
    page.wait_for_selector(LAST)
    assert page.locator(".mh-message").count() == 2
    assert "Answer 1" in page.inner_text("#mh-chat-panel")
    page.reload()
    page.wait_for_selector(".mh-user:has-text('Third question')")


def test_editing_can_be_left(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    say(page, "First question")
    page.hover(".mh-user")
    page.click(".mh-user [data-tool=edit]")
    page.fill(".mh-edit", "something else")
    page.press(".mh-edit", "Escape")
    assert page.inner_text(".mh-user .mh-body") == "First question"
    assert len(engine.requests) == 1


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_race_ends_with_its_speedup(opened: Any, engine: ScriptedEngine, options: dict[str, Any]) -> None:
    page = opened(options)
    engine.delay = 0.01
    page.get_by_role("tab", name="Race").click()
    verdict = page.locator(".mh-verdict").bounding_box()
    page.fill("#mh-race-prompt textarea", "Tell me a story.")
    page.click("#mh-race")
    page.wait_for_selector("#mh-race-plain .mh-token")
    assert page.locator(".mh-verdict").bounding_box() == verdict
    page.wait_for_selector(".mh-speedup")
    assert page.inner_text(".mh-speedup") == f"{ACCEPTED_LENGTH:.2f}×"
    assert page.inner_text(".mh-identical") == "yes"
    if options is DESKTOP:
        assert page.is_visible("#mh-race-panel .mh-tree")
        assert page.is_hidden("#mh-chat-panel")
        assert "Race" in page.inner_text("#mh-race-panel")
    assert page.inner_text("#mh-race-plain .mh-card-text").strip() == STORY.strip()
    assert page.inner_text("#mh-race-speculative .mh-card-text").strip() == STORY.strip()
    assert page.locator(".mh-verdict").bounding_box() == verdict
    assert page.is_visible("#mh-race")
    assert fits(page)
    cards = [page.locator(f"#mh-race-{name} .mh-card").bounding_box() for name in ("plain", "speculative")]
    for card in cards:
        assert card["y"] + card["height"] <= verdict["y"] + 1


def test_the_proposer_and_settings_act_on_the_next_message(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    say(page, "One")
    page.click("#mh-proposer input")
    page.get_by_role("option", name="n-gram").click()
    page.fill("[aria-label='number input for Temperature']", "0")
    page.press("[aria-label='number input for Temperature']", "Tab")
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("Seed").fill("41")
    say(page, "Two")
    first, second = engine.requests
    assert (first.proposer, second.proposer) == (None, "ngram")
    assert (second.params.temperature, second.params.seed) == (0, 41)
    assert "Be kind." in engine.tokenizer.decode(second.prompt)
    page.wait_for_selector(f"{LAST} .mh-ngram")
    page.get_by_label("Seed").fill("no number")
    page.fill(BOX, "Three")
    page.press(BOX, "Enter")
    page.wait_for_selector(".mh-status:has-text('not a number')")
    assert page.input_value(BOX) == "Three"


def test_conversations_are_kept_in_the_browser(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    say(page, "About dogs")
    page.reload()
    page.wait_for_selector(LAST)
    assert last_text(page).strip() == STORY.strip()
    assert page.locator(f"{LAST} .mh-heads").count() > 10
    assert page.locator("#mh-chat-panel .mh-accepted").count() >= 2

    page.click(".mh-new")
    page.wait_for_selector(".mh-hello:visible")
    say(page, "About cats")
    assert "About dogs" not in engine.tokenizer.decode(engine.requests[-1].prompt)
    assert page.locator(".mh-open").all_inner_texts() == ["About cats", "About dogs"]
    page.click(".mh-open:has-text('dogs')")
    page.wait_for_selector(".mh-user:has-text('About dogs')")
    assert page.locator(".mh-message").count() == 2

    remove = page.locator(".mh-row:has-text('cats') .mh-remove")
    remove.click()
    assert page.locator(".mh-open").count() == 2  # the first click only asks
    remove.click()
    assert page.locator(".mh-open").all_inner_texts() == ["About dogs"]
    page.reload()
    page.wait_for_selector(".mh-user:has-text('About dogs')")
    stranger = opened()  # another browser
    assert stranger.locator(".mh-open").count() == 0


def test_leaving_a_conversation_stops_its_answer(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.1
    say(page, "About dogs", until_done=False)
    page.wait_for_selector(f"{LAST} .mh-token >> nth=9")
    page.click(".mh-new")
    wait_for(lambda: engine.running == 0, 5.0)  # only closed pages must end within a second
    page.wait_for_selector(".mh-hello:visible")
    page.wait_for_timeout(500)
    assert page.locator(".mh-message").count() == 0
    assert page.is_visible(SEND)
    page.click(".mh-open")
    page.wait_for_selector(f"{LAST} .mh-token")  # what was written is kept
    engine.delay = 0.0
    say(page, "And cats")


def test_html_is_shown_as_text(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.script, engine.delay = ATTACK, 0.0
    say(page, "<b>mine</b><script>window.pwned = 3</script>")
    assert page.inner_text(".mh-user .mh-body") == "<b>mine</b><script>window.pwned = 3</script>"
    assert "<b>bold</b> and <script>window.pwned = 1</script> & <img src=x" in last_text(page)
    assert page.inner_text(f"{LAST} pre code") == "<i>code</i>\n"
    assert page.locator(".mh-body b, .mh-body img, .mh-body script").count() == 0
    page.get_by_role("tab", name="Race").click()
    page.click("#mh-race")
    page.wait_for_selector(".mh-speedup")
    assert "<script>window.pwned = 1</script>" in page.inner_text("#mh-race-plain .mh-card-text")
    page.reload()
    page.wait_for_selector(LAST)
    assert page.evaluate("() => window.pwned") is None


def test_errors_are_one_line(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.max_rows = engine.max_queue = 0
    page.fill(BOX, "Hello")
    page.press(BOX, "Enter")
    page.wait_for_selector(".mh-status:has-text('waiting already')")
    done(page)
    assert page.input_value(BOX) == "Hello"  # to be sent again
    assert page.locator(".mh-message").count() == 0
    engine.max_rows, engine.crash = 8, True
    page.press(BOX, "Enter")
    page.wait_for_selector(".mh-status:has-text('Internal error')")
    assert "a secret inside" not in page.inner_text("body")
    assert "Traceback" not in page.inner_text("body")
    engine.crash, engine.delay = False, 0.0
    say(page, "And now")
    assert last_text(page).strip() == STORY.strip()


def test_two_people_get_their_own_text(opened: Any, engine: ScriptedEngine) -> None:
    def script(request: Any) -> str:
        animal = "cat" if " cats" in engine.tokenizer.decode(request.prompt) else "dog"
        return f"The {animal} sleeps. " * 20

    engine.script, engine.delay = script, 0.03
    pages = {"dog": opened(), "cat": opened()}
    for animal, page in pages.items():
        say(page, f"About {animal}s", until_done=False)
    for animal, page in pages.items():
        page.wait_for_selector(f"{SEND}:visible")
        assert last_text(page).strip() == (f"The {animal} sleeps. " * 20).strip()


def test_the_phone_opens_and_closes_its_sidebars(opened: Any) -> None:
    page = opened(PHONE)
    page.wait_for_selector("body.mh-ready")
    for side, inside in (("left", ".mh-new"), ("right", "#mh-proposer")):
        box = page.locator(inside).bounding_box()
        assert box is None or box["x"] + box["width"] <= 0 or box["x"] >= 390
        page.click(f".mh-{side} .toggle-button")
        page.wait_for_timeout(500)
        box = page.locator(inside).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        page.click(f".mh-{side} .toggle-button")
        page.wait_for_timeout(500)
    assert fits(page)


def test_the_demo_model_races(browser: Any) -> None:
    from medhead_app.screenshots import demo_page, open_page

    with demo_page() as url:
        page = open_page(browser, url, (1280, 800), "light")
        page.fill("[aria-label='number input for Max new tokens']", "40")
        page.press("[aria-label='number input for Max new tokens']", "Tab")
        page.get_by_role("tab", name="Race").click()
        page.click("#mh-race")
        page.wait_for_selector(".mh-speedup", timeout=60_000)
        assert float(page.inner_text(".mh-speedup").rstrip("×")) > 0
        assert page.inner_text(".mh-identical") == "yes"
        assert page.inner_text("#mh-race-plain .mh-card-text") == page.inner_text("#mh-race-speculative .mh-card-text")
        assert page.locator("#mh-race-speculative .mh-heads").count() > 0
        page.context.close()
