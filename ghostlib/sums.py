"""Sums: what is added up over the tokens of two sets of activations.

They are additive over windows, batches and machines, so that a stream of any length takes the
memory of a few matrices. What they tell of an operator is in `ghostlib.moments`.
"""

from typing import Any, Self

import torch
from torch import Tensor

from ghostlib.boundaries import Boundary
from ghostlib.streams import Stream, ratio

SUMS = ("G", "B", "y2", "x1", "y1", "x_abs", "y_abs", "ratio", "ratio_rotated")


class Sums:
    """Additive float64 sufficient statistics of the pair ``X`` (tokens, p) and ``Y`` (tokens, q).

    Each token may carry a weight ``w``; without one, ``w = 1``.

    Attributes:
        G: (p, p) Gram matrix ``X' diag(w) X``.
        B: (p, q) cross moments ``X' diag(w) Y``.
        y2: (q,) squared norm of each column of ``Y``; their sum is ``t``.
        x1, y1: (p,), (q,) column sums of ``X`` and ``Y``.
        x_abs, y_abs: (p,), (q,) column sums of ``|X|`` and ``|Y|``.
        ratio: (q,) sum over sequences of ``mean|Y_j| / mean|X_j|`` (1 where ``X_j`` is all zero),
            the statistic of LinearPatch; stays zero when ``p != q``.
        ratio_rotated: the same for ``X H`` and ``Y H``, with ``H`` the normalised Hadamard matrix;
            stays zero when the width has none.
        tokens: number of rows seen. weight: sum of their weights. sequences: number of updates.
        boundary: the `Boundary` they belong to, or None.
        model: fingerprint of the model they come from, or None.
        fourth: sum over tokens of ``(w |Y - X|^2)^2``, for `Moments.effective_tokens`; 0 when
            ``p != q``.
        regressor: what ``X`` is: ``"stream"``, or ``"mlp"`` for the output of the last MLP before
            the boundary (then ``Y`` is that output plus Delta), or a `Regressor`'s features (then
            ``Y`` is Delta).
    """

    def __init__(
        self,
        width: int,
        out_width: int | None = None,
        *,
        boundary: Boundary | tuple[int, int] | None = None,
        model: str | None = None,
        regressor: str = "stream",
        device: torch.device | str = "cpu",
    ) -> None:
        p, q = int(width), int(width if out_width is None else out_width)
        if p < 1 or q < 1:
            raise ValueError(f"widths must be at least 1, got {p} and {q}")
        shapes = {"G": (p, p), "B": (p, q), "x1": (p,), "x_abs": (p,)}
        for name in SUMS:
            shape = shapes.get(name, (q,))
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=device))
        self.tokens = 0
        self.weight = 0.0
        self.sequences = 0
        self.fourth = 0.0
        self.boundary = None if boundary is None else Boundary(*boundary)
        self.model = model
        self.regressor = regressor

    G: Tensor
    B: Tensor
    y2: Tensor
    x1: Tensor
    y1: Tensor
    x_abs: Tensor
    y_abs: Tensor
    ratio: Tensor
    ratio_rotated: Tensor

    @property
    def width(self) -> int:
        """Input width p."""
        return self.B.shape[0]

    @property
    def out_width(self) -> int:
        """Output width q."""
        return self.B.shape[1]

    @property
    def of_change(self) -> bool:
        """Whether ``Y`` is Delta, so that doing nothing is a zero operator and not the identity."""
        return self.regressor not in ("stream", "mlp")

    def __repr__(self) -> str:
        where = "" if self.boundary is None else f", boundary={self.boundary}"
        return (
            f"{type(self).__name__}(width={self.width}, out_width={self.out_width}, "
            f"tokens={self.tokens}{where})"
        )

    def update(self, X: Tensor, Y: Tensor, weight: Tensor | None = None) -> Self:
        """Add the tokens of one sequence; returns self.

        Args:
            X: (tokens, p) activations before the boundary. Y: (tokens, q) activations after it.
            weight: (tokens,) non-negative weight of each token's squared error.

        Raises:
            ValueError: shapes that do not fit, non-finite values, or invalid weights. Nothing is
                added in that case.
        """
        self._check(X, Y, weight)
        device = self.G.device
        x, y = (Stream.of(values.to(device), weight) for values in (X, Y))
        self.G = self.G + x.gram()
        return self.add_sequence(x, y)

    def add_sequence(self, x: Stream, y: Stream) -> Self:
        """`update` without ``G``, from what several boundaries share; for the streaming pass.

        Sums are rebound, never changed in place, so that two objects may share a tensor.
        """
        self.B = torch.addmm(self.B, x.weighted.T, y.values)
        self.y2 = self.y2 + y.square
        self.x1, self.y1 = self.x1 + x.sum, self.y1 + y.sum
        self.x_abs, self.y_abs = self.x_abs + x.abs, self.y_abs + y.abs
        if self.of_change:
            self.fourth += float((y.weighted * y.values).sum(1).square().sum())
        elif self.width == self.out_width:
            change = (y.weighted - x.weighted) * (y.values - x.values)
            self.fourth += float(change.sum(1).square().sum())
            self.ratio = self.ratio + ratio(x.abs, y.abs)
            if x.rotated is not None and y.rotated is not None:
                self.ratio_rotated = self.ratio_rotated + ratio(x.rotated, y.rotated)
        self.tokens += len(x.values)
        self.weight += x.weight
        self.sequences += 1
        return self

    def _check(self, X: Tensor, Y: Tensor, weight: Tensor | None) -> None:
        if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
            raise ValueError(
                f"X and Y must be (tokens, width) with as many tokens, "
                f"got {tuple(X.shape)} and {tuple(Y.shape)}"
            )
        if X.shape[1] != self.width or Y.shape[1] != self.out_width:
            raise ValueError(
                f"these moments have widths {self.width} and {self.out_width}, "
                f"got activations of widths {X.shape[1]} and {Y.shape[1]}"
            )
        for name, values in (("X", X), ("Y", Y)):
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{name} has NaN or infinite activations: they would spoil every moment"
                )
        if weight is not None:
            if weight.shape != (len(X),):
                raise ValueError(f"weight must have shape ({len(X)},), got {tuple(weight.shape)}")
            if not torch.isfinite(weight).all() or (weight < 0).any():
                raise ValueError("weights must be finite and non-negative")

    def __add__(self, other: "Sums") -> Self:
        """Moments of both sets of tokens together.

        Every sum is added once, so the result differs from one long pass only by the rounding of
        float64 additions (relative 1e-15 per addition), and ``a + b`` equals ``b + a`` exactly.

        Raises:
            ValueError: other widths, another boundary or another model.
        """
        if not isinstance(other, Sums):
            return NotImplemented
        for what in ("width", "out_width", "boundary", "model", "regressor"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(
                    f"moments of different {what} cannot be added: {mine} and {theirs}"
                )
        total = self._like()
        for name in SUMS:
            setattr(total, name, getattr(self, name) + getattr(other, name).to(self.G.device))
        for name in ("tokens", "weight", "sequences", "fourth"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def __radd__(self, other: Any) -> Self:
        return self if other == 0 else NotImplemented  # so that sum() works

    def _like(self) -> Self:
        return type(self)(
            self.width,
            self.out_width,
            boundary=self.boundary,
            model=self.model,
            regressor=self.regressor,
            device=self.G.device,
        )

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device (float64 stays)."""
        moved = self._like()
        for name in SUMS:
            setattr(moved, name, getattr(self, name).to(device))
        moved.tokens, moved.weight, moved.sequences = self.tokens, self.weight, self.sequences
        moved.fourth = self.fourth
        return moved
