"""Execute the notebooks in fresh kernels.

    tools/notebooks.py execute [NOTEBOOK ...]   store clean outputs; what fails stays as it was
    tools/notebooks.py run [NOTEBOOK ...]       into build/, with a page each; print the results

Tags on code cells: ``setup`` (written by fill.py; with ``eval`` beside it, for lm-eval as well),
``parameters`` (what papermill may set), ``results-table`` (its text is what `run` prints),
``effect-figure`` (its picture becomes docs/effect.png).
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# the rest is stripped
CELL_METADATA = {"tags", "numbers", "jupyter", "editable", "deletable", "slideshow"}
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# progress bars would be stored as widgets
QUIET = {"GHOSTLIB_PROGRESS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

Notebook = Any  # nbformat.NotebookNode, which has no type stubs


def suite(root: Path, folder: str = "notebooks") -> list[Path]:
    """All notebooks, in reading order; of ``notebooks/solutions`` the solved exercises."""
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
    return (str(nbformat.writes(nb)).rstrip("\n") + "\n").encode()


def code_cells(nb: Notebook, tag: str | None = None) -> list[Notebook]:
    """The code cells, or those that carry ``tag``."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    return [cell for cell in code if tag is None or tag in cell.metadata.get("tags", [])]


def texts(cell: Notebook) -> Iterator[tuple[str, str]]:
    """(kind, text) of the source and of every textual output of a cell."""
    yield "source", cell.source
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.name, output.text
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield kind, data


def clean(nb: Notebook, root: Path) -> list[str]:
    """Make an executed notebook fit to be stored, in place; return what was taken out."""
    language = {"name": "python"} | nb.metadata.get("language_info", {})
    language.pop("version", None)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": language})
    for cell in nb.cells:
        for key in set(cell.metadata) - CELL_METADATA:
            del cell.metadata[key]
    dropped = []
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
        dropped += [f"In [{count}]: {noise(output)}" for output in cell.outputs if noise(output)]
        cell.outputs = [output for output in cell.outputs if not noise(output)]
        CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, count)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            parts = output if output.output_type == "stream" else output.get("data", {})
            for kind in parts:
                if kind.startswith("text"):  # of a stream; text/plain and its like
                    inside = parts[kind].replace(f"{root}{os.sep}", "").replace(str(root), ".")
                    parts[kind] = inside.replace(str(Path.home()), "~")
    return dropped


def noise(output: Notebook) -> str:
    """What an output that is not to be stored is; nothing for the others."""
    if output.output_type == "stream" and output.name == "stderr":
        return "stderr: " + ANSI.sub("", output.text).strip()[:100]
    return "a widget" if WIDGET in output.get("data", {}) else ""


def execute(path: Path, root: Path) -> Notebook:
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
        try:
            client.execute(env=environment)
        except (CellExecutionError, DeadKernelError) as error:
            raise SystemExit(f"{path.name}: {ANSI.sub('', str(error)).strip()}") from error
    for note in clean(nb, root):
        print(f"  left out: {note}")
    return nb


def run(path: Path, root: Path) -> None:
    """Execute a notebook into build/, write it as a page, print its table of results."""
    nb, build = execute(path, root), root / "build"
    build.mkdir(exist_ok=True)
    (build / path.name).write_bytes(dump(nb))
    page, _ = HTMLExporter().from_notebook_node(nb, {"metadata": {"name": path.stem}})
    (build / f"{path.stem}.html").write_text(page, encoding="utf-8")
    shown = [part for cell in code_cells(nb, "results-table") for part in texts(cell)]
    table = [text for kind, text in shown if kind in ("stdout", "text/plain")]
    if not table:
        raise SystemExit(f"{path.name}: no cell tagged results-table shows a text")
    print("", *table, f"To read: build/{path.stem}.html", sep="\n")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Command line; a notebook that fails does not keep the others from being executed."""
    parser = argparse.ArgumentParser(description="Execute notebooks in fresh kernels.")
    parser.add_argument("command", choices=["execute", "run"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    options = parser.parse_args(arguments)
    every = suite(root) + suite(root, "notebooks/solutions")
    failed = []
    for path in [path.resolve() for path in options.notebooks] or every:
        try:
            if options.command == "run":
                run(path, root)
            else:
                path.write_bytes(dump(execute(path, root)))
        except SystemExit as error:
            print(error, file=sys.stderr)
            failed.append(path.name)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
