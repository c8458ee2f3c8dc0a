"""Sphinx configuration. `make site` builds the site from a copy of the pages in build/site-source.

The copy has the repository's layout, so that relative links lead to the same files on the site as
in a clone. It has in addition the landing page (the README with a table of contents), the API by
subpackage, and the tables of results. Notebooks keep their stored outputs.
"""

import html
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import nbformat
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "site-source"
sys.path.insert(0, str(ROOT / "tools"))

import fill  # noqa: E402
import ghostlib as gl  # noqa: E402
import notebooks  # noqa: E402
from ghostlib import plotting  # noqa: E402
from ghostlib.common import Registry  # noqa: E402
from ghostlib.experiments.tables import scores  # noqa: E402
from ghostlib.tutorial import claims  # noqa: E402
from ghostlib.tutorial.stored import stored  # noqa: E402

project = "Ghosted Layers, taught and verified"
author = copyright = "the ghostlib contributors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
]
html_theme = "pydata_sphinx_theme"
html_title = "Ghosted Layers"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_theme_options = {
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
}
html_context = {"default_mode": "auto"}
html_show_sourcelink = False

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_google_docstring = True
python_display_short_literal_types = True

# ------------------------------------------------------------------------------------ the pages

ROOMS = {
    "text": "Text: corpora and token windows",
    "models": "Models: layers, boundaries, hooks",
    "statistics": "Statistics: moments of activations",
    "linalg": "Linear algebra",
    "operators": "Operators: closed forms",
    "selection": "Selection of layers",
    "surgery": "Surgery: remove, install, save",
    "recovery": "Recovery in one call",
    "evaluation": "Evaluation and cost",
    "experiments": "Experiments",
    "tutorial": "Tutorial: helpers of the notebooks",
}
ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>\s*', re.MULTILINE)  # as GitHub and Jupyter read it
LINK = re.compile(r"\]\(([\w./-]+)\.(?:md|ipynb)(#[\w-]+)?\)")
NEIGHBOUR = re.compile(r"\]\((?=\d\d_\w+\.ipynb)")  # a link to another notebook
COURSE = """\
The pages show the notebooks with their stored outputs. To run and change them, open them in
JupyterLab (`make lab`). **Learn** derives the method, **Use** applies it to your own models,
**Beyond** shows where it fails and what works better.
"""
# Hand-written pages, in order; other pages in docs/ follow under Reference.
PRACTICE = ["docs/recipes/index", "docs/models", "docs/teachers", "docs/maintainers"]
REFERENCE = [
    "docs/claims",
    "docs/results",
    "docs/notation",
    "docs/glossary",
    "docs/equations",
    "docs/api/index",
    "CONTRIBUTING",
    "CHANGELOG",
]


def toctree(pages: list[str], caption: str = "", *, hidden: bool = False) -> str:
    """A part of the table of contents; pages are paths from the root."""
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden
    return "\n".join(["```{toctree}", ":maxdepth: 1", *options, "", *pages, "```", ""])


def contents(course: dict[str, dict[Path, str]]) -> dict[str, str]:
    """{page: text} of the landing page (the README) and the three pages of its navigation."""
    parts = [
        toctree([f"{title} <{path.stem}>" for path, title in titles.items()], part)
        for part, titles in course.items()
    ]
    solved = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
    if solved:
        parts.append(toctree([f"solutions/{path.stem}" for path in solved], "Solutions"))
    rest = [f"docs/{path.stem}" for path in sorted((ROOT / "docs").glob("*.md"))]
    rest = [page for page in rest if page not in PRACTICE + REFERENCE]
    reference = [f"/{page}" for page in REFERENCE + rest if exists(page)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = ["notebooks/index", "docs/practice", "docs/reference"]
    course_text = "\n".join(["# The course", "", COURSE, *parts])
    return {
        "index.md": f"{readme}\n{toctree(pages, hidden=True)}",
        "notebooks/index.md": course_text,
        "docs/practice.md": "# In practice\n\n" + toctree([f"/{page}" for page in PRACTICE]),
        "docs/reference.md": "# Reference\n\n" + toctree(reference),
    }


def exists(page: str) -> bool:
    """Whether a page is hand-written or generated here."""
    return page in ("docs/results", "docs/api/index") or (ROOT / f"{page}.md").exists()


def goals(read: dict[Path, notebooks.Notebook]) -> str:
    """Table of the learning goals of each notebook."""
    lines = ["| notebook | what you'll learn |", "|---|---|"]
    for titles in fill.course(read).values():
        for path, title in titles.items():
            text = read[path].cells[0].source.replace("\u2019", "'")
            goal = text.partition("What you'll learn")[2].partition("\n\n")[0]
            goal = " ".join(goal.strip(" :*.").split()).replace("|", "\\|")
            goal = NEIGHBOUR.sub("](../notebooks/", goal)
            lines.append(f"| [{title}](../notebooks/{path.name}) | {goal} |")
    return "\n".join(lines)


def table(frame: pd.DataFrame, caption: str) -> str:
    """A table with sortable columns, as HTML."""
    text = frame.to_html(index=False, border=0, classes="sortable", na_rep="", float_format="%.4g")
    return text.replace("<thead>", f"<caption>{html.escape(caption)}</caption><thead>", 1)


def results() -> str:
    """The stored results of the embedded model, and the published numbers."""
    columns = ["layers", "n", "operator", "dataset", "value", "low", "high"]
    columns += ["bits_per_byte", "relative", "relative_low", "relative_high"]
    text = [
        "# Results\n",
        "Click the head of a column to sort by it. `value` is the perplexity, with its 95 % "
        "interval; `relative` is its ratio to that of the dense model on the same windows, with "
        "the interval of the paired difference.\n",
    ]
    titles = {
        "grid": "Criteria, repairs and depths",
        "starts": "Every block of seven layers",
        "beyond": "Features and weights, every block",
        "ablation": "Features and weights, three seeds",
    }
    for name, title in titles.items():
        frame = scores(stored(name))
        caption = f"SmolLM2-135M: {len(frame)} scores"
        text += [f"## {title}\n", table(frame[[*columns, "seed"]], caption), ""]
    published = gl.published()
    caption = f"{len(published)} numbers of the paper and of the works it compares with"
    text += ["## Published\n", table(published, caption), ""]
    return "\n".join(text)


def registries() -> Iterator[str]:
    """Names that options accept: operators, criteria, corpora."""
    families = [{"operator": f.name, "set searched": f.searches} for f in gl.OPERATORS.values()]
    yield "## Operators\n\n" + table(pd.DataFrame(families), f"{len(families)} families")
    yield "\n## Criteria\n\n" + ", ".join(f"`{name}`" for name in gl.CRITERIA)
    corpora = [{"corpus": name, "source": c.description} for name, c in gl.CORPORA.items()]
    yield "\n## Corpora\n\n" + table(pd.DataFrame(corpora), f"{len(corpora)} corpora by name")


def directive(module: str, name: str) -> str:
    """The Sphinx directive that documents one public name."""
    value = getattr(import_module(module), name)
    if not callable(value):
        text = f"Each {value.kind} by its name; :doc:`names` lists them."
        return f"```{{eval-rst}}\n.. py:data:: {module}.{name}\n\n   {text}\n```\n"
    kind, options = ("class", "   :members:\n") if isinstance(value, type) else ("function", "")
    return f"```{{eval-rst}}\n.. auto{kind}:: {module}.{name}\n{options}```\n"


def api() -> dict[str, str]:
    """{page: text} with every public name on the page of its subpackage."""
    origins = gl._origins()
    pages = {}
    for room, title in ROOMS.items():
        names = [n for n in gl.__all__ if origins[n].split(".")[1] == room]
        intro = (import_module(f"ghostlib.{room}").__doc__ or "").strip()
        parts = [directive("ghostlib", name) for name in names]
        if room == "tutorial":
            parts += [directive("ghostlib.tutorial.claims", "record")]
        pages[room] = f"# {title}\n\n```{{eval-rst}}\n{intro}\n```\n\n" + "\n".join(parts)
    names = [n for n, v in vars(plotting).items() if callable(v) or isinstance(v, Registry)]
    figures = "\n".join(directive("ghostlib.plotting", name) for name in sorted(names))
    pages["plotting"] = f"# Figures\n\n{figures}"
    pages["names"] = "# Names of operators, criteria and corpora\n\n" + "\n".join(registries())
    intro = "# The API\n\n`import ghostlib as gl`; names are `gl.NAME` unless spelt out.\n\n"
    return pages | {"index": intro + toctree(list(pages))}


def prepared(path: Path) -> str:
    """A notebook with the alternative texts of figures where MyST-NB reads them."""
    nb = nbformat.read(path, as_version=4)
    for cell in notebooks.code_cells(nb, "setup"):
        cell.metadata["tags"].append("remove-cell")
    for cell in nb.cells:
        texts = []
        for output in cell.get("outputs", []):
            texts += [output.get("metadata", {}).get("image/png", {}).get("alt", "")]
            data = output.get("data", {})
            data.pop(claims.MIME, None)  # for `make fill`
            if "text/markdown" in data:  # Sphinx resolves links in pages, not in outputs
                data["text/markdown"] = LINK.sub(r"](\1.html\2)", data["text/markdown"])
        if any(texts):
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(filter(None, texts))}}
    return nbformat.writes(nb)


def stage() -> None:
    """Write all pages into the folder that Sphinx reads; unchanged files keep their date."""
    read = {path: notebooks.read(path) for path in notebooks.suite(ROOT)}
    pages = contents(fill.course(read)) | {"docs/results.md": results()}
    pages |= {f"docs/api/{name}.md": text for name, text in api().items()}
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("C*.md")]:
        text = path.read_text(encoding="utf-8")
        text = fill.replace_regions(text, {"goals": goals(read)})
        pages[str(path.relative_to(ROOT))] = ANCHOR.sub(r'(\1)=\n<a id="\1"></a>\n\n', text)
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            pages[str(path.relative_to(ROOT))] = prepared(path)
    copied = [*(ROOT / "docs").glob("*.png"), ROOT / "LICENSE", ROOT / "CITATION.cff"]
    current = {SOURCE / name for name in pages} | {SOURCE / p.relative_to(ROOT) for p in copied}
    for stale in [path for path in SOURCE.rglob("*") if path.is_file() and path not in current]:
        stale.unlink()
    for name, text in pages.items():
        path = SOURCE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in copied:
        shutil.copy2(path, SOURCE / path.relative_to(ROOT))


stage()
