"""Pages of every kind of artifact: what they say, and that a real browser opens them from disk without a complaint."""

from __future__ import annotations

import re

import pytest
from fixtures_pages import COUNT, KINDS, RIGHT, browser_path, make_pages, opened
from fixtures_store import make_store

from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.reports.page import SCRIPT
from bifrost_cli.reports.report import report


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return make_pages(tmp_path_factory.mktemp("pages"))


def text(page):
    return re.sub(r"<[^>]*>", " ", page.read_text("utf-8").split("<main>")[1])


# ---- what they say --------------------------------------------------------------------------------------------------


def test_a_training_shows_curves_health_grids_and_where_it_came_from(pages):
    shown = text(pages["branch"])
    for words in ("Loss while training", "loss shuffled", "cosine", "variance", "Sample grids", "step-", "Made from"):
        assert words in shown, words
    assert "<polyline" in pages["branch"].read_text("utf-8") and "trained parameters" in shown


def test_a_store_shows_its_channels_norms_and_maps(pages):
    shown = text(pages["latents"])
    assert "Norms of tokens" in shown and "standard deviation" in shown and "Mean norm of a token" in shown
    assert "first three principal components" in shown
    assert pages["latents"].read_text("utf-8").count("<img") == 20  # every second of 40 rows


def test_a_report_shows_numbers_plots_verdicts_lineage_and_its_command(pages):
    shown = text(pages["report"])
    for words in (f"{RIGHT} of {COUNT}", "Frechet distance", "Principal components of the latents", "predicted latents",
                  "only those that are wrong", "Device hours", "bifrost eval", "The same again"):  # fmt: skip
        assert words in shown, words
    assert shown.count("\u2717 wrong") == COUNT - RIGHT


def test_two_reports_say_first_what_differs(pages):
    shown = text(pages["reports"])
    assert shown.index("What differs") < shown.index("Numbers") < shown.index("Images by prompt")
    assert "The same prompts" in shown


def test_two_trainings_lie_over_each_other(pages):
    shown = text(pages["branches"])
    assert "settings.train.seed" in shown and shown.index("What differs") < shown.index("Loss while training")


def test_two_stores_lie_over_each_other_and_their_rows_side_by_side(pages):
    shown = text(pages["latents-pair"])
    assert "A mean" in shown and "B standard deviation" in shown and "Maps of the rows that both have" in shown
    assert pages["latents-pair"].read_text("utf-8").count("<img") == 2 * 20


def test_two_kinds_and_one_thing_twice_are_refused(pages, tmp_path):
    runs = pages["report"].parent / "runs"
    with pytest.raises(UsageError, match="nothing to compare"):
        report(runs / "latents-a", runs / "samples-0", workspace=runs, output=tmp_path / "a.html")
    with pytest.raises(UsageError, match="given twice"):
        report(runs / "samples-0", runs / "samples-0", workspace=runs, output=tmp_path / "a.html")
    with pytest.raises(UsageError, match="exists already"):
        report(runs / "samples-0", workspace=runs, output=pages["samples"])
    with pytest.raises(UsageError, match="no .html file"):
        report(runs / "samples-0", workspace=runs, output=tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_a_damaged_artifact_has_no_page(tmp_path):
    store = make_store(tmp_path / "latents-a")
    shard = next(path for path in (store.path / "store.zarr" / "latents" / "c").rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        report(store.path, workspace=tmp_path, output=tmp_path / "a.html")


# ---- in a browser ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_asks_for_nothing_and_does_not_complain(browser, pages, kind):
    with opened(browser, pages[kind], viewport={"width": 1280, "height": 900}) as page:
        page.wait_for_load_state("networkidle")
        loaded = page.evaluate("""async () => {
            const all = [...document.images]
            await Promise.all(all.map(i => { i.loading = 'eager'; return i.decode() }))
            return all.map(i => i.naturalWidth)
        }""")
        assert loaded or kind == "branches"
        assert all(loaded), "an image did not load"
        assert page.evaluate("document.querySelectorAll('script').length") == 1 and SCRIPT in page.content()
        assert not page.said
        assert all(url == pages[kind].as_uri() or url.startswith("data:") for url in page.asked), page.asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", (375, 1280))
def test_nothing_is_wider_than_the_window(browser, pages, kind, width):
    with opened(browser, pages[kind], viewport={"width": width, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_alone_enlarges_a_picture_and_filters(browser, pages):
    with opened(browser, pages["report"], viewport={"width": 1280, "height": 900}) as page:
        small = page.locator(".gallery img").first.bounding_box()["width"]
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "wrong-only"
        page.keyboard.press("Space")
        assert page.locator(".gallery li:visible").count() == COUNT - RIGHT
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.keyboard.press("Enter")
        assert page.locator(".gallery img").first.bounding_box()["width"] > 2 * small
        page.keyboard.press("Escape")
        assert page.locator(".gallery img").first.bounding_box()["width"] == small
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the focus stays where it was"


def contrast(page):
    """Of the page's text and of its soft text against what is behind them, by WCAG's formula."""
    return page.evaluate("""() => {
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(v =>
            v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
        const behind = light(getComputedStyle(document.body).backgroundColor)
        return ['h1', '.soft'].map(name => {
            const front = light(getComputedStyle(document.querySelector(name)).color)
            return (Math.max(front, behind) + .05) / (Math.min(front, behind) + .05) })
    }""")


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_text_can_be_read_in_light_and_dark(browser, pages, scheme):
    with opened(browser, pages["report"], color_scheme=scheme) as page:
        behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, re.findall(r"\d+", behind))) > 128) == (scheme == "light")
        assert min(contrast(page)) >= 4.5


def test_it_prints(browser, pages, tmp_path):
    with opened(browser, pages["report"]) as page:
        page.pdf(path=tmp_path / "report.pdf", print_background=True)
        page.emulate_media(media="print")
        assert not page.locator(".filter").is_visible()
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
