"""Numbers in prose: each is in a stored output of its notebook, has a source, or is exempted.

A number with a decimal, a per cent sign or "times" counts. "Found" means rounded the same way: 0.72
is found where a cell printed 0.72 or 0.7213, 96 % where one printed 96% or 96.4%. "Ten times" needs
a number beside it. The source of a number is named in its sentence: a table, figure, section,
equation or appendix of the paper, an arXiv id, or a notebook (`07`). Exempted are the keys of
``"numbers": {"3 %": "why"}`` in the metadata of a cell.
"""

import re
from collections.abc import Iterator

from notebooks import Notebook, code_cells, texts

# Not read: code, addresses, commas and thin spaces inside numbers, LaTeX's backslash before %.
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


def printed(nb: Notebook) -> list[tuple[str, bool]]:
    """(number, whether a per cent sign follows) of every number in the stored textual outputs."""
    outputs = [text for cell in code_cells(nb) for kind, text in texts(cell) if kind != "source"]
    found = PRINTED.findall(SKIPPED.sub("", "\n".join(outputs)))
    return [(number, bool(percent)) for number, percent in found]


def unsupported(nb: Notebook) -> Iterator[tuple[int, str]]:
    """(number of the cell, the words) of every number in prose that nothing supports."""
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
