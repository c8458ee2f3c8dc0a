"""The site as `make site` built it, from its folder and without a network."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site"
DESK, TELEPHONE = {"width": 1300, "height": 900}, {"width": 400, "height": 800}
# Of every element that holds text: its colour, that of what it stands on, and what it says.
INKS = """
() => [...document.querySelectorAll('article *')].flatMap(e => {
  const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
  if (!text || !e.checkVisibility() || e.closest('mjx-container, .visually-hidden')) return [];
  let under = e;
  const paper = () => getComputedStyle(under).backgroundColor;
  while (/, 0\\)$|transparent/.test(paper()) && under.parentElement) under = under.parentElement;
  return [[getComputedStyle(e).color, paper(), text.slice(0, 40)]];
})
"""
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
if not PAGES:
    pytest.skip("no site: make site", allow_module_level=True)


class Page(HTMLParser):
    """Links, anchors and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.silent: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[name] or "" for name in ("id", "name") if name in found}
        for name in ("href", "src"):
            if found.get(name):
                self.links.append(found[name] or "")
        if tag == "img" and not found.get("alt"):
            self.silent.append(found.get("src") or "")


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {path: Page(path) for path in PAGES}


def test_every_internal_link_and_anchor_resolves_and_nothing_is_loaded_from_elsewhere(pages):
    dead, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link in ("#", ""):
                continue
            checked += 1
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            known = pages[target].anchors if target in pages else set()
            if not target.exists() or (
                target in pages and parts.fragment and unquote(parts.fragment) not in known
            ):
                dead.append(f"{path.relative_to(SITE)}: {link}")
    print(f"{len(pages)} pages, {checked} internal links")
    assert not dead and checked > 1000
    for path in PAGES:
        elsewhere = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="https?:[^"]+"', path.read_text()
        )
        assert not [tag for tag in elsewhere if "canonical" not in tag], path.name


def test_every_figure_has_an_alternative_text(pages):
    silent = {path.name: page.silent for path, page in pages.items() if page.silent}
    assert not silent


def test_every_page_opens_without_an_error_and_with_its_formulas(browser, shoot):
    context = browser.new_context(viewport=DESK, offline=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    formulas = 0
    for path in PAGES:
        page.goto(path.as_uri())
        if page.locator(".math").count():
            page.wait_for_selector("mjx-container", timeout=120_000)
            page.evaluate("MathJax.startup.promise")
        raw = page.evaluate(
            "[...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container'))"
            ".map(m => m.textContent.slice(0, 80))"
        )
        assert not raw, (path.name, raw)
        assert not page.locator("mjx-merror").count(), path.name
        formulas += page.locator("mjx-container").count()
        assert not errors, (path.name, errors)
        page.set_viewport_size(TELEPHONE)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{path.name} is {wide} pixels too wide at {TELEPHONE['width']}"
        page.set_viewport_size(DESK)
    print(f"{len(PAGES)} pages, {formulas} formulas")
    assert formulas > 100
    page.goto((SITE / "index.html").as_uri())
    shoot(page, "site-index")
    page.goto((SITE / "notebooks" / "02_derivation.html").as_uri())
    page.wait_for_selector("mjx-container")
    shoot(page, "site-derivation")
    context.close()


def test_search_finds_procrustes(browser, shoot):
    page = browser.new_page()
    page.goto((SITE / "search.html").as_uri() + "?q=Procrustes")
    page.wait_for_selector("#search-results li", timeout=120_000)
    found = page.locator("#search-results").inner_text()
    assert "Compare the closed form" in found
    shoot(page, "site-search")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_telephone(browser, shoot, scheme):
    context = browser.new_context(viewport=TELEPHONE, color_scheme=scheme)
    page = context.new_page()
    for name in ("index", "notebooks/04_closed_form_vs_constrained", "docs/results", "docs/claims"):
        page.goto((SITE / f"{name}.html").as_uri())
        shoot(page, f"site-400-{scheme}-{Path(name).name}")
        inks = page.evaluate(INKS)
        faint = {(ink, paper): text for ink, paper, text in inks if contrast(ink, paper) < 4.5}
        assert len(inks) > 50 and not faint, name
    context.close()


def contrast(*colours: str) -> float:
    """Contrast of two colours as CSS spells them, by the formula of WCAG."""
    lights = []
    for colour in colours:
        values = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_a_click_on_a_head_sorts_a_table_of_results(browser):
    page = browser.new_page()
    page.goto((SITE / "docs" / "results.html").as_uri())
    table = page.locator("table.sortable").first
    column = table.locator("thead th").all_inner_texts().index("value")
    read: Callable[[], list[float]] = lambda: [  # noqa: E731
        float(text)
        for text in table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
    ]
    before = read()
    head = table.locator("thead th").nth(column)
    head.click()
    assert read() == sorted(before)
    head.press("Enter")
    assert read() == sorted(before, reverse=True)
    page.close()
