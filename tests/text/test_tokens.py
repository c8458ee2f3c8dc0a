"""Tokenising piece by piece gives the tokens of one call, whatever the tokenizer."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ghostlib.text import tokens
from ghostlib.text.tokens import beginning

TRAINING = ["the cat sat on the mat\n\nand 12345 dogs ran to the naïve 東京 sea"] * 4


def letters(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer that says nothing of where its tokens start: one per character."""
    return {"input_ids": [ord(letter) for letter in text]}


def byte_bpe(words: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer; without ``words``, merges run across the whole text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>"]
    )
    inner.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=50, eos_token="<end>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a space before the first word of a call only."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    inner.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """One token a word, white space dropped."""
    inner = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte BPE": lambda: byte_bpe(True),
    "byte BPE across words": lambda: byte_bpe(False),
    "unigram": unigram,
    "words": words,
}

PROSE = st.sampled_from(
    ["the", " cat", "\n", "\n\n", " ", "  ", "1234567", "東京", "e\u0301", "🙂", "the the "]
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def fast(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(PROSE, min_size=1, max_size=80).map("".join), max_size=12),
    wanted=st.none() | st.integers(1, 400),
)
def test_pieces_give_the_tokens_of_one_call(
    fast: PreTrainedTokenizerFast, texts: list[str], wanted: int | None
) -> None:
    whole = fast("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    with patch.multiple(tokens, PIECE=120, OVERLAP=80):
        ids = list(beginning(texts, fast, wanted))
    assert ids == whole[: len(ids)]
    assert len(ids) >= (len(whole) if wanted is None else min(wanted, len(whole)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=30),
    st.integers(1, 81),
)
def test_tokenizers_without_offsets_are_called_with_all_the_text(
    texts: list[str], wanted: int
) -> None:
    whole = [ord(letter) for letter in "\n\n".join(texts)]
    ids = list(beginning(texts, letters, wanted))
    assert ids == whole[: len(ids)] and len(ids) >= min(wanted, len(whole))


def calls(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Lengths of the texts the tokenizer is called with, in pieces of 120 characters."""
    lengths: list[int] = []

    class Counted:
        is_fast = True

        def __call__(self, text: str, **options: bool) -> object:
            lengths.append(len(text))
            return tokenizer(text, **options)

    with patch.multiple(tokens, PIECE=120, OVERLAP=80):
        ids = beginning([text], Counted(), None)
    assert list(ids) == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return lengths


def test_no_call_sees_more_than_a_piece_and_its_overlap() -> None:
    lengths = calls(byte_bpe(True), "the cat sat on the mat. " * 50)
    assert len(lengths) == 11 and max(lengths) == 120 + 80


def test_pieces_that_disagree_are_given_up() -> None:
    """A run of one letter has no seam: merges pair its letters from wherever a piece begins."""
    inner = Tokenizer(models.BPE({"a": 0, "aa": 1, "b": 2}, [("a", "a")]))
    text = "b" + "a" * 1000
    assert calls(PreTrainedTokenizerFast(tokenizer_object=inner), text) == [120, 200, len(text)]


def test_tokens_out_of_order_are_given_up() -> None:
    class Backwards:
        is_fast = True

        def __call__(self, text: str, **options: bool) -> dict[str, list]:
            ids = [ord(letter) for letter in reversed(text)]
            return {
                "input_ids": ids,
                "offset_mapping": [(i, i + 1) for i in range(len(text))][::-1],
            }

    assert list(beginning(["abc", "de"], Backwards(), None)) == [ord(c) for c in "ed\n\ncba"]
