"""Texts → token ids, exactly as if they were joined and tokenised in one call.

A tokenizer keeps some hundred bytes for every token of a call, beside the ids that are wanted.
So the joined text is tokenised in overlapping pieces, and neighbouring pieces are cut where both
made the same tokens of a whole stretch of text. Where they did not, or where a tokenizer does not
say at which character its tokens start, everything is tokenised in one call after all.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import tee
from typing import Any

SEPARATOR = "\n\n"
# Tokens at the end of a tokenised beginning of a text may differ from those of the whole text.
MARGIN = 64
# Characters tokenised in one call, and how many of them the next call sees again.
PIECE, OVERLAP = 50_000, 2_000


def bos_token(tokenizer: Any, bos: bool | None = None) -> str | None:
    """The token that `token_windows` puts first in every window, for records; None for none.

    Args:
        tokenizer: a Hugging Face tokenizer.
        bos: None for what the tokenizer does by default: those of Llama 3, Gemma and Mistral put
            BOS before every text, those of GPT-2, Qwen and SmolLM2 do not. True or False to put
            it there, or not, whatever the default.

    Raises:
        ValueError: ``bos=True`` and the tokenizer has no BOS token, or no such ``bos``.
    """
    token: str | None = getattr(tokenizer, "bos_token", None)
    if not isinstance(bos, bool | None):
        raise ValueError(f"bos must be True, False or None (the tokenizer's default), not {bos!r}")
    if bos and token is None:
        raise ValueError(
            "bos=True, but this tokenizer has no BOS token: use bos=False or set its bos_token"
        )
    if bos is None and token is not None:
        bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return token if bos else None


def encode(tokenizer: Any, text: str, **options: bool) -> Any:
    """``tokenizer(text, **options)`` without special tokens; those in ``text`` are text.

    A ``"<|im_start|>"`` in a document does not become the special token.
    """
    # mistral-common reads all text as text, and refuses to be asked for it.
    if not type(tokenizer).__name__.startswith("MistralCommon"):
        options["split_special_tokens"] = True
    # verbose: or else transformers warns that a whole corpus is longer than the model's context
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def token_ids(texts: Iterable[str], tokenizer: Any, wanted: int | None) -> tuple["array[int]", str]:
    """Token ids of the texts joined by a blank line, of all or at least the first ``wanted``.

    Returns:
        The ids, and a text that begins with what they cover.
    """
    texts, again = tee(texts)
    whole = _piecewise(texts, tokenizer, wanted) if getattr(tokenizer, "is_fast", False) else None
    return whole or _at_once(again, tokenizer, wanted)


def _piecewise(
    texts: Iterator[str], tokenizer: Any, wanted: int | None
) -> tuple["array[int]", str] | None:
    """`token_ids`, piece by piece; None where two pieces disagree on the text around their cut."""
    ids, text = array("q"), ""
    begin = cut = 0  # where this piece begins, and from where on its tokens are taken
    seam: list[tuple[int, int]] = []  # the last piece's tokens around the cut
    for piece in _slices(texts, PIECE):
        text += piece
        encoded = encode(tokenizer, text[begin:], return_offsets_mapping=True)
        starts = [begin + start for start, _ in encoded["offset_mapping"]]
        tokens = list(zip(starts, encoded["input_ids"], strict=True))
        if starts != sorted(starts) or (begin and _around(cut, tokens) != seam):
            return None
        last = len(piece) < PIECE
        end = len(text) + 1 if last else len(text) - OVERLAP // 2
        ids.extend(token for start, token in tokens if cut <= start < end)
        if wanted is not None and len(ids) >= wanted:
            break
        begin, cut, seam = len(text) - OVERLAP, end, _around(end, tokens)
    return ids, text


def _around(cut: int, tokens: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, token) for start, token in tokens if abs(start - cut) <= OVERLAP // 4]


def _slices(texts: Iterator[str], size: int) -> Iterator[str]:
    """The joined texts in slices of ``size`` characters; the last is shorter, and may be empty."""
    held, separator = "", ""
    for text in texts:
        held += separator + text
        separator = SEPARATOR
        whole = len(held) // size * size
        yield from (held[start : start + size] for start in range(0, whole, size))
        held = held[whole:]
    yield held


def _at_once(texts: Iterator[str], tokenizer: Any, wanted: int | None) -> tuple["array[int]", str]:
    """`token_ids` in one call, repeated with more text until there are enough tokens."""
    ids, text = array("q"), ""
    for piece in _slices(texts, sys.maxsize if wanted is None else 5 * (wanted + MARGIN)):
        text += piece
        ids = array("q", encode(tokenizer, text)["input_ids"])
        if wanted is not None and len(ids) >= wanted + MARGIN:
            break
    return ids, text
