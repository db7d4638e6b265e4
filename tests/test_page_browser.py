"""The page of a comparison in a real browser: quiet, sortable, narrow enough for a phone, dark where dark is asked for, printable."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comparisons import TESTED, comparison, rows
from featherweight.page import FILE, page

api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = comparison(3)
    known = {
        TESTED: [row | {"text": f"<script>alert({i})</script> \u202e " + "long" * 200} for i, row in enumerate(rows())]
    }
    place = tmp_path_factory.mktemp("page") / FILE
    place.write_text(page("Eight methods", lines, known, ["a note"]), encoding="utf-8")
    return place


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page; fails where it says something on the console or asks for anything but itself."""
    said: list[str] = []
    contexts: list[Any] = []

    def opened(width: int = 1280, **more: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda asked: said.append(asked.url) if asked.url not in (file.as_uri(), "data:,") else None)
        tab.goto(file.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def names(tab: Any) -> list[str]:
    """The first cells of the table, in order."""
    found: list[str] = tab.locator("table[data-sortable] tbody .name").all_text_contents()
    return found


def test_a_heading_sorts_by_number_both_ways_with_mouse_and_keyboard(opened: Any) -> None:
    tab = opened()
    before = names(tab)
    head = tab.locator("th[data-sort]", has_text="Required memory")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert names(tab)[0] == "full fine-tuning"
    assert names(tab)[-1] == "majority class"
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(tab)[:2] == ["untouched model", "LoRA"]
    assert names(tab)[-1] == "majority class"  # without a value: last, whichever way
    tab.locator("th[data-sort]", has_text="Fine-Tuning Method").locator("button").click()
    assert names(tab)[0] == "(IA)³"
    assert tab.locator("th[aria-sort]").count() == 1
    assert sorted(names(tab)) == sorted(before)


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_the_page_itself_does_not_scroll_sideways(opened: Any, width: int) -> None:
    tab = opened(width)
    tab.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.querySelectorAll('.scroll')].some(x => x.scrollWidth > x.clientWidth)")


@pytest.mark.parametrize("width", [320, 375, 500, 1280])
def test_names_and_accuracies_are_seen_without_scrolling_and_words_say_that_there_is_more(
    opened: Any, width: int
) -> None:
    tab = opened(width)
    table = tab.locator("table[data-sortable]")
    assert table.locator("thead tr:last-child > :nth-child(2)").inner_text().startswith("Accuracy")
    for cell in table.locator("tbody > tr > :nth-child(-n+2)").all():
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert tab.locator(".hint").is_visible()


def test_a_table_that_fits_has_no_hint_that_it_scrolls(opened: Any) -> None:
    tab = opened(1280)
    tab.evaluate("document.querySelector('main').style.maxWidth = 'none'")
    tab.set_viewport_size({"width": 4000, "height": 800})
    tab.locator(".hint").wait_for(state="hidden", timeout=3000)


def test_the_first_column_stays_when_the_table_is_scrolled(opened: Any) -> None:
    tab = opened(375)
    tab.evaluate("document.querySelector('.scroll').scrollLeft = 600")
    box, first = tab.locator(".scroll").first.bounding_box(), tab.locator("tbody th").first.bounding_box()
    assert first["x"] == pytest.approx(box["x"], abs=0.5)
    above = tab.locator("table[data-sortable] thead tr:first-child > :first-child").bounding_box()
    assert above["width"] == pytest.approx(
        first["width"], abs=1
    )  # else it would cover what stands above the other columns


def test_dark_is_dark_in_the_page_and_in_the_figures(opened: Any) -> None:
    ask = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('figure svg text')).fill,"
        " getComputedStyle(document.querySelector('#figure-confusion svg text')).fill]"
    )
    light, dark = (opened(color_scheme=scheme).evaluate(ask) for scheme in ("light", "dark"))
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert sum(map(int, dark[0][4:-1].split(","))) < 120
    assert sum(map(int, dark[1][4:-1].split(","))) > 400


def test_on_paper_everything_is_open_and_nothing_is_cut_off(opened: Any) -> None:
    tab = opened(690, color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 690
    assert not tab.locator("table[data-sortable]").is_visible()
    assert [table.is_visible() for table in tab.locator(".on-paper table").all()] == [True] * 3
    assert all(table.bounding_box()["width"] <= 690 for table in tab.locator("table").all() if table.is_visible())
    assert tab.locator(".facts-long").bounding_box()["height"] > 50
    assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF-")


def test_without_javascript_only_sorting_is_lost(opened: Any) -> None:
    tab = opened(java_script_enabled=False)
    assert len(names(tab)) == 11
    assert tab.locator("th button").count() == 0
    assert not tab.locator(".with-script").is_visible()
