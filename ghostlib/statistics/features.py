"""Features: the inputs of a repair, and the weight of each token's error.

The removed layers never read the raw stream: every pre-norm sub-layer reads a normalised copy of
it. A `Regressor` is a list of features, ``F = [f_1, f_2 …]``, and a token weight; ``Delta`` is
regressed on ``F`` from additive moments, and the solution repairs the stream as ``X + F M``. For
one token weight the moments of a subset of features are blocks of the moments of all of them, so a
pass collects the widest regressors only.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostlib.common import Registry, at_least, checked, is_kind, short_repr


def rms_norm(X: Tensor) -> Tensor:
    """``X / rms(X)`` over channels: RMSNorm without its learnt scale; 0 for a zero token.

    In float32 at least, as models compute it. Without the small constant that models add to the
    mean square, so that the scale of the stream cancels exactly.

    >>> rms_norm(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    tensor([[0.8485, 1.1314],
            [0.8485, 1.1314]])
    """
    return _divide(_wide(X), X)


def standardise(X: Tensor) -> Tensor:
    """``(X - mean) / std`` over channels: LayerNorm without its learnt scale and shift.

    0 for a token whose channels are all equal.
    """
    wide = _wide(X)
    return _divide(wide - wide.mean(-1, keepdim=True), X)


def _wide(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _divide(values: Tensor, X: Tensor) -> Tensor:
    """``values`` over their root mean square, in the dtype of the stream ``X`` they come from."""
    root = values.square().mean(-1, keepdim=True).sqrt()
    # Equal channels less their mean are rounding error at the size of the stream.
    noise = torch.finfo(values.dtype).eps * X.abs().amax(-1, keepdim=True).to(values.dtype)
    return torch.where(root > noise, values / root.where(root > noise, 1.0), 0.0).to(X.dtype)


class Sources(NamedTuple):
    """Activations that features are computed from, for the same tokens.

    Attributes:
        stream: (…, tokens, width) before the gap.
        hidden: (…, tokens, intermediate) input of the last down-projection before the gap, or None
            if no feature needs it.
        output: (…, tokens, width) output of that down-projection, or None.
    """

    stream: Tensor
    hidden: Tensor | None = None
    output: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sources":
        """Apply a function to every source."""
        mapped = (None if source is None else function(source) for source in self)
        return Sources(*mapped)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Feature:
    """A function of one token, (…, width) -> (…, width), with ``of(0) = 0``.

    Attributes:
        name: its spelling.
        of: the function.
        source: its input, a field of `Sources`.
        previous: whether its input is the previous token; it is 0 at the first of a sequence.
        norm: ``"rms"`` or ``"layer"``, the norm through which the model's layers read the stream;
            None for a feature that does not depend on it.
    """

    name: str
    of: Callable[[Tensor], Tensor] = field(repr=False)
    source: str = "stream"
    previous: bool = False
    norm: str | None = None

    def __str__(self) -> str:
        return self.name

    def resolve(self, norm: str) -> "Feature":
        """The same feature for a model whose layers read through this norm."""
        if self.norm is None or self.norm == norm:
            return self
        key = (norm, self.source, self.previous)
        return next(f for f in FEATURES.values() if (f.norm, f.source, f.previous) == key)


def _same(X: Tensor) -> Tensor:
    return X


FEATURES: Registry[Feature] = Registry("feature")
"""The stream ``x``; its normalised copy, of this or the previous token (``n`` by RMSNorm, ``z`` by
LayerNorm: name ``n``, and `Regressor.resolve` chooses by the model); the input ``h`` and output
``f`` of the last down-projection before the gap."""
for _feature in (
    Feature("x", _same),
    Feature("n(x)", rms_norm, norm="rms"),
    Feature("n(prev)", rms_norm, previous=True, norm="rms"),
    Feature("z(x)", standardise, norm="layer"),
    Feature("z(prev)", standardise, previous=True, norm="layer"),
    Feature("h", _same, source="hidden"),
    Feature("f", _same, source="output"),
):
    FEATURES[_feature.name] = _feature


@dataclass(frozen=True)
class Weight:
    """The weight of a token's squared error, as a function of the norm of its ``X_post``.

    Scaling all streams scales all weights equally, so no fit depends on the scale. ``1/|y|^2``
    makes every error relative; ``1/|y|`` is halfway: a token with 100 times the norm of the others
    has 100 times their influence instead of 10,000 times.
    """

    name: str
    of: Callable[[Tensor], Tensor] = field(repr=False)

    def __str__(self) -> str:
        return self.name


WEIGHTS: Registry[Weight] = Registry("weight")
for _weight in (
    Weight("1", torch.ones_like),
    Weight("1/|y|^0.5", lambda norm: norm.rsqrt()),
    Weight("1/|y|", lambda norm: 1 / norm),
    Weight("1/|y|^2", lambda norm: 1 / norm.square()),
):
    WEIGHTS[_weight.name] = _weight
UNIFORM = WEIGHTS["1"]


@dataclass(frozen=True)
class Regressor:
    """Features that ``Delta`` is regressed on, and a token weight; spelt ``"x, n(x); 1/|y|"``.

    Attributes:
        features: in the order of their columns.
        weight: of each token.

    Raises:
        ValueError: no feature, or a duplicate.
    """

    features: tuple[Feature, ...]
    weight: Weight = UNIFORM

    def __post_init__(self) -> None:
        is_tuple = isinstance(self.features, tuple) and is_kind(self.features, tuple[Feature, ...])
        if not self.features or not is_tuple:
            raise ValueError(
                f"a regressor needs a tuple of features, such as those of Regressor.parse('x'), "
                f"got {short_repr(self.features)}"
            )
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"regressor '{self}' names a feature twice: name each once")

    def __str__(self) -> str:
        names = ", ".join(map(str, self.features))
        return names if self.weight == UNIFORM else f"{names}; {self.weight}"

    @classmethod
    def parse(cls, spelling: "str | Regressor") -> "Regressor":
        """Parse a spelling, the inverse of ``str``.

        Raises:
            ValueError: an unknown feature or weight, or a duplicate feature.

        >>> Regressor.parse("x, n(x); 1/|y|").features[1].name
        'n(x)'
        """
        if isinstance(spelling, Regressor):
            return spelling
        names, _, weight = str(spelling).partition(";")
        features = tuple(FEATURES[name.strip()] for name in names.split(","))
        return cls(features, WEIGHTS[weight.strip() or "1"])

    @checked
    def resolve(self, norm: str) -> "Regressor":
        """The same for a model whose layers read through an ``"rms"`` or ``"layer"`` norm.

        Raises:
            ValueError: another norm.
        """
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm must be 'rms' or 'layer', got {norm!r}")
        return Regressor(tuple(f.resolve(norm) for f in self.features), self.weight)

    @property
    def generic(self) -> "Regressor":
        """The regressor before `resolve`."""
        return self.resolve("rms")

    @property
    def stream(self) -> "Regressor":
        """The plain stream with the same token weight."""
        return Regressor(STREAM.features, self.weight)

    @property
    def normalised(self) -> bool:
        """Whether it reads a normalised stream."""
        return any(feature.norm for feature in self.features)

    @property
    def sources(self) -> frozenset[str]:
        """Fields of `Sources` that it reads."""
        return frozenset(feature.source for feature in self.features)

    @property
    def reads_mlp(self) -> bool:
        """Whether it reads the last MLP before the gap, which must then have a layer before it."""
        return self.sources != {"stream"}

    @property
    def reads_previous(self) -> bool:
        """Whether it reads the previous token."""
        return any(feature.previous for feature in self.features)

    @property
    def has_identity(self) -> bool:
        """Whether ``W = I + M`` is defined: its one feature is not transformed."""
        return len(self.features) == 1 and self.features[0].name in ("x", "f")

    @checked
    def widths(self, width: int, hidden: int | None = None) -> tuple[int, ...]:
        """Width of each feature, for a stream and an MLP of these widths.

        Raises:
            ValueError: ``hidden`` is missing where a feature needs it.
        """
        at_least(1, width=width, hidden=hidden)
        if "hidden" in self.sources and hidden is None:
            raise ValueError(f"moments of {self} need the width of the MLP: pass hidden=…")
        return tuple(
            hidden if hidden and feature.source == "hidden" else width for feature in self.features
        )

    @checked
    def design(self, sources: Sources, real: Tensor | None = None, p: int | None = None) -> Tensor:
        """The design matrix (…, tokens, p): all features, concatenated.

        Args:
            sources: complete sequences where a feature reads the previous token.
            real: (…, tokens), false at padding, which is never the previous token.
            p: required number of columns; any by default.

        Raises:
            ValueError: a source that is missing or has other tokens or another width, a mask of
                another shape, or no token axis where a feature reads the previous token.
        """
        leading = tuple(sources.stream.shape[:-1])
        if self.reads_previous and not leading:
            raise ValueError(f"{self} reads the previous token: pass sequences (…, tokens, width)")
        if real is not None and real.shape != leading:
            raise ValueError(f"the mask must have shape {leading}, got {tuple(real.shape)}")
        for name, source in zip(sources._fields, sources, strict=True):
            if source is not None and source.shape[:-1] != leading:
                raise ValueError(
                    f"{name} must be of the same tokens as the stream, {leading}, "
                    f"got {tuple(source.shape[:-1])}"
                )
        blocks = []
        for feature in self.features:
            source = getattr(sources, feature.source)
            if source is None:
                raise ValueError(
                    f"{self} reads the MLP before the gap: pass {feature.source}=… as well"
                )
            blocks.append(feature.of(_shifted(source, real) if feature.previous else source))
        F = torch.cat(blocks, -1)
        if p is not None and F.shape[-1] != p:
            raise ValueError(
                f"{self} has {F.shape[-1]} columns here, where {p} are needed: hidden must be "
                "(…, tokens, MLP width), output (…, tokens, width)"
            )
        return F

    def contains(self, other: "Regressor") -> bool:
        """Whether its moments contain those of ``other``."""
        other = Regressor.parse(other)
        return self.weight == other.weight and set(other.features) <= set(self.features)


STREAM = Regressor.parse("x")


def widest(regressors: Iterable[Regressor]) -> list[Regressor]:
    """The smallest subset of regressors whose moments contain those of all.

    >>> [str(r) for r in widest(map(Regressor.parse, ["x", "x, n(x)", "x; 1/|y|"]))]
    ['x, n(x)', 'x; 1/|y|']
    """
    kept: list[Regressor] = []
    for regressor in sorted(regressors, key=lambda r: (-len(r.features), str(r))):
        if not any(wide.contains(regressor) for wide in kept):
            kept.append(regressor)
    return kept


def previous(
    X: Tensor, real: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each token the last real one before it, and the last real token of the sequence.

    Args:
        X: (batch, tokens, width).
        real: (batch, tokens), false at padding; None where all are real.
        before: (batch, width) the last real token of an earlier call; None at the beginning.

    Returns:
        (batch, tokens, width), zero where there is none, and (batch, width) for the next call.
    """
    batch, tokens, width = X.shape
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=X.device)
    first = X.new_zeros(batch, width) if before is None else before.to(X)
    padded = torch.cat([first[:, None], X], 1)
    positions = torch.arange(1, tokens + 1, device=X.device)
    latest = torch.where(real, positions, 0).cummax(1).values  # 0: no real token so far
    latest = nn.functional.pad(latest, (1, 0))
    gathered = padded.gather(1, latest[..., None].expand(-1, -1, width))
    return gathered[:, :-1], gathered[:, -1]


def _shifted(X: Tensor, real: Tensor | None) -> Tensor:
    flat = X.reshape(math.prod(X.shape[:-2]), *X.shape[-2:])
    mask = None if real is None else real.reshape(flat.shape[:2]).to(X.device, torch.bool)
    return previous(flat, mask)[0].view(X.shape)
