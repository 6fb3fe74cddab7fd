"""The page of the server in a headless browser: with a whole random system behind it, and on a phone."""

from __future__ import annotations

import io
import json

import pytest
from fixtures_flux import save_system
from fixtures_pages import MEASURED, browser_path, opened
from fixtures_serve import StandIn, health, live, wait_for
from PIL import Image

from bifrost_cli import BifrostPipeline
from bifrost_cli.serve.answers import Limits
from bifrost_cli.serve.engine import Engine

TOKEN = "a-token-of-thirty-two-characters"
SAID = "document.getElementById('said').textContent"


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    if path is None:
        pytest.skip("no Chromium here: install it, or name one in BIFROST_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    system = save_system(tmp_path_factory.mktemp("system"), decode_steps=4)
    pipe = BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")
    with live(Engine(pipe, "bifrost", Limits()), Limits()) as url:
        yield url


def until(page, expression: str) -> None:
    """Wait until it is true: Playwright's own waiting needs the `eval` that the page's policy forbids."""
    wait_for(lambda: page.evaluate(expression), 60)


def said(page, text: str) -> None:
    until(page, f"{SAID}.includes({json.dumps(text)})")


def generate(page, seed: str = "3") -> None:
    page.fill("#seed", seed)
    page.click("#go")
    said(page, "1 image")


def test_it_generates_and_asks_for_nothing_else(browser, url):
    with opened(browser, url, viewport={"width": 1280, "height": 900}) as page:
        until(page, "document.querySelectorAll('#patches i').length == 16")
        page.fill("#n", "2")
        page.fill("#seed", "3")
        page.click("#go")
        said(page, "2 images")
        shown = "[...document.querySelectorAll('#images img')].map(image => image.naturalWidth)"
        assert page.evaluate(shown) == [64, 64]
        assert "seed 3" in page.inner_text("#images") and "seed 4" in page.inner_text("#images")
        assert page.evaluate("[...document.querySelectorAll('#patches i')].every(cell => cell.style.background)")
        assert not page.said
        assert all(asked.startswith((f"{url}/", "data:", "blob:")) for asked in page.asked)


def test_the_history_is_kept_with_its_lineage_and_forgotten(browser, url):
    with opened(browser, url) as page:
        generate(page)
        page.click("#images button:text('Edit')")
        until(page, "document.activeElement.id == 'canvas'")
        for key in ("Space", "ArrowRight", "Space", "ArrowDown", "ArrowUp"):
            page.keyboard.press(key)
        page.fill("#prompt", "a square")
        page.keyboard.press("Control+Enter")
        said(page, "1 image")
        page.reload()
        rows = page.locator("#history li")
        assert rows.count() == 2 and "edited from" in rows.first.inner_text() and "seed 3" in rows.first.inner_text()
        rows.nth(1).get_by_text("Use").click()
        assert page.input_value("#prompt") == "a red circle above a blue square" and page.input_value("#seed") == "3"
        page.click("#forget")
        assert rows.count() == 0 and page.evaluate("JSON.parse(localStorage.getItem('bifrost-history')).length") == 0
        assert not page.said


def test_an_upload_is_edited_where_it_is_painted(browser, url, tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (120, 80), (200, 60, 60)).save(stream, "PNG")
    with opened(browser, url) as page:
        page.set_input_files("#file", {"name": "../a.png", "mimeType": "image/png", "buffer": stream.getvalue()})
        page.wait_for_selector("#canvas", state="visible")
        page.click("#go")
        said(page, "mark what is to change")
        canvas = page.locator("#canvas")
        canvas.hover(position={"x": 5, "y": 5})
        page.mouse.down()
        canvas.hover(position={"x": canvas.bounding_box()["width"] * 0.4, "y": 5})
        page.mouse.up()
        assert page.evaluate("[...marked].sort()") == [0, 1]
        page.fill("#seed", "5")
        page.click("#go")
        said(page, "1 image")
        assert page.evaluate("JSON.parse(localStorage.getItem('bifrost-history'))[0].from") == "an image of yours"
        assert not page.said


def test_a_plan_is_written_changed_and_used(browser, url):
    with opened(browser, url) as page:
        until(page, "document.querySelectorAll('#patches i').length == 16")
        page.check("#planned")
        page.click("#write-plan")
        until(page, "document.getElementById('plan').value")
        page.fill("#plan", "my own plan")
        generate(page)
        assert page.evaluate("JSON.parse(localStorage.getItem('bifrost-history'))[0].plan") == "my own plan"
        page.fill("#prompt", "another")
        assert page.input_value("#plan") == ""


def test_escape_stops_and_a_token_is_asked_for(browser):
    engine = StandIn()
    engine.gate.clear()
    with live(engine, token=TOKEN) as url, opened(browser, url) as page:
        page.wait_for_selector("#token", state="visible")
        page.fill("#token", TOKEN)
        page.keyboard.press("Tab")
        until(page, "document.querySelectorAll('#patches i').length == 16")
        page.click("#go")
        wait_for(lambda: engine.steps)
        page.keyboard.press("Escape")
        said(page, "Stopped")
        wait_for(lambda: not health(url)["waiting"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut(browser, url, width, scheme, tmp_path):
    with opened(browser, url, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        generate(page)
        page.click("#images button:text('Edit')")
        until(page, "document.activeElement.id == 'canvas'")
        page.keyboard.press("Space")
        page.check("#planned")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(MEASURED) == []
        page.screenshot(path=tmp_path / "page.png", full_page=True)
