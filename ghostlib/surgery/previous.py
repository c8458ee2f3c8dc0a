"""Previous tokens: the state of a boundary that looks back, exact with cache, batches and padding.

In one pass over a whole sequence, a boundary sees the predecessor of every token. In decoding it
does not: the last token of each boundary is kept with the key-value cache, so it belongs to that
generation alone and follows the cache when it is reordered, repeated or copied. The layers of the
cache stay as they are, because transformers sizes and skips attention masks by their types.
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
    """Mixin for a cache that keeps the last real token of each boundary.

    Attributes:
        last_tokens: ``{place: (batch, width)}``, by the index of the layer after the boundary.
        positions: number of tokens seen, padding included.
    """

    last_tokens: dict[int, Tensor]
    positions: int
    is_croppable = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder by beams."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._keep(lambda token: token[beam_idx.to(token.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select sequences of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._keep(lambda token: token[indices.to(token.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._keep(lambda token: token.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()  # type: ignore[misc]
        self.last_tokens, self.positions = {}, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: tokens before the last one are not kept.

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
def _remembering_class(cls: type) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        return empty_instance, (_remembering_class, cls), vars(self)

    body = {"__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Remembering{cls.__name__}", (RememberingCache, cls), body)


def empty_instance(derive: Callable[[Any], Any], cls: type) -> Any:
    """Instance of the class that ``derive`` makes of ``cls``, which pickle cannot import."""
    derived = derive(cls)
    return derived.__new__(derived)


class Pass:
    """State of one forward pass: the real tokens, and the last one at each boundary.

    Attributes:
        real: (batch, cached and new tokens), false at padding; None if all are real.
        start: number of tokens of earlier passes.
        before: last real token of earlier passes, by place.
        last: last real token of this pass, by place.
        tokens: number of tokens of this pass.
    """

    def __init__(self, real: Tensor | None, start: int, before: Mapping[int, Tensor]) -> None:
        self.real, self.start, self.before = real, start, before
        self.last: dict[int, Tensor] = {}
        self.tokens = 0


_PASS: ContextVar[Pass | None] = ContextVar("_PASS", default=None)


def current_pass() -> Pass | None:
    """The pass of the whole model that is running, or None."""
    return _PASS.get()


@contextmanager
def as_current(state: Pass) -> Iterator[None]:
    """Make ``state`` the current pass."""
    token = _PASS.set(state)
    try:
        yield
    finally:
        _PASS.reset(token)


def previous_tokens(place: int, x: Tensor) -> Tensor:
    """The real token before each token of ``x`` (batch, tokens, width) in the current pass.

    Raises:
        RuntimeError: no pass of the whole model is running.
        ValueError: the attention mask is too short.
    """
    state = _PASS.get()
    if state is None:
        raise RuntimeError(
            "a repair with n(prev) must know padding and cache: call the language model itself, "
            "not its inner model or a layer of it"
        )
    state.tokens = x.shape[1]
    real = None
    if state.real is not None:
        end = state.start + state.tokens
        if state.real.shape[1] < end:
            raise ValueError(
                f"attention_mask must cover the {end} tokens of cache and input, "
                f"got {state.real.shape[1]}"
            )
        real = state.real[:, state.start : end].to(x.device)
    tokens, state.last[place] = previous(x, real, state.before.get(place))
    return tokens


def keep_last_tokens(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a model's ``forward`` keep the last tokens of the boundaries that look back."""
    names = list(inspect.signature(forward).parameters)[1:]

    @wraps(forward)
    def remembering_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        places = self.looking_back
        if not places:
            return forward(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        real = kwargs.pop(_PADDING_MASK) if _PADDING_MASK in kwargs else _padding(arguments)
        cache = _first_cache(arguments.values())
        start, before = _recall(cache, places)
        state = Pass(None if real is None else real.bool(), start, before)
        with as_current(state):
            out = forward(self, *args, **kwargs)
        outputs = out.values() if isinstance(out, dict) else out
        cache = _first_cache((*outputs, cache))
        if cache is not None:
            if not isinstance(cache, RememberingCache):
                cls: Any = type(cache)
                cache.__class__ = _remembering_class(cls)
            cache.last_tokens, cache.positions = state.last, start + state.tokens
        return out

    return remembering_forward


def pass_padding(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make a model's ``prepare_inputs_for_generation`` pass on the mask of real tokens.

    With a static cache it returns a mask of four dimensions, which does not show them.
    """

    @wraps(prepare)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if self.looking_back and inputs.get("attention_mask") is not mask:
            inputs[_PADDING_MASK] = mask
        return inputs

    return prepare_inputs_for_generation


def _padding(arguments: Mapping[str, Any]) -> Tensor | None:
    """The (batch, tokens) mask among the arguments of a forward pass, or None."""
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
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


def _first_cache(values: Any) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


def _recall(cache: Cache | None, places: Collection[int]) -> tuple[int, dict[int, Tensor]]:
    """Number of tokens the cache has seen, and the last one at each boundary."""
    if cache is None or cache.get_seq_length() == 0:
        return 0, {}
    last_tokens = cache.last_tokens if isinstance(cache, RememberingCache) else {}
    if set(last_tokens) != set(places):
        raise ValueError(
            f"this cache holds the last token of {len(last_tokens)} boundaries and the model has "
            f"{len(places)}: it was filled by another model; begin with an empty one"
        )
    return cache.positions, last_tokens
