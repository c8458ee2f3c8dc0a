"""JupyterLab and the explorer, used as a person would."""

import re
import shutil
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 60_000


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """The notebooks without their outputs, in a folder of their own."""
    import nbformat

    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder)
    for path in folder.glob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(nb, path)
    return folder


@pytest.fixture(scope="module")
def lab(serve, notebooks):
    """Address of JupyterLab on the notebooks."""
    options = ["--no-browser", "--IdentityProvider.token=", "--ServerApp.password=", "--allow-root"]
    return serve("jupyterlab", *options, cwd=notebooks, probe="/api")


@pytest.fixture
def opened(lab, browser):
    """Open a notebook in JupyterLab."""
    contexts = []

    def open_notebook(name: str):
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{lab}/lab/tree/{name}?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=MINUTES)
        page.wait_for_selector("text=/Python 3.*Idle/i", timeout=MINUTES)
        return page

    yield open_notebook
    for context in contexts:
        context.close()


def run_all(page, minutes: float) -> None:
    """*Run All Cells* in the menu, and wait until the kernel is idle and no cell waits."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_timeout(2000)
    page.wait_for_selector("text=/Python 3.*Idle/i", timeout=minutes * MINUTES)


def scroll_to_the_end(page) -> str:
    """Scroll through the notebook, so that every cell is drawn; returns all that it says."""
    seen = []
    panel = page.locator(".jp-WindowedPanel-outer").first
    panel.evaluate("e => e.scrollTo(0, 0)")
    for _ in range(200):
        seen.append(panel.inner_text())
        at, end = panel.evaluate("e => [e.scrollTop + e.clientHeight, e.scrollHeight]")
        if at >= end - 2:
            return "\n".join(seen)
        panel.evaluate("e => e.scrollBy(0, e.clientHeight * 0.8)")
        page.wait_for_timeout(150)
    raise AssertionError("the notebook has no end")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("00_quickstart.ipynb", r"pruned +\d+\.\d"), ("02_derivation.ipynb", "holds")],
)
def test_a_notebook_runs_in_jupyterlab(opened, shoot, name, shown):
    page = opened(name)
    begin = time.perf_counter()
    run_all(page, minutes=10)
    text = scroll_to_the_end(page)
    print(f"{name}: {time.perf_counter() - begin:.0f} s")
    shoot(page, f"lab-{name[:2]}")
    assert "Traceback" not in text and not page.locator('[data-mime-type*="stderr"]').count()
    assert re.search(shown, text)
    assert "[*]:" not in text and "[ ]:" not in text
    page.locator(".jp-WindowedPanel-outer").first.evaluate("e => e.scrollTo(0, e.scrollHeight / 2)")
    page.wait_for_selector(".jp-OutputArea img", timeout=MINUTES)
    shoot(page, f"lab-{name[:2]}-picture")


def test_the_explorer_answers_in_jupyterlab(opened, shoot):
    page = opened("explore.ipynb")
    run_all(page, minutes=5)
    page.locator(".jp-WindowedPanel-outer").first.evaluate("e => e.scrollTo(0, e.scrollHeight)")
    page.wait_for_selector(".widget-dropdown select", timeout=MINUTES)
    shoot(page, "lab-explore")
    assert "Traceback" not in scroll_to_the_end(page)


def test_the_explorer_alone(serve, browser, shoot, notebooks):
    address = serve(
        "voila", "--no-browser", "explore.ipynb", cwd=notebooks, probe="/static/voila.js"
    )
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.goto(address, timeout=5 * MINUTES)
    page.wait_for_selector(".widget-dropdown select", timeout=5 * MINUTES)
    drawn = page.locator(".widget-html img").first
    drawn.wait_for(timeout=MINUTES)
    seconds = {}
    for family in ("diagonal", "orthogonal", "symmetric", "ghost"):
        before = drawn.get_attribute("src")
        begin = time.perf_counter()
        page.locator(".widget-dropdown select").select_option(family)
        page.wait_for_function(
            "b => { const i = document.querySelector('.widget-html img');"
            "return i && i.src !== b; }",
            arg=before,
            timeout=MINUTES,
        )
        seconds[family] = time.perf_counter() - begin
    shoot(page, "explore")
    begin = time.perf_counter()
    page.get_by_role("button", name="continue it").click()
    page.wait_for_selector("text=/Photosynthesis is the process by which .+/", timeout=MINUTES)
    print(
        {k: round(v, 2) for k, v in seconds.items()},
        f"sentence {time.perf_counter() - begin:.1f} s",
    )
    assert "Traceback" not in page.content()
    page.close()


def test_an_exercise_is_solved_by_typing_into_its_starter_cell(opened, notebooks, shoot):
    """The cell's own solution is typed; the check cell then passes."""
    import nbformat

    solved = [path for path in sorted(notebooks.glob("solutions/*.ipynb"))]
    if not solved:
        pytest.skip("no solutions are stored yet")
    name = solved[0].name
    nb = nbformat.read(solved[0], as_version=4)
    answers = [c.source for c in nb.cells if "exercise" in c.metadata.get("tags", [])]
    page = opened(name)
    run_all(page, minutes=10)
    starters = page.locator(".jp-CodeCell").filter(has_text="exercise")
    starter = starters.first
    starter.scroll_into_view_if_needed()
    starter.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(answers[0])
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("text=/Python 3.*Idle/i", timeout=5 * MINUTES)
    shoot(page, "lab-exercise")
    assert "Traceback" not in scroll_to_the_end(page)
