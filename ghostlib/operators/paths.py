"""Paths: every ridge or rank from one eigendecomposition, and the choice of one.

In the eigenbasis ``G = V diag(s) V'`` a ridge on ``M`` only rescales rows,

    ``M(ridge) = V diag(f) C``,  ``f_i = 1/(s_i + ridge)``,  ``C = V' F'Delta``,

so the training error is a sum over ``p`` rows, and the error on any other moments a quadratic form
in ``f`` whose (p, p) matrix is computed once. Ridges are relative: multiples of each feature's mean
eigenvalue. The operators of reduced-rank regression are nested: ``M_r`` is the sum of the first
``r`` products ``p_i q_i'``, and the error as a function of the rank a cumulative sum.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Unpack

import torch
from torch import Tensor

from ghostlib.common import checked
from ghostlib.linalg.gram import Regularisation, check_ridge
from ghostlib.operators.families import least_squares, whitened
from ghostlib.statistics.moments import Moments, check_alike

RIDGES: tuple[float, ...] = tuple(10 ** (k / 5) for k in range(-40, 11))
COARSE_RIDGES: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-12, 3))


@dataclass(frozen=True, eq=False)
class RidgePath:
    """Errors of least squares along k relative ridges; float64 tensors of shape (k,).

    Attributes:
        ridges: multiples of each feature's mean eigenvalue.
        train_error: squared error on the training moments.
        held_out_error: squared error on the held-out moments, or None without them.
        dof: effective number of parameters, ``C * sum_i s_i/(s_i + ridge)``, at most ``p C``, and
            ``C`` more with a bias.
        gcv: generalised cross-validation score, an estimate of the squared error per token from
            the training moments alone; infinite where the fit interpolates them.
    """

    ridges: Tensor
    train_error: Tensor
    held_out_error: Tensor | None
    dof: Tensor
    gcv: Tensor


@checked
def ridge_path(
    train: Moments, ridges: Iterable[float] = RIDGES, held_out: Moments | None = None
) -> RidgePath:
    """Errors of ``solve(train, …, relative_ridge=r)`` for every ``r``, without a solve per value.

    After the decomposition of ``train.G`` (shared with `solve`) a value costs O(p) on the training
    moments and O(p^2) on held-out moments.

    **Generalised cross-validation** is ``(error/n) / (1 - h/n)^2`` with ``n`` tokens and ``h =
    sum_i s_i/(s_i + ridge)``, the trace of the hat matrix, plus 1 with a bias. Both are functions
    of the moments, so the score is exact. Leave-one-*token*-out would need the leverage
    ``x' (G + ridge)^-1 x`` of each token, which sums over tokens do not give; GCV replaces it by
    the mean ``h/n``. Leaving out a *fold* is exact (`cross_validate`), as moments add up. GCV
    ignores that neighbouring tokens of a text are dependent; held-out documents avoid that bias.

    Args:
        train: moments of any regressor.
        ridges: k positive multiples of each feature's mean eigenvalue.
        held_out: moments of other tokens, of the same width and regressor.

    Raises:
        ValueError: no ridge, one that is not positive and finite, no tokens, different widths or
            regressors.
    """
    values = _grid(ridges)
    train, *others = _centred(train, *(() if held_out is None else (held_out,)))
    unit = train.gram.unit  # of each feature
    s, V = train.gram.spectrum.values, train.gram.spectrum.vectors
    gains = [train.gram.regularise(relative_ridge=ridge).gain for ridge in values]
    f = torch.stack(gains)  # (k, p)
    C = V.T @ (train.cross / unit[:, None])  # (p, C)
    train_error = (f.square() * s - 2 * f) @ C.square().sum(1) + train.pruned_error
    h = (f * s).sum(1) + train.bias
    n = train.tokens
    free = 1.0 - h / n
    gcv = torch.where(free > 1e-6, train_error / n / free.square(), torch.inf)
    held_out_error = None
    for other in others:
        # tr(M'G_v M) - 2 tr(M'F_v'Delta_v) + ||Delta_v||^2 of M = V diag(f) C
        U = V / unit[:, None]
        quadratic = (U.T @ other.G.to(U) @ U) * (C @ C.T)
        linear = (U.T @ other.cross.to(U) * C).sum(1)
        errors = ((f @ quadratic) * f).sum(1) - 2 * f @ linear + other.pruned_error
        held_out_error = errors.clamp_min(0.0).cpu()
    return RidgePath(
        ridges=torch.tensor(values, dtype=torch.float64),
        train_error=train_error.clamp_min(0.0).cpu(),
        held_out_error=held_out_error,
        dof=(train.width * h).cpu(),
        gcv=gcv.clamp_min(0.0).cpu(),
    )


@checked
def cross_validate(folds: Sequence[Moments], ridges: Iterable[float] = RIDGES) -> Tensor:
    """Held-out error of each fold for least squares on all other folds.

    Args:
        folds: k moments of disjoint sets of tokens, preferably complete documents.
        ridges: positive multiples of the mean eigenvalue of the other folds' Gram matrix.

    Returns:
        (folds, ridges) squared errors; their sum over folds is the cross-validation score.

    Raises:
        ValueError: fewer than two folds, or as in `ridge_path`.
    """
    if len(folds) < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, got {len(folds)}")
    ridges = tuple(ridges)
    errors = []
    for index, fold in enumerate(folds):
        # A sum loses no digits, where subtracting the fold from the total would.
        first, *rest = (*folds[:index], *folds[index + 1 :])
        error = ridge_path(sum(rest, start=first), ridges, held_out=fold).held_out_error
        assert error is not None
        errors.append(error)
    return torch.stack(errors)


@checked
def choose_ridge(
    train: Moments | Sequence[Moments],
    ridges: Iterable[float] = RIDGES,
    *,
    held_out: Moments | None = None,
) -> float:
    """The relative ridge with the lowest estimated error, for ``solve(…, relative_ridge=…)``.

    Args:
        train: training moments, or the folds of a cross-validation.
        ridges: candidates; ties go to the larger ridge.
        held_out: moments of other tokens, to evaluate on; without them, GCV decides.

    Raises:
        ValueError: folds together with ``held_out``, or as in `ridge_path`; every candidate
            interpolates the training tokens, so that GCV is infinite.
    """
    ridges = sorted(ridges, reverse=True)
    if not isinstance(train, Moments):
        if held_out is not None:
            raise ValueError("give folds or held_out moments, not both")
        score = cross_validate(train, ridges).sum(0)
    else:
        path = ridge_path(train, ridges, held_out)
        score = path.gcv if path.held_out_error is None else path.held_out_error
        if torch.isinf(score).all():
            raise ValueError(
                f"every ridge up to {ridges[0]:g} interpolates the {train.tokens} training "
                "tokens: try larger ones, or judge on held_out moments"
            )
    return ridges[int(score.argmin())]


@checked
def choose_ridges(
    train: Moments,
    held_out: Moments,
    ridges: Iterable[float] = COARSE_RIDGES,
    *,
    start: float = 1e-2,
) -> tuple[float, ...]:
    """A relative ridge for each feature, by coordinate descent on the held-out error.

    Features of the stream and of the MLP may need different ridges, and no single decomposition
    serves ridges of different ratios: each step is a Cholesky factorisation.

    Args:
        train: training moments.
        held_out: moments of other tokens.
        ridges: candidates, for every feature.
        start: initial value, for every feature.

    Raises:
        ValueError: no ridge, one that is not positive and finite, no tokens, or different widths
            or regressors.
    """
    grid = sorted(_grid(ridges))
    check_ridge(start)
    check_alike(train, held_out)

    @cache
    def error(indices: tuple[int, ...]) -> float:
        fit = least_squares(train, relative_ridge=[grid[index] for index in indices])
        return held_out.error_of(fit.M, fit.bias)

    first = min(range(len(grid)), key=lambda index: abs(math.log(grid[index] / start)))
    best = (first,) * len(train.blocks)
    improved = True
    while improved:
        improved = False
        for block, step in itertools.product(range(len(best)), (1, -1)):
            while 0 <= best[block] + step < len(grid):
                neighbour = (*best[:block], best[block] + step, *best[block + 1 :])
                if error(neighbour) >= error(best):
                    break
                best, improved = neighbour, True
    return tuple(grid[index] for index in best)


def _grid(ridges: Iterable[float]) -> list[float]:
    grid = [check_ridge(ridge) for ridge in ridges]
    if not grid:
        raise ValueError("no ridge to try: name at least one")
    return grid


@dataclass(frozen=True, eq=False)
class RankPath:
    """Squared errors of reduced-rank regression for every rank 1 … width; float64 (width,).

    Attributes:
        train_error: on the training moments.
        held_out_error: on the held-out moments.
    """

    train_error: Tensor
    held_out_error: Tensor


@checked
def rank_path(train: Moments, held_out: Moments, **options: Unpack[Regularisation]) -> RankPath:
    """Errors of ``solve(train, "low-rank", rank=r)`` for every r from one decomposition.

    Args:
        train: moments of any regressor.
        held_out: moments of other tokens, of the same width and regressor.
        options: ``rcond``, ``ridge`` or ``relative_ridge``, as in `ghost`.

    Raises:
        ValueError: no tokens, or different widths or regressors.
    """
    train, held_out = _centred(train, held_out)
    inverse = train.gram.regularise(**options)
    root, A = whitened(inverse, train.cross)
    Q = torch.linalg.eigh(A.T @ A).eigenvectors.flip(1).T  # rows q_i', by descending eigenvalue
    P = inverse.spectrum.vectors @ (root * (A @ Q.T)) / inverse.scaling[:, None]  # columns p_i
    return RankPath(*(_rank_errors(P, Q, moments) for moments in (train, held_out)))


@checked
def choose_rank(
    train: Moments, held_out: Moments, *, tolerance: float = 0.0, **options: Unpack[Regularisation]
) -> int:
    """The smallest rank whose held-out error is within ``tolerance`` of the best.

    Args:
        train, held_out, options: as in `rank_path`.
        tolerance: 0.01 accepts 1 % more error than the best rank has.

    Raises:
        ValueError: a negative or infinite tolerance, or as in `rank_path`.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must not be negative or infinite, got {tolerance}")
    errors = rank_path(train, held_out, **options).held_out_error
    admissible = errors <= errors.min() * (1 + tolerance)
    return 1 + int(admissible.nonzero()[0])


def _centred(train: Moments, *held_out: Moments) -> list[Moments]:
    """All moments, centred on the training means if least squares fits a bias."""
    check_alike(train, *held_out)
    means = train.means
    return [moments.centred(*means) if train.bias else moments for moments in (train, *held_out)]


def _rank_errors(P: Tensor, Q: Tensor, moments: Moments) -> Tensor:
    """(C,) errors of ``sum_{i <= r} p_i q_i'`` for r = 1 …"""
    G, cross = moments.G.to(P), moments.cross.to(P)
    pairs = (P.T @ G @ P) * (Q @ Q.T)
    quadratic = pairs.cumsum(0).cumsum(1).diagonal()
    linear = (P * (cross @ Q.T)).sum(0).cumsum(0)
    return (quadratic - 2 * linear + moments.pruned_error).clamp_min(0.0).cpu()
