"""Boundaries: the places where the stream is cut when decoder layers are removed."""

import operator
from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from ghostlib.common import at_least, checked, is_integer, is_kind, short_repr


class Boundary(NamedTuple):
    """Removed layers ``start … stop - 1``: the stream must jump from ``X_pre`` to ``X_post``.

    ``start`` is the index of the first removed layer, whose input is ``X_pre``; ``stop`` is the
    index of the next kept layer, whose input in the dense model is ``X_post``. With ``L`` layers,
    ``stop == L`` means that the final norm receives the stream.
    """

    start: int
    stop: int

    @property
    def removed(self) -> range:
        """Indices of the removed layers."""
        return range(self.start, self.stop)

    def __str__(self) -> str:
        return f"({self.start}, {self.stop})"


def check_boundary(boundary: Boundary | tuple[int, int], num_layers: int | None = None) -> Boundary:
    """Return ``boundary`` as a `Boundary`; `ValueError` if invalid or outside the model."""
    if not is_kind(boundary, tuple[int, int]):
        raise ValueError(
            f"boundary must be a pair of whole numbers (start, stop), got {short_repr(boundary)}"
        )
    start, stop = map(operator.index, boundary)
    if num_layers is None and not 0 <= start < stop:
        raise ValueError(f"boundary ({start}, {stop}) is none: it needs 0 <= start < stop")
    if num_layers is not None and not 0 <= start < stop <= num_layers:
        raise ValueError(
            f"boundary ({start}, {stop}) does not fit a model of {num_layers} layers: "
            f"it needs 0 <= start < stop <= {num_layers}"
        )
    return Boundary(start, stop)


def check_order(
    boundaries: Iterable[Boundary | tuple[int, int]], num_layers: int
) -> list[Boundary]:
    """Return boundaries in ascending order with kept layers in between; `ValueError` otherwise."""
    gaps = [check_boundary(boundary, num_layers) for boundary in boundaries]
    for before, after in pairwise(gaps):
        if after.start <= before.stop:
            raise ValueError(
                f"boundaries {before} and {after} overlap, touch or are out of order: give the "
                "maximal runs of removed layers in ascending order, as runs(layers, …) does"
            )
    return gaps


def _index(layer: Any) -> int:
    if not is_integer(layer):
        raise ValueError(f"layers must be integers, such as 12, got {layer!r}")
    return operator.index(layer)


@checked
def runs(layers: Iterable[int], num_layers: int) -> list[Boundary]:
    """Group removed layers into maximal runs, one `Boundary` each, in ascending order.

    Adjacent removed layers share one boundary, so one operator repairs them together (paper,
    section 3.2.3: one operator per gap).

    Args:
        layers: indices of the layers to remove, in any order, without repetition.
        num_layers: number of decoder layers of the dense model.

    Raises:
        ValueError: no layers, all of them, or one that is not an integer, repeated or out of range.

    >>> runs([25, 12, 13, 14], num_layers=30)
    [Boundary(start=12, stop=15), Boundary(start=25, stop=26)]
    """
    ordered = sorted(_index(layer) for layer in layers)
    at_least(1, num_layers=num_layers)
    if not ordered:
        raise ValueError("no layer to remove: name at least one layer")
    if outside := [layer for layer in ordered if not 0 <= layer < num_layers]:
        raise ValueError(
            f"layers {outside} are out of range: a model of {num_layers} layers has "
            f"layers 0 … {num_layers - 1}"
        )
    if repeated := sorted({a for a, b in pairwise(ordered) if a == b}):
        raise ValueError(f"layers {repeated} are named more than once: remove each layer once")
    if len(ordered) >= num_layers:
        raise ValueError(
            f"removing {len(ordered)} of {num_layers} layers leaves no layer: "
            f"remove at most {num_layers - 1}"
        )
    starts = [layer for layer in ordered if layer - 1 not in ordered]
    stops = [layer + 1 for layer in ordered if layer + 1 not in ordered]
    return list(map(Boundary, starts, stops))


def gaps_without(layers: Collection[int], num_layers: int) -> list[Boundary]:
    """As `runs`, but ``layers`` may be empty.

    >>> gaps_without((), num_layers=30)
    []
    """
    return runs(layers, num_layers) if layers else []


@checked
def contiguous(n: int, num_layers: int) -> list[Boundary]:
    """Every contiguous block of ``n`` layers, first and last layers included, by ascending start.

    Raises:
        ValueError: ``n`` is not between 1 and ``num_layers - 1``.
    """
    at_least(2, num_layers=num_layers)
    if not 1 <= n < num_layers:
        raise ValueError(
            f"n = {n} layers cannot be removed from a model of {num_layers}: "
            f"choose n between 1 and {num_layers - 1}"
        )
    return [Boundary(start, start + n) for start in range(num_layers - n + 1)]


@checked
def spell(layers: Iterable[int]) -> str:
    """Layers as text, with runs as ``first–last``.

    >>> spell([12, 13, 14, 17, 25, 26])
    '12–14, 17, 25–26'
    >>> spell([])
    ''
    """
    layers = list(layers)
    return ", ".join(
        f"{gap.start}–{gap.stop - 1}" if len(gap.removed) > 1 else f"{gap.start}"
        for gap in gaps_without(layers, max(layers, default=0) + 2)
    )


def read_layers(text: str) -> tuple[int, ...]:
    """Layers in ascending order from the text of `spell`, also with plain hyphens.

    >>> read_layers("12-14,17")
    (12, 13, 14, 17)

    Raises:
        ValueError: another format.
    """
    layers: list[int] = []
    for part in text.replace("–", "-").split(","):
        try:
            first, *last = map(int, part.split("-", 1))
            stop = (last or [first])[0] + 1
            if stop <= first:
                raise ValueError
        except ValueError:
            raise ValueError(f"layers {text!r} are not of the form 12-15,17,25-26") from None
        layers += range(first, stop)
    return tuple(sorted(layers))
