"""Take screenshots of the page with the demo model, for the documentation."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medhead.cli.common import Parser, guarded
from medhead.decoder import Decoder
from medhead.errors import MedheadError
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer
from medhead.serving import Engine
from medhead_app.service import Service

PROG = "medhead_app.screenshots"
PROMPT = "Tell me a story about a brave little dog."
SEED = "7"
DESKTOP, PHONE = (1280, 800), (390, 844)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main(argv: list[str] | None = None) -> int:
    """Run `python -m medhead_app.screenshots`; return the exit code."""
    parser = Parser(prog=f"python -m {PROG}", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the screenshots (default: docs)")
    args = parser.parse_args(argv)
    return guarded(PROG, lambda: take_all(args.output))


def take_all(folder: Path) -> None:
    """Take all screenshots."""
    with demo_page() as url, chromium() as browser:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, size, scheme in (("", DESKTOP, "light"), ("-dark", DESKTOP, "dark"), ("-phone", PHONE, "light")):
            page = open_page(browser, url, size, scheme)
            chat(page)
            save(page, folder / f"chat{suffix}.png")
            race(page)
            save(page, folder / f"race{suffix}.png")
            page.context.close()


@contextmanager
def demo_page() -> Iterator[str]:
    """Serve the demo model's page on a free port; yield its URL."""
    from medhead_app.chat.build import build_page
    from medhead_app.chat.theme import page_options
    from medhead_app.listen import run_in_thread
    from medhead_app.server import build_app

    model = load_model(DEMO_MODEL, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(DEMO_MODEL)
    with Engine(Decoder(model, heads=DEMO_HEADS), tokenizer, heads=DEMO_HEADS) as engine:
        service = Service(engine, tokenizer, "medhead demo model")
        with run_in_thread(build_app(service, build_page(service), page_options()), service) as url:
            yield url


@contextmanager
def chromium() -> Iterator[Any]:
    """Start chromium with Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise MedheadError("playwright is not installed: pip install playwright") from None
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        raise MedheadError("chromium is not installed: apt-get install chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=[*FLAGS, "--no-first-run"])
        yield browser
        browser.close()


def open_page(browser: Any, url: str, size: tuple[int, int], scheme: str) -> Any:
    """Open the page and wait until it is ready."""
    phone = size == PHONE
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, is_mobile=phone, has_touch=phone
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_function("() => localStorage.getItem('medhead:current')")
    page.wait_for_selector("body.mh-ready", state="attached")
    if not phone:
        page.get_by_label("Seed").fill(SEED)
    return page


def chat(page: Any) -> None:
    """Send a message and wait for the answer."""
    page.fill("#mh-message textarea", PROMPT)
    page.press("#mh-message textarea", "Enter")
    page.wait_for_selector(".mh-assistant .mh-token")
    page.wait_for_selector("#mh-send:visible")
    page.wait_for_function("() => !document.querySelector('.mh-busy')")
    page.mouse.move(0, 0)


def race(page: Any) -> None:
    """Run two races to their ends; the first one warms up."""
    page.get_by_role("tab", name="Race").click()
    for _ in range(2):
        page.click("#mh-race")
        page.wait_for_selector("#mh-race-stop:visible")
        page.wait_for_selector(".mh-speedup", timeout=60_000)
        page.wait_for_selector("#mh-race:visible")
    page.mouse.move(0, 0)


def save(page: Any, path: Path) -> None:
    """Save a screenshot as a PNG with 256 colors."""
    from PIL import Image

    page.wait_for_timeout(400)
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "page.png"
        page.screenshot(path=full)
        with Image.open(full) as image:
            # quantised by coverage, which keeps the colors of small areas such as the legend
            small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
            small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
