"""Moments: everything a least-squares operator needs to know about two sets of activations.

Row-vector convention: activations are ``X`` of shape (tokens, width), an operator acts as
``X @ W``. The squared error of *any* linear operator is a quadratic form in the second moments

    ``||X W - Y||_F^2 = tr(W' G W) - 2 tr(W' B) + t``,  ``G = X'X``, ``B = X'Y``, ``t = tr(Y'Y)``,

so ``X`` and ``Y`` themselves need never be kept: memory is O(width^2), whatever the number of
tokens (paper, appendix H, eqs. A15-A16). The moments of two sets of tokens add up.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghostlib.linalg.gram import gram
from ghostlib.linalg.hadamard import has_hadamard, rotate
from ghostlib.models.boundaries import Boundary


class Stream(NamedTuple):
    """One sequence of activations (tokens, width) in float64 with its weighted column sums.

    Computed once a sequence, it serves every boundary that begins or ends there.
    """

    values: Tensor
    weighted: Tensor
    weight: float
    sum: Tensor
    abs: Tensor
    square: Tensor
    rotated: Tensor | None

    @classmethod
    def of(cls, activations: Tensor, weight: Tensor | None = None) -> "Stream":
        """Sums over ``activations`` (tokens, width), each row multiplied by its ``weight``."""
        values = activations.double()
        if weight is None:
            weight = torch.ones(len(values), device=values.device)
            weighted = values
        else:
            weight = weight.to(values.device)
            weighted = weight.double()[:, None] * values
        w = weight.double()
        rotated = None
        if has_hadamard(values.shape[1]):
            # It feeds a mean of absolute values only, for which float32 will do.
            rotated = w @ rotate(activations.float()).abs().double()
        return cls(
            values=values,
            weighted=weighted,
            weight=float(w.sum()),
            sum=w @ values,
            abs=w @ values.abs(),
            square=(weighted * values).sum(0),
            rotated=rotated,
        )

    def gram(self) -> Tensor:
        """``X' diag(w) X``, (width, width)."""
        return self.weighted.T @ self.values


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """``y / x`` by channel, 1 where ``x`` is zero: a channel without signal stays as it is."""
    return torch.where(x > 0, y / x.clamp_min(torch.finfo(x.dtype).tiny), torch.ones_like(x))


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


_FORMAT = "ghostlib-moments-1"


class Linear(Protocol):
    """Anything that maps ``X`` to ``X @ W + bias``, such as an `Operator`."""

    @property
    def W(self) -> Tensor:
        """(p, q) matrix."""

    @property
    def bias(self) -> Tensor | None:
        """(q,) or None."""


class Moments(Sums):
    """Additive float64 sufficient statistics of ``X`` (tokens, p) and ``Y`` (tokens, q).

    `Sums` documents what is added up, how, and the arguments; here is what can be asked of it.
    """

    @property
    def t(self) -> float:
        """``tr(Y'Y)``, the squared Frobenius norm of the target."""
        return float(self.y2.sum())

    @property
    def nothing(self) -> float:
        """(Weighted) squared error of doing nothing, ``||Delta||_F^2``.

        Raises:
            ValueError: ``p != q``, where doing nothing has no meaning.
        """
        if self.of_change:
            return self.t
        if self.width != self.out_width:
            raise ValueError("doing nothing is the identity, which needs equal widths")
        return max(self.t - 2 * float(self.B.trace()) + float(self.G.trace()), 0.0)

    @property
    def effective_tokens(self) -> float:
        """How many tokens share the objective: ``(sum_t e_t)^2 / sum_t e_t^2``.

        ``e_t = w_t |Delta_t|^2`` is what a token contributes to the error of doing nothing. All
        tokens where they are alike, about k where k of them own it; one of them owns at least the
        reciprocal. Both sums are additive, so this is exact whatever the order of the tokens.

        Raises:
            ValueError: as `nothing`.
        """
        nothing = self.nothing
        return nothing**2 / self.fourth if self.fourth > 0 else float(self.tokens)

    def error(self, operator: Tensor | Linear) -> float:
        """Squared error ``||X W + 1 b' - Y||_F^2`` of any operator on these tokens.

        On training moments this is the training residual, on held-out moments the held-out error.
        Below about 1e-15 ``t`` the value is rounding; it is clipped at zero.

        Args:
            operator: W of shape (p, q), or an `Operator` with its W and bias.

        Raises:
            ValueError: W has another shape.
        """
        W = operator if isinstance(operator, Tensor) else operator.W
        bias = None if isinstance(operator, Tensor) else operator.bias
        if W.shape != self.B.shape:
            raise ValueError(
                f"operator must have shape {tuple(self.B.shape)}, got {tuple(W.shape)}"
            )
        W = W.to(self.G)
        total = (W * (self.G @ W)).sum() - 2 * (W * self.B).sum() + self.y2.sum()
        if bias is not None:
            b = bias.to(self.G)
            total = total + 2 * b @ (W.T @ self.x1 - self.y1) + self.weight * (b @ b)
        return max(float(total), 0.0)

    def relative_error(self, operator: Tensor | Linear) -> float:
        """`error` divided by that of doing nothing, ``||Y - X||_F^2`` (1 = no better than pruning).

        Raises:
            ValueError: ``p != q``, or ``Y`` equals ``X`` (there is nothing to recover).
        """
        nothing = self.nothing
        size = 0.0 if self.of_change else self.t + float(self.G.trace())
        rounding = self.width * torch.finfo(torch.float64).eps * size
        if nothing <= rounding:
            raise ValueError("X_post equals X_pre: the removed layers did nothing to recover")
        return self.error(operator) / nothing

    def effective_rank(self, rcond: float = 1e-6) -> int:
        """Number of singular values of ``X`` above ``rcond`` times the largest.

        They are square roots of the eigenvalues of ``G``, so ratios below about 1e-8 drown in
        float64 rounding.
        """
        if not 0 < rcond < 1:
            raise ValueError(f"rcond must lie between 0 and 1, got {rcond}")
        return int(gram(self.G).seen(rcond).sum())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an old file is replaced only once the new one is whole."""
        path = Path(path)
        meta = {
            "format": _FORMAT,
            "tokens": str(self.tokens),
            "weight": repr(self.weight),
            "sequences": str(self.sequences),
            "fourth": repr(self.fourth),
            "boundary": json.dumps(self.boundary),
            "model": json.dumps(self.model),
            "regressor": self.regressor,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            tensors = {name: getattr(self, name).cpu().contiguous() for name in SUMS}
            save_file(tensors, temporary, metadata=meta)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != _FORMAT:
                    raise ValueError("not a ghostlib moments file")
                sums = {name: file.get_tensor(name) for name in SUMS}
            boundary, model = (json.loads(meta[key]) for key in ("boundary", "model"))
            regressor = meta.get("regressor", "stream")  # files of version 0.1 do not say
            moments = cls(*sums["B"].shape, boundary=boundary, model=model, regressor=regressor)
            moments.tokens, moments.sequences = int(meta["tokens"]), int(meta["sequences"])
            moments.weight = float(meta["weight"])
            moments.fourth = float(meta.get("fourth", 0.0))  # nor had they this
            for name, value in sums.items():
                empty = getattr(moments, name)
                if (value.shape, value.dtype) != (empty.shape, empty.dtype):
                    raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}")
                setattr(moments, name, value)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} cannot be read as moments: {error}") from error
        return moments


def check_moments(moments: Moments) -> None:
    """Refuse moments that no operator can be solved from.

    Raises:
        ValueError: no tokens, another dtype than float64, or a Gram matrix that is not symmetric
            or not finite.
    """
    if moments.tokens < 1 or moments.weight <= 0:
        raise ValueError("these moments hold no tokens: call update(X_pre, X_post) first")
    G, B = moments.G, moments.B
    if G.dtype != torch.float64 or B.dtype != torch.float64:
        raise ValueError(
            f"moments must be float64, got G in {G.dtype} and B in {B.dtype}: "
            f"forming X'X squares the condition number, which float32 cannot hold"
        )
    asymmetry = float((G - G.T).abs_().max())
    if not asymmetry <= 1e-9 * float(G.diagonal().abs().max()) or not torch.isfinite(B).all():
        raise ValueError(
            f"moments must be finite with a symmetric Gram matrix, "
            f"got max|G - G'| = {asymmetry:.2g}: were the sums edited by hand?"
        )


def check_square(moments: Moments, what: str) -> None:
    """Refuse moments of two different widths for ``what``, which needs an identity.

    Raises:
        ValueError: ``p != q``.
    """
    if moments.width != moments.out_width:
        raise ValueError(
            f"{what} needs X and Y of one width, got {moments.width} and {moments.out_width}; "
            f"solve(moments, 'ghost', around='zero') and 'affine' fit any pair of widths"
        )


def check_alike(train: Moments, held_out: Moments) -> None:
    """Refuse to judge a fit on held-out moments of another kind.

    Raises:
        ValueError: another width or another regressor.
    """
    if held_out.B.shape != train.B.shape:
        raise ValueError(
            f"training and held-out moments must have one width, "
            f"got {tuple(train.B.shape)} and {tuple(held_out.B.shape)}"
        )
    if held_out.regressor != train.regressor:
        raise ValueError(
            f"training and held-out moments must have one regressor, "
            f"got {train.regressor} and {held_out.regressor}"
        )
