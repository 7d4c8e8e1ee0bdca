"""The page in a real browser for people who see, hear or steer it differently: contrast, names, focus, announcements."""

from __future__ import annotations

from typing import Any

import pytest
from page_browser import DESKTOP, LAST, PHONE, done, last_text, say
from page_engine import STORY, ScriptedEngine

pytestmark = pytest.mark.slow
pytest_plugins = ["page_fixtures"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colored_text_is_easy_to_read(opened: Any, scheme: str) -> None:
    page = opened({**DESKTOP, "color_scheme": scheme})
    say(page, "Tell me a story.")
    contrasts = page.evaluate(
        CONTRASTS, ["heads mh-depth-8", "heads mh-depth-1", "ngram", "recycling", "lookahead", "bonus"]
    )
    assert min(contrasts.values()) >= 4.5, contrasts
    lines = page.evaluate(
        "() => [...document.querySelectorAll('.mh-legend-item i:last-of-type')].map(i => getComputedStyle(i).borderBottomStyle)"
    )
    assert len(set(lines[:4])) == 4  # color is not the only difference


# contrast (WCAG 2) of the text on each color; colors are painted, because computed styles come in many notations
CONTRASTS = """kinds => {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const painted = (...layers) => {
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
      part /= 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
  };
  const light = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  const ground = getComputedStyle(document.body).backgroundColor, found = {};
  const body = document.querySelector('.mh-assistant .mh-body');
  for (const kind of kinds) {
    const span = document.createElement('span');
    span.className = 'mh-token mh-' + kind;
    body.append(span);
    const style = getComputedStyle(span);
    const text = light(painted(ground, style.color)), back = light(painted(ground, style.backgroundColor));
    found[kind] = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    span.remove();
  }
  return found;
}"""


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_control_has_a_name_of_its_own(opened: Any, engine: ScriptedEngine, options: dict[str, Any]) -> None:
    page = opened(options)
    engine.delay, engine.script = 0.0, "One.\n\n```\ncode\n```\n\n```\nmore\n```\n"
    say(page, "First")
    say(page, "Second")
    page.click(f"{LAST} [data-tool=retry]")
    page.wait_for_selector(f"{LAST} .mh-version:has-text('2/2')")
    done(page)
    chat = control_names(page)
    assert {"Message", "Send", "Clear", "Copy code 2 of answer 2, version 2", "Edit message 1"} <= set(chat)
    page.get_by_role("tab", name="Race").click()
    for names in (chat, control_names(page)):
        assert "" not in names
        assert sorted(set(names)) == sorted(names)


def control_names(page: Any) -> list[str]:
    """Return what a screen reader calls the controls, from the browser's own accessibility tree."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    focusable = [node for node in nodes if any(one["name"] == "focusable" for one in node.get("properties", []))]
    return [node["name"]["value"].strip() for node in focusable if node["role"]["value"] != "RootWebArea"]


FOCUSED = """() => {
  const node = document.activeElement, style = getComputedStyle(node);
  const ring = style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2;
  return node === document.body ? null : [node.outerHTML.slice(0, 120), ring];
}"""


def test_the_focus_is_visible_everywhere(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    say(page, "First")
    page.click(".mh-side .mh-name")
    seen = {}
    for _ in range(40):
        page.keyboard.press("Tab")
        if found := page.evaluate(FOCUSED):
            seen[found[0]] = found[1]
    assert len(seen) > 20
    assert [node for node, ring in seen.items() if not ring] == []


HEARD = """() => { window.heard = []; const node = document.querySelector('.mh-announcer');
  new MutationObserver(() => window.heard.push(node.textContent)).observe(node, { childList: true }); }"""


def test_an_answer_is_announced_once_when_it_is_done(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    page.evaluate(HEARD)
    say(page, "Tell me a story.", until_done=False)
    page.wait_for_selector(f"{LAST} .mh-token >> nth=9")
    assert page.evaluate("() => window.heard") == []
    done(page)
    page.wait_for_timeout(300)
    assert [" ".join(text.split()) for text in page.evaluate("() => window.heard")] == [f"answer 1: {STORY.strip()}"]
    live = page.locator("[aria-live], [role=status], [role=alert]")
    assert page.locator(".mh-scroll").locator(live).count() == 0
    assert last_text(page).strip() == STORY.strip()
