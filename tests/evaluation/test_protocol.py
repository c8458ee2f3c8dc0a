"""The published protocol against its parts, and bytes against decoded tokens."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ghostlib as gl
from ghostlib.evaluation.perplexity import PUBLISHED, corpus_perplexity, token_bytes
from ghostlib.text.tokens import SEPARATOR

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXT = "The theory – größer als 東京 – of the thing.\n\n" * 40


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: spaces as ▁, one in front, unknown characters as their bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij.ö", "ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocabulary, [("a", "b")], byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_is_the_perplexity_of_the_same_windows(book: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    result = corpus_perplexity(model, tokenizer, book, split="all", length=32, batch_size=3)
    windows = gl.token_windows(book, tokenizer, split="all", length=32, count=None)
    losses = gl.window_losses(model, windows)
    assert result.perplexity == pytest.approx(gl.perplexity(model, windows), rel=1e-6)
    assert result.nll_se == pytest.approx(float(losses.std()) / len(windows) ** 0.5, rel=1e-5)
    assert (result.windows, result.length, result.tokens) == (*windows.shape, len(windows) * 31)
    assert (result.corpus, result.split, result.separator) == ("book.txt", "all", "\n\n")
    assert result.special_tokens == [] and result.bos is None


@pytest.mark.parametrize("bos", [False, True])
def test_bits_per_byte_of_a_uniform_model(book: Path, bos: bool) -> None:
    """Each token costs log2(300) bits; without merges it is one byte, except a special one."""
    book.write_text("The theory of the thing.\n\n" * 9)
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer(0, bos)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = corpus_perplexity(model, tokenizer, book, split="all", length=16, count=3, bos=False)
    assert result.perplexity == pytest.approx(300, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(300), rel=1e-5)
    assert result.bytes == result.tokens == 45
    assert result.special_tokens == (["<bos>"] if bos else [])
    one = corpus_perplexity(model, tokenizer, book, split="all", length=16, count=1)
    assert one.nll_se is None


@pytest.mark.parametrize("bos", [False, None, True])
def test_bytes_are_those_the_scored_tokens_cover(book: Path, bos: bool | None) -> None:
    """Against decoding all of a window but its first token; a window may cut through a letter."""
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer(bos=True)
    result = corpus_perplexity(model, tokenizer, book, split="all", length=64, bos=bos)
    windows = gl.token_windows(book, tokenizer, split="all", length=64, count=None, bos=True)
    if bos is False:
        ids = torch.tensor(tokenizer(TEXT.strip())["input_ids"])
        windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    assert result.perplexity == pytest.approx(gl.perplexity(model, windows), rel=1e-6)
    assert result.bos == (None if bos is False else "<bos>")
    assert result.special_tokens == (["<bos>"] if bos is False else [])
    decoded = sum(len(tokenizer.decode(row[1:]).encode(errors="replace")) for row in windows)
    assert result.bytes is not None
    assert result.bytes == pytest.approx(decoded, abs=3 * result.windows)
    assert result.tokens == windows[:, 1:].numel()
    bits = result.nll / math.log(2) * result.tokens
    assert result.bits_per_byte == pytest.approx(bits / result.bytes, rel=1e-12)


@given(st.text(max_size=40))
def test_byte_level_tokens_cover_the_text(text: str) -> None:
    """Up to a token's end the bytes agree, except for those of an unfinished character."""
    sizes = token_bytes(TOKENIZER, text)
    pieces = TOKENIZER.convert_ids_to_tokens(
        TOKENIZER(text, split_special_tokens=True)["input_ids"]
    )
    assert sizes is not None and sizes.sum() == len(text.encode())
    unfinished = np.cumsum([len(piece) for piece in pieces]) - np.cumsum(sizes)
    assert ((unfinished >= 0) & (unfinished <= 3)).all()
    if text.isascii():
        assert sizes.tolist() == [len(piece) for piece in pieces]


TOKENIZER = tiny_tokenizer()
BYTE_FALLBACK = byte_fallback()


@given(st.text(alphabet="abcj öß東😀", max_size=30))
def test_tokens_that_fall_back_to_bytes(text: str) -> None:
    sizes = token_bytes(BYTE_FALLBACK, text)
    pieces = BYTE_FALLBACK.convert_ids_to_tokens(BYTE_FALLBACK(text)["input_ids"])
    assert sizes is not None and sizes.sum() == len(text.encode())
    for index, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
        if not piece.startswith("<0x"):  # the first piece begins with a space that is not in text
            assert size == len(piece.replace("▁", " ").encode()) - (index == 0)


def test_dropped_text_and_tokenizers_without_offsets() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = token_bytes(PreTrainedTokenizerFast(tokenizer_object=raw), "a  b ö")
    assert sizes is not None and sizes.tolist() == [3, 2, 2]

    class Slow:
        is_fast = False

    assert token_bytes(Slow(), "a") is None  # type: ignore[arg-type]


def test_without_offsets_there_is_still_a_perplexity(book: Path, monkeypatch: Any) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    monkeypatch.setattr("ghostlib.evaluation.perplexity.token_bytes", lambda *_, **__: None)
    result = corpus_perplexity(model, tokenizer, book, split="all", length=16, count=2)
    assert result.bits_per_byte is None and result.bytes is None and result.perplexity > 1


def test_published_corpora_have_their_splits_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        splits.append(options["split"])
        return [{"text": "the theory " * 9, "sentence": "the thing " * 9} for _ in range(400)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    results = [
        corpus_perplexity(model, tokenizer, name, length=8, batch_size=256) for name in PUBLISHED
    ]
    assert splits == ["test", "validation", "validation"] == [result.split for result in results]
    assert results[2].windows == 256 < results[0].windows
    few = corpus_perplexity(model, tokenizer, "c4", split="test", length=8, count=2)
    assert (few.windows, few.split, few.corpus) == (2, "test", "c4")


def test_bad_requests(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"tokens, fewer than one window of 99999"):
        corpus_perplexity(model, tokenizer, book, split="all", length=99999)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos=True, but this tokenizer has no BOS token"):
        corpus_perplexity(model, tokenizer, book, split="all", length=8, bos=True)
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=OSError("no route")))
    with pytest.raises(ConnectionError, match=r"could not be read.*'wiki' or 'pydoc', or the path"):
        corpus_perplexity(model, tokenizer, "wikitext2")


@pytest.mark.embedded
def test_embedded_model_on_embedded_text(embedded: Any) -> None:
    model, tokenizer = embedded
    result = corpus_perplexity(model, tokenizer, "wiki", length=256, count=3)
    assert 5 < result.perplexity < 60
    assert 0.5 < result.bits_per_byte < 1.5  # type: ignore[operator]
    assert result.split == "test" and result.special_tokens == []


@pytest.mark.skipif(not SHARED.exists(), reason="the shared evaluation data is not here")
@pytest.mark.embedded
@pytest.mark.parametrize("name", ["wikitext2.valid.raw", "c4.sample.jsonl"])
def test_public_files_are_covered_to_the_byte(name: str, embedded: Any) -> None:
    text = SEPARATOR.join(gl.documents(SHARED / name, split="all"))[:200_000]
    sizes = token_bytes(embedded[1], text)
    ids = embedded[1](text, verbose=False)["input_ids"]
    assert sizes is not None and len(sizes) == len(ids)
    assert np.sum(sizes) == len(text.encode())
