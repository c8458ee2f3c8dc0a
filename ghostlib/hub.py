"""Corpora of the Hugging Face hub by name, through ``datasets``, without running their scripts."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ghostlib.splits import Document


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
