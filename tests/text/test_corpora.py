"""Windows of named corpora and files: their tokens, with and without BOS, and every error."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import ghostlib as gl
from ghostlib.common import Registry
from ghostlib.text.assets import embedded_model_dir
from ghostlib.text.corpora import CORPORA, documents, token_windows, tokenised
from ghostlib.text.documents import Corpus

SHARED = Path(__file__).parents[3] / "shared" / "data"


def letters(text: str, **options: bool) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    return {"input_ids": [ord(letter) for letter in text]}


def pages(text: str, **options: bool) -> dict[str, list[int]]:
    """A tokenizer with unusually long tokens: one per 40 characters."""
    return {"input_ids": [ord(text[i]) for i in range(0, len(text), 40)]}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A running text of 40 paragraphs, two of which name a special token."""
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of <bos> and <eos>, the thing." for i in range(40)))
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
    every = list(documents("wiki", split="all"))
    assert set(train) | set(test) == set(every)
    assert every[5].startswith("Academy Awards\n\nThe Academy Awards, more commonly known as")


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
    """The results in the notebooks are those of these tokens."""
    windows = token_windows("wiki", tokenizer, length=2048, count=2)
    assert (
        tokenizer.decode(windows[0, :12])
        == "Cultural Revolution\n\nThe Cultural Revolution, formally known as the"
    )


# ---- windows on any text ----


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


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("default", [True, False])
def test_every_window_begins_with_bos_where_it_should(
    book: Path, default: bool, bos: bool | None
) -> None:
    tokenizer = tiny_tokenizer(bos=default)
    windows = token_windows(book, tokenizer, split="all", length=16, count=None, bos=bos)
    text = book.read_text()
    stream = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(stream) == text
    if default if bos is None else bos:
        assert (windows[:, 0] == tokenizer.bos_token_id).all()
        windows = windows[:, 1:]
    body = windows.shape[1]
    assert windows.flatten().tolist() == stream[: len(stream) // body * body]
    assert not torch.isin(windows, torch.tensor([1, 2])).any()  # <bos> and <eos> in it are text
    few = token_windows(book, tokenizer, split="all", length=16, count=3, bos=bos)
    assert torch.equal(few[:, -body:], windows[:3])


def test_bos_is_never_scored(book: Path) -> None:
    """As many losses as text tokens, each given the tokens before it; from all logits."""
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer(bos=True)
    windows = token_windows(book, tokenizer, length=16, count=4)
    with torch.no_grad():
        log_probs = model(windows).logits.double().log_softmax(-1)
    expected = -log_probs[:, :-1].gather(2, windows[:, 1:, None]).mean((1, 2))
    torch.testing.assert_close(gl.window_losses(model, windows), expected, rtol=1e-5, atol=1e-5)


def test_one_long_stream_begins_with_what_the_tokenizer_adds(book: Path) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    options: dict[str, Any] = {"split": "all", "length": 8, "count": 5, "bos": False}
    plain, text = tokenised(book, tokenizer, **options)
    published, same_text = tokenised(book, tokenizer, **options, special_tokens=True)
    assert text == same_text and text.startswith("Paragraph 0 of <bos>")
    assert published.flatten().tolist() == [1, *plain.flatten().tolist()[:-1]]
    assert torch.equal(plain, token_windows(book, tokenizer, **options))


def test_numpy_integers_are_integers(book: Path) -> None:
    length, count, seed = np.array([10, 2, 1])
    windows = token_windows(book, letters, length=length, count=count, seed=seed)
    assert torch.equal(windows, token_windows(book, letters, length=10, count=2, seed=1))


# ---- errors ----


def test_bad_arguments(book: Path) -> None:
    for corpus in ("wiki", "c4", "wikitext2"):
        with pytest.raises(ValueError, match=f"unknown split 'dev' of corpus {corpus}: use one of"):
            documents(corpus, split="dev")
    with pytest.raises(ValueError, match="has no BOS token"):
        token_windows(book, letters, bos=True)
    with pytest.raises(ValueError, match=r"length = 1 has room for <bos> alone: use at least 2"):
        token_windows(book, tiny_tokenizer(bos=True), length=1)
    size = len("\n\n".join(documents(book)))
    with pytest.raises(ValueError, match=rf"has {size} tokens, fewer than one window of 99999"):
        token_windows(book, letters, length=99999)
    with pytest.raises(
        ValueError, match=rf"has {size // 100} windows of 100 tokens.*count <= {size // 100}"
    ):
        token_windows(book, letters, length=100, count=9999)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("wikki", r"unknown corpus 'wikki'; did you mean 'wiki'.*org/name"),
        ("", "unknown corpus ''"),
        ("../../etc/passwd", r"(no such corpus file|is no \.txt)"),
        ("org/../name", "unknown corpus"),
        ("'; drop 'table", "unknown corpus"),
        ("<script>", "unknown corpus '<script>'"),
        ("two\nlines", r"unknown corpus .*two\\+nlines"),
        ("\x1b[31mred", r"unknown corpus .*x1b\[31mred"),
        ("nul\0byte", r"unknown corpus .*nul\\+x00byte"),
        ("x" * 10_000, "unknown corpus 'xxxx"),
        ("x" * 10_000 + ".txt", r"no such corpus file: x{300}… \(10,004 characters\)"),
        ("~nobody-of-this-name/a.txt", "no such corpus file: ~nobody"),
        (Path("two\nlines.txt"), r"no such corpus file: 'two\\nlines\.txt'"),
        (7, "corpus must be text or a path, got 7"),
        (None, "corpus must be text or a path, got None"),
        (b"wiki", "corpus must be text or a path"),
    ],
)
def test_hostile_names_get_one_clear_line(corpus: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        token_windows(corpus, letters)
    text = str(error.value)
    assert text.isprintable() and len(text) < 1000


def test_corpora_have_a_description_and_a_licence() -> None:
    assert isinstance(CORPORA, Registry)
    assert {"wiki", "pydoc", "wikitext2", "c4", "ptb"} <= set(CORPORA)
    assert str(CORPORA["wiki"]).endswith("Wikipedia articles; licence: CC BY-SA 4.0")


def test_a_corpus_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [(f"title {i}", f"text {i}") for i in range(50)]
    entry = Corpus("fifty short texts", "CC0", lambda split, column: every)
    monkeypatch.setitem(CORPORA, "fifty", entry)
    train, test = (set(documents("fifty", split=split)) for split in ("train", "test"))
    assert not train & test and train | test == {text for _, text in every}


@pytest.mark.thorough
def test_documents_are_read_without_heavy_libraries() -> None:
    """torch, transformers and datasets are imported where they are needed."""
    code = """
import sys, types
package = types.ModuleType("ghostlib")
package.__path__ = [sys.argv[1]]
sys.modules["ghostlib"] = package  # without what its __init__ imports
import ghostlib.text.corpora
next(ghostlib.text.corpora.documents("pydoc"))
print(*({"torch", "transformers", "datasets", "pyarrow", "numpy"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(Path(gl.__file__).parent)]
    assert subprocess.check_output(command, text=True).strip() == ""


# ---- real files in public formats ----


@pytest.mark.embedded
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
    for split, count in windows.items():
        every = token_windows(SHARED / name, tokenizer, split=split, length=512, count=None)
        assert len(every) >= count - 4
