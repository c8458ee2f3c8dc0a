"""Which documents are for training, which for testing, and in which order they come.

A stable hash of a document's key (its title, or else its text) decides both, so neither depends on
the machine, on the Python version or on the order in which documents happen to be read.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice

# (key, text)
Document = tuple[str, str]

TEST_SHARE = 0.2
# Documents of a stream that are ordered together: enough to mix, few enough to wait for.
BUFFER = 10_000


def kept(found: Iterable[Document], split: str) -> Iterator[Document]:
    """The documents of one split, ``"train"`` or ``"test"``, without repeated keys or texts.

    Two documents with the same text and different titles could land in different splits; only the
    first of them is in any.
    """
    seen: set[bytes] = set()
    for key, text in found:
        marks = {_digest("key:" + key), _digest("text:" + squeeze(text))}
        if not seen.isdisjoint(marks):
            continue
        seen |= marks
        if split == ("test" if fraction(key) < TEST_SHARE else "train"):
            yield key, text


def ordered(found: Iterable[Document], seed: int) -> Iterator[str]:
    """The texts in the order that belongs to ``seed``; another seed gives another order."""
    stream = iter(found)
    while block := list(islice(stream, BUFFER)):
        block.sort(key=lambda document: fraction(f"{seed}:{document[0]}"))
        yield from (text for _, text in block)


def halves(text: str) -> tuple[str, str]:
    """Cut a running text at the paragraph end nearest to 80 % of it; no paragraph is in both parts.

    Returns:
        The text before the cut, and the paragraphs after it that do not occur before it. With one
        paragraph only, the second part is empty.
    """
    ends = [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text.rstrip())]
    if not ends:
        return text, ""
    cut = min(ends, key=lambda end: abs(end - (1 - TEST_SHARE) * len(text)))
    known = set(paragraphs(text[:cut]))
    return text[:cut], "\n\n".join(part for part in paragraphs(text[cut:]) if part not in known)


def paragraphs(text: str) -> list[str]:
    """Pieces of ``text`` between blank lines, stripped, empty ones left out."""
    return [part.strip() for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def squeeze(text: str) -> str:
    """``text`` with every run of white space as one space: equal for texts that read the same."""
    return " ".join(text.split())


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but ``key``."""
    return int.from_bytes(_digest(key)[:8], "big") / 2**64


def _digest(text: str) -> bytes:
    # A lone surrogate, which JSON can smuggle in, must not stop the hash.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
