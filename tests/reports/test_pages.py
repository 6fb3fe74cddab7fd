"""Pages of every kind of artifact: what they say, and that a real browser opens them from disk without a complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from fixtures_pages import COUNT, KINDS, MEASURED, RIGHT, browser_path, make_pages, opened
from fixtures_stage_training import CAPTIONS
from fixtures_store import make_store

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.cli.app import run
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.reports import artifact_pages
from bifrost_cli.reports.page import SCRIPT, report_html
from bifrost_cli.reports.report import report
from bifrost_cli.training import training_run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return make_pages(tmp_path_factory.mktemp("pages"))


def text(page):
    return re.sub(r"<[^>]*>", " ", page.read_text("utf-8").split("<main>")[1])


# ---- what they say --------------------------------------------------------------------------------------------------


def test_a_training_shows_curves_health_grids_and_where_it_came_from(pages):
    shown = text(pages["branch"])
    for words in ("Loss while training", "loss shuffled", "cosine", "variance", "Sample grids", "true | predicted",
                  "predicted, step ", CAPTIONS[0], "Made from"):  # fmt: skip
        assert words in shown, words
    assert "<polyline" in pages["branch"].read_text("utf-8") and "trained parameters" in shown


def test_without_its_latents_a_training_shows_its_grids_whole(pages, tmp_path):
    branch = next((pages["report"].parent / "runs").glob("branch-*"))
    moved = shutil.copytree(branch, tmp_path / "moved")
    page = report(moved, workspace=tmp_path, output=tmp_path / "a.html")
    sheets = sorted(path.stem for path in moved.glob("samples/step-*.png"))
    assert sheets and all(sheet in text(page) for sheet in sheets) and "true | predicted" in text(page)
    assert page.read_text("utf-8").count("<img") == len(sheets)


def test_a_sample_grid_is_cut_where_the_training_put_it_together():
    assert artifact_pages.GRID_ROWS == training_run.SHOWN


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
    with pytest.raises(UsageError, match="not an .html file"):
        report(runs / "samples-0", workspace=runs, output=tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_a_damaged_artifact_has_no_page(tmp_path):
    store = make_store(tmp_path / "latents-a")
    shard = next(path for path in (store.path / "store.zarr" / "latents" / "c").rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        report(store.path, workspace=tmp_path, output=tmp_path / "a.html")


TABLE = "step,loss\n1,2\n"


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"losses.csv": "step,loss\n1,=cmd\n2,x\n"}, "no table"),
        ({"losses.csv": "a,b\n1,2\n"}, "no column step"),
        ({"losses.csv": b"step,loss\n1,\xff\n"}, "no table"),
        ({"losses.csv": "step,loss\n1,nan\n2,inf\n"}, None),
        ({"losses.csv": "step,loss\n1,1\n2,1e300\n3,nan\n4,2\nnan,1\n5,"}, None),
        ({"losses.csv": "step\n1\n", "validation.csv": "step,loss_shuffled\n1,2\n2,3\n"}, None),
        ({"losses.csv": TABLE, "samples/step-0000001.png": b"no picture"}, "no PNG"),
    ],
)
def test_odd_values_in_a_training_are_shown_or_named(tmp_path, files, refused):
    """Of somebody else's artifact, whose digests are right; never a bug of ours."""
    with Draft.open(tmp_path / "a", "branch", {"settings": {"train": {"validation_rows": "x"}}}) as draft:
        for name, data in files.items():
            (draft.path / name).parent.mkdir(exist_ok=True)
            (draft.path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        draft.commit({"recipe": {"name": 3}, "parameters": 7})
    if refused is None:
        assert "</html>" in report(tmp_path / "a", workspace=tmp_path).read_text("utf-8")
    else:
        with pytest.raises(ArtifactError, match=refused) as caught:
            report(tmp_path / "a", workspace=tmp_path)
        assert caught.value.code == "BF-ART-005"


@pytest.mark.parametrize("gone", ["store", "table", "picture"])
def test_a_page_is_made_as_far_as_its_ancestors_are_here(pages, tmp_path, gone):
    """A store is emptied to save room, a table is damaged: of what came from it the page is still made."""
    runs = shutil.copytree(pages["report"].parent / "runs", tmp_path / "runs")
    whole = report(runs / "samples-0", workspace=runs).read_text("utf-8")
    if gone == "store":
        for store in runs.glob("latents-*"):
            shutil.rmtree(store / "store.zarr")
    for table in runs.glob("branch-*/losses.csv") if gone == "table" else ():
        table.write_text("step,loss\n1,x\n")
    for picture in runs.glob("samples-*/00000.png") if gone == "picture" else ():
        picture.write_bytes(b"")
    if gone == "picture":  # of the samples that two reports are of
        pair = [path for path in runs.glob("report-*")]
        assert "Images by prompt" not in text(report(*pair, workspace=runs, output=tmp_path / "a.html"))
        return
    page = report(runs / "samples-0", workspace=runs).read_text("utf-8")
    assert page.count("<img") == whole.count("<img") > 0
    assert page.count("<svg") == whole.count("<svg") - 1


def test_samples_without_an_image_have_a_page(tmp_path):
    with Draft.open(tmp_path / "a", "samples", {}) as draft:
        (draft.path / "prompts.jsonl").write_text('{"index": 0, "prompt": "a"}\n')
        draft.commit({"recipe": {"name": "test"}})
    assert "</html>" in report(tmp_path / "a", workspace=tmp_path).read_text("utf-8")


# ---- on the command line --------------------------------------------------------------------------------------------


def test_an_empty_workspace_says_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["report"]) == 0
    told = capsys.readouterr()
    assert "no finished artifact yet" in told.out and "builtin:branch" in told.out and "bifrost generate" in told.err
    with pytest.raises(ZeroDivisionError), Draft.open(tmp_path / "runs" / "latents-x", "latents", {"x": 1}):
        1 / 0  # noqa: B018
    assert run(["report", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] is None and told["unfinished"] == ["runs/latents-x"]
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == []


def test_the_newest_training_that_runs_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), Draft.open(tmp_path / "runs" / "branch-x", "branch", {"x": 1}) as draft:
        (draft.path / "work").mkdir()
        (draft.path / "work" / "losses.csv").write_text("step,loss\n1,0.5\n2,0.25\n3,0.1")
        1 / 0  # noqa: B018
    assert run(["report", "-q"]) == 0
    page = text(tmp_path / capsys.readouterr().out.strip())
    assert "unfinished: branch-" in page and "branch-x" not in page and "Loss while training" in page


def test_a_refusal_loads_no_heavy_library(tmp_path):
    """What needs no model is answered at once: torch alone takes seconds to import."""
    program = (
        "import sys\nfrom bifrost_cli.cli.app import run\n"
        "assert (run(['report', 'nothing']), run(['report'])) == (5, 0)\n"
        "assert not {'torch', 'transformers', 'diffusers', 'zarr', 'scipy', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
@pytest.mark.parametrize("width", (390, 1280))
def test_nothing_is_cut_or_clipped(browser, pages, kind, width):
    """Also with every folded part open: no element beyond the window, no label beyond its drawing."""
    with opened(browser, pages[kind], viewport={"width": width, "height": 800}) as page:
        page.evaluate("document.querySelectorAll('.fold').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg text").count()
        assert page.evaluate(MEASURED) == []


@pytest.mark.parametrize("width", (390, 1280))
def test_long_names_wrap_in_a_plot(browser, tmp_path, width):
    """Of an ablation: names of any length and script, at a row, in a legend, and in a lineage."""
    names = ["a variant with a name that is far too long for one line of a plot on a phone", "\u4e00" * 60, "x" * 90]
    rows = [{"name": name, "value": 0.5, "interval95": [0.0, 1.0], "right": 1, "count": 2} for name in names]
    series = {name: [[1, 1000000.0], [1e6, 2.5e-7]] for name in names}
    plot = {"x": "share", "y": "loss", "caption": "", "title": "", "powers": ""}
    plots = [{**plot, "kind": "dots", "rows": rows}, {**plot, "kind": "lines", "series": series},
             {**plot, "kind": "points", "series": series}]  # fmt: skip
    kinds = ("report", "controlnet", "b", "c", "d", "a-kind-with-a-long-name")
    lines = [{"depth": int(place > 0), "id": f"{kind}-0123456789ab", "kind": kind, "cost": None}
             for place, kind in enumerate(kinds)]  # fmt: skip
    result = {"label": "right", "format": "share", "value": 0.5, "spread": "", "details": [], "sentence": "s",
              "categories": rows}  # fmt: skip
    report = {"title": "t", "summary": "s", "results": [result], "warnings": [], "pictures": [], "plots": plots,
              "settings": {"name": "y" * 200}, "lineage": lines, "command": "z" * 200, "env": {}}  # fmt: skip
    (tmp_path / "a.html").write_text(report_html(report, {}), encoding="utf-8")
    with opened(browser, tmp_path / "a.html", viewport={"width": width, "height": 800}) as page:
        page.evaluate("document.querySelectorAll('.fold').forEach(d => d.open = true)")
        assert page.evaluate(MEASURED) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "branches"])
def test_images_come_before_curves_and_settings_are_folded(browser, pages, kind):
    with opened(browser, pages[kind]) as page:
        places = page.evaluate("""() => ['.gallery', '.plots', '.lineage'].map(name =>
            document.querySelector(name)?.getBoundingClientRect().top)""")
        assert [place for place in places if place] == sorted(place for place in places if place) and places[0]
        assert page.evaluate("[...document.querySelectorAll('.fold')].every(d => !d.open)")
        assert page.locator(".fold").count() >= (2 if len(kind.split("-")) == 1 and kind != "reports" else 0)


def test_a_box_of_the_lineage_leads_to_its_row_or_its_page(browser, pages):
    runs = pages["report"].parent / "runs"
    branch = next(path for path in runs.iterdir() if path.name.startswith("branch-"))
    report(branch, workspace=runs)
    report(runs / "samples-0", workspace=runs)
    with opened(browser, runs / "pages" / f"{samples_id(runs)}.html") as page:
        links = {link.get_attribute("href") for link in page.locator("svg a").all()}
        own = {link for link in links if not link.startswith("#")}
        assert own == {f"{branch.name}.html"} and len(links) == 3
        rows = page.evaluate("[...document.querySelectorAll('tr[id]')].map(row => '#' + row.id)")
        assert links - own <= set(rows)
        page.locator(f"svg a[href='{branch.name}.html']").click()
        assert page.title() == branch.name


def samples_id(runs):
    return Artifact.open(runs / "samples-0").id


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


LIGHT = """() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(v =>
        v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
    const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05)
    const ground = e => { const c = getComputedStyle(e).backgroundColor
        return c.endsWith(', 0)') ? ground(e.parentElement) : c }
    return (BODY)()
}"""


def contrast(page, body):
    """Contrasts by WCAG's formula, of what `body` compares by ratio(a, b) and ground(element)."""
    return page.evaluate(LIGHT.replace("BODY", body))


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_text_can_be_read_in_light_and_dark(browser, pages, scheme):
    with opened(browser, pages["report"], color_scheme=scheme) as page:
        behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, re.findall(r"\d+", behind))) > 128) == (scheme == "light")
        names = "['h1', '.soft', '.card .soft', 'figcaption', 'svg text', '.right', '.wrong', 'pre', 'td']"
        texts = f"""() => {names}.map(name => {{
            const e = document.querySelector(name), style = getComputedStyle(e)
            return ratio(e.closest('svg') ? style.fill : style.color, ground(e)) }})"""
        assert min(contrast(page, texts)) >= 4.5


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_curves_can_be_told_from_the_page(browser, pages, scheme):
    """Every colour of a series against what it is drawn on, by WCAG's bound for graphics."""
    with opened(browser, pages["branches"], color_scheme=scheme) as page:
        ratios = contrast(
            page,
            """() => {
            const svg = document.querySelector('.plots svg')
            return [...Array(6).keys()].map(i => {
                const line = document.createElementNS('http://www.w3.org/2000/svg', 'line')
                line.setAttribute('stroke', i ? `var(--series-${i + 1})` : 'var(--bar)')
                svg.append(line)
                return ratio(getComputedStyle(line).stroke, ground(svg)) })
        }""",
        )
        assert len(ratios) == 6 and min(ratios) >= 3


def test_it_prints(browser, pages, tmp_path):
    with opened(browser, pages["report"]) as page:
        page.pdf(path=tmp_path / "report.pdf", print_background=True)
        page.emulate_media(media="print")
        assert not page.locator(".filter").is_visible()
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
