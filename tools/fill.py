"""Write what is generated: setup cells, badges, tables, the ledger of claims, the README's picture.

It comes from the notebooks' stored outputs and from the public address. That stands in
pyproject.toml alone, as ``Repository`` under ``[project.urls]``; while it does not, nothing that
needs one is printed. In the files of `FILLED` it stands between ``begin:NAME`` and ``end:NAME``.
"""

import base64
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostlib.tutorial import claims
from notebooks import ROOT, Notebook, code_cells, dump, read, suite

QUICK = "00_quickstart.ipynb"  # what the README's badges open
FILLED = ("README.md", "CONTRIBUTING.md", "CITATION.cff")
PARTS = {"00": "Learn", "08": "Use", "13": "Beyond", "ex": "Explore"}  # from this number on
WITHOUT_ADDRESS = "put ghostlib's wheel (make wheel) beside the notebook, or start from a clone"
WHEEL = f"""\
    wheels = glob.glob("ghostlib-*.whl")
    assert wheels, "{WITHOUT_ADDRESS}"
"""
CODE = "```bash\n{}\n```"
REGION = re.compile(
    r"((?:<!--|#) begin:(?P<name>[\w-]+)[^\n]*\n).*?((?:<!--|#) end:(?P=name)\b)", re.DOTALL
)


def address(root: Path) -> str | None:
    """Owner and name of the public repository; None while pyproject.toml names none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project.get("urls", {}).get("Repository")
    if url is None:
        return None
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    if not found:
        raise SystemExit(f"pyproject.toml: Repository is not https://github.com/…/…: {url!r}")
    return found[1]


def setup_source(repository: str | None, evaluates: bool = False) -> str:
    """The cell that sees that the package is there: silent and instant where it is."""
    extra, test = "", 'importlib.util.find_spec("ghostlib") is None'
    if evaluates:  # with zero-shot tasks
        extra, test = "[eval]", 'None in map(importlib.util.find_spec, ("ghostlib", "lm_eval"))'
    imports, package, wheel = "", f"ghostlib{extra} @ git+https://github.com/{repository}", ""
    if repository is None:
        imports, package, wheel = "import glob\n", f"{{wheels[0]}}{extra}", WHEEL
    head = f"{imports}import importlib.util\n\nif {test}:  # on Colab, or in a bare kernel\n"
    return f'{head}{wheel}    %pip install --quiet "{package}"'


def badges(repository: str | None, name: str) -> str:
    """Links that open one notebook on Colab and on Binder, or what to do without an address."""
    if repository is None:
        return f"On Colab or another server: {WITHOUT_ADDRESS}."
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}) "
        "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
        f"(https://mybinder.org/v2/gh/{repository}/main?labpath=notebooks%2F{name})"
    )


def addressed(repository: str | None) -> dict[str, str]:
    """Bodies of the regions that need the public address."""
    commands = "make run\nmake lab"
    if repository is None:
        return {"badges": "", "start": CODE.format(commands), "repository": ""}
    url = f"https://github.com/{repository}"
    workflow = f"{url}/actions/workflows/test.yml"
    clone = CODE.format(f"git clone {url} && cd {repository.split('/')[1]}\n{commands}")
    pip = CODE.format(f"pip install git+{url}")
    return {
        "badges": f"[![tests]({workflow}/badge.svg)]({workflow}) {badges(repository, QUICK)}",
        "start": f"{clone}\n\nThe package without the notebooks:\n\n{pip}",
        "repository": f'repository-code: "{url}"',
    }


def course(notebooks: dict[Path, Notebook]) -> dict[str, dict[Path, str]]:
    """{part: {notebook: title}}, in reading order; the explorer, without a number, comes last."""
    parts: dict[str, dict[Path, str]] = {}
    for path, nb in notebooks.items():
        number = path.stem[:2]
        part = max(start for start in PARTS if start <= number)
        title = nb.cells[0].source.partition("\n")[0].lstrip("# ")
        label = f"{number} · {title}" if number.isdecimal() else title
        parts.setdefault(PARTS[part], {})[path] = label
    return parts


def table(notebooks: dict[Path, Notebook]) -> str:
    """The README's list of notebooks: a line each, under the parts of the course."""
    parts = []
    for part, titles in course(notebooks).items():
        links = [f"- [{title}](notebooks/{path.name})" for path, title in titles.items()]
        parts.append("\n".join([f"**{part}**\n", *links]))
    return "\n\n".join(parts)


def outputs(notebooks: dict[Path, Notebook], kind: str) -> Iterator[tuple[Path, Notebook, Any]]:
    """(notebook, cell, data) of every stored output of one kind, a MIME type."""
    for path, nb in notebooks.items():
        for cell in code_cells(nb):
            for output in cell.outputs:
                if kind in output.get("data", {}):
                    yield path, cell, output.data[kind]


def replace_regions(text: str, bodies: dict[str, str]) -> str:
    """``text`` with the body of every region that ``bodies`` names replaced."""

    def replaced(found: re.Match[str]) -> str:
        body = bodies.get(found["name"])
        return found[0] if body is None else found[1] + (body and f"{body}\n") + found[3]

    return REGION.sub(replaced, text)


def contents(root: Path) -> dict[Path, bytes]:
    """Every file with generated parts, and what it should contain."""
    repository = address(root)
    notebooks = {path: read(path) for path in suite(root)}
    measured = [
        claims.Measurement(path.stem, cell.execution_count, facts)
        for path, cell, facts in outputs(notebooks, claims.MIME)
    ]
    found = {root / "docs" / "claims.md": claims.ledger(measured).encode()}
    for _, cell, picture in outputs(notebooks, "image/png"):
        if "effect-figure" in cell.metadata.get("tags", []):
            found[root / "docs" / "effect.png"] = base64.b64decode(picture)
    bodies = {**addressed(repository), "notebooks": table(notebooks)}
    for path in filter(Path.exists, (root / name for name in FILLED)):
        found[path] = replace_regions(path.read_text(encoding="utf-8"), bodies).encode()
    solved = {path: read(path) for path in suite(root, "notebooks/solutions")}
    for path, nb in (notebooks | solved).items():
        for cell in code_cells(nb, "setup"):
            cell.source = setup_source(repository, "eval" in cell.metadata.tags)
        links = {"badges": badges(repository, path.name)}
        nb.cells[0].source = replace_regions(nb.cells[0].source, links)
        found[path] = dump(nb)
    return found


def stale(root: Path) -> dict[Path, bytes]:
    """The generated contents that differ from what is stored."""
    wanted = contents(root).items()
    return {p: content for p, content in wanted if not p.exists() or p.read_bytes() != content}


def fill(root: Path) -> None:
    """Write the generated parts that have changed."""
    for path, content in stale(root).items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        print(f"filled {path.relative_to(root)}")


if __name__ == "__main__":
    fill(ROOT)
