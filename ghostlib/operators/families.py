"""The operator families: from `Moments` to the best matrix within each set.

Every function takes moments of ``X`` (tokens, p) and ``Y`` (tokens, q) and returns a `Fit`. With
``C`` the common width the sets are nested,

    identity ⊂ scalar ⊂ diagonal, hadamard-diagonal ⊂ symmetric ⊂ ghost ⊂ affine,
    identity ⊂ orthogonal ⊂ scaled-orthogonal ⊂ ghost,
    scalar ⊂ scaled-orthogonal,
    identity ⊂ low-rank (any rank) ⊂ ghost,

so their training errors are ordered. The two `linearpatch` functions and `magnitude` are no
least-squares fits; `replaceme` is the fit of another regressor, the last MLP's output; those of
several features of the stream, and of weighted tokens, differ in their regressor. Directions
the calibration tokens never visit stay untouched: each family returns, among equally good fits, the
one closest to the identity.
"""

import operator
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ghostlib.linalg.gram import Gram, Regularisation, Regularised, gram
from ghostlib.linalg.hadamard import rotate
from ghostlib.statistics.moments import Moments, check_square


class Fit(NamedTuple):
    """What a family found: see `Operator` for the fields."""

    W: Tensor
    dof: int
    bias: Tensor | None = None
    rank: int = 0
    condition: float = 1.0
    trouble: str | None = None


def identity(moments: Moments) -> Fit:
    """``W = I``: the pruned model without recovery."""
    return Fit(_eye(moments, "identity"), 0)


def scalar(moments: Moments) -> Fit:
    """``W = a I`` with ``a = tr(B)/tr(G)``."""
    eye = _eye(moments, "scalar")
    G = moments.G.trace()[None]
    return Fit(_ratio(moments.B.trace(), G) * eye, 1, None, *_conditioning(G))


def diagonal(moments: Moments) -> Fit:
    """``W = diag(d)`` with ``d_j = B_jj / G_jj``; 1 for a channel that is always zero."""
    check_square(moments, "diagonal")
    G, B = moments.G.diagonal(), moments.B.diagonal()
    return Fit(torch.diag(_ratio(B, G)), len(G), None, *_conditioning(G))


def linearpatch_d(moments: Moments, *, pooled: bool = False) -> Fit:
    """LinearPatch without rotation: ``d_j = mean|Y_j| / mean|X_j|`` (NeurIPS 2025).

    Args:
        pooled: take the ratio over all tokens at once (weighted where the tokens are) instead of
            averaging the ratios of the sequences, as the published code does.
    """
    check_square(moments, "linearpatch-d")
    d = _ratio(moments.y_abs, moments.x_abs) if pooled else moments.ratio / moments.sequences
    return Fit(torch.diag(d), len(d))


def linearpatch_r(moments: Moments) -> Fit:
    """LinearPatch: ``W = H diag(d) H'`` with ``d`` the magnitude ratios of ``X H`` and ``Y H``.

    Raises:
        ValueError: the width has no Hadamard matrix.
    """
    H = rotate(_eye(moments, "linearpatch-r"))
    d = moments.ratio_rotated / moments.sequences
    return Fit(rotate(H * d, inverse=True), len(d))


def hadamard_diagonal(moments: Moments) -> Fit:
    """The least-squares optimum of LinearPatch's own set ``H diag(d) H'``: `diagonal` after ``H``.

    Raises:
        ValueError: the width has no Hadamard matrix.
    """
    H = rotate(_eye(moments, "hadamard-diagonal"))
    g, b = _rotated_diagonal(moments.G, H), _rotated_diagonal(moments.B, H)
    return Fit(rotate(H * _ratio(b, g), inverse=True), len(g), None, *_conditioning(g))


def magnitude(moments: Moments) -> Fit:
    """Prune&Comp: ``W = a I`` with ``a`` the mean over channels of ``mean|Y_j| / mean|X_j|``.

    That is the mean of `linearpatch_d`'s diagonal (arXiv 2507.18212, whose code averages the ratios
    of channels and sequences). It is folded into the weights before the gap.
    """
    a = linearpatch_d(moments).W.diagonal().mean()
    return Fit(a * _eye(moments, "magnitude"), 1)


def orthogonal(moments: Moments) -> Fit:
    """Procrustes: ``W = U V'`` from ``B = U S V'``, reflections included."""
    check_square(moments, "orthogonal")
    C = moments.width
    return Fit(_procrustes(moments.B)[0], C * (C - 1) // 2)


def scaled_orthogonal(moments: Moments) -> Fit:
    """Procrustes with a scale: ``W = (tr(S)/tr(G)) U V'`` from ``B = U S V'``."""
    check_square(moments, "scaled-orthogonal")
    C = moments.width
    Q, nuclear = _procrustes(moments.B)
    G = moments.G.trace()[None]
    return Fit(_ratio(nuclear, G) * Q, C * (C - 1) // 2 + 1, None, *_conditioning(G))


def symmetric(moments: Moments, **how: Unpack[Regularisation]) -> Fit:
    """``W = W'``: the Lyapunov equation ``G W + W G = B + B'`` in the eigenbasis of ``G``.

    Solved for ``M = W - I``, which obeys the same equation with ``B - G`` on the right. There
    entry (i, j) is divided by ``s_i + s_j``, so it stays 0 only where neither direction was seen.

    Args:
        how: ``rcond``, ``ridge`` or ``relative_ridge`` as in `ghost`.
    """
    check_square(moments, "symmetric")
    inverse = gram(moments.G).regularise(**how)
    V = inverse.gram.vectors
    # X v = 0 forces v' X' Delta = 0: on dropped directions both are rounding, and must go together.
    C = V.T @ (moments.B - moments.G) @ V * inverse.kept[:, None]
    s = (inverse.gram.values + inverse.ridge) * inverse.kept
    W = V @ _ratio(C + C.T, s[:, None] + s[None, :], empty=0.0) @ V.T
    W.diagonal().add_(1.0)
    return full_fit((W + W.T) / 2, moments, inverse, moments.width * (moments.width + 1) // 2)


def low_rank(moments: Moments, *, rank: int | None = None, **how: Unpack[Regularisation]) -> Fit:
    """``W = I + M`` with ``rank M <= r``: reduced-rank regression of ``Delta`` on ``X``.

    ``||X M - Delta||`` differs by a constant from the distance of ``G^(1/2) M`` to the whitened
    fit ``G^(-1/2) X'Delta``, whose best rank-r approximation is its truncated SVD (Eckart-Young).

    Args:
        rank: r, between 1 and the width.
        how: ``rcond``, ``ridge`` or ``relative_ridge`` as in `ghost`.

    Raises:
        ValueError: no rank, or one outside 1 … width.
    """
    check_square(moments, "low-rank")
    if rank is None:
        raise ValueError("low-rank needs rank=…: `choose_rank` finds one by held-out error")
    C, r = moments.width, operator.index(rank)
    if not 1 <= r <= C:
        raise ValueError(f"rank must lie between 1 and the width {C}, got {rank}")
    inverse = gram(moments.G).regularise(**how)
    W = reduced(inverse, moments.B - moments.G, r)
    W.diagonal().add_(1.0)
    return full_fit(W, moments, inverse, r * (2 * C - r))


def reduced(inverse: Regularised, cross: Tensor, rank: int) -> Tensor:
    """The best fit (p, q) of at most this rank, from cross moments ``X'Delta`` (p, q)."""
    root, A = whitened(inverse, cross)
    if rank < min(A.shape):
        # The leading right singular vectors, from A'A: a third of the cost of an SVD, and an error
        # in them enters the residual only squared.
        U = torch.linalg.eigh(A.T @ A).eigenvectors[:, -rank:]
        A = A @ U @ U.T
    return inverse.gram.vectors @ (root * A)


def whitened(inverse: Regularised, cross: Tensor) -> tuple[Tensor, Tensor]:
    """``G^(-1/2)``'s eigenvalues (p, 1), and the whitened fit in the eigenbasis (p, q)."""
    root = inverse.gain.sqrt()[:, None]
    return root, root * (inverse.gram.vectors.T @ cross)


def ghost(
    moments: Moments,
    *,
    rcond: float | None = None,
    ridge: float | None = None,
    relative_ridge: float | None = None,
    around: str = "identity",
) -> Fit:
    """The unconstrained optimum ``W = I + M``, ``M = pinv(X) Delta`` (paper, eqs. 4-7).

    Give at most one of the first three; the default is ``rcond = 1e-6``.

    Args:
        rcond: truncated SVD as in the paper's text: singular values of ``X`` up to this fraction of
            the largest are dropped.
        ridge: ``(G + ridge I) M = X'Delta`` as in the paper's code, which takes 1e-6.
        relative_ridge: the same in units of the mean eigenvalue ``tr(G)/p``, so that a value keeps
            its meaning when the number of tokens or the scale of the stream changes.
        around: ``"identity"`` solves for the smallest ``M``, which leaves unseen directions as they
            are; ``"zero"`` for the smallest ``W``, which erases them, and which fits any pair of
            widths. The two agree without a ridge where ``X`` has full column rank.
    """
    inverse = gram(moments.G).regularise(rcond, ridge, relative_ridge)
    W = _solve(inverse, moments, moments.G, moments.B, around, "ghost")
    return full_fit(W, moments, inverse, W.numel())


def replaceme(moments: Moments, **how: Unpack[Regularisation]) -> Fit:
    """ReplaceMe, least squares: ``T`` on the last kept MLP's output alone (arXiv 2505.02819).

    With ``F`` that output, the stream before the gap is ``X = R + F`` and becomes ``R + F T``; the
    best ``T`` regresses ``X_post - R = F + Delta`` on ``F``. These moments (``calibrate(…,
    mlp=True).mlp``) have ``F`` for ``X`` and ``F + Delta`` for ``Y``, so it is `ghost` on them.

    Args:
        how: ``rcond``, ``ridge`` or ``relative_ridge`` as in `ghost`.
    """
    return ghost(moments, **how)


def affine(moments: Moments, *, around: str = "identity", **how: Unpack[Regularisation]) -> Fit:
    """``X W + b``: `ghost` on centred moments; a ridge does not shrink ``b``.

    Args:
        around: as in `ghost`.
        how: ``rcond``, ``ridge`` or ``relative_ridge`` as in `ghost`.
    """
    x, y = moments.x1 / moments.weight, moments.y1 / moments.weight
    G = moments.G - torch.outer(moments.x1, x)
    B = moments.B - torch.outer(moments.x1, y)
    # Centring cancels: what is left of a large constant channel is rounding at the size of G.
    scale = float(moments.G.diagonal().max())
    inverse = Gram.decompose(G, scale).regularise(**how)
    W = _solve(inverse, moments, G, B, around, "affine")
    return full_fit(W, moments, inverse, W.numel() + len(y), bias=y - x @ W)


def _solve(
    inverse: Regularised, moments: Moments, G: Tensor, B: Tensor, around: str, name: str
) -> Tensor:
    if around == "zero":
        return inverse.solve(B)
    if around != "identity":
        raise ValueError(f"around must be 'identity' or 'zero', got {around!r}")
    check_square(moments, f"{name} around the identity")
    W = inverse.solve(B - G)
    W.diagonal().add_(1.0)
    return W


def full_fit(
    W: Tensor,
    moments: Moments,
    inverse: Regularised,
    dof: int,
    bias: Tensor | None = None,
    blind: int = 0,
) -> Fit:
    """A `Fit` of a whole matrix, with what can be said of the Gram matrix it inverted."""
    trouble = inverse.trouble(moments.tokens, blind)
    return Fit(W, dof, bias, inverse.rank, inverse.gram.condition, trouble)


def _eye(moments: Moments, name: str) -> Tensor:
    check_square(moments, name)
    return torch.eye(moments.width, dtype=torch.float64, device=moments.G.device)


def _ratio(numerator: Tensor, denominator: Tensor, empty: float = 1.0) -> Tensor:
    """``numerator / denominator``, and ``empty`` where the denominator is zero."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, empty)


def _conditioning(diagonal: Tensor) -> tuple[int, float]:
    """Rank and condition number of a diagonal Gram matrix."""
    low, high = float(diagonal.min()), float(diagonal.max())
    return int((diagonal > 0).sum()), high / low if low > 0 else float("inf")


def _rotated_diagonal(A: Tensor, H: Tensor) -> Tensor:
    """(n,) diagonal of ``H' A H``."""
    return (H * rotate(A)).sum(0)


def _procrustes(B: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal ``Q`` with the largest ``tr(Q'B)``, and that trace, the nuclear norm of ``B``."""
    U, sigma, Vh = torch.linalg.svd(B)
    unseen = sigma <= len(B) * torch.finfo(B.dtype).eps * sigma[0]
    if unseen.any():
        # Any rotation among the null directions fits as well: take the one nearest the identity.
        U0, V0 = U[:, unseen], Vh[unseen].T
        P, _, Qh = torch.linalg.svd(U0.T @ V0)
        U[:, unseen] = U0 @ (P @ Qh)
    return U @ Vh, sigma.sum()


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
