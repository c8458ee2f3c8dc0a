"""The house rules of the notebooks: one function a rule, listed in `RULES`.

tools/rules.py [NOTEBOOK ...]   say what breaks them, and what is not as `make fill` writes it
"""

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fill import stale
from notebooks import ROOT, Notebook, clean, code_cells, read, suite, texts

MAX_LINES = 25  # of a code cell
PROMISES = ("What you'll do", "What you'll learn", "What you'll need")
ENDING = ["What we saw", "Exercises", "Further reading"]
ABSOLUTE = re.compile(r"(?<![\w.~:/\\-])/(?:home|tmp|work|root|Users|private)\b[\w./-]*")
VOLATILE = re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d|\bat 0x[0-9a-f]{6,}")


def opening(nb: Notebook, root: Path) -> Iterator[str]:
    """The first cell has a title and says what is done, learnt and needed."""
    text = nb.cells[0].source.replace("\u2019", "'")
    if not text.startswith("# "):
        yield "the first cell does not begin with a title"
    for part in (*PROMISES, "<!-- begin:badges"):
        if part not in text:
            yield f"the first cell lacks “{part}”"
    if not re.search(r"\bminutes?\b", text) or not re.search(r"\b[MG]i?B\b", text):
        yield "the first cell does not say how many minutes and how much memory it takes"


def setup(nb: Notebook, root: Path) -> Iterator[str]:
    """The first code cell makes sure of the package."""
    if code_cells(nb, "setup") != code_cells(nb)[:1]:
        yield "the first code cell, and no other, must have the tag setup"


def ending(nb: Notebook, root: Path) -> Iterator[str]:
    """The last sections are what we saw, exercises with folded solutions, further reading."""
    prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    _, *sections = re.split(r"^## +(?=\S)", prose, flags=re.MULTILINE)
    last = sections[-len(ENDING) :]
    if [section.partition("\n")[0].strip() for section in last] != ENDING:
        yield f"the last sections are not {', '.join(ENDING)} (as ## headings)"
    elif "<details" not in last[1]:
        yield "the exercises have no folded solution (<details>)"


def assertion(nb: Notebook, root: Path) -> Iterator[str]:
    """A claim is prose, then a number, then an assert."""
    source = "\n".join(cell.source for cell in code_cells(nb))
    if not re.search(r"^\s*assert\b|\bassert_\w+\(", source, re.MULTILINE):
        yield "no assert: a claim is prose, then a number, then an assert"


def short_cells(nb: Notebook, root: Path) -> Iterator[str]:
    """A code cell has something to say, and not too much."""
    for number, cell in enumerate(code_cells(nb), 1):
        lines = len(cell.source.splitlines())
        if not 0 < lines <= MAX_LINES:
            yield f"In [{number}] has {lines} lines, not 1 … {MAX_LINES}"


def one_machine(nb: Notebook, root: Path) -> Iterator[str]:
    """Nothing depends on the machine, or on the hour, of the last execution."""
    for number, cell in enumerate(nb.cells, 1):
        for kind, text in texts(cell):
            if found := ABSOLUTE.search(text):
                yield f"cell {number}, {kind}: absolute path {found[0]}"
            if kind != "source" and (found := VOLATILE.search(text)):
                yield f"cell {number}, {kind}: {found[0]} changes with every run"


def links(nb: Notebook, root: Path) -> Iterator[str]:
    """Files that the prose links to are there."""
    for number, cell in enumerate(nb.cells, 1):
        targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", cell.source)
        for target in targets if cell.cell_type == "markdown" else ():
            if not (root / "notebooks" / target).exists():
                yield f"cell {number}: dead link {target}"


def executed(nb: Notebook, root: Path) -> Iterator[str]:
    """Outputs are those of one execution from top to bottom, without error and clean."""
    outputs = [output for cell in code_cells(nb) for output in cell.outputs]
    if not outputs or any(output.output_type == "error" for output in outputs):
        yield "no stored outputs, or an error among them: run `make notebooks`"
    tidied = copy.deepcopy(nb)
    if clean(tidied, root) or tidied != nb:
        yield "execution counts, outputs or metadata are not clean: run `make notebooks`"


RULES = (opening, setup, ending, assertion, short_cells, one_machine, links, executed)


def check(root: Path, paths: list[Path]) -> list[str]:
    """Every broken rule in some notebooks and in what is generated, with the file it is in."""
    found = []
    for path in paths:
        nb = read(path)
        found += [f"{path.name}: {problem}" for rule in RULES for problem in rule(nb, root)]
    found += [
        f"{path.relative_to(root)}: not as generated: run `make fill`" for path in stale(root)
    ]
    return found


if __name__ == "__main__":
    broken = check(ROOT, [Path(name).resolve() for name in sys.argv[1:]] or suite(ROOT))
    if broken:
        sys.exit("\n".join(broken))
    print("House rules kept")
