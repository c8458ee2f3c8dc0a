"""Operators: repairs in place of the removed layers, solved in closed form from moments."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghostlib.common import checked, warn
from ghostlib.linalg.gram import Regularisation, Regularised, SingularGramWarning, as_list, gram
from ghostlib.models.boundaries import Boundary
from ghostlib.operators.families import FAMILIES, Family, Shape, check_rank, low_rank
from ghostlib.statistics.features import STREAM, Regressor, Sources
from ghostlib.statistics.moments import Moments, check_moments

_MASSIVE_SHARE = 0.01  # of all tokens


class MassiveActivationWarning(UserWarning):
    """A few tokens dominate the objective, and its optimum may harm all other tokens."""


@dataclass(frozen=True, eq=False)
class Operator:
    """A solved repair ``X -> X + F M + b``, with diagnostics.

    Attributes:
        M: (p, C) float64 matrix, acting on row vectors of features as ``F @ M``.
        family: its family.
        regressor: the features, resolved for the model's norm, and the token weight.
        bias: (C,) b, or None.
        dof: number of free parameters.
        residual: (weighted) squared error on the training tokens; NaN if unknown.
    """

    M: Tensor = field(repr=False)
    family: Family
    regressor: Regressor = STREAM
    bias: Tensor | None = field(default=None, repr=False)
    dof: int = 0
    residual: float = float("nan")
    _inverse: Regularised | None = field(default=None, repr=False)
    _diagonal: Tensor | None = field(default=None, repr=False)

    @classmethod
    @checked
    def of(
        cls, W: Tensor, family: str | Family = "ghost", *, residual: float = float("nan")
    ) -> "Operator":
        """An operator from a given matrix ``W`` (C, C), such as a fine-tuned one.

        Raises:
            ValueError: ``W`` is not square, real and finite, or the family has no single matrix.
        """
        _check_square(W, "W")
        record = Family.of(family)
        if not record.regressor.has_identity:
            raise ValueError(f"{record} reads {record.regressor}: it has M, and no single W")
        if record.install in ("nothing", "earlier-writes"):
            raise ValueError(f"{record} installs no single W, but at most one factor: use 'ghost'")
        M = W.double() - torch.eye(len(W)).to(W.double())
        dof = record.dof(Shape(len(W), len(W)))
        return cls(M, record, record.regressor, dof=dof, residual=residual)

    @property
    def name(self) -> str:
        """Name of its family."""
        return self.family.name

    @property
    def W(self) -> Tensor:
        """(C, C) ``I + M``, for a repair of one feature that is not normalised.

        Raises:
            ValueError: a repair of other features, which is not a single matrix on the stream.
        """
        if not self.regressor.has_identity:
            raise ValueError(f"{self.name} reads {self.regressor}: it has M, and no single W")
        W = self.M.clone()
        W.diagonal().add_(1.0)
        return W

    @cached_property
    def rank(self) -> int:
        """Effective rank of the Gram matrix, or (rotated) diagonal, that the family inverts.

        0 without an inverse. After a ridge solve this computes the spectrum.
        """
        if self._diagonal is not None:
            return int((self._diagonal > 0).sum())
        return self._inverse.rank if self._inverse else 0

    @cached_property
    def condition(self) -> float:
        """Condition number of the same matrix: infinite if singular, 1 without an inverse."""
        if self._diagonal is not None:
            low, high = float(self._diagonal.min()), float(self._diagonal.max())
            return high / low if low > 0 else float("inf")
        return self._inverse.gram.spectrum.condition if self._inverse else 1.0

    @checked
    def apply(
        self,
        X: Tensor,
        real: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """The repaired stream (…, C), in the dtype and on the device of ``X``.

        Args:
            X: (…, C); complete sequences (…, tokens, C) where a feature reads the previous token.
            real: (…, tokens), false at padding, which is never the previous token.
            hidden: (…, I) input of the down-projection before the gap, if a feature needs it.
            output: (…, C) output of that down-projection, if a feature needs it.

        Raises:
            ValueError: ``X`` has another width or is not floating point, a source is missing or
                does not fit, or a mask of another shape.
        """
        p, C = self.M.shape
        if X.ndim == 0 or X.shape[-1] != C or not X.is_floating_point():
            raise ValueError(
                f"{self.name} acts on activations (..., {C}), got {tuple(X.shape)} {X.dtype}"
            )
        F = self.regressor.design(Sources(X, hidden, output), real, p)
        Y = X + F @ self.M.to(X)
        return Y if self.bias is None else Y + self.bias.to(X)


Operators = Mapping[Boundary, Operator]
"""The operator of each repaired gap."""


@checked
def solve(moments: Moments, name: str | Family = "ghost", **options: Any) -> Operator:
    """The best fit of a family to the moments.

    Args:
        moments: of the family's regressor.
        name: one of `FAMILIES`, whose ``solve`` documents the options; or a `Family`.
        options: ``rcond``, ``ridge`` or ``relative_ridge`` for families that invert a matrix;
            ``around`` for `ghost`; ``rank`` for ``low-rank``; ``rank`` and ``bias`` for repairs of
            several features; ``pooled`` for ``linearpatch-d``.

    Raises:
        ValueError: an unknown name, no tokens, moments that are not float64 or not symmetric,
            moments of another regressor, or an option that is out of range or of another family.

    Warns:
        SingularGramWarning: the tokens do not determine a full matrix and no ridge makes up for it.

    >>> X = torch.randn(100, 8)
    >>> operator = solve(Moments(8).update(X, 2 * X), "scalar")
    >>> operator.W.shape, operator.dof
    (torch.Size([8, 8]), 1)
    """
    family = Family.of(name)
    check_moments(moments)
    generic = moments.regressor.generic
    any_features = family is FAMILIES["branches"] and not generic.reads_mlp and generic != STREAM
    if generic != family.regressor.generic and not any_features:
        raise ValueError(
            f"{family} is solved from moments of {family.regressor}, these are of {generic}: "
            f"calibrate(…, regressors=['{family.regressor}']).of('{family.regressor}')"
        )
    check_options(family, options, moments.width)
    ridges = Regularisation.__annotations__.keys()
    options = {k: value for k, value in options.items() if value is not None or k not in ridges}
    fit = family.solve(moments, **({} if ridges & options else dict(family.default)) | options)
    if fit.inverse is not None:
        # The channels of a standardised token sum to zero.
        nullity = sum(feature.norm == "layer" for feature in moments.regressor.features)
        if problem := fit.inverse.diagnosis(moments.tokens, nullity):
            warn(f"{family}: {problem}", SingularGramWarning)
    shape = Shape(moments.width, len(fit.M), options.get("rank") or 0, fit.bias is not None)
    residual = moments.error_of(fit.M, fit.bias) if fit.error is None else fit.error
    regressor, dof = moments.regressor, family.dof(shape)
    return Operator(fit.M, family, regressor, fit.bias, dof, residual, fit.inverse, fit.seen)


def solve_quietly(moments: Moments, family: Family | str = "ghost", **options: Any) -> Operator:
    """`solve` without `SingularGramWarning`, for fits on few tokens by intention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularGramWarning)
        return solve(moments, family, **options)


def check_options(family: Family, options: Mapping[str, Any], width: int | None = None) -> None:
    """Raise `ValueError` for an unknown option, one out of range, or ``low-rank`` without a rank.

    Args:
        width: of the stream, the largest rank, if known.
    """
    if unknown := [name for name in options if name not in family.options]:
        names = ", ".join(family.options) or "none"
        raise ValueError(f"{family} has no option {unknown[0]!r}: it takes {names}")
    inverse = {n: v for n, v in options.items() if n in Regularisation.__annotations__}
    features = len(family.regressor.features)
    if family is FAMILIES["branches"]:  # any number of features
        features = len(as_list(options.get("relative_ridge", 1.0))) or 1
    gram(torch.eye(features, dtype=torch.float64), (1,) * features).regularise(**inverse)
    if (around := options.get("around", "zero")) not in ("identity", "zero"):
        raise ValueError(f"around must be 'identity' or 'zero', got {around!r}")
    rank = options.get("rank")
    if family.solve is low_rank and rank is None:
        raise ValueError("low-rank needs rank=…: `choose_rank` finds one by held-out error")
    if rank is not None:
        check_rank(rank, width)


def warn_of_massive_activations(moments: Mapping[Boundary, Moments], family: Family) -> None:
    """Warn of boundaries whose objective less than one token in a hundred dominates."""
    for boundary, sums in moments.items() if family.least_squares else ():
        effective = sums.effective_tokens
        if sums.tokens > 0 and effective < _MASSIVE_SHARE * sums.tokens:
            warn(
                f"boundary {boundary}: {effective:.0f} of {sums.tokens} tokens own the squared "
                f"error that {family} minimises (massive activations born or ended in the removed "
                "layers), so the others may fare worse than without repair: use operator="
                "'two-branch-relative', which weights each token by 1/|y|, or operator='auto'",
                MassiveActivationWarning,
            )


@checked
def antisymmetric_share(M: Tensor) -> float:
    """``||(M - M')/2||_F / ||M||_F``: 0 for a symmetric matrix, 1 for an antisymmetric one.

    The paper's figure 3 reports it for ``M*``. The reference is a large random matrix, with
    ``sqrt(1/2)``, 70.7 %. A zero matrix is symmetric and has 0.

    Raises:
        ValueError: ``M`` is not square, real and finite.

    >>> antisymmetric_share(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    1.0
    """
    _check_square(M, "M")
    M = M.double()
    norm = float(torch.linalg.norm(M))
    return float(torch.linalg.norm(M - M.T)) / (2 * norm) if norm > 0 else 0.0


def _check_square(M: Tensor, name: str) -> None:
    if M.ndim != 2 or M.shape[0] != M.shape[1] or M.is_complex():
        got = f"{tuple(M.shape)} {M.dtype}"
        raise ValueError(f"{name} must be a square matrix of real numbers, got {got}")
    if not torch.isfinite(M).all():
        raise ValueError(f"{name} must be a matrix of finite numbers, got NaN or infinity in it")
