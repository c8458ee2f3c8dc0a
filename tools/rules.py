"""The house rules of the notebooks: one function a rule, listed in `RULES`.

tools/rules.py [NOTEBOOK ...]   say what breaks them, and what is not as `make fill` writes it
"""

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fill import stale
from notebooks import ROOT, Notebook, clean, code_cells, dump, read, suite, texts

MAX_LINES, MAX_CELLS, MAX_KB = 25, 45, 700  # of a code cell; of a notebook
PROMISES = ("What you'll do", "What you'll learn", "What you'll need", "<!-- begin:badges")
ENDING = ["What we saw", "Exercises", "Further reading"]
ABSOLUTE = re.compile(r"(?<![\w.~:/\\-])/(?:home|tmp|work|root|Users|private)\b[\w./-]*")
VOLATILE = re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d|\bat 0x[0-9a-f]{6,}")

# Of numbers in prose, see `unsupported`. Not read: code, addresses, commas and thin spaces inside
# numbers, LaTeX's backslash before %.
SKIPPED = re.compile(
    r"`(?!\d\d`)[^`]*`|\]\((?!\d\d_)[^)]*\)|(?:https?|doi):\S+|(?<=\d),(?=\d{3})|\\(,|(?=%))"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\W*[A-Z])|\n\s*(?=[\n|*-]|\d+\.\s)")
NUMBER = re.compile(r"(?<![\w./-])(\d+\.\d+|\d+(?=\s?%|\stimes\b))(\s?%|\stimes\b)?(?![.-]?\w*\d)")
COUNT = (
    "two|three|four|five|six|seven|eight|nine|ten|twenty|[a-z]+ty|hundreds?|thousands?|millions?"
)
WORDS = re.compile(rf"\b(?:{COUNT})(?: of)? times\b", re.IGNORECASE)
SOURCE = re.compile(
    r"\b(table|figure|section|eqs?\.|theorem|appendix)s? [A-Z]?\d|appendix [A-Z]\b|arxiv"
    r"|`\d\d`|\(\d\d_",
    re.IGNORECASE,
)
PRINTED = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(\s?%)?")


def opening(nb: Notebook, path: Path) -> Iterator[str]:
    """The first cell has a title and says what is done, learnt and needed."""
    text = nb.cells[0].source.replace("\u2019", "'")
    if not text.startswith("# "):
        yield "the first cell does not begin with a title"
    for part in PROMISES:
        if part not in text:
            yield f"the first cell lacks “{part}”"
    if not re.search(r"\bminutes?\b", text) or not re.search(r"\b[MG]i?B\b", text):
        yield "the first cell does not say how many minutes and how much memory it takes"


def setup(nb: Notebook, path: Path) -> Iterator[str]:
    """The first code cell makes sure of the package."""
    if code_cells(nb, "setup") != code_cells(nb)[:1]:
        yield "the first code cell, and no other, must have the tag setup"


def ending(nb: Notebook, path: Path) -> Iterator[str]:
    """The last sections are what we saw, exercises, further reading with links on and back."""
    sections = re.split(r"^## +(?=\S)", prose(nb), flags=re.MULTILINE)
    if [section.partition("\n")[0].strip() for section in sections[-3:]] != ENDING:
        yield f"the last sections are not {', '.join(ENDING)} (as ## headings)"
    names = [p.name for p in suite(path.parents[1]) if p.stem[:2].isdecimal()]
    place = names.index(path.name) if path.name in names else 0
    for word, other in (("Back", names[:place][-1:]), ("Next", names[place + 1 :][:1])):
        if other and not re.search(rf"\b{word}\b[^\n]*\]\({other[0]}\)", nb.cells[-1].source):
            yield f"the last cell has no line “{word}: … (link to {other[0]})”"


def exercises(nb: Notebook, path: Path) -> Iterator[str]:
    """Two to four exercises: a cell to start from, then one that checks; all solved elsewhere."""
    tags = [set(cell.metadata.get("tags", ())) & {"exercise", "check"} for cell in nb.cells]
    order = [tag for found in tags for tag in sorted(found)]
    if order not in [["exercise", "check"] * n for n in (2, 3, 4)]:
        yield f"not two to four pairs of cells tagged exercise and check, but {order}"
    solved = path.parent / "solutions" / path.name
    if not solved.exists():
        yield f"no solutions/{path.name}"
        return
    answers = read(solved)
    checks = {cell.source for cell in code_cells(answers, "check")}
    for cell in code_cells(nb, "check"):
        if cell.source not in checks:
            yield f"solutions: no cell, tagged check, is {cell.source.splitlines()[:1]}"
    for rule in BASIC:
        yield from (f"solutions: {problem}" for problem in rule(answers, solved))


def teaching(nb: Notebook, path: Path) -> Iterator[str]:
    """The reader predicts before a result; a claim is prose, then a number, then an assert."""
    if "**What do you expect?**" not in prose(nb):
        yield "no line “**What do you expect?**” before a result"
    for place, words in unsupported(nb):
        yield f"cell {place}: {words!r} is in no stored output, without a source, not exempted"


def assertion(nb: Notebook, path: Path) -> Iterator[str]:
    """Something is asserted."""
    source = "\n".join(cell.source for cell in code_cells(nb))
    if not re.search(r"^\s*assert\b|\bassert_\w+\(", source, re.MULTILINE):
        yield "no assert: a claim is prose, then a number, then an assert"


def short_cells(nb: Notebook, path: Path) -> Iterator[str]:
    """A code cell has something to say, and not too much; so has the notebook."""
    for number, cell in enumerate(code_cells(nb), 1):
        lines = len(cell.source.splitlines())
        if not 0 < lines <= MAX_LINES:
            yield f"In [{number}] has {lines} lines, not 1 … {MAX_LINES}"
    sizes = (len(nb.cells), MAX_CELLS, "cells"), (len(dump(nb)) // 1000, MAX_KB, "kB")
    yield from (f"{size} {unit}, more than {most}" for size, most, unit in sizes if size > most)


def one_machine(nb: Notebook, path: Path) -> Iterator[str]:
    """Nothing depends on the machine, or on the hour, of the last execution."""
    for number, cell in enumerate(nb.cells, 1):
        for kind, text in texts(cell):
            if found := ABSOLUTE.search(text):
                yield f"cell {number}, {kind}: absolute path {found[0]}"
            if kind != "source" and (found := VOLATILE.search(text)):
                yield f"cell {number}, {kind}: {found[0]} changes with every run"


def links(nb: Notebook, path: Path) -> Iterator[str]:
    """Files that the prose links to are there."""
    for number, cell in enumerate(nb.cells, 1):
        targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", cell.source)
        for target in targets if cell.cell_type == "markdown" else ():
            if not (path.parent / target).exists():
                yield f"cell {number}: dead link {target}"


def executed(nb: Notebook, path: Path) -> Iterator[str]:
    """Outputs are those of one execution from top to bottom, without error and clean."""
    outputs = [output for cell in code_cells(nb) for output in cell.outputs]
    if not outputs or any(output.output_type == "error" for output in outputs):
        yield "no stored outputs, or an error among them: run `make notebooks`"
    tidied = copy.deepcopy(nb)
    if clean(tidied, path.parent) or tidied != nb:
        yield "execution counts, outputs or metadata are not clean: run `make notebooks`"


def printed(nb: Notebook) -> list[tuple[str, bool]]:
    """(number, whether a per cent sign follows) of every number in the stored textual outputs."""
    outputs = [text for cell in code_cells(nb) for kind, text in texts(cell) if kind != "source"]
    found = PRINTED.findall(SKIPPED.sub("", "\n".join(outputs)))
    return [(number, bool(percent)) for number, percent in found]


def unsupported(nb: Notebook) -> Iterator[tuple[int, str]]:
    """(number of the cell, the words) of every number in prose that nothing supports.

    A number with a decimal, a per cent sign or "times" counts. It is supported by a stored output
    of the notebook that rounds to it: 0.72 by 0.72 or 0.7213, 96 % by 96% or 96.4%; "ten times" by
    a number beside it; by its source in the sentence: a table, figure, section, equation or
    appendix of the paper, an arXiv id, or a notebook (`07`); or by the cell's metadata, as a key of
    ``"numbers": {"3 %": "why"}``.
    """
    stored = printed(nb)
    for place, cell in enumerate(nb.cells, 1):
        exempt = {key for key, reason in cell.metadata.get("numbers", {}).items() if reason}
        for sentence in SENTENCE.split(cell.source) if cell.cell_type == "markdown" else ():
            text = SKIPPED.sub("", sentence)
            if SOURCE.search(text):
                continue
            words = WORDS.findall(text) if not re.search(r"\d", text) else []
            for found in NUMBER.finditer(text):
                number, percent = found[1], "%" in (found[2] or "")
                digits = len(number.partition(".")[2])
                if not any(
                    same_sign >= percent and f"{float(other):.{digits}f}" == number
                    for other, same_sign in stored
                    if len(other.partition(".")[2]) >= digits
                ):
                    words.append(found[0])
            yield from ((place, word) for word in words if word not in exempt)


def prose(nb: Notebook) -> str:
    """All that is not code."""
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


BASIC = (setup, assertion, short_cells, one_machine, links, executed)  # solutions keep these
RULES = (opening, ending, exercises, teaching, *BASIC)


def check(root: Path, paths: list[Path]) -> list[str]:
    """Every broken rule in some notebooks and in what is generated, with the file it is in."""
    found = []
    for path in paths:
        nb = read(path)
        for rule in RULES:
            # the explorer has no exercises
            if path.stem[:2].isdecimal() or rule in (opening, *BASIC):
                found += [f"{path.name}: {problem}" for problem in rule(nb, path)]
    found += [
        f"{path.relative_to(root)}: not as generated: run `make fill`" for path in stale(root)
    ]
    return found


if __name__ == "__main__":
    broken = check(ROOT, [Path(name).resolve() for name in sys.argv[1:]] or suite(ROOT))
    if broken:
        sys.exit("\n".join(broken))
    print("House rules kept")
