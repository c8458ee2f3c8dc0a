"""Named corpora and local files → documents → token windows.

A corpus is where documents come from (`CORPORA`, a hub name, a path); `text.documents` decides
which of them are for training and in which order they come; here they become windows of tokens.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlib.common import Registry
from ghostlib.text.assets import asset
from ghostlib.text.documents import (
    NAMED,
    Document,
    HubCorpus,
    is_hub_name,
    is_text_path,
    kept,
    one_text,
    ordered,
    paragraphs,
    read_hub,
    read_local,
    spec_of,
    squeeze,
)
from ghostlib.text.tokens import at_once, beginning

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from, what may be done with it, and how to read it.

    Attributes:
        about: what it is, for a reader.
        licence: its licence, or where to find it.
        read: ``(split, text_column)`` → documents (key, text).
        splits: names of its splits; None for whatever the hub has.
        by_key: ``read`` yields the documents of all splits, and their keys say which is in which.
    """

    about: str
    licence: str
    read: Callable[[str, str], Iterable[Document]]
    splits: tuple[str, ...] | None = ("train", "test", "all")
    by_key: bool = True

    def __str__(self) -> str:
        return f"{self.about}; licence: {self.licence}"


def _wiki(split: str, column: str) -> Iterator[Document]:
    for entry in json.loads(asset("wiki").read_text(encoding="utf-8")).values():
        yield entry["title"], f"{entry['title']}\n\n{entry['extract']}"


def _pydoc(split: str, column: str) -> Iterator[Document]:
    """Python's help topics, less those that repeat a part of a longer one.

    Many topics are sections of others, word for word: "if" is a part of "compound". Kept, they
    would carry the same text into both splits.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for title, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        parts = {part for part in map(squeeze, paragraphs(text)) if len(part) > 80}
        if seen.isdisjoint(parts):
            seen |= parts
            yield title, text.strip()


def _of_hub(spec: HubCorpus) -> Corpus:
    read = partial(read_hub, spec)
    return Corpus(spec.about, spec.licence, read, splits=None, by_key=False)


CORPORA: Registry[Corpus] = Registry("corpus")
CORPORA["wiki"] = Corpus("10,033 introductions of Wikipedia articles", "CC BY-SA 4.0", _wiki)
CORPORA["pydoc"] = Corpus("help topics of this Python's language reference", "PSF-2.0", _pydoc)
for _name, _spec in NAMED.items():
    CORPORA[_name] = _of_hub(_spec)


def documents(
    corpus: str | Path, *, split: str = "train", seed: int = 0, text_column: str = "text"
) -> Iterator[str]:
    """Documents of a corpus, one after the other.

    Args:
        corpus: a name from `CORPORA` (``"wiki"`` and ``"pydoc"`` need no network); any dataset of
            the Hugging Face hub as ``"org/name"`` or ``"org/name:config"``; the path of a ``.txt``,
            ``.raw``, ``.jsonl`` or ``.parquet`` file, or of a folder of such files.
        split: ``"train"`` or ``"test"``, about 80 % and 20 % of the documents, which never share
            one: of documents with the same text one is kept. Embedded and local corpora also have
            ``"all"``: everything, in its own order. A hub corpus has the splits it was published
            with. A single ``.txt`` is one document, cut near 80 % at the end of a paragraph.
        seed: orders the documents. The splits of a hub corpus other than ``"train"`` keep their
            published order, as protocols that report perplexity on them do.
        text_column: the field of a ``.jsonl``, ``.parquet`` or hub corpus that holds the text.

    ``"pydoc"`` comes with the Python that runs this, so its text differs between Python versions.

    Raises:
        ValueError: unknown corpus or split; a file that cannot be used, and why.
        FileNotFoundError: no such file.
        ConnectionError: a hub corpus that cannot be reached.
        ghostlib.text.assets.AssetError: ``"wiki"`` is not in the cache and not to be had from here.
    """
    source = find(corpus)
    if source.splits is not None and split not in source.splits:
        raise ValueError(
            f"unknown split {split!r} of corpus {corpus}: use one of {', '.join(source.splits)}"
        )
    if not _whole(seed):
        raise ValueError(f"seed must be an integer, not {seed!r}")
    return _texts(source, split, seed, text_column)


def token_windows(
    corpus: str | Path,
    tokenizer: Any,
    *,
    split: str = "train",
    length: int = 2048,
    count: int | None = 32,
    seed: int = 0,
    text_column: str = "text",
) -> "torch.Tensor":
    """Consecutive windows of the tokenised documents, which are joined by a blank line.

    The windows are those of one tokenisation of the joined text, without special tokens and without
    overlap; of the text only as much is tokenised as they need. The same arguments give the same
    windows, and fewer windows are the first of more.

    Args:
        corpus, split, seed, text_column: see `documents`.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window.
        count: number of windows; None for all that the split has.

    Returns:
        LongTensor (count, length).

    Raises:
        ValueError: too little text (the message says how much there is), or a bad ``length`` or
            ``count``. Otherwise as `documents`.
    """
    texts = _drawn(corpus, split, length, count, seed, text_column)
    ids = beginning(texts, tokenizer, _ends(length, count))
    return _cut(ids, f"split {split!r} of corpus {corpus}", length, count)


def tokenised(
    corpus: str | Path,
    tokenizer: Any,
    *,
    split: str,
    length: int,
    count: int | None,
    seed: int = 0,
    text_column: str = "text",
    special_tokens: bool = False,
) -> tuple["torch.Tensor", str]:
    """`token_windows` and the text they begin, all in memory at once.

    Args:
        special_tokens: let the tokenizer add its own, once, to the joined text.

    Returns:
        Windows (count, length), and a text that begins with what they cover.
    """
    texts = _drawn(corpus, split, length, count, seed, text_column)
    ids, text = at_once(texts, tokenizer, _ends(length, count), special_tokens)
    where = f"split {split!r} of corpus {corpus}"
    return _cut(array("q", ids if text else []), where, length, count), text


def _drawn(
    corpus: str | Path, split: str, length: int, count: int | None, seed: int, column: str
) -> Iterator[str]:
    for name, value in (("length", length), ("count", count)):
        if value is not None and (not _whole(value) or value < 1):
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return documents(corpus, split=split, seed=seed, text_column=column)


def _ends(length: int, count: int | None) -> int | None:
    """How many tokens are wanted; None for all."""
    return None if count is None else count * length


def _cut(ids: "array[int]", where: str, length: int, count: int | None) -> "torch.Tensor":
    import torch

    if not ids:
        raise ValueError(f"{where} is empty: it has no document with text")
    have = len(ids) // length
    if not have:
        raise ValueError(f"{where} has {len(ids)} tokens, fewer than one window of {length}")
    if count is not None and have < count:
        raise ValueError(
            f"{where} has {have} windows of {length} tokens, fewer than count = {count}: "
            f"choose count <= {have}, or None for all"
        )
    used = have if count is None else count
    return torch.frombuffer(ids, dtype=torch.long)[: used * length].clone().view(used, length)


def find(corpus: str | Path) -> Corpus:
    """The `Corpus` behind a name or a path.

    Raises:
        ValueError: neither a known name, nor a hub name, nor a path.
        FileNotFoundError: a path, but nothing is there.
    """
    if isinstance(corpus, str) and corpus in CORPORA:
        return CORPORA[corpus]
    if isinstance(corpus, Path) or is_text_path(corpus):
        path = Path(corpus).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no such corpus file: {path}")
        read = partial(read_local, path)
        return Corpus(f"local file {path.name}", "its owner's", read, by_key=not one_text(path))
    if is_hub_name(corpus):
        return _of_hub(spec_of(corpus))
    try:
        return CORPORA[corpus]
    except ValueError as error:
        raise ValueError(f"{error}; or a hub dataset 'org/name', or the path of a file") from None


def describe(corpus: str | Path) -> str:
    """One line on where the text comes from and under which licence it stands."""
    source = find(corpus)
    # Not the path of a local file: notebooks print this line, and keep it.
    return f"{source}" if source.about.startswith("local") else f"{corpus}: {source}"


def _texts(source: Corpus, split: str, seed: int, column: str) -> Iterator[str]:
    found = source.read(split, column)
    if split == "all" or (source.splits is None and split != "train"):
        yield from (text for _, text in found)
    else:
        yield from ordered(kept(found, split) if source.by_key else found, seed)


def _whole(value: object) -> bool:
    """Whether ``value`` is an integer, NumPy's included."""
    return isinstance(value, Integral)
