"""Execute the notebooks, store clean outputs, check the house rules, fill in the generated parts.

    tools/notebooks.py execute [NOTEBOOK ...]   execute in fresh kernels, store clean outputs
    tools/notebooks.py run NOTEBOOK             execute into build/, write HTML, print the results
    tools/notebooks.py check [NOTEBOOK ...]     say what breaks the house rules
    tools/notebooks.py fill                     write badges, setup cells, README table and figure

Tags on code cells: ``setup`` (filled by this tool: installs the package where it is missing, with
the tag ``eval`` beside it lm-eval as well), ``parameters`` (what papermill may set),
``results-table`` (its text is what `run` prints), ``effect-figure`` (its picture becomes
docs/effect.png for the README). The repository's address stands once, in pyproject.toml.
"""

import argparse
import base64
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
MAX_LINES = 25  # of a code cell
PROMISES = ("What you'll do", "What you'll learn", "What you'll need")
ENDING = ["What we saw", "Exercises", "Further reading"]
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
CELL_METADATA = {"tags", "jupyter", "editable", "deletable", "slideshow"}  # the rest is stripped
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ABSOLUTE = re.compile(
    r"(?<![\w.~:/\\-])/(?:home|tmp|work|root|Users|private|var/folders)\b(?:/[\w.-]+)*"
)
DRIVE = re.compile(r"\b[A-Z]:\\\w[\w\\.-]*")
STAMP = re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
REGION = re.compile(
    r"((?:<!--|#) begin:(?P<name>[\w-]+)[^\n]*\n)(?P<body>.*?)(?P<end>(?:<!--|#) end:(?P=name)\b)",
    re.DOTALL,
)

Notebook = Any  # nbformat.NotebookNode, which has no type stubs


class NotebookError(Exception):
    """A notebook could not be read or executed; the message names it and the cell."""


# ---------------------------------------------------------------- reading and writing


def notebooks(root: Path) -> list[Path]:
    """All notebooks of the suite, in reading order."""
    return sorted(path for path in (root / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Notebook:
    """The notebook at ``path``, in the current format."""
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise NotebookError(f"{path}: no such notebook") from None
    except Exception as error:
        raise NotebookError(f"{path}: not a notebook ({error})") from error


def write(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(partial, path)


def dump(nb: Notebook) -> str:
    """The notebook as the text of its file."""
    return str(nbformat.writes(nb)).rstrip("\n") + "\n"


def tagged(nb: Notebook, tag: str) -> list[Notebook]:
    """The code cells that carry ``tag``."""
    return [c for c in nb.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]


def headings(nb: Notebook) -> Iterator[tuple[int, int, str]]:
    """(cell index, level, text) of every markdown heading; code fences are skipped."""
    for index, cell in enumerate(nb.cells):
        fenced = False
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            fenced ^= line.lstrip().startswith("```")
            if not fenced and (found := re.match(r"(#{1,6})\s+(.*?)\s*#*$", line)):
                yield index, len(found[1]), found[2]


def output_texts(cell: Notebook) -> Iterator[tuple[str, str]]:
    """(kind, text) of every textual output of a cell."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.name, output.text
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield kind, data


# ---------------------------------------------------------------- execution


def clean(nb: Notebook, root: Path) -> list[str]:
    """Make a fresh execution fit to be stored, in place; return what was taken out."""
    dropped: list[str] = []
    nb.metadata.clear()
    nb.metadata.update(kernelspec=dict(KERNEL), language_info=dict(LANGUAGE))
    nb.nbformat, nb.nbformat_minor = 4, 5
    count = 0
    for index, cell in enumerate(nb.cells):
        for key in set(cell.metadata) - CELL_METADATA:
            del cell.metadata[key]
        if "id" not in cell:
            cell["id"] = f"cell-{index}"
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        kept: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                first = ANSI.sub("", output.text).strip().splitlines()
                if first:
                    dropped.append(f"cell {index + 1}, stderr: {first[0][:120]}")
                continue
            if WIDGET in output.get("data", {}):
                dropped.append(f"cell {index + 1}: a widget")
                continue
            if output.output_type == "stream":
                output.text = tidy(output.text, root)
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = tidy(data, root)
            if output.output_type == "execute_result":
                output.execution_count = count
            kept.append(output)
        cell.outputs = kept
    return dropped


def tidy(text: str, root: Path) -> str:
    """Only the last state of a line that was overwritten, and no path above the repository."""
    lines = [re.sub(r"[^\n]*\r(?!\n|$)", "", line) for line in text.split("\n")]
    text = "\n".join(line.rstrip("\r") for line in lines)
    return (
        text.replace(f"{root}{os.sep}", "").replace(str(root), ".").replace(str(Path.home()), "~")
    )


def label(nb: Notebook, index: int) -> str:
    """What a cell is about: the nearest heading above it."""
    above = [text for at, _, text in headings(nb) if at <= index]
    return "Setup" if "setup" in nb.cells[index].metadata.get("tags", []) else (above or ["…"])[-1]


def execute(path: Path, root: Path, timeout: int | None = None) -> Notebook:
    """Execute a notebook in a fresh kernel, one line of progress per cell, and clean it."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    nb = read(path)
    total = sum(c.cell_type == "code" and bool(c.source.strip()) for c in nb.cells)
    done, current, begin = 0, 0, time.monotonic()

    def started(cell: Notebook, cell_index: int) -> None:
        nonlocal done, current, begin
        done, current, begin = done + 1, cell_index, time.monotonic()
        title = label(nb, cell_index)[:60]
        print(f"[{done:>{len(str(total))}}/{total}] {title} … ", end="", flush=True)

    def finished(cell: Notebook, cell_index: int, execute_reply: Any) -> None:
        word = "" if execute_reply["content"]["status"] == "ok" else "  failed"
        print(f"{time.monotonic() - begin:.1f} s{word}", flush=True)

    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ} | {
        "GHOSTLIB_PROGRESS": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }
    environment.pop("MPLBACKEND", None)  # figures belong in the notebook
    client = NotebookClient(
        nb,
        kernel_name="python3",
        extra_arguments=["--log-level=40"],  # ipykernel warns about TCP on every start
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=started,
        on_cell_executed=finished,
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        reason = ANSI.sub("", error.traceback).strip()
    except CellTimeoutError:
        reason = f"took longer than {timeout} s"
    except DeadKernelError:
        reason = "the kernel died (out of memory?)"
    else:
        for note in clean(nb, root):
            print(f"  left out: {note}")
        return nb
    raise NotebookError(f"{path.name}, cell {current + 1} ({label(nb, current)}): {reason}")


def execute_all(paths: list[Path], root: Path, timeout: int | None) -> int:
    """Execute notebooks in place; one that fails stays as it was. Returns the exit status."""
    failures = []
    for path in paths:
        begin = time.monotonic()
        print(f"== {path.name}", flush=True)
        try:
            nb = execute(path, root, timeout)
        except NotebookError as error:
            print(f"FAILED {error}", file=sys.stderr)
            failures.append(path.name)
            continue
        write(path, dump(nb))
        print(f"   stored after {time.monotonic() - begin:.0f} s")
    if failures:
        print(f"FAILED: {', '.join(failures)}", file=sys.stderr)
        return 1
    fill(root)  # the README's figure and table come from stored outputs
    return report(check(root, paths))


def run(path: Path, root: Path, timeout: int | None) -> int:
    """Execute a notebook into build/, write it as a page, print its table of results."""
    from nbconvert import HTMLExporter

    begin = time.monotonic()
    nb = execute(path, root, timeout)
    build = root / "build"
    write(build / path.name, dump(nb))
    page, _ = HTMLExporter().from_notebook_node(nb, {"metadata": {"name": title(nb)}})
    write(build / f"{path.stem}.html", page)
    texts = [
        text
        for cell in tagged(nb, "results-table")
        for kind, text in output_texts(cell)
        if kind in ("stdout", "text/plain") and not text.startswith("<")
    ]
    if not texts:
        raise NotebookError(f"{path.name}: no cell tagged results-table shows a text")
    print("\n" + "\n".join(text.rstrip("\n") for text in texts))
    print(f"\nDone in {time.monotonic() - begin:.0f} s. To read: build/{path.stem}.html")
    return 0


# ---------------------------------------------------------------- generated parts


def address(root: Path) -> str:
    """Owner and name of the public repository, from the one place that knows it."""
    with (root / "pyproject.toml").open("rb") as file:
        url = tomllib.load(file)["project"]["urls"]["Repository"]
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    if not found:
        raise NotebookError(f"pyproject.toml: Repository is not https://github.com/…/…: {url}")
    return found[1]


def setup_source(repository: str, evaluates: bool = False) -> str:
    """The cell that makes the package available: silent and instant where it is installed."""
    if evaluates:  # with zero-shot tasks
        return (
            "import importlib.util\n"
            "\n"
            'needed = map(importlib.util.find_spec, ("ghostlib", "lm_eval"))\n'
            "if None in needed:  # on Colab, or in a bare kernel\n"
            f'    %pip install --quiet "ghostlib[eval] @ git+https://github.com/{repository}"'
        )
    return (
        "import importlib.util\n"
        "\n"
        'if importlib.util.find_spec("ghostlib") is None:  # on Colab, or in a bare kernel\n'
        f"    %pip install --quiet git+https://github.com/{repository}"
    )


def badges(repository: str, name: str) -> str:
    """Links that open one notebook on Colab, on Binder and in nbviewer."""
    where = f"{repository}/blob/{BRANCH}/notebooks/{name}"
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{where}) "
        "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
        f"(https://mybinder.org/v2/gh/{repository}/{BRANCH}?labpath=notebooks%2F{name}) "
        "[![View in nbviewer](https://img.shields.io/badge/view_in-nbviewer-orange)]"
        f"(https://nbviewer.org/github/{where})"
    )


def title(nb: Notebook) -> str:
    """The first heading of a notebook."""
    return next((text for _, _, text in headings(nb)), "Untitled")


def summary(nb: Notebook) -> str:
    """The first sentence under "What you'll do"."""
    text = plain(nb.cells[0].source) if nb.cells else ""
    _, _, rest = text.partition(PROMISES[0])
    rest = re.sub(r"^[\s:*.#–-]+", "", rest)
    return (
        re.split(r"(?<=[.!?])\s|\n\s*\n|\n\s*[-*#]", rest, maxsplit=1)[0].replace("\n", " ").strip()
    )


def plain(text: str) -> str:
    """``text`` with straight apostrophes."""
    return text.replace("\u2019", "'")


def table(root: Path, repository: str) -> str:
    """The README's table of notebooks."""
    rows = ["| notebook | what you'll do | open |", "|---|---|---|"]
    for path in notebooks(root):
        nb = read(path)
        name = f"[{path.stem[:2]} · {title(nb)}](notebooks/{path.name})"
        rows.append(f"| {name} | {summary(nb)} | {badges(repository, path.name)} |")
    return "\n".join(rows)


def claims(root: Path) -> list[tuple[Path, int, dict[str, Any]]]:
    """(notebook, execution count, facts) of every claim that stored outputs record."""
    from ghostlib.tutorial.claims import MIME

    return [
        (path, cell.execution_count, dict(output.data[MIME]))
        for path in notebooks(root)
        for cell in read(path).cells
        for output in cell.get("outputs", [])
        if MIME in output.get("data", {})
    ]


def ledger(root: Path) -> str:
    """The README's table of claims: every row of `CLAIMS`, with what the notebooks measured."""
    from ghostlib.tutorial.claims import CLAIMS

    measured = claims(root)
    rows = ["| # | claim | from | measured here | verdict | where |", "|---|---|---|---|---|---|"]
    for number, claim in CLAIMS.items():
        found = [(p, count, facts) for p, count, facts in measured if facts["claim"] == number]
        for path, count, facts in found:
            where = f"[{path.stem[:2]}](notebooks/{path.name}), cell {count}"
            row = (number, claim.text, claim.source, facts["figure"], facts["verdict"], where)
            rows.append("| " + " | ".join(str(part).replace("|", "\\|") for part in row) + " |")
        if not found:
            rows.append(
                f"| {number} | {claim.text} | {claim.source} | – | not measured here yet | |"
            )
    return "\n".join(rows)


def figure(root: Path) -> bytes | None:
    """The picture of the first cell tagged effect-figure, if a notebook has one."""
    for path in notebooks(root):
        for cell in tagged(read(path), "effect-figure"):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    return None


def replace_regions(text: str, bodies: dict[str, str]) -> str:
    """``text`` with the body of every known ``begin:NAME … end:NAME`` region replaced."""

    def body(found: re.Match[str]) -> str:
        new = bodies.get(found["name"])
        return found[0] if new is None else found[1] + new + "\n" + found["end"]

    return REGION.sub(body, text)


def generated(root: Path) -> dict[Path, str | bytes]:
    """Every file with generated parts, and what it should contain."""
    repository = address(root)
    url = f"https://github.com/{repository}"
    contents: dict[Path, str | bytes] = {}
    for path in notebooks(root):
        nb = read(path)
        before = dump(nb)
        for cell in tagged(nb, "setup"):
            cell.source = setup_source(repository, "eval" in cell.metadata["tags"])
        first = nb.cells[0] if nb.cells else None
        if first is not None and first.cell_type == "markdown":
            if "begin:badges" not in first.source:
                head, _, rest = first.source.partition("\n")
                first.source = f"{head}\n\n<!-- begin:badges -->\n<!-- end:badges -->\n{rest}"
            first.source = replace_regions(first.source, {"badges": badges(repository, path.name)})
        if dump(nb) != before:
            contents[path] = dump(nb)
    picture = figure(root)
    if picture is not None:
        contents[root / "docs" / "effect.png"] = picture
    shown = "![Perplexity of the dense, pruned and recovered model](docs/effect.png)"
    bodies = {
        "badges": (
            f"[![tests]({url}/actions/workflows/test.yml/badge.svg)]"
            f"({url}/actions/workflows/test.yml) "
            "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
            f"(https://mybinder.org/v2/gh/{repository}/{BRANCH}?labpath=notebooks)"
        ),
        "claims": ledger(root),
        "clone": f"```bash\ngit clone {url} && cd {repository.split('/')[1]}\nmake run\n```",
        "figure": shown if picture is not None else "",
        "install": f"```bash\npip install git+{url}\n```",
        "notebooks": table(root, repository),
        "repository": f'repository-code: "{url}"',
    }
    for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff"):
        path = root / name
        if path.exists():
            contents[path] = replace_regions(path.read_text(encoding="utf-8"), bodies)
    return contents


def stale(root: Path) -> dict[Path, str | bytes]:
    """The generated contents that differ from what is stored."""

    def now(path: Path) -> bytes:
        return path.read_bytes() if path.exists() else b""

    return {
        path: content
        for path, content in generated(root).items()
        if now(path) != (content if isinstance(content, bytes) else content.encode())
    }


def fill(root: Path) -> int:
    """Write the generated parts; returns the exit status."""
    for path, content in stale(root).items():
        write(path, content)
        print(f"filled {path.relative_to(root)}")
    return 0


# ---------------------------------------------------------------- house rules


def problems(nb: Notebook, root: Path) -> Iterator[str]:
    """Everything in a notebook that breaks the house rules."""
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        yield f"invalid notebook: {error.message}"
        return
    yield from opening_problems(nb)
    yield from ending_problems(nb)
    code = [(i, c) for i, c in enumerate(nb.cells, 1) if c.cell_type == "code"]
    counts = [cell.execution_count for _, cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"execution counts are not 1 … {len(code)}: run `make notebooks`"
    elif not any(cell.outputs for _, cell in code):
        yield "no stored outputs: run `make notebooks`"
    if not any(re.search(r"^\s*assert\b|\bassert_\w+\(", c.source, re.MULTILINE) for _, c in code):
        yield "no assert: a claim is prose, then a number, then an assert"
    for index, cell in code:
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            yield f"cell {index} has {lines} lines (at most {MAX_LINES})"
        if not cell.source.strip():
            yield f"cell {index} is empty"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"cell {index} stores an error"
    for index, cell in enumerate(nb.cells, 1):
        yield from text_problems(index, cell, root)
    tidied = nbformat.from_dict(nb)
    if clean(tidied, root) or tidied != nb:
        yield "outputs or metadata are not clean: run `make notebooks`"


def opening_problems(nb: Notebook) -> Iterator[str]:
    """The first cell says what, for what and with what; then comes the setup cell."""
    first = nb.cells[0] if nb.cells else nbformat.v4.new_markdown_cell("")
    text = plain(first.source)
    if first.cell_type != "markdown" or not text.startswith("# "):
        yield "the first cell does not begin with a title"
    for promise in PROMISES:
        if promise not in text:
            yield f"the first cell lacks “{promise}”"
    if not re.search(r"\bminutes?\b", text) or not re.search(r"\b[MG]i?B\b", text):
        yield "the first cell does not say how many minutes and how much memory it takes"
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    setup = tagged(nb, "setup")
    if len(setup) != 1 or setup[0] is not code[0]:
        yield "the first code cell, and no other, must have the tag setup"


def ending_problems(nb: Notebook) -> Iterator[str]:
    """The last sections are what we saw, exercises with folded solutions, further reading."""
    last = [(index, text) for index, level, text in headings(nb) if level <= 2][-len(ENDING) :]
    if [text for _, text in last] != ENDING:
        yield f"the last sections are not {', '.join(ENDING)} (as ## headings)"
        return
    exercises = nb.cells[last[1][0] : last[2][0] + 1]
    if not any(
        "<details" in cell.source or cell.metadata.get("jupyter", {}).get("source_hidden")
        for cell in exercises
    ):
        yield "the exercises have no folded solution (<details>)"


def text_problems(index: int, cell: Notebook, root: Path) -> Iterator[str]:
    """Absolute paths, noise and dead links in one cell."""
    code = cell.cell_type == "code"
    texts = [("source", cell.source), *output_texts(cell)]
    for kind, text in texts:
        drive = DRIVE.search(text) if code else None  # in prose it may be LaTeX
        if found := ABSOLUTE.search(text) or drive:
            yield f"cell {index}, {kind}: absolute path {found[0]}"
        if kind == "stderr":
            yield f"cell {index} stores stderr: {text.strip()[:80]}"
        if kind != "source" and (found := STAMP.search(text) or ADDRESS.search(text)):
            yield f"cell {index}, {kind}: {found[0]} changes with every run"
    if not code:
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", cell.source):
            if not (root / "notebooks" / target).exists():
                yield f"cell {index}: dead link {target}"


def check(root: Path, paths: list[Path] | None = None) -> list[str]:
    """Every broken rule, with the file it is in."""
    paths = notebooks(root) if paths is None else paths
    found = [f"{path.name}: {problem}" for path in paths for problem in problems(read(path), root)]
    found += [
        f"{path.relative_to(root)}: not as generated from pyproject.toml: run `make fill`"
        for path in stale(root)
    ]
    return found


def report(found: list[str]) -> int:
    """Print broken rules; returns the exit status."""
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(found)} broken rules" if found else "House rules kept")
    return int(bool(found))


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "execute": "execute in fresh kernels and store clean outputs",
        "run": "execute into build/, write HTML, print the results",
        "check": "say what breaks the house rules",
        "fill": "write the generated parts",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in ("execute", "check"):
            command.add_argument("notebooks", nargs="*", type=Path, help="default: all")
        if name == "run":
            command.add_argument("notebook", type=Path)
        if name in ("execute", "run"):
            command.add_argument("--timeout", type=int, help="seconds a cell may take")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return run(options.notebook.resolve(), root, options.timeout)
        if options.command == "fill":
            return fill(root)
        paths = [path.resolve() for path in options.notebooks] or notebooks(root)
        if options.command == "check":
            return report(check(root, paths))
        return execute_all(paths, root, options.timeout)
    except NotebookError as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing stored", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
