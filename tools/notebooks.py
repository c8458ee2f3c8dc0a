"""Execute the notebooks in fresh kernels.

    tools/notebooks.py execute [NOTEBOOK ...]   store clean outputs; one that fails stays unchanged
    tools/notebooks.py run [NOTEBOOK ...]       into build/, with an HTML page each; print the table

Tags on code cells: ``setup`` (written by fill.py; with ``eval`` also for lm-eval), ``parameters``
(set by papermill), ``results-table`` (its text is what `run` prints), ``effect-figure`` (its
picture becomes docs/effect.png).
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_METADATA = {"tags", "numbers", "jupyter", "editable", "deletable", "slideshow"}  # kept
WIDGET = "application/vnd.jupyter.widget-view+json"
# progress bars would be stored as widgets
QUIET = {"GHOSTLIB_PROGRESS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

Notebook = Any  # nbformat.NotebookNode, which has no type stubs


def suite(root: Path, folder: str = "notebooks") -> list[Path]:
    """All notebooks in reading order; those of ``notebooks/solutions`` are the solved exercises."""
    return sorted((root / folder).glob("*.ipynb"))


def read(path: Path) -> Notebook:
    """The notebook at ``path``, in the current format."""
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except Exception as error:
        raise SystemExit(f"{path}: not a notebook ({error})") from error
    return nb


def dump(nb: Notebook) -> bytes:
    """The notebook as the content of its file."""
    return f"{nbformat.writes(nb)}\n".encode()


def code_cells(nb: Notebook, tag: str | None = None) -> list[Notebook]:
    """The code cells, or those with ``tag``."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    return [cell for cell in code if tag is None or tag in cell.metadata.get("tags", [])]


def texts(cell: Notebook) -> Iterator[tuple[str, str]]:
    """(kind, text) of the source and of every textual output of a cell."""
    yield "source", cell.source
    for output in cell.get("outputs", []):
        parts = output if output.output_type == "stream" else output.get("data", {})
        yield from ((kind, text) for kind, text in parts.items() if kind.startswith("text"))


def clean(nb: Notebook) -> list[str]:
    """Make an executed notebook fit to be stored, in place; return what was removed."""
    language = {"name": "python"} | nb.metadata.get("language_info", {})
    language.pop("version", None)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": language})
    for cell in nb.cells:
        for key in set(cell.metadata) - CELL_METADATA:
            del cell.metadata[key]
    removed = []
    for count, cell in enumerate(code_cells(nb), 1):
        removed += [f"In [{count}]: {noise(output)}" for output in cell.outputs if noise(output)]
        cell.outputs = [output for output in cell.outputs if not noise(output)]
        CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, count)
        for numbered in (cell, *cell.outputs):
            if "execution_count" in numbered:
                numbered.execution_count = count
    return removed


def noise(output: Notebook) -> str:
    """Description of an output that is not to be stored; empty for the others."""
    if output.output_type == "stream" and output.name == "stderr":
        return "stderr: " + str(strip_ansi(output.text)).strip()[:100]
    return "a widget" if WIDGET in output.get("data", {}) else ""


def execute(path: Path) -> Notebook:
    """The notebook at ``path``, executed in a fresh kernel and cleaned."""
    nb = read(path)
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **QUIET}
    environment.pop("MPLBACKEND", None)  # figures belong in the notebook
    with tqdm(total=len(code_cells(nb)), desc=path.name, unit="cell") as bar:
        client = NotebookClient(
            nb,
            kernel_name="python3",
            extra_arguments=["--log-level=40"],  # ipykernel warns about TCP on every start
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_complete=lambda **_: bar.update(),
        )
        client.execute(env=environment)
    for note in clean(nb):
        print(f"  left out: {note}")
    return nb


def publish(nb: Notebook, name: str, build: Path) -> None:
    """Write an executed notebook into ``build``, also as a page, and print its table of results."""
    build.mkdir(exist_ok=True)
    (build / f"{name}.ipynb").write_bytes(dump(nb))
    page, _ = HTMLExporter().from_notebook_node(nb, {"metadata": {"name": name}})
    (build / f"{name}.html").write_text(page, encoding="utf-8")
    shown = [part for cell in code_cells(nb, "results-table") for part in texts(cell)]
    table = [text for kind, text in shown if kind in ("text", "text/plain")]
    if not table:
        raise SystemExit("no cell tagged results-table shows a text")
    print("", *table, f"To read: build/{name}.html", sep="\n")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Command line; the notebooks after one that fails are executed all the same."""
    parser = argparse.ArgumentParser(description="Execute notebooks in fresh kernels.")
    parser.add_argument("command", choices=["execute", "run"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    options = parser.parse_args(arguments)
    every = suite(root) + suite(root, "notebooks/solutions")
    failed = []
    for path in [path.resolve() for path in options.notebooks] or every:
        try:
            nb = execute(path)
            if options.command == "run":
                publish(nb, path.stem, root / "build")
            else:
                path.write_bytes(dump(nb))
        except (CellExecutionError, DeadKernelError, SystemExit) as error:
            print(f"{path.name}: {strip_ansi(str(error)).strip()}", file=sys.stderr)
            failed.append(path.name)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
