"""Named corpora, hub datasets and local files → documents → windows of tokens.

Splits and the order of documents are in `text.documents`, tokenisation is in `text.tokens`.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlib.common import Registry, at_least, checked, one_line, short_repr
from ghostlib.text.assets import asset
from ghostlib.text.documents import (
    Corpus,
    Document,
    is_text_path,
    local_corpus,
    paragraphs,
    read_hub,
    squeeze,
)
from ghostlib.text.tokens import bos_token, token_ids

if TYPE_CHECKING:
    import torch


def _wiki(split: str, column: str) -> Iterator[Document]:
    for entry in json.loads(asset("wiki").read_text(encoding="utf-8")).values():
        yield entry["title"], f"{entry['title']}\n\n{entry['extract']}"


def _pydoc(split: str, column: str) -> Iterator[Document]:
    """Python's help topics, without those that repeat a part of a longer one.

    Many topics are verbatim sections of others: "if" is a part of "compound". Such topics would
    put the same text into both splits.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for title, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        parts = {part for part in map(squeeze, paragraphs(text)) if len(part) > 80}
        if seen.isdisjoint(parts):
            seen |= parts
            yield title, text.strip()


CORPORA: Registry[Corpus] = Registry("corpus")
CORPORA["wiki"] = Corpus("10,033 introductions of Wikipedia articles", "CC BY-SA 4.0", _wiki)
CORPORA["pydoc"] = Corpus("help topics of this Python's language reference", "PSF-2.0", _pydoc)


def _published(
    description: str,
    licence: str,
    path: str,
    splits: tuple[str, ...] | None = ("train", "validation", "test"),
    **reading: Any,
) -> Corpus:
    """A hub dataset with its published splits; ``reading`` are options of `read_hub`."""
    return Corpus(description, licence, partial(read_hub, path, **reading), splits, by_key=False)


CORPORA["wikitext2"] = _published(
    "WikiText-2 raw: good and featured Wikipedia articles",
    "CC BY-SA 3.0",
    "Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    opens=lambda lines, line: re.fullmatch(r" = [^=].* = \s*", line),
)
CORPORA["c4"] = _published(
    "C4: English web pages, first shard of each split",
    "ODC-BY 1.0",
    "allenai/c4",
    files={
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
        "test": "en/c4-validation.00000-of-00008.json.gz",
    },
    streaming=True,
)
CORPORA["ptb"] = _published(
    "Penn Treebank: newspaper sentences, rare words replaced",
    "LDC user agreement",
    "ptb-text-only/ptb_text_only",
    # The repository's own loader is a script; this branch has the same rows as parquet files.
    revision="refs/convert/parquet",
    column="sentence",
    opens=lambda lines, line: lines >= 64,
)


def find(corpus: str | Path) -> Corpus:
    """The `Corpus` of a name or a path.

    Raises:
        ValueError: not a known name, a hub name or the path of a supported file or folder.
        FileNotFoundError: the path does not exist.
    """
    name = one_line(corpus)
    if isinstance(corpus, str) and corpus in CORPORA:
        return CORPORA[corpus]
    if isinstance(corpus, Path) or (isinstance(corpus, str) and is_text_path(corpus)):
        path = Path(os.path.expanduser(corpus))
        if not os.path.exists(path):
            raise FileNotFoundError(f"no such corpus file: {name}")
        return local_corpus(path)
    if dataset := re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?", name):
        description, licence = f"hub dataset {name}", "see its dataset card"
        repo, config = dataset.groups()
        return _published(description, licence, repo, None, config=config, streaming=True)
    try:
        return CORPORA[name]
    except ValueError as error:
        raise ValueError(f"{error}; or a hub dataset 'org/name', or the path of a file") from None


@checked
def documents(
    corpus: str | Path, *, split: str = "train", seed: int = 0, text_column: str = "text"
) -> Iterator[str]:
    """Iterate over the documents of a corpus.

    Args:
        corpus: a name from `CORPORA` (``"wiki"`` and ``"pydoc"`` need no network); any dataset of
            the Hugging Face hub as ``"org/name"`` or ``"org/name:config"``; the path of a ``.txt``,
            ``.raw``, ``.jsonl`` or ``.parquet`` file, or of a folder of such files.
        split: ``"train"`` or ``"test"``, disjoint sets of about 80 % and 20 % of the documents,
            without duplicates. Embedded and local corpora also have ``"all"``: every document, in
            the original order. A hub corpus has its published splits. A single ``.txt`` is one
            document, cut near 80 % at the end of a paragraph.
        seed: orders the documents. The splits of a hub corpus other than ``"train"`` keep their
            published order, as protocols that report perplexity on them do.
        text_column: the field of a ``.jsonl``, ``.parquet`` or hub corpus that holds the text.

    ``"pydoc"`` is part of the Python installation, so its text differs between Python versions.

    Raises:
        ValueError: unknown corpus or split, or an unusable file.
        FileNotFoundError: no such file.
        ConnectionError: the hub cannot be reached.
        ghostlib.text.assets.AssetError: ``"wiki"`` is not in the cache and cannot be fetched.

    >>> train, test = (set(documents("pydoc", split=split)) for split in ("train", "test"))
    >>> len(train) > len(test), len(train & test)
    (True, 0)
    """
    source = find(corpus)
    if source.splits is not None and split not in source.splits:
        name, splits = one_line(corpus), ", ".join(source.splits)
        raise ValueError(f"unknown split {split!r} of corpus {name}: use one of {splits}")
    return source.texts(split, seed, text_column)


@checked
def token_windows(
    corpus: str | Path,
    tokenizer: Any,
    *,
    split: str = "train",
    length: int = 2048,
    count: int | None = 32,
    seed: int = 0,
    text_column: str = "text",
    bos: bool | None = None,
) -> "torch.Tensor":
    """Consecutive windows of the tokenised documents, which are joined by a blank line.

    The windows do not overlap and are those of the joined text tokenised at once; only as much
    text as they need is tokenised. Special tokens in a document are text. The same arguments give
    the same windows, and a smaller ``count`` the first of them.

    Args:
        corpus, split, seed, text_column: see `documents`.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window, BOS included.
        count: number of windows; None for all of the split.
        bos: whether every window begins with the tokenizer's BOS token, which a model trained with
            one needs for its attention sink. None for the tokenizer's default, see `bos_token`.
            False cuts the windows from one long stream without special tokens.

    Returns:
        LongTensor (count, length).

    Raises:
        ValueError: too little text (the message says how much), an invalid ``length`` or
            ``count``, or ``bos=True`` without a BOS token. Otherwise as `documents`.

    >>> tokenizer = lambda text, **options: {"input_ids": list(text.encode())}  # or AutoTokenizer
    >>> token_windows("pydoc", tokenizer, length=512, count=4).shape
    torch.Size([4, 512])
    >>> token_windows("pydoc", tokenizer, split="test", length=512, count=None).shape[1]
    512
    """
    reading: dict[str, Any] = {"split": split, "seed": seed, "text_column": text_column}
    return tokenised(corpus, tokenizer, length=length, count=count, bos=bos, **reading)[0]


def tokenised(
    corpus: str | Path,
    tokenizer: Any,
    *,
    split: str,
    length: int,
    count: int | None,
    bos: bool | None = False,
    special_tokens: bool = False,
    **reading: Any,
) -> tuple["torch.Tensor", str]:
    """`token_windows`, without BOS by default, and a text that begins with that of the windows.

    Args:
        bos: as in `token_windows`; published protocols use False.
        special_tokens: put the special tokens that the tokenizer adds before the first window
            only, as published protocols do.
        reading: ``seed`` and ``text_column``, see `documents`.
    """
    texts = documents(corpus, split=split, **reading)
    at_least(1, length=length, count=count)
    if not callable(tokenizer):
        raise ValueError(
            f"tokenizer must be a tokenizer, as load_model returns it, got {short_repr(tokenizer)}"
        )
    token = bos_token(tokenizer, bos)
    body = length if token is None else length - 1
    if not body:
        raise ValueError(f"length = 1 has room for {token} alone: use at least 2, or bos=False")
    ids, text = token_ids(texts, tokenizer, None if count is None else count * body)
    source = f"split {split!r} of corpus {one_line(corpus)}"
    if not ids:
        raise ValueError(f"{source} is empty: it has no document with text")
    if special_tokens:
        ids = array("q", tokenizer("")["input_ids"]) + ids
    available = len(ids) // body
    if not available:
        raise ValueError(f"{source} has {len(ids)} tokens, fewer than one window of {length}")
    if count is None:
        count = available
    if available < count:
        raise ValueError(
            f"{source} has {available} windows of {length} tokens, fewer than count = {count}: "
            f"choose count <= {available}, or None for all"
        )
    import torch

    windows = torch.frombuffer(ids, dtype=torch.long)[: count * body].clone().view(count, body)
    if token is not None:
        windows = torch.nn.functional.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    return windows, text
