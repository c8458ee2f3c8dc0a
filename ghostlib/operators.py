"""Operators: what is put in place of the removed layers, solved in closed form from moments.

An operator is what it does to the stream, ``X -> X @ W + b``; a matrix without bias is the
simplest case. `solve` finds the best one of a named family, and `OPERATORS` lists the families.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ghostlib import families
from ghostlib.checks import check_moments
from ghostlib.families import Fit
from ghostlib.gram import SingularGramWarning
from ghostlib.moments import Moments
from ghostlib.registry import Registry


@dataclass(frozen=True, eq=False)
class Operator:
    """A solved operator and how far to trust it.

    Attributes:
        W: (p, q) float64 matrix, acting on row vectors as ``X @ W``.
        name: family it was searched in.
        dof: number of free parameters of that family.
        rank: effective rank of the Gram matrix the family inverts: that of ``G`` for `ghost`,
            `low-rank` and `symmetric`, of the centred ``G`` for `affine`, of its (rotated) diagonal
            or trace for the diagonal and scalar families; 0 where nothing is inverted.
        condition: condition number of the same matrix, infinite when it is singular; 1 where
            nothing is inverted.
        residual: squared error ``||X W + b - Y||_F^2`` on the tokens it was solved from.
        bias: (q,) b, or None.
    """

    W: Tensor = field(repr=False)
    name: str
    dof: int
    rank: int
    condition: float
    residual: float
    bias: Tensor | None = field(default=None, repr=False)

    @property
    def M(self) -> Tensor:
        """(p, p) ``W - I``, the part that stands in for the removed layers.

        Raises:
            ValueError: ``W`` is not square.
        """
        if self.W.shape[0] != self.W.shape[1]:
            raise ValueError(f"M = W - I needs a square W, got {tuple(self.W.shape)}")
        M = self.W.clone()
        M.diagonal().sub_(1.0)
        return M

    def apply(self, X: Tensor) -> Tensor:
        """``X @ W + b`` in the dtype and on the device of ``X``, (..., p) -> (..., q).

        Raises:
            ValueError: ``X`` has another width.
        """
        if X.ndim == 0 or X.shape[-1] != len(self.W):
            raise ValueError(
                f"{self.name} acts on activations (..., {len(self.W)}), got {tuple(X.shape)}"
            )
        Y = X @ self.W.to(X)
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
}
REGRESSORS = {"replaceme": "mlp"}
"""What a family acts on, where it is not the stream; see `Moments.regressor`."""
OPERATORS: Registry[Callable[..., Fit]] = Registry("operator", **_FAMILIES)


def solve(moments: Moments, name: str = "ghost", **options: Any) -> Operator:
    """The operator of a family that fits the moments best.

    Args:
        moments: of ``X`` (tokens, p) and ``Y`` (tokens, q).
        name: one of `OPERATORS`; its function in `ghostlib.families` documents the options.
        options: ``rcond``, ``ridge`` or ``relative_ridge`` for `ghost`, `affine`, `symmetric`,
            `low-rank` and `replaceme`; ``around`` for `ghost` and `affine`; ``rank`` for
            `low-rank`; ``pooled`` for `linearpatch-d`.

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
    if moments.regressor != regressor:
        raise ValueError(
            f"{name} is solved from moments of the {regressor}, these are of the "
            f"{moments.regressor}: calibrate(…, mlp=True) collects both, the second as .mlp"
        )
    fit = family(moments, **options)
    if fit.trouble:
        warnings.warn(f"{name}: {fit.trouble}", SingularGramWarning, stacklevel=2)
    found = Operator(fit.W, name, fit.dof, fit.rank, fit.condition, math.nan, fit.bias)
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
