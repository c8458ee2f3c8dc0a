"""Documents, splits, windows; hub corpora with a stand-in for `datasets.load_dataset`."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ghostlib.common import Registry
from ghostlib.text import documents as hub
from ghostlib.text import documents as splits
from ghostlib.text.assets import embedded_model_dir
from ghostlib.text.corpora import CORPORA, describe, documents, token_windows

SHARED = Path(__file__).parents[3] / "shared" / "data"


def letters(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    assert not add_special_tokens and not verbose
    return {"input_ids": [ord(letter) for letter in text]}


def pages(text: str, **options: bool) -> dict[str, list[int]]:
    """A tokenizer with far fewer tokens than usual: one per 40 characters."""
    return {"input_ids": [ord(text[i]) for i in range(0, len(text), 40)]}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A .jsonl of 60 different documents, one of them twice and a blank line in between."""
    path = tmp_path / "stories.jsonl"
    lines = [json.dumps({"text": f"Story {i}. " + "And so on. " * (i % 7)}) for i in range(60)]
    path.write_text("\n".join([*lines[:30], "", *lines[30:], lines[3]]) + "\n")
    return path


# ---- embedded ----


@pytest.mark.embedded
def test_wiki_splits_share_nothing_and_cover_all() -> None:
    train, test = (list(documents("wiki", split=split)) for split in ("train", "test"))
    assert len(train) + len(test) == 10_033
    assert 0.78 < len(train) / 10_033 < 0.82
    titles = [{text.split("\n")[0] for text in part} for part in (train, test)]
    extracts = [{text.split("\n\n", 1)[1] for text in part} for part in (train, test)]
    assert not titles[0] & titles[1] and not extracts[0] & extracts[1]
    assert set(train) | set(test) == set(documents("wiki", split="all"))
    whole = list(documents("wiki", split="all"))
    assert whole[5].startswith("Academy Awards\n\nThe Academy Awards, more commonly known as")


def test_pydoc_splits_share_no_paragraph() -> None:
    parts = [
        {
            splits.squeeze(paragraph)
            for text in documents("pydoc", split=split)
            for paragraph in splits.paragraphs(text)
        }
        for split in ("train", "test")
    ]
    assert all(len(paragraph) <= 80 for paragraph in parts[0] & parts[1])


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("corpus", "split", "least"),
    [("pydoc", "test", 8), ("pydoc", "train", 16), ("wiki", "test", 64)],
)
def test_enough_windows_for_the_embedded_model(
    corpus: str, split: str, least: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    windows = token_windows(corpus, tokenizer, split=split, count=least)
    assert windows.shape == (least, 2048) and windows.dtype == torch.long


@pytest.mark.embedded
def test_windows_are_those_of_one_tokenisation(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        every = token_windows("pydoc", tokenizer, length=256, count=None, seed=3)
    assert not caplog.records  # no warning about the model's context
    text = "\n\n".join(documents("pydoc", seed=3))
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    assert every.flatten().tolist() == ids[: len(ids) // 256 * 256]
    for count in (1, 5, len(every)):
        assert torch.equal(
            token_windows("pydoc", tokenizer, length=256, count=count, seed=3), every[:count]
        )
    assert not torch.equal(
        token_windows("pydoc", tokenizer, length=256, count=5, seed=4), every[:5]
    )


@pytest.mark.embedded
def test_wiki_windows_never_change(tokenizer: PreTrainedTokenizerBase) -> None:
    """The figures in the notebooks stand on these very tokens."""
    windows = token_windows("wiki", tokenizer, length=2048, count=2)
    assert (
        tokenizer.decode(windows[0, :12])
        == "Cultural Revolution\n\nThe Cultural Revolution, formally known as the"
    )


# ---- splits and windows on any text ----


def test_only_as_much_is_read_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def endless(path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        for number in range(10**9):
            taken.append(number)
            yield {"text": f"document {number}"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    assert token_windows("c4", letters, split="test", length=100, count=3).shape == (3, 100)
    assert len(taken) < 200
    assert token_windows("c4", pages, split="test", length=10, count=8).shape == (8, 10)


def test_all_is_everything_in_order(stories: Path) -> None:
    every = list(documents(stories, split="all"))
    assert every == [json.loads(line)["text"] for line in stories.read_text().splitlines() if line]
    train, test = (list(documents(stories, split=split)) for split in ("train", "test"))
    assert sorted(train + test) == sorted(set(every))
    assert train != sorted(train) and train != list(documents(stories, seed=1))
    assert sorted(train) == sorted(documents(stories, seed=1))


def test_same_text_under_two_titles_is_in_one_split() -> None:
    found = [(f"title {i}", f"text  {i // 20}") for i in range(200)]
    train, test = (dict(splits.kept(found, split)) for split in ("train", "test"))
    assert len(train) + len(test) == 10 and not set(train.values()) & set(test.values())


def test_streams_are_ordered_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "BUFFER", 10)
    texts = list(splits.ordered(((str(i), str(i)) for i in range(25)), seed=0))
    assert [sorted(map(int, texts[i : i + 10])) for i in (0, 10, 20)] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 25)),
    ]


def test_order_and_split_do_not_depend_on_the_machine() -> None:
    assert splits.fraction("Academy Awards") == pytest.approx(0.34115708052346955, abs=1e-12)
    assert 0 <= splits.fraction("\ud800") < 1  # a lone surrogate, as JSON may hold


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=12), max_size=12))
def test_halves_never_share_a_paragraph(pieces: list[str]) -> None:
    text = "\n\n".join(pieces)
    head, tail = splits.halves(text)
    assert text.startswith(head)
    assert not set(splits.paragraphs(head)) & set(splits.paragraphs(tail))


# ---- local files ----


def test_running_text_is_cut_at_a_paragraph(tmp_path: Path) -> None:
    parts = [f"Paragraph {i} " + "x" * 50 for i in range(10)]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join([*parts, parts[0]]).encode())
    (train,), (test,), (every,) = (
        list(documents(str(path), split=split)) for split in ("train", "test", "all")
    )
    assert splits.paragraphs(train) == parts[:9] and test == parts[9]
    assert splits.paragraphs(every) == [*parts, parts[0]]
    assert token_windows(path, letters, split="all", length=10, count=None).shape[1] == 10


def test_one_paragraph_has_no_test_part(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("one paragraph\nof two lines")
    assert list(documents(tmp_path / "note.txt")) == ["one paragraph\nof two lines"]
    with pytest.raises(ValueError, match=r"split 'test' of corpus .*note.txt is empty"):
        token_windows(tmp_path / "note.txt", letters, split="test")


def test_folder_takes_its_files_as_documents(tmp_path: Path, stories: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.TXT").write_text("first\n\nsecond")
    (tmp_path / "b.raw").write_text("third")
    (tmp_path / "c.csv").write_text("ignored")
    every = list(documents(tmp_path, split="all"))
    assert every[:2] == ["third", "first\n\nsecond"] and len(every) == 63


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = {"body": ["one", None, " ", "two"], "n": [1, 2, 3, 4]}
    pq.write_table(pa.table(rows), path)
    assert list(documents(path, split="all", text_column="body")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"no column 'text' \(it has: body, n\).*text_column"):
        list(documents(path))
    with pytest.raises(ValueError, match="row 1: 'n' holds int, not text"):
        list(documents(path, text_column="n"))
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"rows.parquet is not a parquet file"):
        list(documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 2: not JSON"),
        ('{"body": "x"}', r"line 2: no field 'text' \(it has: body\); name .* text_column"),
        ("[1]", r"line 2: no field 'text' \(it has: list\)"),
        ('{"text": 7}', r"line 2: 'text' holds int, not text"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine\u2028still fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(documents(path))


@pytest.mark.parametrize(
    ("data", "offset"), [(b"text\xff\xfe", 4), (b"ab\0c", 2), ("né".encode("latin-1"), 1)]
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, offset: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.txt is not UTF-8 text \(byte offset {offset}\)"):
        list(documents(path))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such corpus file: .*gone\.txt"):
        documents(tmp_path / "gone.txt")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"unsupported suffix '\.csv': use a \.txt, \.raw"):
        list(documents(tmp_path / "a.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.txt"):
        list(documents(tmp_path / "empty"))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(" \n\n")
        for split in ("train", "all"):
            with pytest.raises(ValueError, match=rf"{name} is empty: it has no document"):
                token_windows(tmp_path / name, letters, split=split)


def test_numpy_integers_are_integers(stories: Path) -> None:
    length, count, seed = np.array([10, 2, 1])
    windows = token_windows(stories, letters, length=length, count=count, seed=seed)
    assert torch.equal(windows, token_windows(stories, letters, length=10, count=2, seed=1))


def test_bad_arguments(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[str, Any]] = [("length", 0), ("length", 2.0), ("count", -1), ("count", "all")]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, not {value!r}"):
            token_windows(stories, letters, **{name: value})
    with pytest.raises(ValueError, match="seed must be an integer, not '0'"):
        documents(stories, seed="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown split 'dev' of corpus wiki: use one of train"):
        documents("wiki", split="dev")
    with pytest.raises(ValueError, match=r"unknown corpus 'wikki'; did you mean 'wiki'.*org/name"):
        documents("wikki")
    with pytest.raises(ValueError, match="unknown corpus ''"):
        documents("")
    size = len("\n\n".join(documents(stories)))
    with pytest.raises(ValueError, match=rf"has {size} tokens, fewer than one window of 99999"):
        token_windows(stories, letters, length=99999)
    with pytest.raises(
        ValueError, match=rf"has {size // 100} windows of 100 tokens.*count <= {size // 100}"
    ):
        token_windows(stories, letters, length=100, count=9999)


# ---- hub ----

Load = Callable[[list[dict[str, Any]]], list[tuple[Any, ...]]]


@pytest.fixture
def hub_has(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Make the hub consist of the given rows; returns the list of calls to come."""

    def have(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
            asked.append((path, config, options))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return have


def test_wikitext2_rows_become_articles(hub_has: Load) -> None:
    rows = [
        "",
        " = Lobster = \n",
        "",
        " A lobster . \n",
        " = = Name = = \n",
        " = Crab = \n",
        " B \n",
    ]
    asked = hub_has([{"text": row} for row in rows])
    test = list(documents("wikitext2", split="test"))
    assert len(test) == 2 and "\n\n".join(test) == "\n\n".join(rows)  # the published protocol
    assert sorted(documents("wikitext2", seed=1)) == sorted(test)
    options = {"split": "test", "streaming": False}
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", options)


def test_c4_reads_one_shard_of_each_split(hub_has: Load) -> None:
    asked = hub_has([{"text": "a"}, {"text": "b"}])
    assert list(documents("c4", split="validation")) == ["a", "b"]
    list(documents("c4"))
    path, config, options = asked[1]
    assert (path, config) == ("allenai/c4", None) and options["streaming"]
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    with pytest.raises(ValueError, match="unknown split 'dev' of allenai/c4: use train or test"):
        list(documents("c4", split="dev"))


def test_ptb_reads_parquet_and_joins_sentences(hub_has: Load) -> None:
    asked = hub_has([{"sentence": f"s {i}"} for i in range(100)])
    test = list(documents("ptb", split="test"))
    assert len(test) == 2 and "\n\n".join(test).split("\n\n") == [f"s {i}" for i in range(100)]
    assert asked[0][2]["revision"] == "refs/convert/parquet"


def test_any_hub_dataset_by_name(hub_has: Load) -> None:
    asked = hub_has([{"body": "a"}, {"body": ""}, {"body": None}, {"body": "b"}])
    assert list(documents("org/set:small", split="dev", text_column="body")) == ["a", "b"]
    assert asked == [("org/set", "small", {"split": "dev", "streaming": True})]
    assert "trust_remote_code" not in asked[0][2]
    with pytest.raises(ValueError, match=r"org/set has no text in column 'text' \(it has: body\)"):
        list(documents("org/set"))


def test_hub_out_of_reach_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, config: str | None, **options: Any) -> None:
        raise OSError("no route\nand a long story")

    def breaking(path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise TimeoutError

    for load, reason in ((unreachable, "OSError: no route"), (breaking, "TimeoutError")):
        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(ConnectionError, match=rf"{reason}.*'wiki' or 'pydoc'") as caught:
            list(documents("c4", split="test"))
        assert "long story" not in str(caught.value)
    with pytest.raises(ConnectionError, match="no local file is called some/thing"):
        list(documents("some/thing"))


# ---- provenance, and real files in public formats ----


def test_describe_names_licence_but_no_folder(stories: Path) -> None:
    assert isinstance(CORPORA, Registry) and set(hub.NAMED) < set(CORPORA)
    assert describe("wiki").startswith("wiki: ") and describe("wiki").endswith("CC BY-SA 4.0")
    assert "PSF-2.0" in describe("pydoc") and "dataset card" in describe("org/set")
    assert describe(stories) == "local file stories.jsonl; licence: its owner's"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared evaluation data is not here")
@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("wikitext2.valid.raw", {"train": 416, "test": 104, "all": 520}),
        ("c4.sample.jsonl", {"all": 372}),
    ],
)
def test_public_files(
    name: str, windows: dict[str, int], tokenizer: PreTrainedTokenizerBase
) -> None:
    for split, least in windows.items():
        found = token_windows(SHARED / name, tokenizer, split=split, length=512, count=None)
        assert len(found) >= least - 4
