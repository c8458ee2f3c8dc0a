"""Documents of local files and of the hub, and their splits; no network."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from conftest import tiny_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ghostlib.text import documents as splits
from ghostlib.text.corpora import documents, token_windows

TOKENIZER = tiny_tokenizer(bos=True)


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A .jsonl of 60 documents, a duplicate of one, and a blank line."""
    path = tmp_path / "stories.jsonl"
    lines = [json.dumps({"text": f"Story {i}. " + "And so on. " * (i % 7)}) for i in range(60)]
    path.write_text("\n".join([*lines[:30], "", *lines[30:], lines[3]]) + "\n")
    return path


# ---- splits ----


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


def test_all_is_everything_in_order(stories: Path) -> None:
    every = list(documents(stories, split="all"))
    assert every == [json.loads(line)["text"] for line in stories.read_text().splitlines() if line]
    train, test = (list(documents(stories, split=split)) for split in ("train", "test"))
    assert sorted(train + test) == sorted(set(every))
    assert train != sorted(train) and train != list(documents(stories, seed=1))
    assert sorted(train) == sorted(documents(stories, seed=1))


def test_same_text_under_two_titles_is_in_one_split() -> None:
    pairs = [(f"title {i}", f"text  {i // 20}") for i in range(200)]
    train, test = (dict(splits.kept(pairs, split)) for split in ("train", "test"))
    assert len(train) + len(test) == 10 and not set(train.values()) & set(test.values())


def test_streams_are_ordered_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "BUFFER", 10)
    texts = list(splits.ordered(((str(i), str(i)) for i in range(25)), seed=0))
    for start, stop in ((0, 10), (10, 20), (20, 25)):
        assert sorted(map(int, texts[start:stop])) == list(range(start, stop))
    assert len(texts) == 25


def test_order_and_split_do_not_depend_on_the_machine() -> None:
    assert splits.fraction("Academy Awards") == pytest.approx(0.34115708052346955, abs=1e-12)


@settings(max_examples=60)
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
    assert token_windows(path, TOKENIZER, split="all", length=10, count=None).shape[1] == 10


def test_one_paragraph_has_no_test_part(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("one paragraph\nof two lines")
    assert list(documents(tmp_path / "note.txt")) == ["one paragraph\nof two lines"]
    with pytest.raises(ValueError, match=r"split 'test' of corpus .*note.txt is empty"):
        token_windows(tmp_path / "note.txt", TOKENIZER, split="test")


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
    with pytest.raises(ValueError, match=r"no field 'text' \(it has: body, n\).*text_column"):
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
def test_a_binary_file_is_refused(tmp_path: Path, data: bytes, offset: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.txt is not UTF-8 text \(byte offset {offset}\)"):
        list(documents(path))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such corpus file: .*gone\.txt"):
        documents(tmp_path / "gone.txt")
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "folder.txt").mkdir()
    for name in ("a.csv", "empty"):
        with pytest.raises(ValueError, match=rf"{name} is no \.txt, \.raw, .*, nor a folder that"):
            documents(tmp_path / name)
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(" \n\n")
        for split in ("train", "all"):
            with pytest.raises(ValueError, match=rf"{name} is empty: it has no document"):
                token_windows(tmp_path / name, TOKENIZER, split=split)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
LINES = st.lists(JSON | st.fixed_dictionaries({"text": JSON}), max_size=4).map(
    lambda records: "\n".join(map(json.dumps, records)).encode()
)


def parquet(texts: list[str | None]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), buffer)
    return buffer.getvalue()


@st.composite
def damaged_parquet(draw: st.DrawFn) -> bytes:
    data = bytearray(parquet(draw(st.lists(st.none() | st.text(max_size=8), max_size=4))))
    for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=3)):
        data[place] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


FILES = st.one_of(
    st.tuples(st.sampled_from([".txt", ".raw", ".jsonl", ".parquet"]), st.binary(max_size=80)),
    st.tuples(st.just(".txt"), st.text(max_size=80).map(lambda t: t.encode("utf-8", "replace"))),
    st.tuples(st.just(".jsonl"), LINES),
    st.tuples(st.just(".parquet"), damaged_parquet()),
)


@pytest.mark.thorough
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(FILES, st.sampled_from(["train", "test", "all"]))
@example((".jsonl", b"[" * 100_000), "all")
@example((".jsonl", b'{"text": "half a pair: \\ud800"}'), "all")
@example((".jsonl", b'{"\\n": 1}'), "all")
def test_any_bytes_give_windows_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], split: str
) -> None:
    suffix, data = file
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    try:
        windows = token_windows(path, TOKENIZER, split=split, length=4, count=None)
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert windows.shape[1] == 4 and len(windows)


# ---- hub ----

Load = Callable[[list[dict[str, Any]]], list[tuple[Any, ...]]]


@pytest.fixture
def hub_has(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Replace the hub by the given rows; returns a list that records the calls."""

    def have(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
            calls.append((path, config, options))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return have


def test_wikitext2_rows_become_articles(hub_has: Load) -> None:
    rows = ["", " = Lobster = \n", "", " A lobster . \n"]
    rows += [" = = Name = = \n", " = Crab = \n", " B \n"]
    calls = hub_has([{"text": row} for row in rows])
    test = list(documents("wikitext2", split="test"))
    assert len(test) == 2 and "\n\n".join(test) == "\n\n".join(rows)  # the published protocol
    assert sorted(documents("wikitext2", seed=1)) == sorted(test)
    options = {"split": "test", "streaming": False}
    assert calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", options)


def test_c4_reads_one_shard_of_each_split(hub_has: Load) -> None:
    calls = hub_has([{"text": "a"}, {"text": "b"}])
    assert list(documents("c4", split="validation")) == ["a", "b"]
    list(documents("c4"))
    path, config, options = calls[1]
    assert (path, config) == ("allenai/c4", None) and options["streaming"]
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


def test_ptb_reads_parquet_and_joins_sentences(hub_has: Load) -> None:
    calls = hub_has([{"sentence": f"s {i}"} for i in range(100)])
    test = list(documents("ptb", split="test"))
    assert len(test) == 2 and "\n\n".join(test).split("\n\n") == [f"s {i}" for i in range(100)]
    assert calls[0][2]["revision"] == "refs/convert/parquet"


def test_any_hub_dataset_by_name(hub_has: Load) -> None:
    calls = hub_has([{"body": "a"}, {"body": ""}, {"body": None}, {"body": "b"}])
    assert list(documents("org/set:small", split="dev", text_column="body")) == ["a", "b"]
    assert calls == [("org/set", "small", {"split": "dev", "streaming": True})]
    with pytest.raises(ValueError, match=r"org/set: no field 'text' \(it has: body\)"):
        list(documents("org/set"))


def test_hub_out_of_reach_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, config: str | None, **options: Any) -> None:
        raise OSError("no route\nand a long story")

    def breaking(path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise TimeoutError

    for load, reason in ((unreachable, "OSError: "), (breaking, r"(TimeoutError|OSError: )")):
        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(ConnectionError, match=rf"{reason}.*'wiki' or 'pydoc'") as error:
            list(documents("c4", split="test"))
        assert "long story" not in str(error.value)
    with pytest.raises(ConnectionError, match=r"some/thing could not.*no local file has that"):
        list(documents("some/thing"))
