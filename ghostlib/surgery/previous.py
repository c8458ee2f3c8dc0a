"""The token before: what a boundary that looks back needs, exact with cache, batches and padding.

A whole sequence in one pass shows a boundary every token's predecessor. Token by token it does not:
the last token each boundary has seen is kept with the key-value cache, so it belongs to that
generation alone and follows the cache wherever it is reordered, repeated or copied. The layers of
the cache stay as they are, because transformers sizes and skips attention masks by their kinds.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ghostlib.statistics.features import previous

_PADDING_MASK = "padding_mask"


class RememberingCache:
    """What a cache becomes that keeps the last real token of each boundary.

    Attributes:
        last_tokens: ``{place: (batch, width)}``, by the index of the layer after the boundary.
        positions: how many tokens have passed, padding included.
    """

    last_tokens: dict[int, Tensor]
    positions: int
    is_croppable = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._keep(lambda token: token[beam_idx.to(token.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._keep(lambda token: token[indices.to(token.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._keep(lambda token: token.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Begin again."""
        super().reset()  # type: ignore[misc]
        self.last_tokens, self.positions = {}, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what came before the last token is not kept.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a repair with n(prev) keeps one token and cannot go back: use one without it, such as "
            "two-branch-relative, for assisted generation or a cache that is cropped"
        )

    def _keep(self, change: Callable[[Tensor], Tensor]) -> None:
        self.last_tokens = {place: change(token) for place, token in self.last_tokens.items()}


@cache
def _remembering_kind(kind: type) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        return _empty_cache, (kind,), vars(self)  # this class is made, not imported

    body = {"__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Remembering{kind.__name__}", (RememberingCache, kind), body)


def _empty_cache(kind: type) -> Any:
    remembering_kind = _remembering_kind(kind)
    return remembering_kind.__new__(remembering_kind)


class Pass:
    """One forward pass: which tokens are real, and what each boundary saw last.

    Attributes:
        real: (batch, cached and new tokens), false at padding; None where all are real.
        begin: how many tokens came in earlier passes.
        before: the last real token of what came earlier, by place.
        last: the last real token of this pass, by place.
        tokens: how many came in this pass.
    """

    def __init__(self, real: Tensor | None, begin: int, before: Mapping[int, Tensor]) -> None:
        self.real, self.begin, self.before = real, begin, before
        self.last: dict[int, Tensor] = {}
        self.tokens = 0


_PASS: ContextVar[Pass | None] = ContextVar("_PASS", default=None)


def current_pass() -> Pass | None:
    """The pass of the whole model that is under way, if one is."""
    return _PASS.get()


@contextmanager
def during(this: Pass | None) -> Iterator[None]:
    """Make ``this`` the current pass."""
    token = _PASS.set(this)
    try:
        yield
    finally:
        _PASS.reset(token)


def token_before(place: int, x: Tensor) -> Tensor:
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
    now.tokens = x.shape[1]
    real = None
    if now.real is not None:
        end = now.begin + now.tokens
        if now.real.shape[1] < end:
            raise ValueError(
                f"attention_mask must cover the {end} tokens of cache and input, "
                f"got {now.real.shape[1]}"
            )
        real = now.real[:, now.begin : end].to(x.device)
    before, now.last[place] = previous(x, real, now.before.get(place))
    return before


def remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``forward`` that keeps the last tokens of its boundaries that look back."""
    names = list(inspect.signature(forward).parameters)[1:]

    @wraps(forward)
    def remembering_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        places = self.looking_back
        if not places:
            return forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        real = kwargs.pop(_PADDING_MASK) if _PADDING_MASK in kwargs else _padding(given)
        cache = _cache_in(given.values())
        begin, before = _recall(cache, places)
        this = Pass(None if real is None else real.bool(), begin, before)
        with during(this):
            out = forward(self, *args, **kwargs)
        kept = _cache_in(out.values() if isinstance(out, dict) else out)
        if kept is None:
            kept = cache
        if kept is not None:
            if not isinstance(kept, RememberingCache):
                plain: Any = type(kept)
                kept.__class__ = _remembering_kind(plain)
            kept.last_tokens, kept.positions = this.last, begin + this.tokens
        return out

    return remembering_forward


def handing_on_padding(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A model's ``prepare_inputs_for_generation`` that hands on which tokens are real.

    Static caches get a mask of four dimensions there, from which that cannot be told.
    """

    @wraps(prepare)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        given = kwargs.get("attention_mask")
        if self.looking_back and inputs.get("attention_mask") is not given:
            inputs[_PADDING_MASK] = given
        return inputs

    return prepare_inputs_for_generation


def _padding(given: Mapping[str, Any]) -> Tensor | None:
    """The (batch, tokens) mask among the arguments of a forward pass, if there is padding."""
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
            f"a repair with n(prev) needs an attention_mask (batch, tokens), got {got}: leave "
            "masks of more dimensions to the model"
        )
    return mask


def _cache_in(values: Any) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


def _recall(cache: Cache | None, places: Collection[int]) -> tuple[int, dict[int, Tensor]]:
    """How many tokens the cache has seen, and the last of them at each boundary."""
    if cache is None or cache.get_seq_length() == 0:
        return 0, {}
    known = cache.last_tokens if isinstance(cache, RememberingCache) else {}
    if set(known) != set(places):
        raise ValueError(
            f"this cache holds the last token of {len(known)} boundaries and the model has "
            f"{len(places)}: it was filled by another model; begin with an empty one"
        )
    return cache.positions, known
