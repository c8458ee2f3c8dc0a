"""The token before: what a boundary that looks back needs, exact with cache, batches and padding.

A whole sequence in one pass shows a boundary every token's predecessor. Token by token it does not:
the last token each boundary has seen is kept inside the key-value cache, as one layer more, so it
belongs to that generation alone and follows the cache wherever it is reordered, repeated or copied.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ghostlib.statistics.features import previous


class LastTokens(DynamicLayer):
    """A layer of the cache that holds the last real token (batch, width) of each boundary."""

    is_croppable = False

    def __init__(self, tokens: Sequence[Tensor]) -> None:
        super().__init__()
        self.tokens = list(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self.tokens = [t[indices.to(t.device)] for t in self.tokens]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.tokens = [t.repeat_interleave(repeats, dim=0) for t in self.tokens]

    def reset(self) -> None:
        """Begin again."""
        self.tokens = []

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what came before the last token is not kept.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a repair with n(prev) keeps one token and cannot go back: use one without it, such as "
            "two-branch-relative, for assisted generation or a cache that is cropped"
        )


class _Pass:
    """One forward pass: which tokens are real, and what each boundary saw last."""

    def __init__(self, real: Tensor | None, before: dict[nn.Module, Tensor]) -> None:
        self.real, self.before = real, before
        self.last: dict[nn.Module, Tensor] = {}


_PASS: ContextVar[_Pass | None] = ContextVar("_PASS", default=None)


def token_before(boundary: nn.Module, x: Tensor) -> Tensor:
    """The real token before each of ``x`` (batch, tokens, width), as the current pass knows it.

    Raises:
        RuntimeError: no pass of the whole model is under way.
    """
    now = _PASS.get()
    if now is None:
        raise RuntimeError(
            "a repair with n(prev) must know padding and cache: call the language model itself, "
            "not its inner model or a layer of it"
        )
    real = None if now.real is None else now.real[:, -x.shape[1] :].to(x.device)
    found, now.last[boundary] = previous(x, real, now.before.get(boundary))
    return found


@contextmanager
def _during(this: _Pass) -> Iterator[None]:
    token = _PASS.set(this)
    try:
        yield
    finally:
        _PASS.reset(token)


def remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``forward`` that keeps the last tokens of its boundaries that look back."""
    names = list(inspect.signature(forward).parameters)[1:]

    @wraps(forward)
    def remembering_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        boundaries = self.looking_back
        if not boundaries:
            return forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        real = _real(given)
        cache = _cache_in(given.values())
        this = _Pass(real, _recall(cache, boundaries))
        with _during(this):
            out = forward(self, *args, **kwargs)
        kept = _cache_in(out.values() if isinstance(out, dict) else out)
        if kept is None:
            kept = cache
        if kept is not None:
            layers = [layer for layer in kept.layers if not isinstance(layer, LastTokens)]
            kept.layers[:] = [*layers, LastTokens([this.last[b] for b in boundaries])]
        return out

    return remembering_forward


def _real(given: dict[str, Any]) -> Tensor | None:
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is None:
        if positions is not None and (positions.diff(dim=-1) != 1).any():
            raise ValueError(
                "position_ids that jump without an attention_mask mean packed sequences, whose "
                "borders a repair with n(prev) does not see: give one sequence a row"
            )
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a repair with n(prev) needs an attention_mask (batch, tokens), got {got}: leave the "
            "cache dynamic, and masks to the model"
        )
    return mask.bool()


def _cache_in(values: Any) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


def _recall(cache: Cache | None, boundaries: Sequence[nn.Module]) -> dict[nn.Module, Tensor]:
    if cache is None or cache.get_seq_length() == 0:
        return {}
    known = next((layer.tokens for layer in cache.layers if isinstance(layer, LastTokens)), [])
    if len(known) != len(boundaries):
        raise ValueError(
            f"this cache holds the last token of {len(known)} boundaries and the model has "
            f"{len(boundaries)}: it was filled by another model; begin with an empty one"
        )
    return dict(zip(boundaries, known, strict=True))
