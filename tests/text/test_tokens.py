"""Tokenising in pieces gives the tokens of one call, for any tokenizer; BOS; special tokens."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from ghostlib.text import tokens
from ghostlib.text.tokens import bos_token, encode, token_ids

TRAINING = ["the cat sat on the mat\n\nand 12345 dogs ran to the naïve 東京 sea"] * 4


def letters(text: str, **options: bool) -> dict[str, list[int]]:
    """A tokenizer without offsets: one token per character."""
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


@pytest.mark.thorough
@settings(max_examples=60)
@given(
    texts=st.lists(st.lists(PROSE, min_size=1, max_size=80).map("".join), max_size=12),
    least=st.none() | st.integers(1, 400),
)
def test_pieces_give_the_tokens_of_one_call(
    fast: PreTrainedTokenizerFast, texts: list[str], least: int | None
) -> None:
    expected = fast("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    with patch.multiple(tokens, PIECE=120, OVERLAP=80):
        id_array, text = token_ids(texts, fast, least)
    ids = list(id_array)
    assert ids == expected[: len(ids)] and "\n\n".join(texts).startswith(text)
    covered = fast(text, add_special_tokens=False, verbose=False)["input_ids"]
    stable = max(0, len(ids) - 40)  # the last tokens may differ from those of the complete text
    assert covered[:stable] == ids[:stable]
    assert len(ids) >= (len(expected) if least is None else min(least, len(expected)))


@settings(max_examples=60)
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=30),
    st.integers(1, 81),
)
def test_tokenizers_without_offsets_are_called_with_all_the_text(
    texts: list[str], least: int
) -> None:
    expected = [ord(letter) for letter in "\n\n".join(texts)]
    ids = list(token_ids(texts, letters, least)[0])
    assert ids == expected[: len(ids)] and len(ids) >= min(least, len(expected))


def calls(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Lengths of the texts the tokenizer is called with, in pieces of 120 characters."""
    lengths: list[int] = []

    class Counted:
        is_fast = True

        def __call__(self, text: str, **options: bool) -> object:
            lengths.append(len(text))
            return tokenizer(text, **options)

    with patch.multiple(tokens, PIECE=120, OVERLAP=80):
        ids, covered = token_ids([text], Counted(), None)
    assert covered == text
    assert list(ids) == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return lengths


def test_no_call_sees_more_than_a_piece_and_its_overlap() -> None:
    lengths = calls(byte_bpe(True), "the cat sat on the mat. " * 50)
    assert len(lengths) == 11 and max(lengths) == 120 + 80


def test_pieces_that_disagree_fall_back_to_one_call() -> None:
    """In a run of one letter, merges pair the letters from the start of the piece."""
    inner = Tokenizer(models.BPE({"a": 0, "aa": 1, "b": 2}, [("a", "a")]))
    text = "b" + "a" * 1000
    assert calls(PreTrainedTokenizerFast(tokenizer_object=inner), text) == [120, 200, len(text)]


def test_tokens_out_of_order_fall_back_to_one_call() -> None:
    class Backwards:
        is_fast = True

        def __call__(self, text: str, **options: bool) -> dict[str, list]:
            offsets = [(i, i + 1) for i in range(len(text))]
            return {"input_ids": [ord(c) for c in reversed(text)], "offset_mapping": offsets[::-1]}

    ids, _ = token_ids(["abc", "de"], Backwards(), None)
    assert list(ids) == [ord(c) for c in "ed\n\ncba"]


# ---- special tokens ----


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: BOS, then one token per character."""

    def __init__(self) -> None:
        self.letters = ["<s>", *map(chr, range(32, 127))]
        super().__init__(bos_token="<s>")

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: place for place, letter in enumerate(self.letters)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]

    def build_inputs_with_special_tokens(self, ids: list[int], pair: object = None) -> list[int]:
        return [0, *ids]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(bos=True), Slow()], ids=["fast", "slow"])
def test_special_tokens_in_a_document_are_text(tokenizer: PreTrainedTokenizer) -> None:
    bos = tokenizer.bos_token
    text = f"a {bos} and {bos}{bos} b"
    assert tokenizer.bos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encode(tokenizer, text)["input_ids"]
    assert tokenizer.bos_token_id not in ids and list(token_ids([text], tokenizer, None)[0]) == ids
    if tokenizer.is_fast:
        assert tokenizer.decode(ids) == text
    # the tokenizer is unchanged
    assert tokenizer.bos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_mistral_common_gets_no_option_that_it_rejects() -> None:
    class MistralCommonBackend:
        def __call__(self, text: str, **options: bool) -> dict[str, bool]:
            return options

    assert encode(MistralCommonBackend(), "a") == {"add_special_tokens": False, "verbose": False}


def test_bos_follows_the_tokenizer_by_default() -> None:
    adds, has, none = tiny_tokenizer(bos=True), tiny_tokenizer(), byte_bpe(True)
    assert bos_token(adds) == "<bos>" and bos_token(Slow()) == "<s>"
    assert all(bos_token(tokenizer) is None for tokenizer in (has, none, letters))
    assert bos_token(has, True) == "<bos>"
    assert bos_token(adds, False) is None and bos_token(none, False) is None


def test_a_token_added_at_the_end_is_no_bos() -> None:
    ends = tiny_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <bos>", None, [("<bos>", 1)]
    )
    assert ends("a")["input_ids"][-1] == ends.bos_token_id and bos_token(ends) is None


@pytest.mark.parametrize("bos", [1, 0, "yes"])
def test_bos_is_true_false_or_none(bos: Any) -> None:
    with pytest.raises(ValueError, match=f"bos must be True, False or None .*, not {bos!r}"):
        bos_token(tiny_tokenizer(), bos)


def test_bos_of_a_tokenizer_without_one_is_refused() -> None:
    for tokenizer in (byte_bpe(True), letters):
        with pytest.raises(ValueError, match="bos=True, but this tokenizer has no BOS token"):
            bos_token(tokenizer, True)
