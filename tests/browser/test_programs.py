"""JupyterLab and the explorer, used as a person would."""

import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
MINUTE = 60_000  # milliseconds
# No cell waits, and the last has run; or one has failed, and the rest will not run.
FINISHED = """
() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
  const says = prompts.map(prompt => prompt.textContent.trim());
  if (document.querySelector('[data-mime-type="application/vnd.jupyter.error"]')) return true;
  return !says.includes('[*]:') && /^\\[\\d+\\]:$/.test(says.at(-1));
}
"""
# Cells above take their height when they are first drawn: it is in view once it stays there.
IN_VIEW = """
e => {
  e.scrollIntoView({block: 'center'});
  const {top, bottom} = e.getBoundingClientRect();
  const stays = e.dataset.top === String(top);
  e.dataset.top = top;
  return stays && top > 0 && bottom < innerHeight;
}
"""
REDRAWN = "before => document.querySelector('.widget-html img')?.src !== before"


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """The notebooks without their outputs, in a folder of their own."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder)
    for path in folder.glob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(nb, path)
    return folder


@pytest.fixture
def opened(serve, notebooks, browser):
    """Open a notebook in a JupyterLab of its own, which ends with the test, kernels included."""
    contexts = []

    def open_notebook(name: str):
        options = ["--no-browser", "--IdentityProvider.token=", "--allow-root"]
        lab = serve("jupyterlab", *options, cwd=notebooks, probe="/api")
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5 * MINUTE)
        page.goto(f"{lab}/lab/tree/{name}")
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        page.wait_for_selector("text=/Python 3.*Idle/i")
        return page

    yield open_notebook
    for context in contexts:
        context.close()


def run_all(page) -> float:
    """*Run All Cells* in the menu, and wait for the last cell; returns the seconds it took."""
    begin = time.perf_counter()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, timeout=30 * MINUTE)
    return time.perf_counter() - begin


def check_outputs(page, name: str) -> str:
    """No cell failed or warned, and every stored picture is there again; returns the text."""
    text = page.locator(".jp-NotebookPanel .jp-OutputArea").all_text_contents()
    assert "Traceback" not in "\n".join(text), [part for part in text if "Traceback" in part]
    assert not page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_text_contents()
    stored = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    drawn = page.locator(".jp-OutputArea img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert len(drawn) == len(pictures) > 0 and min(drawn) > 100
    return "\n".join(text)


def bring_into_view(page, element) -> None:
    """Scroll until it has been in view for a second."""
    page.wait_for_function(IN_VIEW, arg=element.element_handle(), polling=1000)


def cell_with(page, source: str):
    """The code cell that begins with a line."""
    return page.locator(".jp-CodeCell").filter(has_text=source).first


def test_the_quickstart_runs_in_jupyterlab(opened, shoot):
    page = opened("00_quickstart.ipynb")
    print(f"Run All {run_all(page):.0f} s")
    text = check_outputs(page, "00_quickstart.ipynb")
    assert re.search(r"\nghost +\d+\.\d +\d+\.\d +\d+% +\d+%", text)
    for name, source in (("table", "print(table"), ("picture", "def interval(loss)")):
        output = cell_with(page, source).locator(".jp-OutputArea-output").first
        bring_into_view(page, output)
        shoot(page, f"lab-00-{name}")


def test_a_theory_notebook_runs_and_its_exercise_is_solved_by_typing(opened, shoot):
    """The stored answer is typed into the starter cell; the check cell then passes."""
    name = "02_derivation.ipynb"
    solved = nbformat.read(ROOT / "notebooks" / "solutions" / name, as_version=4).cells
    (answer,) = (cell.source for cell in solved if cell.source.startswith("def error_of("))
    page = opened(name)
    print(f"Run All {run_all(page):.0f} s")
    text = check_outputs(page, name)
    assert "Still missing: error_of" in text and "both ways" not in text
    shoot(page, "lab-02")
    starter = cell_with(page, "error_of = None")
    starter.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(answer)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    right = re.compile("Right: .+ both ways")  # in an output: the check cell says it, too
    page.locator(".jp-OutputArea-output").filter(has_text=right).wait_for()
    shoot(page, "lab-exercise")
    check_outputs(page, name)


def test_the_explorer_answers_in_jupyterlab(opened, shoot):
    name = "explore.ipynb"
    page = opened(name)
    print(f"Run All {run_all(page):.0f} s")
    drawn = page.locator(".widget-html img")
    bring_into_view(page, drawn)
    before = drawn.get_attribute("src")
    page.locator(".widget-dropdown select").select_option("diagonal")
    page.wait_for_function(REDRAWN, arg=before)
    page.wait_for_selector("text=/without layers 12–18, diagonal/")
    shoot(page, "lab-explore")
    assert "Traceback" not in page.content()


def test_the_explorer_alone(serve, browser, shoot, notebooks):
    # the page itself runs the notebook, so the server is probed elsewhere
    address = serve("voila", "--no-browser", "explore.ipynb", cwd=notebooks, probe="/voila/static/")
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.set_default_timeout(10 * MINUTE)
    page.goto(address)
    drawn = page.locator(".widget-html img")
    drawn.wait_for()
    seconds = {}
    for family in ("diagonal", "orthogonal", "symmetric", "ghost"):
        before = drawn.get_attribute("src")
        begin = time.perf_counter()
        page.locator(".widget-dropdown select").select_option(family)
        page.wait_for_function(REDRAWN, arg=before)
        seconds[family] = time.perf_counter() - begin
    bring_into_view(page, drawn)
    shoot(page, "explore")
    begin = time.perf_counter()
    page.get_by_role("button", name="continue it").click()
    page.wait_for_selector("text=/Photosynthesis is the process by which .+/")
    seconds["sentence"] = time.perf_counter() - begin
    print({name: round(taken, 2) for name, taken in seconds.items()})
    assert "Traceback" not in page.content()
    page.close()
