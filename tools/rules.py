"""The house rules of the notebooks: one function each, listed in `RULES`.

tools/rules.py [NOTEBOOK ...]   list what breaks them, and what differs from what `make fill` writes
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

# Numbers in prose, see `numbers`. Ignored: code, addresses, commas and thin spaces inside
# numbers, LaTeX's backslash before %.
SKIPPED = re.compile(
    r"`(?!\d\d`)[^`]*`|\]\((?!\d\d_)[^)]*\)|(?:https?|doi):\S+|(?<=\d),(?=\d{3})|\\(,|(?=%))"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\W*[A-Z])|\n\s*(?=[\n|*-]|\d+\.\s)")
NUMBER = re.compile(r"(?<![\w./-])(\d+\.\d+|\d+(?=\s?%|\stimes\b))(\s?%|\stimes\b)?(?![.-]?\w*\d)")
COUNT = "two|three|four|five|six|seven|eight|nine|ten|[a-z]+ty|hundreds?|thousands?|millions?"
WORDS = re.compile(rf"\b(?:{COUNT})(?: of)? times\b", re.IGNORECASE)
SOURCE = re.compile(
    r"(?i)\b(table|figure|section|eqs?\.|theorem|appendix)s? [A-Z]?\d|appendix [A-Z]\b|arxiv"
    r"|`\d\d`|\(\d\d_"
)
PRINTED = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(\s?%)?")


def opening(nb: Notebook, path: Path) -> Iterator[str]:
    """The first cell has a title and states tasks, goals and requirements."""
    text = nb.cells[0].source.replace("\u2019", "'")
    if not text.startswith("# "):
        yield "the first cell does not begin with a title"
    for part in PROMISES:
        if part not in text:
            yield f"the first cell lacks “{part}”"
    if not re.search(r"\bminutes?\b", text) or not re.search(r"\b[MG]i?B\b", text):
        yield "the first cell does not say how many minutes and how much memory it takes"


def structure(nb: Notebook, path: Path) -> Iterator[str]:
    """A prediction before a result; at the end a summary, exercises and further reading."""
    if "**What do you expect?**" not in prose(nb):
        yield "no line “**What do you expect?**” before a result"
    sections = re.split(r"^## +(?=\S)", prose(nb), flags=re.MULTILINE)
    if [section.partition("\n")[0].strip() for section in sections[-3:]] != ENDING:
        yield f"the last sections are not {', '.join(ENDING)} (as ## headings)"
    names = [p.name for p in suite(path.parents[1]) if p.stem[:2].isdecimal()]
    place = names.index(path.name) if path.name in names else 0
    for word, other in (("Back", names[:place][-1:]), ("Next", names[place + 1 :][:1])):
        if other and not re.search(rf"\b{word}\b[^\n]*\]\({other[0]}\)", nb.cells[-1].source):
            yield f"the last cell has no line “{word}: … (link to {other[0]})”"


def exercises(nb: Notebook, path: Path) -> Iterator[str]:
    """Two to four exercises, each a cell to start from and one that checks, with solutions."""
    tags = [tag for cell in nb.cells for tag in cell.metadata.get("tags", ())]
    order = [tag for tag in tags if tag in ("exercise", "check")]
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


def code(nb: Notebook, path: Path) -> Iterator[str]:
    """First the setup cell; then cells that are short, one of them with an assertion."""
    if code_cells(nb, "setup") != code_cells(nb)[:1]:
        yield "the first code cell, and no other, must have the tag setup"
    source = "\n".join(cell.source for cell in code_cells(nb))
    if not re.search(r"^\s*assert\b|\bassert_\w+\(", source, re.MULTILINE):
        yield "no assert: a claim is prose, then a number, then an assert"
    for number, cell in enumerate(code_cells(nb), 1):
        lines = len(cell.source.splitlines())
        if not 0 < lines <= MAX_LINES:
            yield f"In [{number}] has {lines} lines, not 1 … {MAX_LINES}"
    sizes = (len(nb.cells), MAX_CELLS, "cells"), (len(dump(nb)) // 1000, MAX_KB, "kB")
    yield from (f"{size} {unit}, more than {most}" for size, most, unit in sizes if size > most)


def one_machine(nb: Notebook, path: Path) -> Iterator[str]:
    """Nothing depends on the machine or the hour of the last execution."""
    for number, cell in enumerate(nb.cells, 1):
        for kind, text in texts(cell):
            if match := ABSOLUTE.search(text):
                yield f"cell {number}, {kind}: absolute path {match[0]}"
            if kind != "source" and (match := VOLATILE.search(text)):
                yield f"cell {number}, {kind}: {match[0]} changes with every run"


def links(nb: Notebook, path: Path) -> Iterator[str]:
    """The prose links to files that exist."""
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", prose(nb)):
        if not (path.parent / target).exists():
            yield f"dead link {target}"


def executed(nb: Notebook, path: Path) -> Iterator[str]:
    """Outputs come from one execution from top to bottom, without errors, and are clean."""
    outputs = [output for cell in code_cells(nb) for output in cell.outputs]
    if not outputs or any(output.output_type == "error" for output in outputs):
        yield "no stored outputs, or an error among them: run `make notebooks`"
    cleaned = copy.deepcopy(nb)
    if clean(cleaned) or cleaned != nb:
        yield "execution counts, outputs or metadata are not clean: run `make notebooks`"


def numbers(nb: Notebook, path: Path) -> Iterator[str]:
    """Numbers in prose have support.

    A number with a decimal, a per cent sign or "times" counts. It is supported by a stored output
    of the notebook that rounds to it: 0.72 by 0.72 or 0.7213, 96 % by 96% or 96.4%; "ten times" by
    a number in the sentence; by a source in the sentence: a table, figure, section, equation or
    appendix of the paper, an arXiv id, or a notebook (`07`); or by the cell's metadata, as a key of
    ``"numbers": {"3 %": "why"}``.
    """
    outputs = [text for cell in code_cells(nb) for kind, text in texts(cell) if kind != "source"]
    printed = PRINTED.findall(SKIPPED.sub("", "\n".join(outputs)))
    for place, cell in enumerate(nb.cells, 1):
        exempt = {key for key, reason in cell.metadata.get("numbers", {}).items() if reason}
        for sentence in SENTENCE.split(cell.source) if cell.cell_type == "markdown" else ():
            text = SKIPPED.sub("", sentence)
            if SOURCE.search(text):
                continue
            words = [] if re.search(r"\d", text) else WORDS.findall(text)
            for match in NUMBER.finditer(text):
                number, percent = match[1], "%" in (match[2] or "")
                digits = len(number.partition(".")[2])
                if not any(
                    bool(sign) >= percent and f"{float(other):.{digits}f}" == number
                    for other, sign in printed
                    if len(other.partition(".")[2]) >= digits
                ):
                    words.append(match[0])
            for word in words:
                if word not in exempt:
                    yield f"cell {place}: {word!r} is in no stored output, has no source, no reason"


def prose(nb: Notebook) -> str:
    """All Markdown cells."""
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


BASIC = (code, one_machine, links, executed)  # solutions keep these, and the explorer
RULES = (opening, structure, exercises, numbers, *BASIC)


def check(root: Path, paths: list[Path]) -> list[str]:
    """Every broken rule in the notebooks, and every stale generated part, with its file."""
    problems = []
    for path in paths:
        nb, is_lesson = read(path), path.stem[:2].isdecimal()
        for rule in RULES if is_lesson else (opening, *BASIC):
            problems += [f"{path.name}: {problem}" for problem in rule(nb, path)]
    generated = "not as generated: run `make fill`"
    return problems + [f"{path.relative_to(root)}: {generated}" for path in stale(root)]


if __name__ == "__main__":
    broken = check(ROOT, [Path(name).resolve() for name in sys.argv[1:]] or suite(ROOT))
    if broken:
        sys.exit("\n".join(broken))
    print("House rules kept")
