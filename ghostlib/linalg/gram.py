"""The Gram matrix: one eigendecomposition, shared by everything that has to invert it.

With ``G = V diag(s) V'`` every regularised inverse used here is ``V diag(gain) V'``: the truncated
SVD of the paper's text (section 3.2.2) has ``gain = 1/s`` on the singular values kept and 0 on
those dropped, the normal equations of its code (appendix H) have ``gain = 1/(s + ridge)``.
"""

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

RCOND = 1e-6
# A ridge below this multiple of the mean eigenvalue regularises nothing that can be measured.
_RIDGE_THAT_COUNTS = 1e-6


class Regularisation(TypedDict, total=False):
    """The options of `Gram.regularise`, of which at most one may be given."""

    rcond: float | None
    ridge: float | None
    relative_ridge: float | None


class SingularGramWarning(UserWarning):
    """The calibration tokens do not determine the operator; more tokens or a ridge would."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Eigendecomposition ``G = V diag(s) V'`` of a Gram matrix.

    Attributes:
        values: (p,) eigenvalues s in ascending order, negative rounding set to zero; their square
            roots are the singular values of ``X``.
        vectors: (p, p) eigenvectors V, one per column.
        noise: eigenvalues up to here cannot be told from rounding.
    """

    values: Tensor
    vectors: Tensor
    noise: float

    @classmethod
    def decompose(cls, G: Tensor, scale: float = 0.0) -> "Gram":
        """Decompose a symmetric (p, p) matrix made of terms as large as ``scale``."""
        values, vectors = torch.linalg.eigh(G)
        scale = max(scale, float(values[-1]))
        # Sums over tokens, made block by block, are off by tens of eps however narrow the matrix.
        noise = max(len(G), 64) * torch.finfo(G.dtype).eps * scale
        return cls(values.clamp_min(0.0), vectors, noise)

    @property
    def mean(self) -> float:
        """Mean eigenvalue ``tr(G)/p``, the unit of a relative ridge."""
        return float(self.values.mean())

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue; infinite for a numerically singular matrix."""
        low, high = float(self.values[0]), float(self.values[-1])
        return high / low if low > self.noise else math.inf

    def seen(self, rcond: float = RCOND) -> Tensor:
        """(p,) mask of the directions whose singular value exceeds ``rcond`` times the largest."""
        return self.values > max(rcond**2 * float(self.values[-1]), self.noise)

    def regularise(
        self,
        rcond: float | None = None,
        ridge: float | None = None,
        relative_ridge: float | None = None,
    ) -> "Regularised":
        """Choose a regularised inverse; ``rcond = 1e-6`` where nothing is given.

        Args:
            rcond: drop singular values of ``X`` up to this fraction of the largest.
            ridge: add this to every eigenvalue (the paper's code: 1e-6).
            relative_ridge: add this multiple of the mean eigenvalue ``tr(G)/p``.

        Raises:
            ValueError: more than one of them, ``rcond`` outside (0, 1), or a ridge that is not
                positive and finite.
        """
        given = {"rcond": rcond, "ridge": ridge, "relative_ridge": relative_ridge}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) > 1:
            raise ValueError(f"choose one of rcond, ridge and relative_ridge, got {chosen}")
        # Where X has no component, X'Delta has none either: what rounding leaves there must be
        # dropped, for it would be divided by the ridge alone.
        if ridge is not None:
            return Regularised(self, self.values > self.noise, check_ridge(ridge))
        if relative_ridge is not None:
            shift = check_ridge(relative_ridge) * self.mean
            return Regularised(self, self.values > self.noise, shift)
        rcond = RCOND if rcond is None else rcond
        if not 0 < rcond < 1:
            raise ValueError(f"rcond must lie between 0 and 1, got {rcond}")
        return Regularised(self, self.seen(rcond), 0.0)


@dataclass(frozen=True, eq=False)
class Regularised:
    """A `Gram` matrix with the regularised inverse that was chosen for it.

    Attributes:
        gram: the decomposition. kept: (p,) mask of its directions in use. ridge: absolute ridge.
    """

    gram: Gram
    kept: Tensor
    ridge: float

    @property
    def gain(self) -> Tensor:
        """(p,) eigenvalues of the inverse: ``1/(s + ridge)`` where kept, 0 where dropped."""
        return self.kept / torch.where(self.kept, self.gram.values + self.ridge, 1.0)

    @property
    def rank(self) -> int:
        """Number of directions the data determine: those kept, or seen at 1e-6 under a ridge."""
        return int((self.gram.seen() if self.ridge else self.kept).sum())

    def solve(self, C: Tensor) -> Tensor:
        """Apply the inverse to ``C`` (p, q): the smallest fit ``M`` with ``G M = C``."""
        V = self.gram.vectors
        return V @ (V.T @ C).mul_(self.gain[:, None])

    def trouble(self, tokens: int, blind: int = 0) -> str | None:
        """What is wrong with fitting a full matrix to these tokens, and what to do; or None.

        Args:
            blind: directions in which no data can have a component.
        """
        p = len(self.gram.values) - blind
        if self.rank == p or self.ridge >= _RIDGE_THAT_COUNTS * self.gram.mean > 0:
            return None
        return (
            f"{tokens} tokens determine {self.rank} of {p} directions (condition number "
            f"{self.gram.condition:.1e}), so the fit is not unique and need not generalise: "
            f"calibrate on at least {10 * p} tokens, or pass relative_ridge=1e-3 "
            f"(choose_ridge finds a value)"
        )


_decomposed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gram(G: Tensor) -> Gram:
    """The decomposition of ``G`` (p, p), computed once for as long as that tensor lives.

    `Moments` rebind their sums and never change them in place, and boundaries that start at the
    same layer share one ``G``: keyed by the tensor, they share its decomposition as well.
    """
    if G not in _decomposed:
        _decomposed[G] = Gram.decompose(G)
    found: Gram = _decomposed[G]
    return found


def check_ridge(ridge: float) -> float:
    """Return a positive finite ridge, or raise `ValueError`."""
    if not 0 < ridge < math.inf:
        raise ValueError(f"a ridge must be positive and finite, got {ridge}; for none use rcond")
    return float(ridge)
