"""Images on the page in a real browser."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import BOX, Site, done, say
from page_engine import ScriptedEngine, WordProcessor
from test_browser_access import control_names

from medhead_app.service import Service
from vision_chat import picture

pytestmark = pytest.mark.slow
pytest_plugins = ["page_fixtures"]

ATTACHED, SHOWN = ".mh-attached img", ".mh-user .mh-images img"
PASTE = """([selector, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], 'pasted.png', { type: 'image/png' }));
  const event = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
  document.querySelector(selector).dispatchEvent(event);
  return event.defaultPrevented;
}"""


@pytest.fixture(scope="module")
def processor() -> WordProcessor:
    return WordProcessor(ScriptedEngine().tokenizer)


@pytest.fixture(scope="module")
def site(processor: WordProcessor) -> Iterator[Site]:
    from medhead_app.chat.build import build_page
    from medhead_app.chat.theme import page_options
    from medhead_app.listen import run_in_thread
    from medhead_app.server import build_app

    engine = ScriptedEngine()
    processor.tokenizer = engine.tokenizer
    service = Service(engine, engine.tokenizer, "scripted model", processor=processor)  # type: ignore[arg-type]
    with run_in_thread(build_app(service, build_page(service), page_options()), service) as url:
        yield Site(engine, url)


def png(color: str, size: tuple[int, int]) -> dict[str, Any]:
    file = io.BytesIO()
    picture(color, size).save(file, "PNG")
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": file.getvalue()}


def test_images_are_added_removed_sent_and_kept(opened: Any, engine: ScriptedEngine, processor: WordProcessor) -> None:
    page = opened()
    engine.delay = 0.0
    page.set_input_files("#mh-images input", [png("red", (40, 30)), png("blue", (3000, 1500))])
    page.wait_for_function("() => document.querySelectorAll('.mh-attached img').length === 2")
    names = control_names(page)
    assert {"Add image", "Remove image 1", "Remove image 2"} <= set(names)
    assert sorted(set(names)) == sorted(names)
    page.get_by_role("button", name="Remove image 1").click()
    page.wait_for_function("() => document.querySelectorAll('.mh-attached img').length === 1")
    say(page, "What is this?")
    assert [image.size for image in processor.images] == [(1024, 512)]
    assert page.locator(ATTACHED).count() == 0
    assert page.get_attribute(SHOWN, "alt") == "Image 1 of message 1"
    say(page, "And now?")  # the image is still part of the conversation
    assert [image.size for image in processor.images] == [(1024, 512)] * 2
    page.reload()
    page.wait_for_selector(SHOWN)
    assert page.locator(SHOWN).count() == 1
    page.click(".mh-message:last-child [data-tool=retry]")
    page.wait_for_selector(".mh-message:last-child .mh-version:has-text('2/2')")
    done(page)
    assert len(processor.images) == 3


def test_an_image_is_pasted_into_the_message(opened: Any, engine: ScriptedEngine) -> None:
    page = opened()
    engine.delay = 0.0
    pasted = list(png("green", (40, 30))["buffer"])
    assert not page.evaluate(PASTE, ["#mh-race-tab, body", pasted])  # elsewhere it is left alone
    assert page.evaluate(PASTE, [BOX, pasted])
    page.wait_for_selector(ATTACHED)
    page.press(BOX, "Enter")  # an image may come without a text
    page.wait_for_selector(SHOWN)
    done(page)
    page.click(".mh-message:last-child [data-tool=undo]")
    page.wait_for_selector(ATTACHED)
    page.set_input_files("#mh-images input", [{"name": "no.png", "mimeType": "image/png", "buffer": b"hello"}])
    page.wait_for_selector(".mh-attach-note:has-text('no.png is not an image that can be read.')")
