"""Texts → token ids, exactly as if they were joined and tokenised in one call.

A tokenizer keeps about a hundred bytes for every token of a call, beside the ids that are wanted.
So the joined text is tokenised in overlapping pieces, and neighbouring pieces are cut where both
made the same tokens of a whole stretch of text. Where they did not, or where a tokenizer does not
say at which character its tokens start, everything is tokenised in one call after all.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

SEPARATOR = "\n\n"
# Tokens at the end of a tokenised beginning of a text may differ from those of the whole text.
MARGIN = 64
# Characters tokenised in one call, and how many of them the next call sees again.
PIECE, OVERLAP = 50_000, 2_000

# (where a token starts, its id)
Token = tuple[int, int]


def beginning(texts: Iterable[str], tokenizer: Any, wanted: int | None) -> "array[int]":
    """Token ids of the texts joined by a blank line, of all or at least the first ``wanted``."""
    stream, read = iter(texts), []
    if getattr(tokenizer, "is_fast", False):

        def recorded() -> Iterator[str]:
            for text in stream:
                read.append(text)
                yield text

        ids = _piecewise(recorded(), tokenizer, wanted)
        if ids is not None:
            return ids
    return array("q", at_once(chain(read, stream), tokenizer, wanted)[0])


def _piecewise(texts: Iterator[str], tokenizer: Any, wanted: int | None) -> "array[int] | None":
    """`beginning`, piece by piece; None where two pieces disagree on the text around their cut."""
    ids: array[int] = array("q")
    text, begin = "", 0
    seam: list[Token] | None = None  # the last piece's tokens around the cut
    for piece in _slices(texts, PIECE):
        text += piece
        made = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        starts = (start for start, _ in made["offset_mapping"])
        tokens: list[Token] = list(zip(starts, made["input_ids"], strict=True))
        if any(later < start for (start, _), (later, _) in pairwise(tokens)):
            return None
        if seam is not None and _around_cut(tokens, 0) != seam:
            return None
        last = len(piece) < PIECE
        end = len(text) if last else len(text) - OVERLAP // 2
        stop = len(tokens) if last else bisect_left(tokens, (end,))
        ids.extend(token for _, token in tokens[bisect_left(tokens, (begin,)) : stop])
        if wanted is not None and len(ids) >= wanted:
            break
        seam = _around_cut(tokens, len(text) - OVERLAP)
        text, begin = text[-OVERLAP:], OVERLAP // 2
    return ids


def _around_cut(tokens: list[Token], overlap: int) -> list[Token]:
    """Tokens starting in the middle half of the overlap, which starts at character ``overlap``."""
    first, last = (overlap + OVERLAP * quarter // 4 for quarter in (1, 3))
    found = tokens[bisect_left(tokens, (first,)) : bisect_left(tokens, (last,))]
    return [(start - overlap, token) for start, token in found]


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


def at_once(
    texts: Iterator[str], tokenizer: Any, wanted: int | None, special: bool = False
) -> tuple[list[int], str]:
    """`beginning` in one call, repeated with more text until there are enough tokens.

    Args:
        special: let the tokenizer add its own special tokens.

    Returns:
        The ids, and the text they are of.
    """
    joined: list[str] = []
    characters, exhausted = 0, False
    target = None if wanted is None else 5 * (wanted + MARGIN)
    while True:
        while not exhausted and (target is None or characters < target):
            text = next(texts, None)
            if text is None:
                exhausted = True
            else:
                joined.append(text)
                characters += len(text) + len(SEPARATOR)
        whole = SEPARATOR.join(joined)[:target]
        # verbose: or else transformers warns that a whole corpus is longer than the model's context
        ids: list[int] = tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"]
        if wanted is None or target is None or len(ids) >= wanted + MARGIN:
            return ids, whole
        if exhausted and target >= characters:
            return ids, whole
        target = 1 + int(1.1 * target * (wanted + MARGIN) / max(len(ids), 1))
