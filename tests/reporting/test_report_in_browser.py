"""The report opened in headless Chromium, at a desk's and a phone's width, in light and dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from cmdlab.reporting import write_report

PUBLISHED = sorted((Path(__file__).parents[2] / "reports").glob("*.html"))
CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>document.title = 'stolen'</script> a red <img src=x onerror=alert(1)> star"
LOAD_EVERY_CLIP = """Promise.all([...document.querySelectorAll("audio")].map((one) =>
    new Promise((loaded, failed) => {
        one.onloadedmetadata = loaded;
        one.onerror = () => failed(one.error.message);
        one.load();
    })))"""
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def report(make_study, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    runs = make_study(
        folder / "runs",
        axes={"rate": [0.1, 0.3, 0.5]},
        seeds=(1, 2),
        text=HOSTILE,
        missing=(("cmd-image", 2),),
    )
    write_report([runs], folder / "report.html", title=HOSTILE)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: f"{view[0]} px, {view[1]}")
def opened(request, browser: Browser, report: str) -> Iterator[tuple[Page, list[str]]]:
    """The page in one view, and all that it asked for, printed or threw."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen: list[str] = []
    page.on("request", lambda one: seen.append(one.url))
    page.on("console", lambda one: seen.append(f"console: {one.text}"))
    page.on("pageerror", lambda one: seen.append(f"error: {one}"))
    page.on("dialog", lambda one: seen.append(f"dialog: {one.message}"))
    page.goto(report)
    page.evaluate(LOAD_EVERY_CLIP)  # wait_for_function would poll by eval, which the page forbids
    yield page, seen
    page.close()


def test_nothing_is_requested_printed_or_thrown(opened, report):
    _, seen = opened
    assert {one for one in seen if not one.startswith("data:")} == {report}


def test_axe_finds_no_violation(opened):
    page, _ = opened
    found = Axe().run(page).response
    assert [one["id"] for one in found["violations"]] == []
    assert len(found["passes"]) > 20


def test_every_audio_player_loads_its_clip(opened):
    page, _ = opened
    durations = page.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
    assert len(durations) == 6
    assert all(1.5 < one < 4.2 for one in durations)


def test_markup_in_a_caption_is_shown_as_text(opened):
    page, _ = opened
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator(".query h4").first.inner_text() == f"“{HOSTILE}”"
    assert page.title() == HOSTILE
    assert page.evaluate("document.scripts.length") == 1


def test_the_page_itself_never_scrolls_sideways(opened):
    page, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_the_form_computes_with_the_readers_own_numbers(opened):
    """On the test gallery it gives the table's means; twice the pictures, about twice as many
    are looked at; a field that cannot be read changes nothing."""
    page, _ = opened

    def shown() -> list[list[str]]:
        rows = page.locator("#users-form tbody tr").all()
        return [row.locator("output").all_inner_texts() for row in rows]

    cells = page.locator("#users-table tbody tr").first.locator("td").all_inner_texts()
    before = shown()
    assert before[0][1] == cells[1].split("\n")[0]
    assert before[-1] == ["20.0 %", "30.5", "30.5 s", "0.8 h"]  # leafing through 60, 100 times
    page.fill("input[name=pictures]", "119")
    page.fill("input[name=seconds]", "2")
    after = shown()
    for old, new in zip(before, after, strict=True):
        assert float(new[1]) == pytest.approx(2 * float(old[1]) - 1, abs=0.16)
        assert float(new[2].split()[0]) == pytest.approx(2 * float(new[1]), abs=0.11)
        assert float(new[0].split()[0]) < float(old[0].split()[0])
    page.fill("input[name=pictures]", "")
    assert shown() == after
    page.fill("input[name=pictures]", "60")
    page.fill("input[name=seconds]", "1")


def test_wide_tables_scroll_and_can_be_reached_with_the_keyboard(opened):
    page, _ = opened
    regions = page.locator(".scroll").all()
    assert regions
    for region in regions:
        region.focus()
        assert region.evaluate("one => one === document.activeElement")


def test_every_image_is_decoded(opened):
    page, _ = opened
    widths = page.evaluate("[...document.images].map(one => one.naturalWidth)")
    assert len(widths) == 30
    assert set(widths) == {48}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("report", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_page_is_sound(browser: Browser, report: Path, width: int):
    page = browser.new_page(viewport={"width": width, "height": 900})
    seen: list[str] = []
    page.on("request", lambda one: seen.append(one.url))
    page.on("console", lambda one: seen.append(f"console: {one.text}"))
    page.on("pageerror", lambda one: seen.append(f"error: {one}"))
    page.goto(report.as_uri())
    page.evaluate(LOAD_EVERY_CLIP)
    assert {one for one in seen if not one.startswith("data:")} == {report.as_uri()}
    assert [one["id"] for one in Axe().run(page).response["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.close()
