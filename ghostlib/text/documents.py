"""Which documents are for training, which for testing, and in which order they come.

A stable hash of a document's key (its title, or else its text) decides both, so neither depends on
the machine, on the Python version or on the order in which documents happen to be read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

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


def read_local(path: Path, split: str, column: str) -> Iterator[Document]:
    """Documents of a local file or folder, those of other splits included where keys decide.

    A single ``.txt`` or ``.raw`` file is running text, so its split is made here: ``"train"`` is
    what comes before the paragraph end nearest to 80 % of it, ``"test"`` what comes after, without
    the paragraphs that ``"train"`` has too. In a folder every such file is one document; every line
    of a ``.jsonl`` and every row of a ``.parquet`` is one.

    Args:
        path: the file or folder.
        split: ``"train"``, ``"test"`` or ``"all"``; matters to a single running text only.
        column: the field or column that holds the text.

    Raises:
        ValueError: a suffix that is not read, a file that is not text, or one without the column.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS)
        if not files:
            raise ValueError(f"the folder {path} holds no {_KNOWN} file")
        for file in files:
            yield from _READERS[file.suffix.lower()](file, column)
        return
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path} has the unsupported suffix {suffix!r}: use a {_KNOWN} file")
    if split == "all" or not one_text(path):
        yield from _READERS[suffix](path, column)
        return
    head, tail = halves(decode(path))
    part = head if split == "train" else tail
    if part.strip():
        yield part, part


def one_text(path: Path) -> bool:
    """Whether ``path`` is a single running text, which `read_local` splits itself."""
    return path.is_file() and _READERS.get(path.suffix.lower()) is _running_text


def decode(path: Path) -> str:
    """The text of an UTF-8 file, whatever its line ends.

    Raises:
        ValueError: the file is no UTF-8 text; the message says at which byte that shows.
    """
    data = path.read_bytes()
    where = data.find(b"\0")  # legal UTF-8, but the mark of a binary file (or of UTF-16)
    if where < 0:
        try:
            return data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            where = error.start
    raise ValueError(f"{path} is not UTF-8 text (byte offset {where}): convert it, or name another")


def _running_text(path: Path, column: str) -> Iterator[Document]:
    text = decode(path)
    if text.strip():
        yield text, text


def _jsonl(path: Path, column: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028, unescaped.
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or column not in record:
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{path}, line {number}: no field {column!r} (it has: {fields}); "
                "name the right one by text_column"
            )
        yield from _row(record[column], column, f"{path}, line {number}")


def _parquet(path: Path, column: str) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error
    with table:
        if column not in table.schema_arrow.names:
            raise ValueError(
                f"{path}: no column {column!r} (it has: {', '.join(table.schema_arrow.names)}); "
                "name the right one by text_column"
            )
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield from _row(value, column, f"{path}, row {number}")


def _row(value: Any, column: str, where: str) -> Iterator[Document]:
    """One document, or none for a missing or blank text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} holds {type(value).__name__}, not text")
    if value and value.strip():
        yield value, value


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _running_text,
    ".raw": _running_text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
_KNOWN = ", ".join(_READERS)


def is_text_path(name: str) -> bool:
    """Whether ``name`` is meant as a local path: it exists, or is spelled like a file."""
    return (
        Path(name).suffix.lower() in _READERS
        or name.startswith((".", "/", "~", "\\"))
        or (name != "" and Path(name).exists())
    )


@dataclass(frozen=True)
class HubCorpus:
    """How to call ``datasets.load_dataset`` for a corpus.

    Attributes:
        column: the text column, where it is not the one the caller names.
        stream: read only as much as is used, and keep nothing; otherwise the dataset is kept in
            the cache of ``datasets``.
        files: split → data file, where one file of many is enough.
        heading: a row that opens a document; rows are joined into documents. None: a row is one.
        rows: number of rows joined into a document where no heading says it.
    """

    path: str
    about: str
    licence: str = "see its dataset card"
    config: str | None = None
    revision: str | None = None
    column: str | None = None
    stream: bool = True
    files: dict[str, str] = field(default_factory=dict)
    heading: str | None = None
    rows: int | None = None


NAMED = {
    "wikitext2": HubCorpus(
        "Salesforce/wikitext",
        "WikiText-2 raw: good and featured Wikipedia articles",
        "CC BY-SA 3.0",
        config="wikitext-2-raw-v1",
        stream=False,
        heading=r" = [^=].* = \s*",
    ),
    "c4": HubCorpus(
        "allenai/c4",
        "C4: English web pages, first shard of each split",
        "ODC-BY 1.0",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "Penn Treebank: newspaper sentences, rare words replaced",
        "LDC user agreement",
        # The repository's own loader is a script; this branch has the same rows as parquet files.
        revision="refs/convert/parquet",
        column="sentence",
        stream=False,
        rows=64,
    ),
}


def is_hub_name(name: str) -> bool:
    """Whether ``name`` has the form ``org/name`` or ``org/name:config``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) is not None


def spec_of(name: str) -> HubCorpus:
    """How to read the dataset ``org/name`` or ``org/name:config``."""
    path, _, config = name.partition(":")
    return HubCorpus(path, f"hub dataset {name}", config=config or None)


def read_hub(spec: HubCorpus, split: str, text_column: str) -> Iterator[Document]:
    """Documents of one split, in their published order.

    Joined by blank lines, the documents of a corpus that consists of lines (WikiText-2, Penn
    Treebank) are the text of the published protocols, blank rows included.

    Raises:
        ConnectionError: the hub cannot be reached, or has no such dataset, config or split.
        ValueError: no such column, or no such split of a corpus read from single files.
    """
    column = spec.column or text_column
    if spec.files and split not in spec.files:
        raise ValueError(f"unknown split {split!r} of {spec.path}: use {' or '.join(spec.files)}")
    rows = _rows(spec, split, column)
    if spec.heading is None and spec.rows is None:
        yield from ((row, row) for row in rows if row.strip())
        return
    block: list[str] = []
    for row in rows:
        opens = len(block) == spec.rows or (spec.heading and re.fullmatch(spec.heading, row))
        if opens and any(map(str.strip, block)):
            yield _document(block)
            block = []
        block.append(row)
    if block:
        yield _document(block)


def _document(rows: list[str]) -> Document:
    text = "\n\n".join(rows)
    return text, text


def _rows(spec: HubCorpus, split: str, column: str) -> Iterator[str]:
    stream = iter(_load(spec, split))
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(spec, split, error) from error
        if not isinstance(row.get(column), str | None) or column not in row:
            raise ValueError(
                f"{spec.path} has no text in column {column!r} (it has: {', '.join(row)}); "
                "name the right one by text_column"
            )
        yield row[column] or ""


def _load(spec: HubCorpus, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": spec.stream}
    if spec.files:
        options["data_files"] = {split: spec.files[split]}
    if spec.revision:
        options["revision"] = spec.revision
    # datasets raises a dozen kinds of error for "not reachable", "not there" and "not readable".
    try:
        loaded: Iterable[dict[str, Any]] = datasets.load_dataset(spec.path, spec.config, **options)
    except Exception as error:
        raise _unreachable(spec, split, error) from error
    return loaded


def _unreachable(spec: HubCorpus, split: str, error: Exception) -> ConnectionError:
    first = (str(error).splitlines() or [""])[0]
    mistaken = "" if spec in NAMED.values() else f"; no local file is called {spec.path}"
    return ConnectionError(
        f"split {split!r} of {spec.path} could not be read from the Hugging Face hub "
        f"({type(error).__name__}: {first}): without network use the embedded 'wiki' or 'pydoc', "
        f"or the path of a local .txt, .jsonl or .parquet file{mistaken}"
    )
