"""Local text files as corpora: ``.txt``, ``.raw``, ``.jsonl``, ``.parquet``, or a folder of them.

These documents have no titles, so their key (see `ghostlib.splits`) is the text itself.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghostlib.splits import Document, halves


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
