"""Operators: what is put in place of the removed layers, solved in closed form from moments.

An operator is what it does to the stream: ``X -> X W + b``, of which a matrix without bias is the
simplest case, or ``X -> X + F M + b`` with several features ``F`` of the stream side by side.
`solve` finds the best one of a named family, and `OPERATORS` lists the families.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ghostlib.common import Registry
from ghostlib.linalg.gram import SingularGramWarning
from ghostlib.models.boundaries import Boundary
from ghostlib.operators import families
from ghostlib.operators.families import Fit, branches
from ghostlib.statistics.features import Regressor, design, generic
from ghostlib.statistics.moments import Moments, check_moments

_FEW = 0.01  # of all tokens
_NOT_LEAST_SQUARES = ("identity", "magnitude", "linearpatch-d", "linearpatch-r")


class MassiveActivationWarning(UserWarning):
    """A few tokens own the objective: what is best for it may harm all other tokens."""


def warn_of_massive_activations(moments: Mapping[Boundary, Moments], operator: str) -> None:
    """Warn of boundaries whose objective belongs to less than one token in a hundred.

    `Moments.effective_tokens` tells it from the moments alone, before anything is evaluated.
    """
    if operator in _NOT_LEAST_SQUARES:
        return
    for boundary, found in moments.items():
        if found.width != found.out_width and not found.of_change:
            continue  # the solver will refuse them
        share = found.effective_tokens
        if found.tokens > 0 and share < _FEW * found.tokens:
            warnings.warn(
                f"boundary {boundary}: {share:.0f} of {found.tokens} tokens own the squared error "
                f"that {operator} minimises (massive activations born in the removed layers), so "
                "the others may fare worse than without repair: use operator="
                "'two-branch-relative', which weighs each token by 1/|y|, or operator='auto'",
                MassiveActivationWarning,
                stacklevel=3,
            )


@dataclass(frozen=True, eq=False)
class Operator:
    """A solved operator and how far to trust it.

    Attributes:
        W: (p, q) float64 matrix, acting on row vectors as ``X @ W``; the matrix ``M`` of all
            features, one below the other, where the operator has ``features``.
        name: family it was searched in.
        dof: number of free parameters of that family.
        rank: effective rank of the Gram matrix the family inverts: that of ``G`` for `ghost`,
            `low-rank` and `symmetric`, of the centred ``G`` for `affine`, of its (rotated) diagonal
            or trace for the diagonal and scalar families; 0 where nothing is inverted.
        condition: condition number of the same matrix, infinite when it is singular; 1 where
            nothing is inverted.
        residual: (weighted) squared error on the tokens it was solved from.
        bias: (q,) b, or None.
        features: names from `FEATURES`; empty for one that is ``X W + b``.
    """

    W: Tensor = field(repr=False)
    name: str
    dof: int
    rank: int
    condition: float
    residual: float
    bias: Tensor | None = field(default=None, repr=False)
    features: tuple[str, ...] = ()

    @property
    def M(self) -> Tensor:
        """The part that stands in for the removed layers: ``W - I``, or the features' matrix.

        Raises:
            ValueError: ``W`` is not square.
        """
        if self.features:
            return self.W
        if self.W.shape[0] != self.W.shape[1]:
            raise ValueError(f"M = W - I needs a square W, got {tuple(self.W.shape)}")
        M = self.W.clone()
        M.diagonal().sub_(1.0)
        return M

    def apply(self, X: Tensor, real: Tensor | None = None) -> Tensor:
        """What ``X`` becomes, (..., p) -> (..., q), in its dtype and on its device.

        Args:
            X: (…, p); whole sequences (…, tokens, p) where a feature is of the token before.
            real: (…, tokens), false at padding, which is nobody's token before.

        Raises:
            ValueError: ``X`` has another width.
        """
        p = len(self.W) // max(len(self.features), 1)
        if X.ndim == 0 or X.shape[-1] != p:
            raise ValueError(f"{self.name} acts on activations (..., {p}), got {tuple(X.shape)}")
        W = self.W.to(X)
        Y = X + design(self.features, X, real) @ W if self.features else X @ W
        return Y if self.bias is None else Y + self.bias.to(X)


_FAMILIES: dict[str, Callable[..., Fit]] = {
    "identity": families.identity,
    "scalar": families.scalar,
    "magnitude": families.magnitude,
    "diagonal": families.diagonal,
    "linearpatch-d": families.linearpatch_d,
    "linearpatch-r": families.linearpatch_r,
    "hadamard-diagonal": families.hadamard_diagonal,
    "orthogonal": families.orthogonal,
    "scaled-orthogonal": families.scaled_orthogonal,
    "symmetric": families.symmetric,
    "low-rank": families.low_rank,
    "ghost": families.ghost,
    "affine": families.affine,
    "replaceme": families.replaceme,
    "ghost-relative": branches,
    "two-branch": branches,
    "two-branch-relative": branches,
    "three-branch": branches,
    "three-branch-relative": branches,
    "branches": branches,
}
REGRESSORS = {
    "replaceme": "mlp",
    "ghost-relative": "x; 1/|y|",
    "two-branch": "x, n(x)",
    "two-branch-relative": "x, n(x); 1/|y|",
    "three-branch": "x, n(x), n(prev)",
    "three-branch-relative": "x, n(x), n(prev); 1/|y|",
    "branches": "x, n(x); 1/|y|",
}
"""What a family is solved from, where it is not the stream: the ``regressor`` of its `Moments`.
``"branches"`` takes any features and weight; these where it is not told."""
OPERATORS: Registry[Callable[..., Fit]] = Registry("operator", **_FAMILIES)


def solve(moments: Moments, name: str = "ghost", **options: Any) -> Operator:
    """The operator of a family that fits the moments best.

    Args:
        moments: of ``X`` (tokens, p) and ``Y`` (tokens, q), with the family's regressor.
        name: one of `OPERATORS`; its function documents the options.
        options: ``rcond``, ``ridge`` or ``relative_ridge`` for `ghost`, `affine`, `symmetric`,
            `low-rank` and `replaceme`; ``around`` for `ghost` and `affine`; ``rank`` for
            `low-rank`; ``pooled`` for `linearpatch-d`; for those with branches and those that are
            relative see `ghostlib.operators.families.branches`.

    Raises:
        ValueError: an unknown name, no tokens, moments that are not float64 or not symmetric, two
            widths in a family that needs one, moments of another regressor, or an option out of
            range.
        TypeError: an option the family does not have.

    Warns:
        SingularGramWarning: the tokens do not determine a full matrix and no ridge makes up for it.

    >>> X = torch.randn(100, 8)
    >>> solve(Moments(8).update(X, 2 * X), "scalar").W.shape
    torch.Size([8, 8])
    """
    family = OPERATORS[name]
    check_moments(moments)
    regressor = REGRESSORS.get(name, "stream")
    fitting = moments.of_change if name == "branches" else generic(moments.regressor) == regressor
    if not fitting:
        raise ValueError(
            f"{name} is solved from moments of the {regressor}, these are of the "
            f"{moments.regressor}: calibrate(…, regressors=[{regressor!r}]).of({regressor!r})"
        )
    fit = family(moments, **options)
    if fit.trouble:
        warnings.warn(f"{name}: {fit.trouble}", SingularGramWarning, stacklevel=2)
    features = Regressor.parse(moments.regressor).features if moments.of_change else ()
    found = Operator(fit.W, name, fit.dof, fit.rank, fit.condition, math.nan, fit.bias, features)
    return replace(found, residual=moments.error(found))


def antisymmetric_share(M: Tensor) -> float:
    """``||(M - M')/2||_F / ||M||_F``: 0 for a symmetric matrix, 1 for an antisymmetric one.

    The paper's figure 3 reports it for ``M*``. A large random matrix has ``sqrt(1/2)``, 70.7 %,
    which is the number to compare with. A zero matrix is symmetric and has 0.

    Raises:
        ValueError: ``M`` is not square.
    """
    if M.ndim != 2 or M.shape[0] != M.shape[1]:
        raise ValueError(f"the antisymmetric share needs a square matrix, got {tuple(M.shape)}")
    norm = float(torch.linalg.norm(M))
    return float(torch.linalg.norm(M - M.T)) / (2 * norm) if norm > 0 else 0.0
