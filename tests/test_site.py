"""The built handbook in a real browser: each page, light and dark and on a phone, with nothing from outside."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVERY_WORD = (
    "document.body.innerText + [...document.querySelectorAll('*')].map(e => e.shadowRoot?.textContent ?? '').join(' ')"
)
VIEWS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 375), "dark phone": ("dark", 375)}

pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site and says nothing."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built once for every process of the tests: a second build would empty what the first one serves."""
    pytest.importorskip("zensical", reason='the handbook needs the extra: pip install -e ".[docs]"')
    pytest.importorskip("mkdocstrings", reason='the handbook needs the extra: pip install -e ".[docs]"')
    own = tmp_path_factory.getbasetemp()
    shared = (own if worker_id == "master" else own.parent) / "site"
    with FileLock(shared.with_suffix(".lock")):
        if not shared.exists():
            built = subprocess.run(
                [sys.executable, ROOT / "docs/build.py"], capture_output=True, text=True, check=False
            )
            assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
            shutil.copytree(ROOT / "build/site", shared)
    return shared


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serves the site on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    api = pytest.importorskip(
        "playwright.sync_api", reason='the browser test needs the extra: pip install -e ".[docs]"'
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield found
        found.close()


def pages(site: Path) -> list[str]:
    """Every page that was built, those of the repository's files last."""
    found = (p.relative_to(site).as_posix() for p in site.rglob("*.html") if p.name != "404.html")
    return sorted(found, key=lambda p: (p.startswith("repository/"), p))


def watched(page: Any, address: str) -> list[str]:
    """What goes wrong on a page is written into the list."""
    wrong: list[str] = []
    page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(f"console: {said.text}"))
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on(
        "request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append(f"asks outside: {r.url}")
    )
    page.on("response", lambda r: r.status < 400 or wrong.append(f"{r.status}: {r.url}"))
    return wrong


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_shows_without_a_word_of_complaint_and_asks_nothing_outside(
    address: str, site: Path, browser: Any, view: str
) -> None:
    scheme, width = VIEWS[view]
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    wrong = watched(page, address)
    for name in pages(site):
        if view != "light" and name.startswith("repository/"):  # listings of files: once is enough
            continue
        page.goto(address + name, wait_until="load")
        assert wrong == [], f"{name} ({view})"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways ({view})"
        if not name.endswith("/report.html"):  # a comparison's page, which is linked as it is, has looks of its own
            shown = page.evaluate("document.body.dataset.mdColorScheme")
            assert shown == {"light": "default", "dark": "slate"}[scheme], f"{name} ({view})"
    page.close()


def test_formulas_diagrams_and_figures_are_drawn(address: str, site: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    seen = {"formulas": 0, "figures": 0, "diagrams": 0}
    for name in (p for p in pages(site) if not p.startswith("repository/")):
        page.goto(address + name, wait_until="load")
        page.wait_for_function(
            "document.querySelectorAll('.drawn').length === document.querySelectorAll('.drawn svg').length"
        )
        formulas = page.locator(".arithmatex").count()
        assert page.locator(".arithmatex .katex").count() == formulas, name
        assert page.locator(".katex-error").count() == 0, name
        seen["formulas"] += formulas
        sizes = page.evaluate("[...document.querySelectorAll('svg.fw')].map(s => [s.clientWidth, s.clientHeight])")
        assert all(min(size) > 40 for size in sizes), name
        seen["figures"] += len(sizes)
        assert page.locator("pre.diagram").count() == 0, name
        seen["diagrams"] += page.locator(".drawn svg").count()
    page.close()
    assert seen["formulas"] > 30
    assert seen["figures"] > 20
    assert seen["diagrams"] >= 1


def test_a_figure_follows_the_readers_choice_of_light_or_dark(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page.goto(address + "methods/lora.html", wait_until="load")
    fill = "getComputedStyle(document.querySelector('svg.fw rect.frozen')).fill"
    light = page.evaluate(fill)
    page.evaluate("document.body.setAttribute('data-md-color-scheme', 'slate')")
    assert page.evaluate(fill) != light
    page.close()


def test_the_map_leads_to_the_methods(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address + "methods/index.html", wait_until="load")
    page.locator("svg.fw a", has_text="LoRA").first.click()
    page.wait_for_url("**/methods/lora.html")
    assert page.locator("h1").inner_text().startswith("LoRA")
    page.close()


def test_the_search_finds_a_method(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    wrong = watched(page, address)
    page.goto(address + "index.html", wait_until="networkidle")
    page.keyboard.press("Control+k")
    page.keyboard.type("virtual tokens", delay=20)
    page.wait_for_timeout(1500)
    assert "Prompt Tuning" in page.evaluate(EVERY_WORD)
    assert wrong == []
    page.close()


def test_no_link_of_the_site_is_broken(site: Path) -> None:
    """Files and anchors, read from the built pages themselves."""
    texts = {p: (site / p).read_text(encoding="utf-8") for p in pages(site)}
    anchors = {p: set(re.findall(r'\bid="([^"]+)"', text)) for p, text in texts.items()}
    broken = []
    for name, text in texts.items():
        for target in re.findall(r'<(?:a|link|script|img)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            if re.match(r"[a-z]+:", target) or target in ("", "#"):
                continue
            file, _, anchor = target.partition("#")
            path = (site / name).parent.joinpath(file.split("?")[0]).resolve() if file else site / name
            inside = path.relative_to(site.resolve()).as_posix() if path.is_relative_to(site.resolve()) else ""
            if path.is_dir():
                inside = f"{inside}/index.html".removeprefix("./")
            missing = anchor and inside in anchors and anchor not in anchors[inside]
            if not path.exists() or (missing and not anchor.startswith("__")):
                broken.append(f"{name}: {target}")
    assert broken == []
