"""The Gram matrix and its regularised inverses, each computed when it is first asked for.

With ``G = V diag(s) V'`` every regularised inverse used here is ``V diag(gain) V'``: the truncated
SVD of the paper's text (section 3.2.2) has ``gain = 1/s`` on the singular values kept and 0 on
those dropped, the normal equations of its code (appendix H) have ``gain = 1/(s + ridge)``. The
second needs no spectrum: a Cholesky factorisation of ``G + ridge I`` solves it for a tenth of the
time, and the spectrum is computed only where the factorisation fails or someone asks for it.
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
# A ridge below this multiple of the mean eigenvalue regularises nothing that can be measured.
_RIDGE_THAT_COUNTS = 1e-6


class Regularisation(TypedDict, total=False):
    """The options of `Gram.regularise`, of which at most one may be given."""

    rcond: float | None
    ridge: float | None
    relative_ridge: float | Sequence[float] | None


class SingularGramWarning(UserWarning):
    """The calibration tokens do not determine the operator; more tokens or a ridge would."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigendecomposition ``V diag(s) V'`` of a symmetric positive semidefinite matrix.

    The same as ``scipy.linalg.eigh``, with negative rounding set to zero and a noise level.

    Attributes:
        values: (p,) eigenvalues s in ascending order; their roots are the singular values of ``X``.
        vectors: (p, p) eigenvectors V, one per column.
        noise: eigenvalues up to here cannot be told from rounding.
    """

    values: Tensor
    vectors: Tensor
    noise: float

    @classmethod
    def of(cls, G: Tensor, scale: float = 0.0) -> "Spectrum":
        """Decompose a symmetric (p, p) matrix made of terms as large as ``scale``."""
        values, vectors = torch.linalg.eigh(G)
        scale = max(scale, float(values[-1]))
        # Sums over tokens, made block by block, are off by tens of eps however narrow the matrix.
        noise = max(len(G), 64) * torch.finfo(G.dtype).eps * scale
        return cls(values.clamp_min(0.0), vectors, noise)

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue; infinite for a numerically singular matrix."""
        low, high = float(self.values[0]), float(self.values[-1])
        return high / low if low > self.noise else math.inf

    def seen(self, rcond: float = RCOND) -> Tensor:
        """(p,) mask of the directions whose singular value exceeds ``rcond`` times the largest."""
        return self.values > max(rcond**2 * float(self.values[-1]), self.noise)


class Gram:
    """The Gram matrix of one feature, or of several side by side, and what its inverse needs.

    Features differ in size by orders of magnitude. Each is measured in its own unit, the root mean
    eigenvalue of its own Gram matrix: truncation and relative ridges see ``F_k / u_k``, of which
    every block has mean eigenvalue 1. So neither the scale of the stream, nor a rotation of its
    basis, nor the number or order of the tokens changes what a value of ``rcond`` or
    ``relative_ridge`` does.

    Args:
        G: (p, p) symmetric, float64. blocks: widths of the features, with sum p; one by default.
        terms: (p,) diagonal of the matrix that another was subtracted from, where ``G`` is what is
            left; its rounding is of that size.
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
        """That of ``G`` in the features' own units."""
        return self._spectrum(self.unit)

    def _spectrum(self, scaling: Tensor) -> Spectrum:
        scale = 0.0 if self.terms is None else float((self.terms / scaling.square()).max())
        return Spectrum.of(self.G / torch.outer(scaling, scaling), scale)

    @checked
    def regularise(
        self,
        rcond: float | None = None,
        ridge: float | None = None,
        relative_ridge: float | Sequence[float] | None = None,
    ) -> "Regularised":
        """Choose a regularised inverse; ``rcond = 1e-6`` where nothing is given.

        Args:
            rcond: drop singular values of ``X`` up to this fraction of the largest.
            ridge: add this to the diagonal (the paper's code: 1e-6).
            relative_ridge: add this multiple of the mean eigenvalue of each feature's Gram matrix;
                one value for all features, or one for each.

        Raises:
            ValueError: more than one of them, ``rcond`` outside (0, 1), a ridge that is not
                positive and finite, or another number of ridges than of features.
        """
        given = {"rcond": rcond, "ridge": ridge, "relative_ridge": relative_ridge}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) > 1:
            raise ValueError(f"choose one of rcond, ridge and relative_ridge, got {chosen}")
        if ridge is not None:
            # With one feature the unit is one number: the spectrum of every ridge is the same.
            scaling = self.unit if len(self.blocks) == 1 else torch.ones_like(self.unit)
            return Regularised(self, scaling, check_ridge(ridge) / float(scaling[0]) ** 2)
        if relative_ridge is not None:
            ridges = [check_ridge(ridge) for ridge in listed(relative_ridge)]
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
    """A `Gram` matrix with the regularised inverse that was chosen for it.

    Args:
        gram: the matrix. scaling: (p,) d, by which columns are divided. shift: added to the
            eigenvalues of ``G / d d'``, so that the penalty is ``shift * ||diag(d) M||^2``; 0 for
            truncation. rcond: where to truncate.
    """

    def __init__(
        self, gram: Gram, scaling: Tensor, shift: float, rcond: float | None = None
    ) -> None:
        self.gram, self.scaling, self.shift, self.rcond = gram, scaling, shift, rcond

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of ``G / d d'``, which the shift is added to."""
        shared = self.scaling is self.gram.unit
        return self.gram.spectrum if shared else self.gram._spectrum(self.scaling)

    @property
    def kept(self) -> Tensor:
        """(p,) mask of the directions in use."""
        # Where X has no component, X'Delta has none either: what rounding leaves there must be
        # dropped, for it would be divided by the ridge alone.
        values = self.spectrum
        return values.seen(self.rcond) if self.rcond else values.values > values.noise

    @property
    def gain(self) -> Tensor:
        """(p,) eigenvalues of the inverse: ``1/(s + shift)`` where kept, 0 where dropped."""
        kept = self.kept
        return kept / torch.where(kept, self.spectrum.values + self.shift, 1.0)

    @property
    def rank(self) -> int:
        """Number of directions the data determine: those kept, or seen at 1e-6 under a ridge."""
        return int((self.gram.spectrum.seen() if self.shift else self.kept).sum())

    @property
    def condition(self) -> float:
        """Condition number of the Gram matrix in the features' own units."""
        return self.gram.spectrum.condition

    @property
    def counts(self) -> bool:
        """Whether there is a ridge large enough to make up for directions never seen."""
        smallest = self.shift * float((self.scaling / self.gram.unit).square().min())
        return smallest >= _RIDGE_THAT_COUNTS

    @cached_property
    def _factor(self) -> Tensor | None:
        """Lower Cholesky factor of ``G + shift d d'``; None where it is not to be trusted."""
        spectrum_known = self.scaling is self.gram.unit and "spectrum" in vars(self.gram)
        if not self.shift or spectrum_known:
            return None
        A = self.gram.G.clone()
        A.diagonal().add_(self.shift * self.scaling.square())
        factor, info = torch.linalg.cholesky_ex(A, out=(A, A.new_empty(0, dtype=torch.int32)))
        trusted = not int(info) and (self.counts or self._full_rank(factor))
        return factor if trusted else None

    def _full_rank(self, factor: Tensor) -> bool:
        """Whether the factor of ``G + shift d d'`` proves that ``G`` itself has full rank.

        In the features' units the smallest eigenvalue is at least ``1 / tr(inverse)``, of which the
        shift may be a part, and the largest at most the trace, p.
        """
        p, unit2 = len(factor), self.gram.unit.square()
        smallest = 1 / float(torch.cholesky_inverse(factor).diagonal() @ unit2)
        added = self.shift * float((self.scaling.square() / unit2).max())
        seen = max(RCOND**2, max(p, 64) * torch.finfo(factor.dtype).eps)
        return smallest - added > seen * p

    def solve(self, C: Tensor) -> Tensor:
        """Apply the inverse to ``C`` (p, q): the smallest fit ``M`` with ``G M = C``."""
        if self._factor is not None:
            return torch.cholesky_solve(C, self._factor)
        V, d = self.spectrum.vectors, self.scaling[:, None]
        return (V @ (V.T @ (C / d)).mul_(self.gain[:, None])).div_(d)

    def explained(self, M: Tensor, C: Tensor) -> float | None:
        """By how much ``M = solve(C)`` lowers the squared error, without a product with ``G``.

        The normal equations say what ``G M`` is. None where directions were dropped, whose rounding
        they do not see.
        """
        if self._factor is None:
            return None
        rows = torch.linalg.vector_norm(M, dim=1)
        penalty = self.shift * (self.scaling * rows).square().sum()
        return float(torch.tensordot(M, C) + penalty)

    def trouble(self, tokens: int, blind: int = 0) -> str | None:
        """What is wrong with fitting a full matrix to these tokens, and what to do; or None.

        Args:
            blind: directions in which no data can have a component.
        """
        if self.counts or self._factor is not None:
            return None
        p = len(self.gram.G) - blind
        if self.rank == p:
            return None
        return (
            f"{tokens} tokens determine {self.rank} of {p} directions (condition number "
            f"{self.condition:.1e}), so the fit is not unique and need not generalise: "
            f"calibrate on at least {10 * p} tokens, or pass relative_ridge=1e-3 "
            f"(choose_ridge finds a value)"
        )


_known: WeakValueDictionary[tuple[int, tuple[int, ...]], Gram] = WeakValueDictionary()


def gram(G: Tensor, blocks: Sequence[int] = ()) -> Gram:
    """The one `Gram` of ``G`` (p, p), whose spectrum is computed once for all who hold it.

    `Moments` rebind their sums and never change them in place, and boundaries that start at the
    same layer share one ``G``: known by the tensor, they share its decomposition as well, for as
    long as one of them lives.
    """
    key = id(G), tuple(blocks) or (len(G),)  # an id belongs to G while a Gram keeps it alive
    known = _known.get(key)
    if known is None:
        known = _known[key] = Gram(G, blocks)
    return known


def listed(ridges: float | Iterable[float]) -> list[float]:
    """One ridge, or those of a list, tensor or array, as a list."""
    several = isinstance(ridges, Iterable) and getattr(ridges, "ndim", 1) > 0
    return list(ridges) if several else [ridges]  # type: ignore[arg-type, list-item]


def check_ridge(ridge: float) -> float:
    """Return a positive finite ridge, or raise `ValueError`."""
    if not 0 < ridge < math.inf:
        raise ValueError(f"a ridge must be positive and finite, got {ridge}; for none use rcond")
    return float(ridge)
