"""Write the generated parts: setup cells, badges, tables, the claims ledger, the README's picture.

Their sources are the notebooks' stored outputs and the public address, ``Repository`` under
``[project.urls]`` in pyproject.toml; without an address nothing that needs one is written. In the
files of `FILLED` a generated part stands between ``begin:NAME`` and ``end:NAME``.
"""

import base64
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostlib.tutorial import claims
from notebooks import ROOT, Notebook, code_cells, dump, read, suite

QUICK = "00_quickstart.ipynb"  # opened by the README's badges
FILLED = ("README.md", "CONTRIBUTING.md", "CITATION.cff")
PARTS = {"00": "Learn", "08": "Use", "13": "Beyond", "ex": "Explore"}  # by their first number
WITHOUT_ADDRESS = "put ghostlib's wheel (make wheel) next to the notebook, or start from a clone"
WHEEL = f"""\
    wheels = glob.glob("ghostlib-*.whl")
    assert wheels, "{WITHOUT_ADDRESS}"
"""
CODE = "```bash\n{}\n```"


def address(root: Path) -> str | None:
    """Owner and name of the public repository; None if pyproject.toml has no address."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project.get("urls", {}).get("Repository")
    if url is None:
        return None
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    if not match:
        raise SystemExit(f"pyproject.toml: Repository is not https://github.com/…/…: {url!r}")
    return match[1]


def setup_source(repository: str | None, evaluates: bool = False) -> str:
    """Source of the cell that installs the package where it is missing."""
    extra, test = "", 'importlib.util.find_spec("ghostlib") is None'
    if evaluates:  # with zero-shot tasks
        extra, test = "[eval]", 'None in map(importlib.util.find_spec, ("ghostlib", "lm_eval"))'
    imports, package, wheel = "", f"ghostlib{extra} @ git+https://github.com/{repository}", ""
    if repository is None:
        imports, package, wheel = "import glob\n", f"{{wheels[0]}}{extra}", WHEEL
    head = f"{imports}import importlib.util\n\nif {test}:  # on Colab, or in a bare kernel\n"
    return f'{head}{wheel}    %pip install --quiet "{package}"'


def badges(repository: str | None, name: str) -> str:
    """Links that open a notebook on Colab and on Binder; instructions if there is no address."""
    if repository is None:
        return f"On Colab or another server: {WITHOUT_ADDRESS}."
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}) "
        "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
        f"(https://mybinder.org/v2/gh/{repository}/main?labpath=notebooks%2F{name})"
    )


def addressed(repository: str | None) -> dict[str, str]:
    """Bodies of the regions that contain the public address."""
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
        number, title = path.stem[:2], nb.cells[0].source.partition("\n")[0].lstrip("# ")
        part = PARTS[max(first for first in PARTS if first <= number)]
        parts.setdefault(part, {})[path] = f"{number} · " * number.isdecimal() + title
    return parts


def table(notebooks: dict[Path, Notebook]) -> str:
    """The README's list of notebooks, by part of the course."""
    lines = []
    for part, titles in course(notebooks).items():
        lines += [f"\n**{part}**\n"]
        lines += [f"- [{title}](notebooks/{path.name})" for path, title in titles.items()]
    return "\n".join(lines).lstrip()


def outputs(notebooks: dict[Path, Notebook], kind: str) -> Iterator[tuple[Path, Notebook, Any]]:
    """(notebook, cell, data) of every stored output of one MIME type."""
    for path, nb in notebooks.items():
        for cell in code_cells(nb):
            for output in cell.outputs:
                if kind in output.get("data", {}):
                    yield path, cell, output.data[kind]


def replace_regions(text: str, bodies: dict[str, str]) -> str:
    """``text`` with new bodies for the regions that ``bodies`` names."""
    for name, body in bodies.items():
        region = rf"((?:<!--|#) begin:{name}\b[^\n]*\n).*?(?=(?:<!--|#) end:{name}\b)"
        lines = body.replace("\\", r"\\") + "\n" * bool(body)
        text = re.sub(region, rf"\g<1>{lines}", text, flags=re.DOTALL)
    return text


def contents(root: Path) -> dict[Path, bytes]:
    """Every file with generated parts, and what it should contain."""
    repository = address(root)
    notebooks = {path: read(path) for path in suite(root)}
    measurements = [
        claims.Measurement(path.stem, cell.execution_count, facts)
        for path, cell, facts in outputs(notebooks, claims.MIME)
    ]
    files = {root / "docs" / "claims.md": claims.ledger(measurements).encode()}
    for _, cell, picture in outputs(notebooks, "image/png"):
        if "effect-figure" in cell.metadata.get("tags", []):
            files[root / "docs" / "effect.png"] = base64.b64decode(picture)
    bodies = {**addressed(repository), "notebooks": table(notebooks)}
    for path in filter(Path.exists, (root / name for name in FILLED)):
        files[path] = replace_regions(path.read_text(encoding="utf-8"), bodies).encode()
    solved = {path: read(path) for path in suite(root, "notebooks/solutions")}
    for path, nb in (notebooks | solved).items():
        for cell in code_cells(nb, "setup"):
            cell.source = setup_source(repository, "eval" in cell.metadata.tags)
        links = {"badges": badges(repository, path.name)}
        nb.cells[0].source = replace_regions(nb.cells[0].source, links)
        files[path] = dump(nb)
    return files


def stale(root: Path) -> dict[Path, bytes]:
    """The contents that differ from the files."""
    expected = contents(root).items()
    return {p: content for p, content in expected if not p.exists() or p.read_bytes() != content}


def fill(root: Path) -> None:
    """Write the files that are stale."""
    for path, content in stale(root).items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        print(f"filled {path.relative_to(root)}")


if __name__ == "__main__":
    fill(ROOT)
