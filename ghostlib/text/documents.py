"""Sources of documents (local files, the hub), and their splits into training and test.

A stable hash of a document's key (its title, or else its text) decides its split and its place in
the order, so neither depends on the machine, on the Python version or on the order of reading.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ghostlib.common import one_line, without_retries

# (key, text)
Document = tuple[str, str]
# (location, for error messages; fields)
Row = tuple[str, Any]

TEST_SHARE = 0.2
# Documents of a stream that are ordered together: a compromise between mixing and waiting.
BUFFER = 10_000


@dataclass(frozen=True)
class Corpus:
    """Source of a corpus, its licence, and how to read it.

    Attributes:
        description: what it is, for a reader.
        licence: its licence, or where to find it.
        read: ``(split, text_column)`` → documents (key, text).
        splits: names of its splits; None for those of the hub.
        by_key: ``read`` yields the documents of all splits, and their keys decide the split.
    """

    description: str
    licence: str
    read: Callable[[str, str], Iterable[Document]]
    splits: tuple[str, ...] | None = ("train", "test", "all")
    by_key: bool = True

    def __str__(self) -> str:
        return f"{self.description}; licence: {self.licence}"

    def texts(self, split: str, seed: int, text_column: str) -> Iterator[str]:
        """The texts of one split, in the order of ``seed``."""
        documents = self.read(split, text_column)
        if split == "all" or (split != "train" and not self.by_key):
            return (text for _, text in documents)
        return ordered(kept(documents, split) if self.by_key else documents, seed)


def kept(documents: Iterable[Document], split: str) -> Iterator[Document]:
    """The documents of one split, ``"train"`` or ``"test"``, without repeated keys or texts.

    Two documents with the same text and different titles could fall into different splits, so only
    the first is kept.
    """
    seen: set[bytes] = set()
    for key, text in documents:
        digests = {_digest("key:" + key), _digest("text:" + squeeze(text))}
        if seen.isdisjoint(digests):
            seen |= digests
            if split == ("test" if fraction(key) < TEST_SHARE else "train"):
                yield key, text


def ordered(documents: Iterable[Document], seed: int) -> Iterator[str]:
    """The texts in an order that depends on ``seed``."""
    stream = iter(documents)
    while block := list(islice(stream, BUFFER)):
        block.sort(key=lambda document: fraction(f"{seed}:{document[0]}"))
        yield from (text for _, text in block)


def halves(text: str) -> tuple[str, str]:
    """Split a running text at the paragraph end nearest to 80 %; no paragraph is in both parts.

    Returns:
        The text before the cut, and the paragraphs after it that do not occur before it: none if
        the text is a single paragraph.
    """
    ends = [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text.rstrip())]
    if not ends:
        return text, ""
    cut = min(ends, key=lambda end: abs(end - (1 - TEST_SHARE) * len(text)))
    before = set(paragraphs(text[:cut]))
    return text[:cut], "\n\n".join(part for part in paragraphs(text[cut:]) if part not in before)


def paragraphs(text: str) -> list[str]:
    """Stripped, non-empty parts of ``text`` between blank lines."""
    return [part.strip() for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def squeeze(text: str) -> str:
    """``text`` with every run of white space replaced by one space."""
    return " ".join(text.split())


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone."""
    return int.from_bytes(_digest(key)[:8], "big") / 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def local_corpus(path: Path) -> Corpus:
    """The corpus in a local file or folder.

    A single ``.txt`` or ``.raw`` file is running text, split by `halves` into ``"train"`` and
    ``"test"``. In a folder every such file is one document; every line of a ``.jsonl`` and every
    row of a ``.parquet`` is one.

    Raises:
        ValueError: no supported file. Reading raises it for a file that is not what its suffix
            says, and for one without the text column.
    """
    files = text_files(path)
    if not files:
        raise ValueError(f"{one_line(path)} is no {_SUFFIXES} file, nor a folder that contains one")
    one_text = files == [path] and _READERS[path.suffix.lower()] is _running_text
    read = partial(_part, path) if one_text else partial(_documents, files)
    return Corpus(f"local file {path.name}", "its owner's", read, by_key=not one_text)


def text_files(path: Path) -> list[Path]:
    """The supported files in a folder, or the file itself if it is one."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sorted(file for file in files if file.suffix.lower() in _READERS and file.is_file())


def _documents(files: list[Path], split: str, column: str) -> Iterator[Document]:
    for file in files:
        for text in _texts(_READERS[file.suffix.lower()](file, column), column):
            if text.strip():
                yield text, text


def _part(path: Path, split: str, column: str) -> Iterator[Document]:
    """One split of a running text, as one document; none if it is blank."""
    text = decode(path)
    part = text if split == "all" else halves(text)[split == "test"]
    if part.strip():
        yield part, part


def _texts(rows: Iterable[Row], column: str) -> Iterator[str]:
    """The texts in ``column`` of the rows, empty for None."""
    for location, row in rows:
        if not isinstance(row, dict) or column not in row:
            fields = one_line(", ".join(row) if isinstance(row, dict) else type(row).__name__)
            raise ValueError(
                f"{location}: no field {column!r} (it has: {fields}); name yours by text_column"
            )
        text = row[column]
        if not isinstance(text, str | None):
            raise ValueError(f"{location}: {column!r} holds {type(text).__name__}, not text")
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair
            raise ValueError(f"{location}: {column!r} is not Unicode text ({error})") from error
        yield text or ""


def decode(path: Path) -> str:
    r"""The text of a UTF-8 file, with line ends ``\n``.

    Raises:
        ValueError: the file is not UTF-8 text; the message has the offset of the offending byte.
    """
    data = path.read_bytes()
    offset = data.find(b"\0")  # legal UTF-8, but the mark of a binary file (or of UTF-16)
    if offset < 0:
        try:
            return data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            offset = error.start
    raise ValueError(
        f"{one_line(path)} is not UTF-8 text (byte offset {offset}): convert it, or name another"
    )


def _running_text(path: Path, column: str) -> Iterator[Row]:
    yield one_line(path), {column: decode(path)}


def jsonl(path: Path, column: str = "") -> Iterator[Row]:
    """The rows of a JSON Lines file; `ValueError` names a line that is not JSON."""
    # Lines of bytes end at b"\n" only: JSON strings may hold U+2028 and the like unescaped.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                location = f"{one_line(path)}, line {number}"
                try:
                    yield location, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{location}: not JSON ({error})") from error


def _parquet(path: Path, column: str) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    name = one_line(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                yield name, dict.fromkeys(columns)
            batches = file.iter_batches(columns=[column])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a parquet file ({one_line(error)})") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _running_text,
    ".raw": _running_text,
    ".jsonl": jsonl,
    ".parquet": _parquet,
}
_SUFFIXES = ", ".join(_READERS)


def is_text_path(name: str) -> bool:
    """Whether ``name`` is meant as a local path: it exists, or is spelled like a file."""
    like_a_file = Path(name).suffix.lower() in _READERS or name.startswith((".", "/", "~", "\\"))
    return like_a_file or os.path.exists(name)


def read_hub(
    path: str,
    split: str,
    text_column: str,
    *,
    config: str | None = None,
    column: str | None = None,
    files: dict[str, str] | None = None,
    opens: Callable[[int, str], object] | None = None,
    **options: Any,
) -> Iterator[Document]:
    """Documents of one split of a hub dataset, in their published order.

    Args:
        path: the dataset, ``"org/name"``.
        split: one of its splits.
        text_column: the field that holds the text.
        config: which of several datasets under that path.
        column: overrides ``text_column``, for a dataset whose field is known.
        files: split → data file, where one file of many is enough.
        opens: for a corpus whose rows are lines: ``(lines so far, next line)`` → whether that line
            opens a document. Joined by blank lines, the documents are then the text of the
            published protocols, blank rows included. None: a row is a document.
        options: for ``datasets.load_dataset``.

    Raises:
        ConnectionError: the hub cannot be reached, or has no such dataset, config or split.
        ValueError: no such column.
    """
    options = {"split": split, "streaming": False} | options
    if files is not None:
        options["data_files"] = {split: files[split]}
    rows = _texts(_hub_rows(path, config, options), column or text_column)
    texts = _joined(rows, opens) if opens else filter(str.strip, rows)
    yield from ((text, text) for text in texts)


def _joined(rows: Iterable[str], opens: Callable[[int, str], object]) -> Iterator[str]:
    block: list[str] = []
    for row in rows:
        if opens(len(block), row) and any(map(str.strip, block)):
            yield "\n\n".join(block)
            block = []
        block.append(row)
    if block:
        yield "\n\n".join(block)


def _hub_rows(path: str, config: str | None, options: dict[str, Any]) -> Iterator[Row]:
    # datasets raises a dozen types of error for "not reachable", "not found" and "not readable".
    trouble = ""
    try:
        import datasets

        with without_retries() as trouble:
            rows = datasets.load_dataset(path, config, **options)
        for row in rows:
            yield path, row
    except Exception as error:
        reason = one_line((str(trouble or error).splitlines() or [""])[0])
        raise ConnectionError(
            f"split {options['split']!r} of {path} could not be read from the Hugging Face hub "
            f"({type(error).__name__}: {reason}), and no local file has that name: without network "
            f"use the embedded 'wiki' or 'pydoc', or the path of a {_SUFFIXES} file"
        ) from error
