"""Texts → token ids, exactly as if they were joined and tokenised in one call.

One call takes some 600 bytes per token. So the joined text is tokenised in overlapping pieces, and
neighbouring pieces are cut where both agree on the tokens of a stretch of text. If they do not, or
if the tokenizer does not report the offsets of its tokens, everything is tokenised in one call.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import tee
from typing import Any

SEPARATOR = "\n\n"
# The last tokens of the beginning of a text may differ from those of the complete text.
MARGIN = 64
# Characters tokenised in one call, and how many of them the next call repeats.
PIECE, OVERLAP = 50_000, 2_000


def bos_token(tokenizer: Any, bos: bool | None = None) -> str | None:
    """The token that `token_windows` puts first in every window, or None.

    Args:
        tokenizer: a Hugging Face tokenizer.
        bos: whether windows begin with BOS; None for the tokenizer's default: those of Llama 3,
            Gemma and Mistral put BOS before every text, those of GPT-2, Qwen and SmolLM2 do not.

    Raises:
        ValueError: ``bos=True`` without a BOS token, or an invalid ``bos``.
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
    # mistral-common always treats special tokens as text, and rejects the option.
    if not type(tokenizer).__name__.startswith("MistralCommon"):
        options["split_special_tokens"] = True
    # verbose=False: no warning that a corpus is longer than the model's context
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def token_ids(texts: Iterable[str], tokenizer: Any, least: int | None) -> tuple["array[int]", str]:
    """Token ids of the texts joined by a blank line: at least the first ``least``, or all.

    Returns:
        The ids, and a text that begins with the text they encode.
    """
    texts, again = tee(texts)
    pieces = _piecewise(texts, tokenizer, least) if getattr(tokenizer, "is_fast", False) else None
    return pieces or _at_once(again, tokenizer, least)


def _piecewise(
    texts: Iterator[str], tokenizer: Any, least: int | None
) -> tuple["array[int]", str] | None:
    """`token_ids`, piece by piece; None if two pieces disagree on the text around their cut."""
    ids, text = array("q"), ""
    begin = cut = 0  # the first character of this piece, and the first whose token is taken
    seam: list[tuple[int, int]] = []  # tokens of the last piece around the cut
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
        if least is not None and len(ids) >= least:
            break
        begin, cut, seam = len(text) - OVERLAP, end, _around(end, tokens)
    return ids, text


def _around(cut: int, tokens: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, token) for start, token in tokens if abs(start - cut) <= OVERLAP // 4]


def _slices(texts: Iterator[str], size: int) -> Iterator[str]:
    """The joined texts in slices of ``size`` characters; the last is shorter, and may be empty."""
    buffer, separator = "", ""
    for text in texts:
        buffer += separator + text
        separator = SEPARATOR
        full = len(buffer) // size * size
        yield from (buffer[start : start + size] for start in range(0, full, size))
        buffer = buffer[full:]
    yield buffer


def _at_once(texts: Iterator[str], tokenizer: Any, least: int | None) -> tuple["array[int]", str]:
    """`token_ids` in one call, repeated with more text until there are enough tokens."""
    ids, text = array("q"), ""
    for piece in _slices(texts, sys.maxsize if least is None else 5 * (least + MARGIN)):
        text += piece
        ids = array("q", encode(tokenizer, text)["input_ids"])
        if least is not None and len(ids) >= least + MARGIN:
            break
    return ids, text
