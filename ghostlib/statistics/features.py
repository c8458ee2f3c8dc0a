"""Features: what a repair may read of the stream, and how much the error of each token weighs.

The removed layers never saw the raw stream: every pre-norm sub-layer reads a normalised copy of it.
A `Regressor` names several features side by side, ``F = [f_1(X), f_2(X) …]``, and a token weight;
``Delta`` is regressed on ``F`` from the same additive moments as ever, and what was found repairs
the stream as ``X + F M``.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostlib.common import Registry
from ghostlib.statistics.moments import Moments


def rms_norm(X: Tensor) -> Tensor:
    """``X / rms(X)`` over channels, what RMSNorm gives before its learnt scale; 0 for a zero token.

    In float32 at least, as models compute it. Without the small constant that models add to the
    square, so that the scale of the stream goes out exactly.
    """
    return _divide(X.to(_wide(X)), X)


def standardise(X: Tensor) -> Tensor:
    """``(X - mean) / std`` over channels, what LayerNorm gives before its learnt scale and shift.

    0 for a token whose channels are all alike.
    """
    wide = X.to(_wide(X))
    return _divide(wide - wide.mean(-1, keepdim=True), X)


def _wide(X: Tensor) -> torch.dtype:
    return torch.promote_types(X.dtype, torch.float32)


def _divide(values: Tensor, X: Tensor) -> Tensor:
    """``values`` over their root mean square, in the dtype of the stream ``X`` they come from."""
    root = values.square().mean(-1, keepdim=True).sqrt()
    # What the subtraction of a mean leaves of equal channels is rounding at the size of the stream.
    noise = torch.finfo(values.dtype).eps * X.abs().amax(-1, keepdim=True).to(values.dtype)
    return torch.where(root > noise, values / root.where(root > noise, 1.0), 0.0).to(X.dtype)


class Feature(NamedTuple):
    """A function of one token, (…, width) -> (…, width), with ``of(0) = 0``.

    ``previous``: it is taken of the token before, and is 0 at the first token of a sequence.
    """

    of: Callable[[Tensor], Tensor]
    previous: bool = False


FEATURES: Registry[Feature] = Registry(
    "feature",
    **{
        "x": Feature(lambda X: X),
        "n(x)": Feature(rms_norm),
        "n(prev)": Feature(rms_norm, previous=True),
        "z(x)": Feature(standardise),
        "z(prev)": Feature(standardise, previous=True),
    },
)
"""The stream; and its normalised copy, this token's or the one's before: ``n`` by RMSNorm, ``z`` by
LayerNorm. Ask for ``n``: `Regressor.resolve` takes what the model's layers read."""

WEIGHTS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "weight",
    **{
        "1": torch.ones_like,
        "1/|y|^0.5": lambda norm: norm.rsqrt(),
        "1/|y|": lambda norm: 1 / norm,
        "1/|y|^2": lambda norm: 1 / norm.square(),
    },
)
"""The weight of a token's squared error, as a function of the norm of its ``X_post``.

Multiplying all streams by ``a`` multiplies all weights alike, so no fit depends on their scale.
``1/|y|^2`` makes every error relative; ``1/|y|`` is half way (a token 100 times the norm of the
others counts 100 times as much as they, and not 10,000 times)."""


class Regressor(NamedTuple):
    """What ``Delta`` is regressed on, and how tokens are weighted; as text ``"x, n(x); 1/|y|"``."""

    features: tuple[str, ...]
    weight: str = "1"

    def __str__(self) -> str:
        return ", ".join(self.features) + (f"; {self.weight}" if self.weight != "1" else "")

    @classmethod
    def parse(cls, text: str) -> "Regressor":
        """Read what `__str__` wrote.

        Raises:
            ValueError: an unknown feature or weight, or a feature named twice.
        """
        listed, _, weight = text.partition("; ")
        features = tuple(listed.split(", "))
        for name in features:
            FEATURES[name]
        WEIGHTS[weight or "1"]
        if len(set(features)) < len(features):
            raise ValueError(f"regressor {text!r} names a feature twice: name each once")
        return cls(features, weight or "1")

    @property
    def normalised(self) -> bool:
        """Whether it reads a normalised stream."""
        return any(name != "x" for name in self.features)

    def resolve(self, norm: str) -> "Regressor":
        """The same for a model whose layers read through a ``"rms"`` or a ``"layer"`` norm."""
        new, old = ("n(", "z(") if norm == "rms" else ("z(", "n(")
        return self._replace(features=tuple(f.replace(old, new) for f in self.features))


def generic(regressor: str) -> str:
    """A regressor's text, whatever norm it was resolved for."""
    return regressor.replace("z(", "n(")


def reads_previous(features: Sequence[str]) -> bool:
    """Whether one of ``features`` is taken of the token before."""
    return any(FEATURES[name].previous for name in features)


def previous(
    X: Tensor, real: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each token the last real one before it, and the last real one of all.

    Args:
        X: (batch, tokens, width).
        real: (batch, tokens), false at padding; None where all are real.
        before: (batch, width) the last real token of what came earlier; None at the beginning.

    Returns:
        (batch, tokens, width), zero where there is none, and (batch, width) to go on from.
    """
    batch, tokens, width = X.shape
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=X.device)
    first = X.new_zeros(batch, width) if before is None else before.to(X)
    known = torch.cat([first[:, None], X], 1)
    place = torch.arange(1, tokens + 1, device=X.device)
    latest = torch.where(real, place, 0).cummax(1).values  # of the tokens so far, from 1; 0: none
    latest = nn.functional.pad(latest, (1, 0))
    found = known.gather(1, latest[..., None].expand(-1, -1, width))
    return found[:, :-1], found[:, -1]


def design(
    features: Sequence[str],
    X: Tensor,
    real: Tensor | None = None,
    shifted: Tensor | None = None,
) -> Tensor:
    """``features`` of ``X`` side by side, (…, tokens, features x width).

    Args:
        X: (…, tokens, width), whole sequences where a feature is of the token before.
        real: (…, tokens), false at padding.
        shifted: what `previous` gave, where at hand.
    """
    if shifted is None and reads_previous(features):
        flat = X.reshape(-1, *X.shape[-2:])
        shifted = previous(flat, None if real is None else real.reshape(flat.shape[:2]))[0]
        shifted = shifted.view(X.shape)
    parts = []
    for name in features:
        feature = FEATURES[name]
        source = shifted if feature.previous else X
        assert source is not None
        parts.append(feature.of(source))
    return torch.cat(parts, -1)


def observe(
    moments: Moments,
    X: Tensor,
    Y: Tensor,
    real: Tensor | None = None,
    used: Tensor | None = None,
) -> Moments:
    """Add one sequence to moments of a `Regressor`: its features for ``X``, ``Delta`` for ``Y``.

    Args:
        moments: ``Moments(features x width, width, regressor=…)``; returned.
        X, Y: (tokens, width) streams before and after the boundary, from the sequence's beginning.
        real: (tokens,) false at padding. used: (tokens,) those to learn from; by default ``real``.

    Raises:
        ValueError: as `Moments.update`; a used token that is zero after the boundary, where
            weights divide by its norm.
    """
    regressor = Regressor.parse(moments.regressor)
    x, y = X.double(), Y.double()
    F = design(regressor.features, x, real)
    used = real if used is None else used
    if used is not None:
        F, x, y = F[used], x[used], y[used]
    norm = torch.linalg.vector_norm(y, dim=-1)
    if regressor.weight != "1" and not (norm > 0).all():
        raise ValueError(
            f"a token has norm 0 after the boundary, where its weight {regressor.weight} is "
            "infinite: leave it out, or use a regressor without a weight"
        )
    return moments.update(F, y - x, WEIGHTS[regressor.weight](norm))


def contains(wide: Regressor, narrow: Regressor) -> bool:
    """Whether moments of ``wide`` hold those of ``narrow``."""
    return wide.weight == narrow.weight and set(narrow.features) <= set(wide.features)


def widest(regressors: Iterable[Regressor]) -> list[Regressor]:
    """The fewest of ``regressors`` whose moments hold those of all.

    >>> [str(r) for r in widest(map(Regressor.parse, ["x", "x, n(x)", "x; 1/|y|"]))]
    ['x, n(x)', 'x; 1/|y|']
    """
    found: list[Regressor] = []
    for regressor in sorted(regressors, key=lambda r: (-len(r.features), str(r))):
        if not any(contains(wide, regressor) for wide in found):
            found.append(regressor)
    return found


def part(moments: Moments, places: Sequence[int]) -> Moments:
    """The moments of some of the features that ``moments`` has side by side.

    The first ones are given as views. What does not depend on features is shared: sums are rebound,
    never changed in place.

    Args:
        moments: of k features (tokens, k C) and Delta (tokens, C).
        places: which of them, from 0 to k - 1, in the order they are wanted in.
    """
    C, whole = moments.out_width, Regressor.parse(moments.regressor)
    columns: slice | Tensor = slice(len(places) * C)
    if list(places) != list(range(len(places))):
        columns = torch.cat([torch.arange(place * C, (place + 1) * C) for place in places])
    found = copy.copy(moments)
    found.regressor = str(whole._replace(features=tuple(whole.features[i] for i in places)))
    found.G = moments.G[columns][:, columns]
    found.B, found.x1, found.x_abs = (t[columns] for t in (moments.B, moments.x1, moments.x_abs))
    return found
