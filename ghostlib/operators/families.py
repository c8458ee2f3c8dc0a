"""The operator families: closed forms from `Moments` to the best repair within each set.

Every solver takes moments of features ``F`` (tokens, p) and ``Delta`` (tokens, C) and returns the
matrix ``M`` (p, C) of the repair ``X + F M``; with the plain stream for ``F`` that is ``X W`` with
``W = I + M``. With the same tokens and no ridge the sets are nested,

    identity ⊂ scalar ⊂ diagonal, hadamard-diagonal ⊂ symmetric ⊂ ghost ⊂ affine,
    identity ⊂ orthogonal ⊂ scaled-orthogonal ⊂ ghost,
    scalar ⊂ scaled-orthogonal,
    identity ⊂ low-rank (any rank) ⊂ ghost ⊂ two-branch ⊂ three-branch,
    identity ⊂ replaceme ⊂ refit ⊂ ghost-refit,  ghost ⊂ ghost-refit,

so their training errors are ordered. The two ``linearpatch`` families and ``magnitude`` are not
least-squares fits. Among equally good fits each family returns the one with the smallest ``M``, so
directions without calibration data stay unchanged.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ghostlib.common import Registry, checked, is_integer, warn
from ghostlib.linalg.gram import Regularisation, Regularised, SingularGramWarning, as_list
from ghostlib.linalg.hadamard import rotate
from ghostlib.models.boundaries import Boundary
from ghostlib.statistics.features import FEATURES, STREAM, Regressor
from ghostlib.statistics.moments import Moments, ratio


class Fit(NamedTuple):
    """Result of a solver.

    Attributes:
        M: (p, C) float64 matrix.
        bias: (C,) or None.
        inverse: the regularised inverse of the Gram matrix, or None if there is none.
        seen: the diagonal that the solver inverted instead, or None.
        error: the squared error, where it is a by-product of the solution.
    """

    M: Tensor
    bias: Tensor | None = None
    inverse: Regularised | None = None
    seen: Tensor | None = None
    error: float | None = None


class Shape(NamedTuple):
    """Sizes that determine the number of free parameters.

    Attributes:
        C: width of the stream.
        p: total width of the features.
        rank: bound on the rank of ``M``; 0 for none.
        bias: whether there is a bias.
    """

    C: int
    p: int
    rank: int = 0
    bias: bool = False


@dataclass(frozen=True)
class Family:
    """A family of repairs.

    Attributes:
        name: in `FAMILIES`, figures and tables.
        searches: the set it searches, in one line.
        solve: the closed form, from moments (and options) to a `Fit`.
        dof: number of free parameters, from the `Shape`.
        regressor: its features and token weight.
        install: where its matrices go, a name in `ghostlib.surgery.installers.INSTALLERS`.
        color: in every figure.
        marker: of its points.
        dash: of its lines.
        least_squares: whether it minimises a squared error, which few tokens may dominate.
        options: of `solve`.
        default: options without a choice of regularisation.
    """

    name: str
    searches: str
    solve: Callable[..., Fit]
    dof: Callable[[Shape], int]
    regressor: Regressor = STREAM
    install: str = "module"
    color: str = "#808080"
    marker: str = "o"
    dash: str = "-"
    least_squares: bool = True
    options: tuple[str, ...] = ()
    default: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def free(self) -> bool:
        """Whether it adds no parameter and no operation, so that the checkpoint is a stock one."""
        return self.install in ("down-projection", "earlier-writes", "nothing")

    @property
    def ridged(self) -> bool:
        """Whether it has a ridge by default, which held-out windows can choose."""
        return "relative_ridge" in dict(self.default)

    @checked
    def check_place(self, gaps: Iterable[Boundary]) -> None:
        """Raise `ValueError` for a gap at layer 0, if the repair needs a layer before the gap."""
        for gap in gaps:
            if gap.start == 0 and self.regressor.reads_mlp:
                raise ValueError(
                    f"{self} repairs the MLP before the gap, and boundary {gap} has no layer "
                    "before it: keep layer 0, or use a repair of the stream such as ghost"
                )

    @classmethod
    def of(cls, spelling: "str | Family") -> "Family":
        """The family with this name, or least squares on a regressor spelt ``"x, n(x); 1/|y|"``.

        Raises:
            ValueError: neither a family nor a regressor (the message names the nearest family), or
                a regressor that reads the MLP, which a module at the gap cannot.
        """
        if isinstance(spelling, Family):
            return spelling
        text = str(spelling)
        if text in FAMILIES or not (text in FEATURES or "," in text or ";" in text):
            return FAMILIES[text]
        regressor = Regressor.parse(text)
        if regressor.reads_mlp:
            raise ValueError(
                f"no module at the gap can read {regressor}: use a family that is folded into the "
                "MLP before it, such as replaceme"
            )
        return replace(FAMILIES["branches"], regressor=regressor)


# ---------------------------------------------------------------- sets of diagonal matrices


def identity(moments: Moments) -> Fit:
    """``W = I``: the pruned model without a repair."""
    return Fit(torch.zeros_like(moments.cross))


def scalar(moments: Moments) -> Fit:
    """``W = a I`` with ``a = tr(B)/tr(G)``."""
    size = moments.G.trace()[None]
    a = ratio(moments.B.trace(), size)
    return Fit((a - 1) * _eye(moments), seen=size)


def diagonal(moments: Moments) -> Fit:
    """``W = diag(d)`` with ``d_j = B_jj / G_jj``, or 1 for a channel that is zero."""
    G, B = moments.G.diagonal(), moments.B.diagonal()
    return Fit(torch.diag(ratio(B, G) - 1), seen=G)


def linearpatch_d(moments: Moments, *, pooled: bool = False) -> Fit:
    """LinearPatch without rotation: ``d_j = mean|X_post,j| / mean|X_pre,j|`` (NeurIPS 2025).

    Args:
        pooled: take one ratio over all (weighted) tokens. By default the ratios of the sequences
            are averaged, as in the published code.
    """
    pool = ratio(moments.y_abs, moments.x_abs)
    return Fit(torch.diag((pool if pooled else moments.ratio / moments.sequences) - 1))


def linearpatch_r(moments: Moments) -> Fit:
    """LinearPatch: ``W = H diag(d) H'``, d the magnitude ratios of ``X_pre H`` and ``X_post H``.

    Raises:
        ValueError: the width has no Hadamard matrix.
    """
    return Fit(_in_hadamard_basis(moments, moments.ratio_rotated / moments.sequences))


def hadamard_diagonal(moments: Moments) -> Fit:
    """The least-squares optimum of LinearPatch's own set ``H diag(d) H'``: `diagonal` after ``H``.

    Raises:
        ValueError: the width has no Hadamard matrix.
    """
    H = rotate(_eye(moments))
    g, b = ((H * rotate(A)).sum(0) for A in (moments.G, moments.B))  # diagonals of H'GH, H'BH
    noise = max(len(g), 64) * torch.finfo(g.dtype).eps * g.sum()
    g = g.where(g > noise, 0.0)
    return Fit(_in_hadamard_basis(moments, ratio(b, g)), seen=g)


def magnitude(moments: Moments) -> Fit:
    """Prune&Comp: ``W = a I``, a the mean over channels of ``mean|X_post,j| / mean|X_pre,j|``.

    The mean of `linearpatch_d`'s diagonal (arXiv 2507.18212, whose code averages over channels and
    sequences), folded into the weights before the gap.
    """
    return Fit(linearpatch_d(moments).M.diagonal().mean() * _eye(moments))


# ---------------------------------------------------------------- rotations and symmetric matrices


def orthogonal(moments: Moments) -> Fit:
    """Procrustes: ``W = U V'`` from ``B = U S V'``, reflections included.

    The same as ``scipy.linalg.orthogonal_procrustes(X_pre, X_post)``.
    """
    return Fit(_procrustes(moments.B)[0] - _eye(moments))


def scaled_orthogonal(moments: Moments) -> Fit:
    """Procrustes with a scale: ``W = (tr(S)/tr(G)) U V'`` from ``B = U S V'``."""
    Q, nuclear = _procrustes(moments.B)
    size = moments.G.trace()[None]
    return Fit(ratio(nuclear, size) * Q - _eye(moments), seen=size)


def symmetric(moments: Moments, **options: Unpack[Regularisation]) -> Fit:
    """``W = W'``: the Lyapunov equation ``G W + W G = B + B'`` in the eigenbasis of ``G``.

    Solved for ``M = W - I``, which satisfies the same equation with ``X'Delta`` for ``B``. Entry
    (i, j) is divided by ``s_i + s_j``, so it is 0 only where neither direction has data. The same
    as ``scipy.linalg.solve_continuous_lyapunov(G, B + B')`` where G has full rank.

    Args:
        options: ``rcond``, ``ridge`` or ``relative_ridge`` as in `ghost`.
    """
    inverse = moments.gram.regularise(**options)
    V, unit2 = inverse.spectrum.vectors, inverse.scaling[0] ** 2
    # X v = 0 implies v' X' Delta = 0: both are rounding error on dropped directions.
    C = V.T @ (moments.cross / unit2) @ V * inverse.kept[:, None]
    s = inverse.spectrum.values * inverse.kept + inverse.shift  # dropped directions shrink as well
    M = V @ ratio(C + C.T, s[:, None] + s[None, :], empty=0.0) @ V.T
    return Fit((M + M.T) / 2, inverse=inverse)


# ---------------------------------------------------------------- least squares


@checked
def ghost(moments: Moments, *, around: str = "identity", **options: Unpack[Regularisation]) -> Fit:
    """The unconstrained optimum ``W = I + M``, ``M = pinv(X_pre) Delta`` (paper, eqs. 4-7).

    The same as ``scipy.linalg.lstsq(X_pre, X_post - X_pre)``, from moments.

    Args:
        around: ``"identity"`` solves for the smallest ``M``, which keeps directions without data;
            ``"zero"`` for the smallest ``W``, which erases them. The two agree without a ridge
            where ``X_pre`` has full column rank.
        options: at most one of ``rcond``, truncated SVD as in the paper's text: singular values of
            ``X_pre`` up to this fraction of the largest are dropped, 1e-6 by default; ``ridge``,
            ``(G + ridge I) M = X'Delta`` as in the paper's code, where it is 1e-6; and
            ``relative_ridge``, the same in units of the mean eigenvalue ``tr(G)/p``, independent of
            the number of tokens and the scale of the stream.
    """
    if around == "zero":
        inverse = moments.gram.regularise(**options)
        return Fit(inverse.solve(moments.B) - _eye(moments), inverse=inverse)
    return least_squares(moments, **options)


@checked
def least_squares(
    moments: Moments,
    *,
    rank: int | None = None,
    bias: bool | None = None,
    **options: Unpack[Regularisation],
) -> Fit:
    """The best ``M = [M_1; M_2; …]`` of ``X + f_1 M_1 + f_2 M_2 …``, with or without a bias.

    One linear least-squares problem: ``Delta`` regressed on all features. With ``rank``,
    reduced-rank regression: ``||F M - Delta||`` differs by a constant from the distance between
    ``G^(1/2) M`` and the whitened fit ``G^(-1/2) F'Delta``, whose best rank-r approximation is its
    truncated SVD (Eckart-Young).

    Args:
        rank: upper bound on the rank of ``M``, between 1 and C.
        bias: fit a bias as well, not penalised: centred moments. By default where the weights that
            receive the repair have one.
        options: as in `ghost`; a relative ridge is in each feature's own unit, one for all features
            or one for each.

    Raises:
        ValueError: a rank out of range, or bad options.
    """
    bias = moments.bias if bias is None else bias
    f, d = moments.means
    if bias:
        moments = moments.centred(f, d)
    inverse, error = moments.gram.regularise(**options), None
    if rank is None:
        M = inverse.solve(moments.cross)
        explained = inverse.explained(M, moments.cross)
        error = None if explained is None else max(moments.pruned_error - explained, 0.0)
    else:
        check_rank(rank, moments.width)
        M = _reduced(inverse, moments.cross, rank)
    return Fit(M, d - f @ M if bias else None, inverse, error=error)


def check_rank(rank: int, width: int | None = None) -> None:
    """Raise `ValueError` for a rank that is not between 1 and the width (if known)."""
    if not is_integer(rank) or not 1 <= rank <= (rank if width is None else width):
        limit = "the width" if width is None else f"the width {width}"
        raise ValueError(f"rank must lie between 1 and {limit}, got {rank}")


def joint_least_squares(
    moments: Moments, *, bias: bool | None = None, **options: Unpack[Regularisation]
) -> Fit:
    """Least squares on the stream and on the input of the last down-projection, ``X + X M + h E``.

    ``M`` becomes a module at the boundary and multiplies the output of the down-projection before
    it by ``I + M``, so ``E (I + M)^-1`` is folded into that projection. Where ``I + M`` is too
    close to singular to fold in float32, the ridge is raised tenfold, with a warning, until it is
    not.
    """
    while True:
        fit = least_squares(moments, bias=bias, **options)
        C = moments.width
        condition = float(torch.linalg.cond(fit.M[:C] + _eye(moments)))
        if condition < _FOLDABLE:
            return fit
        ridges = options.get("relative_ridge")
        raised = [10 * r for r in as_list(_SMALLEST_RIDGE if ridges is None else ridges)]
        warn(
            f"I + M has condition number {condition:.1e}, too close to singular to fold in "
            f"float32: solved with relative_ridge={raised} instead",
            SingularGramWarning,
        )
        options = {"relative_ridge": raised}


def affine(moments: Moments, **options: Unpack[Regularisation]) -> Fit:
    """``X W + b``: `ghost` on centred moments; a ridge does not shrink ``b``."""
    return least_squares(moments, bias=True, **options)


def low_rank(moments: Moments, *, rank: int, **options: Unpack[Regularisation]) -> Fit:
    """``W = I + M`` with ``rank M <= r``: reduced-rank regression of ``Delta`` on ``X_pre``."""
    return least_squares(moments, rank=rank, **options)


def _reduced(inverse: Regularised, cross: Tensor, rank: int) -> Tensor:
    """The best fit (p, C) of at most this rank, from cross moments ``F'Delta`` (p, C)."""
    root, A = whitened(inverse, cross)
    if rank < min(A.shape):
        # The leading right singular vectors, from A'A: a third of the cost of an SVD; their error
        # enters the residual only squared.
        U = torch.linalg.eigh(A.T @ A).eigenvectors[:, -rank:]
        A = A @ U @ U.T
    return (inverse.spectrum.vectors @ (root * A)) / inverse.scaling[:, None]


def whitened(inverse: Regularised, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``G^(-1/2)`` (p, 1), and the whitened fit in the eigenbasis (p, C)."""
    root = inverse.gain.sqrt()[:, None]
    return root, root * (inverse.spectrum.vectors.T @ (cross / inverse.scaling[:, None]))


# ---------------------------------------------------------------- helpers


def _eye(moments: Moments) -> Tensor:
    return torch.eye(moments.width, dtype=torch.float64, device=moments.G.device)


def _in_hadamard_basis(moments: Moments, d: Tensor) -> Tensor:
    """``H diag(d) H' - I``."""
    H = rotate(_eye(moments))
    return rotate(H * (d - 1), inverse=True)


def _procrustes(B: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal ``Q`` with the largest ``tr(Q'B)``, and the nuclear norm of ``B``, its trace."""
    U, sigma, Vh = torch.linalg.svd(B)
    unseen = sigma <= len(B) * torch.finfo(B.dtype).eps * sigma[0]
    if unseen.any():
        # Any rotation of the null space fits equally well: take the one nearest the identity.
        U0, V0 = U[:, unseen], Vh[unseen].T
        P, _, Qh = torch.linalg.svd(U0.T @ V0)
        U[:, unseen] = U0 @ (P @ Qh)
    return U @ Vh, sigma.sum()


# ---------------------------------------------------------------- the table

_RIDGES = tuple(Regularisation.__annotations__)
# Largest condition number of I + M for a fold in float32: 1e6 x 1.2e-7 is a tenth.
_FOLDABLE = 1e6
_SMALLEST_RIDGE = 1e-6


def _matrix_dof(s: Shape) -> int:
    return (s.rank * (s.p + s.C - s.rank) if s.rank else s.p * s.C) + s.bias * s.C


def _linear(spelling: str, **fields: Any) -> dict[str, Any]:
    """Fields of a family that is least squares on other features than the stream."""
    fields = {"solve": least_squares, "options": (*_RIDGES, "rank", "bias")} | fields
    return {"regressor": Regressor.parse(spelling), "dof": _matrix_dof} | fields


_JOINT: dict[str, Any] = {
    "solve": joint_least_squares,
    "options": (*_RIDGES, "bias"),
    "default": (("relative_ridge", (1e-3, 1e-2)),),
}

FAMILIES: Registry[Family] = Registry("operator")
"""Every family of repairs, by name."""
# fmt: off
for _family in (
    Family("identity", "{I}", identity, lambda s: 0, install="nothing",
           color="#c11608", marker="X", least_squares=False),
    Family("scalar", "a I", scalar, lambda s: 1, color="#d7cbb0", marker="h", dash=":"),
    Family("magnitude", "a I, by mean magnitudes", magnitude, lambda s: 1,
           install="earlier-writes", color="#e97c96", marker="s", dash="-.", least_squares=False),
    Family("diagonal", "diag(d)", diagonal, lambda s: s.C, color="#ef5a0b", marker="*"),
    Family("linearpatch-d", "diag(d), by mean magnitudes", linearpatch_d, lambda s: s.C,
           color="#e4d104", marker="p", dash="-.", least_squares=False, options=("pooled",)),
    Family("linearpatch-r", "H diag(d) H', by mean magnitudes", linearpatch_r, lambda s: s.C,
           color="#99b476", marker="d", dash="-.", least_squares=False),
    Family("hadamard-diagonal", "H diag(d) H'", hadamard_diagonal, lambda s: s.C,
           color="#dea42b", marker="<"),
    Family("orthogonal", "W'W = I", orthogonal, lambda s: s.C * (s.C - 1) // 2,
           color="#9da4c8", marker="P", dash=":"),
    Family("scaled-orthogonal", "s Q, Q'Q = I", scaled_orthogonal,
           lambda s: s.C * (s.C - 1) // 2 + 1, color="#4485f7", marker="^"),
    Family("symmetric", "W = W'", symmetric, lambda s: s.C * (s.C + 1) // 2,
           color="#1faaee", marker="v", options=_RIDGES),
    Family("low-rank", "I + M, rank M = r", low_rank, _matrix_dof, color="#44e8dc", marker=">",
           options=(*_RIDGES, "rank")),
    Family("ghost", "every matrix", ghost, _matrix_dof, color="#008077", marker="o",
           options=(*_RIDGES, "around")),
    Family("affine", "every matrix and bias", affine, _matrix_dof, color="#054547", marker="p",
           options=_RIDGES),
    Family("replaceme", "every matrix on the output of the last MLP before the gap",
           color="#754539", marker="s", install="down-projection", **_linear("f", options=_RIDGES)),
    Family("refit", "the whole down-projection before the gap", color="#f1a8bf", marker="D",
           install="down-projection", **_linear("h", default=(("relative_ridge", 1e-2),))),
    Family("ghost-refit", "a matrix on the stream and the down-projection before it, jointly",
           color="#1765e1", marker="P", install="module and down-projection",
           **_linear("x, h", **_JOINT)),
    Family("ghost-refit-relative", "the same, tokens weighted by 1/|y|",
           color="#003db5", marker="*", dash="--", install="module and down-projection",
           **_linear("x, h; 1/|y|", **_JOINT)),
    Family("ghost-relative", "every matrix, tokens weighted by 1/|y|",
           color="#629947", marker="p", dash="--",
           **_linear("x; 1/|y|")),
    Family("two-branch", "matrices on the stream and its normalised copy",
           color="#745fa1", marker="d",
           **_linear("x, n(x)")),
    Family("two-branch-relative", "the same, tokens weighted by 1/|y|",
           color="#5a1d6b", marker="^", dash="--",
           **_linear("x, n(x); 1/|y|")),
    Family("three-branch", "the same and the normalised stream of the token before",
           color="#43d8fe", marker="*", dash=":", **_linear("x, n(x), n(prev)")),
    Family("three-branch-relative", "the same, tokens weighted by 1/|y|",
           color="#4d8eaf", marker=">", dash="--",
           **_linear("x, n(x), n(prev); 1/|y|")),
    Family("branches", "matrices on any features of the stream", color="#ac6a8b", marker="h",
           **_linear("x, n(x); 1/|y|")),
):
    FAMILIES[_family.name] = _family
# fmt: on
OPERATORS = FAMILIES  # their public name
