"""The rank of a low-rank operator, chosen by its error on tokens it was not solved from."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from ghostlib.branches import block_units, normal_equations
from ghostlib.checks import check_alike, check_moments, check_square
from ghostlib.families import whitened
from ghostlib.gram import Regularisation, gram
from ghostlib.moments import Moments


@dataclass(frozen=True, eq=False)
class RankPath:
    """Squared errors of `low_rank` for every rank 1 … width; float64 tensors of shape (width,).

    Attributes:
        train_error: on the training moments. held_out_error: on the held-out moments.
    """

    train_error: Tensor
    held_out_error: Tensor


def rank_path(train: Moments, held_out: Moments, **how: Unpack[Regularisation]) -> RankPath:
    """Errors of ``solve(train, "low-rank", rank=r)`` for every r from one decomposition.

    The operators of reduced-rank regression are nested: ``M_r`` is the sum of the first ``r`` of
    the products ``p_i q_i'``. So the error of every rank is a running sum.

    Args:
        train: square moments to solve from, or those of features of the stream.
        held_out: of other tokens, of the same width and regressor.
        how: ``rcond``, ``ridge`` or ``relative_ridge``, as in `ghost`.

    Raises:
        ValueError: no tokens, or different widths or regressors.
    """
    for moments in (train, held_out):
        check_moments(moments)
        if not moments.of_change:
            check_square(moments, "a rank path")
    check_alike(train, held_out)
    unit = block_units(train) if train.of_change else None
    G, cross = normal_equations(train, unit)
    inverse = gram(G).regularise(**how)
    root, A = whitened(inverse, cross)
    Q = torch.linalg.eigh(A.T @ A).eigenvectors.flip(1).T  # rows q_i', the strongest first
    P = inverse.gram.vectors @ (root * (A @ Q.T))  # columns p_i
    return RankPath(*(_errors(P, Q, moments, unit) for moments in (train, held_out)))


def choose_rank(
    train: Moments,
    held_out: Moments,
    ranks: Iterable[int] | None = None,
    *,
    tolerance: float = 0.0,
    **how: Unpack[Regularisation],
) -> int:
    """The smallest rank whose held-out error is within ``tolerance`` of the best.

    Args:
        train, held_out, how: as in `rank_path`.
        ranks: candidates; all by default.
        tolerance: 0.01 accepts 1 % more error than the best candidate has.

    Raises:
        ValueError: no candidate, one outside 1 … width, or a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    errors = rank_path(train, held_out, **how).held_out_error
    tried = sorted(
        {operator.index(r) for r in (range(1, len(errors) + 1) if ranks is None else ranks)}
    )
    if not tried or not 1 <= tried[0] <= tried[-1] <= len(errors):
        raise ValueError(f"ranks must lie between 1 and the width {len(errors)}, got {tried}")
    scores = {rank: float(errors[rank - 1]) for rank in tried}
    enough = min(scores.values()) * (1 + tolerance)
    return next(rank for rank, score in scores.items() if score <= enough)


def _errors(P: Tensor, Q: Tensor, moments: Moments, unit: Tensor | None) -> Tensor:
    """(q,) errors of ``sum_{i <= r} p_i q_i'`` for r = 1 …"""
    G, cross = (t.to(P) for t in normal_equations(moments, unit))
    pairs = (P.T @ G @ P) * (Q @ Q.T)
    quadratic = pairs.cumsum(0).cumsum(1).diagonal()
    linear = (P * (cross @ Q.T)).sum(0).cumsum(0)
    return (quadratic - 2 * linear + moments.nothing).clamp_min(0.0).cpu()
