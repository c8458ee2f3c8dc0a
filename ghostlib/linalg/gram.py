"""The Gram matrix and its regularised inverses, each computed on first use.

With ``G = V diag(s) V'`` every regularised inverse used here is ``V diag(gain) V'``: the truncated
SVD of the paper's text (section 3.2.2) has ``gain = 1/s`` on the singular values kept and 0 on
those dropped, the normal equations of its code (appendix H) have ``gain = 1/(s + ridge)``. The
second needs no spectrum: a Cholesky factorisation of ``G + ridge I`` solves it in a tenth of the
time, and the spectrum is computed only on request or where the factorisation fails.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ghostlib.common import checked

RCOND = 1e-6
# A smaller multiple of the mean eigenvalue has no measurable effect as a ridge.
_EFFECTIVE_RIDGE = 1e-6


class Regularisation(TypedDict, total=False):
    """Options of `Gram.regularise`, at most one of them set."""

    rcond: float | None
    ridge: float | None
    relative_ridge: float | Sequence[float] | None


class SingularGramWarning(UserWarning):
    """The calibration tokens do not determine the operator; more tokens or a ridge would."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigendecomposition ``V diag(s) V'`` of a symmetric positive semidefinite matrix.

    As ``scipy.linalg.eigh``, with negative eigenvalues set to zero and a noise level.

    Attributes:
        values: (p,) eigenvalues s in ascending order; their roots are the singular values of ``X``.
        vectors: (p, p) eigenvectors V, one per column.
        noise: eigenvalues up to this one may be rounding error.
    """

    values: Tensor
    vectors: Tensor
    noise: float

    @classmethod
    def of(cls, G: Tensor, scale: float = 0.0) -> "Spectrum":
        """Decompose a symmetric (p, p) matrix, a sum of terms as large as ``scale``."""
        values, vectors = torch.linalg.eigh(G)
        scale = max(scale, float(values[-1]))
        # Blockwise sums over tokens are off by tens of eps, however narrow the matrix.
        noise = max(len(G), 64) * torch.finfo(G.dtype).eps * scale
        return cls(values.clamp_min(0.0), vectors, noise)

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue; infinite for a numerically singular matrix."""
        low, high = float(self.values[0]), float(self.values[-1])
        return high / low if low > self.noise else math.inf

    def significant(self, rcond: float = RCOND) -> Tensor:
        """(p,) mask of the directions whose singular value exceeds ``rcond`` times the largest."""
        return self.values > max(rcond**2 * float(self.values[-1]), self.noise)


class Gram:
    """The Gram matrix of one or more concatenated features, with its factorisations.

    Features differ in size by orders of magnitude. Each is measured in its own unit, the root mean
    eigenvalue of its own Gram matrix: truncation and relative ridges apply to ``F_k / u_k``, whose
    Gram matrix has mean eigenvalue 1. The effect of ``rcond`` or ``relative_ridge`` therefore does
    not depend on the scale or basis of the stream, or on the number or order of the tokens.

    Args:
        G: (p, p) symmetric, float64. blocks: widths of the features, with sum p; one by default.
        terms: (p,) diagonal of the minuend where ``G`` is a difference: the size of its rounding.
    """

    def __init__(self, G: Tensor, blocks: Sequence[int] = (), terms: Tensor | None = None) -> None:
        self.G, self.blocks, self.terms = G, tuple(blocks) or (len(G),), terms

    @cached_property
    def unit(self) -> Tensor:
        """(p,) root mean eigenvalue of each feature's Gram matrix; 1 for one that is zero."""
        means = torch.stack(
            [part.mean() for part in torch.split(self.G.diagonal(), list(self.blocks))]
        )
        sizes = torch.tensor(self.blocks, device=means.device)
        return torch.where(means > 0, means, 1.0).sqrt().repeat_interleave(sizes)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum of ``G`` in the features' own units."""
        return self.scaled_spectrum(self.unit)

    def scaled_spectrum(self, scaling: Tensor) -> Spectrum:
        """Spectrum of ``G / d d'``, for a ``scaling`` d (p,)."""
        scale = 0.0 if self.terms is None else float((self.terms / scaling.square()).max())
        return Spectrum.of(self.G / torch.outer(scaling, scaling), scale)

    @checked
    def regularise(
        self,
        rcond: float | None = None,
        ridge: float | None = None,
        relative_ridge: float | Sequence[float] | None = None,
    ) -> "Regularised":
        """Choose a regularised inverse, by default ``rcond = 1e-6``.

        Args:
            rcond: drop singular values of ``X`` up to this fraction of the largest.
            ridge: add this to the diagonal (the paper's code: 1e-6).
            relative_ridge: add this multiple of the mean eigenvalue of each feature's Gram matrix;
                one value for all features, or one for each.

        Raises:
            ValueError: more than one option, ``rcond`` outside (0, 1), a ridge that is not
                positive and finite, or another number of ridges than of features.
        """
        options = {"rcond": rcond, "ridge": ridge, "relative_ridge": relative_ridge}
        options = {name: value for name, value in options.items() if value is not None}
        if len(options) > 1:
            raise ValueError(f"choose one of rcond, ridge and relative_ridge, got {options}")
        if ridge is not None:
            # With one feature the unit is a scalar: all ridges share one spectrum.
            scaling = self.unit if len(self.blocks) == 1 else torch.ones_like(self.unit)
            return Regularised(self, scaling, check_ridge(ridge) / float(scaling[0]) ** 2)
        if relative_ridge is not None:
            ridges = [check_ridge(ridge) for ridge in as_list(relative_ridge)]
            if len(ridges) not in (1, len(self.blocks)):
                raise ValueError(
                    f"relative_ridge has {len(ridges)} values for {len(self.blocks)} features: "
                    "give one, or one for each"
                )
            if len(set(ridges)) == 1:
                return Regularised(self, self.unit, ridges[0])
            parts = zip(ridges, torch.split(self.unit, list(self.blocks)), strict=True)
            return Regularised(self, torch.cat([math.sqrt(r) * part for r, part in parts]), 1.0)
        rcond = RCOND if rcond is None else rcond
        if not 0 < rcond < 1:
            raise ValueError(f"rcond must lie between 0 and 1, got {rcond}")
        return Regularised(self, self.unit, 0.0, rcond)


class Regularised:
    """The regularised inverse of a `Gram` matrix.

    Args:
        gram: the matrix.
        scaling: (p,) d, which divides the columns.
        shift: added to the spectrum of ``G / d d'``, for the penalty ``shift * ||diag(d) M||^2``.
        rcond: where to truncate, if ``shift`` is 0.
    """

    def __init__(
        self, gram: Gram, scaling: Tensor, shift: float, rcond: float | None = None
    ) -> None:
        self.gram, self.scaling, self.shift, self.rcond = gram, scaling, shift, rcond

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum of ``G / d d'``, without the shift."""
        shared = self.scaling is self.gram.unit
        return self.gram.spectrum if shared else self.gram.scaled_spectrum(self.scaling)

    @property
    def kept(self) -> Tensor:
        """(p,) mask of the directions in use."""
        spectrum = self.spectrum
        if self.rcond:
            return spectrum.significant(self.rcond)
        # Where X has no component X'Delta is rounding error, which the ridge alone would divide.
        return spectrum.values > spectrum.noise

    @property
    def gain(self) -> Tensor:
        """(p,) eigenvalues of the inverse: ``1/(s + shift)`` where kept, 0 where dropped."""
        kept = self.kept
        return kept / torch.where(kept, self.spectrum.values + self.shift, 1.0)

    @property
    def rank(self) -> int:
        """Number of directions that the data determine, at ``rcond = 1e-6`` under a ridge."""
        return int((self.gram.spectrum.significant() if self.shift else self.kept).sum())

    @property
    def effective(self) -> bool:
        """Whether the ridge is large enough to make up for directions without data."""
        smallest = self.shift * float((self.scaling / self.gram.unit).square().min())
        return smallest >= _EFFECTIVE_RIDGE

    @cached_property
    def _factor(self) -> Tensor | None:
        """Lower Cholesky factor of ``G + shift d d'``; None where it is not reliable."""
        has_spectrum = self.scaling is self.gram.unit and "spectrum" in vars(self.gram)
        if not self.shift or has_spectrum:
            return None
        A = self.gram.G.clone()
        A.diagonal().add_(self.shift * self.scaling.square())
        factor, info = torch.linalg.cholesky_ex(A, out=(A, A.new_empty(0, dtype=torch.int32)))
        reliable = not int(info) and (self.effective or self._full_rank(factor))
        return factor if reliable else None

    def _full_rank(self, factor: Tensor) -> bool:
        """Whether the factor of ``G + shift d d'`` proves that ``G`` itself has full rank.

        In the features' units the smallest eigenvalue, shift included, is at least
        ``1 / tr(inverse)``, and the largest eigenvalue of ``G`` at most its trace, p.
        """
        p, unit2 = len(factor), self.gram.unit.square()
        smallest = 1 / float(torch.cholesky_inverse(factor).diagonal() @ unit2)
        largest_shift = self.shift * float((self.scaling.square() / unit2).max())
        threshold = p * max(RCOND**2, max(p, 64) * torch.finfo(factor.dtype).eps)
        return smallest - largest_shift > threshold

    def solve(self, C: Tensor) -> Tensor:
        """Apply the inverse to ``C`` (p, q): the smallest ``M`` with ``G M = C``."""
        if self._factor is not None:
            return torch.cholesky_solve(C, self._factor)
        V, d = self.spectrum.vectors, self.scaling[:, None]
        return (V @ (V.T @ (C / d)).mul_(self.gain[:, None])).div_(d)

    def explained(self, M: Tensor, C: Tensor) -> float | None:
        """Reduction of the squared error by ``M = solve(C)``, without a product with ``G``.

        The normal equations give ``G M``. None where directions were dropped, to which they do not
        apply.
        """
        if self._factor is None:
            return None
        rows = torch.linalg.vector_norm(M, dim=1)
        penalty = self.shift * (self.scaling * rows).square().sum()
        return float(torch.tensordot(M, C) + penalty)

    def diagnosis(self, tokens: int, nullity: int = 0) -> str | None:
        """Why a full matrix fitted to these tokens is not unique, with a remedy; or None.

        Args:
            nullity: number of directions in which no data can have a component.
        """
        if self.effective or self._factor is not None:
            return None
        p = len(self.gram.G) - nullity
        if self.rank == p:
            return None
        return (
            f"{tokens} tokens determine {self.rank} of {p} directions (condition number "
            f"{self.gram.spectrum.condition:.1e}), so the fit is not unique and need not "
            f"generalise: calibrate on at least {10 * p} tokens, or pass relative_ridge=1e-3 "
            f"(choose_ridge finds a value)"
        )


_cache: WeakValueDictionary[tuple[int, tuple[int, ...]], Gram] = WeakValueDictionary()


def gram(G: Tensor, blocks: Sequence[int] = ()) -> Gram:
    """The cached `Gram` of ``G`` (p, p), for as long as one is in use.

    Boundaries that start at the same layer share one ``G``, and so its decomposition. The cache
    goes by the tensor's identity: `Moments` rebind their sums and never change them in place.
    """
    key = id(G), tuple(blocks) or (len(G),)  # an id belongs to G while a Gram keeps it alive
    return _cache.setdefault(key, Gram(G, blocks))


def as_list(ridges: float | Iterable[float]) -> list[float]:
    """One ridge, or a list, tensor or array of them, as a list."""
    iterable = isinstance(ridges, Iterable) and getattr(ridges, "ndim", 1) > 0
    return list(ridges) if iterable else [ridges]  # type: ignore[arg-type, list-item]


def check_ridge(ridge: float) -> float:
    """Return a positive finite ridge, or raise `ValueError`."""
    if not 0 < ridge < math.inf:
        raise ValueError(f"a ridge must be positive and finite, got {ridge}; for none use rcond")
    return float(ridge)
