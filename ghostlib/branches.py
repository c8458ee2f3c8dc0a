"""Branches: the closed form on several features of the stream side by side.

``X -> X + f_1(X) M_1 + f_2(X) M_2 + …`` is linear in the ``M_k``, so the best ones are still one
least-squares problem, ``Delta`` on ``F = [f_1(X), f_2(X) …]``, with the moments of a
`ghostlib.features.Regressor`. The families differ in nothing but that regressor.

Features differ in size by orders of magnitude. Each block of ``F`` is therefore measured in its own
unit, the root mean square of its columns: truncation and ridge see ``F_k / u_k``, of which every
block has mean eigenvalue 1. Neither the scale of the stream, nor a rotation of its basis, nor the
number or the order of the tokens changes what a value of ``rcond`` or ``relative_ridge`` does.
"""

import operator

import torch
from torch import Tensor

from ghostlib.families import Fit, full_fit, reduced
from ghostlib.gram import Gram
from ghostlib.moments import Moments


def branches(
    moments: Moments,
    *,
    rcond: float | None = None,
    relative_ridge: float | None = None,
    rank: int | None = None,
    bias: bool = False,
) -> Fit:
    """The best ``M = [M_1; M_2; …]`` of ``X + F M``, or of ``X + F M + b``.

    Args:
        moments: of features (tokens, k C) and Delta (tokens, C).
        rcond: drop singular values of the blockwise scaled ``F`` up to this fraction of the
            largest; 1e-6 where no ridge is given.
        relative_ridge: penalty ``r sum_k u_k^2 ||M_k||^2``, with ``u_k^2`` the mean eigenvalue of
            block ``k``'s Gram matrix.
        rank: of ``M`` at most, between 1 and C: reduced-rank regression, k C + C numbers a rank.
        bias: fit ``b`` as well, which nothing shrinks: where norms and layers have shifts.

    Raises:
        ValueError: an option out of range, or both of the first two.
    """
    C = moments.out_width
    if rank is not None and not 1 <= operator.index(rank) <= C:
        raise ValueError(f"rank must lie between 1 and the width {C}, got {rank}")
    G, B, x, y = moments.G, moments.B, moments.x1 / moments.weight, moments.y1 / moments.weight
    unit = block_units(moments)
    if bias:
        G = G - torch.outer(moments.x1, x)
        B = B - torch.outer(moments.x1, y)
    # Centring cancels: what is left of a large constant channel is rounding at the size of G.
    scale = float((moments.G.diagonal() / unit.square()).max()) if bias else 0.0
    gram = Gram.decompose(G / torch.outer(unit, unit), scale)
    inverse = gram.regularise(rcond=rcond, relative_ridge=relative_ridge)
    cross = B / unit[:, None]
    scaled = inverse.solve(cross) if rank is None else reduced(inverse, cross, rank)
    M = scaled / unit[:, None]
    p = len(M)
    dof = p * C if rank is None else rank * (p + C - rank)
    b = y - x @ M if bias else None
    # The channels of a standardised token sum to zero.
    blind = moments.regressor.count("z(")
    return full_fit(M, moments, inverse, dof + bias * C, b, blind)


def normal_equations(moments: Moments, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gram matrix (p, p) and cross moments with Delta (p, q), for any regressor.

    Args:
        unit: `block_units` of the moments that a fit is from, where features are concerned.
    """
    if not moments.of_change:
        return moments.G, moments.B - moments.G
    unit = (block_units(moments) if unit is None else unit).to(moments.G)
    return moments.G / torch.outer(unit, unit), moments.B / unit[:, None]


def block_units(moments: Moments) -> Tensor:
    """(k C,) root mean square eigenvalue of each feature's Gram matrix; 1 for one that is zero."""
    C = moments.out_width
    mean = moments.G.diagonal().view(-1, C).mean(1, keepdim=True)
    return torch.where(mean > 0, mean, 1.0).sqrt().expand(-1, C).flatten()
