"""Moments: everything a least-squares repair needs to know about the tokens on both sides of a gap.

Row-vector convention: activations are ``X`` of shape (tokens, width), a matrix acts as ``X @ W``.
The squared error of *any* matrix ``M`` on features ``F`` is a quadratic form in the second moments

    ``||F M - Delta||_F^2 = tr(M' G M) - 2 tr(M' F'Delta) + ||Delta||_F^2``,  ``G = F'F``,

so the activations themselves need never be kept: memory is O(width^2), whatever the number of
tokens (paper, appendix H, eqs. A15-A16). The moments of two sets of tokens add up. With the stream
itself for ``F``, and ``W = I + M``, the same number is the familiar ``||X_pre W - X_post||_F^2``.
"""

import copy
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghostlib.common import at_least, checked, replacing
from ghostlib.linalg.gram import Gram, gram
from ghostlib.linalg.hadamard import has_hadamard, rotate
from ghostlib.models.boundaries import Boundary, check_boundary
from ghostlib.models.placement import check_device
from ghostlib.statistics.features import STREAM, Regressor, Sources

_FORMAT = "ghostlib-moments-2"
_TENSORS = ("G", "cross", "f1", "d1", "d2", "x_abs", "y_abs", "ratio", "ratio_rotated")
_COUNTS = ("tokens", "weight", "sequences", "fourth")


@runtime_checkable
class Repair(Protocol):
    """Anything that maps features ``F`` to ``F M + bias``, such as an `Operator`."""

    @property
    def M(self) -> Tensor:
        """(p, C) matrix."""

    @property
    def bias(self) -> Tensor | None:
        """(C,) or None."""


class Stream(NamedTuple):
    """One sequence of the stream in float64, with what every boundary there shares.

    Attributes:
        values: (tokens, width).
        weight: (tokens,) of each token's squared error.
        abs: (width,) weighted column sums of ``|X|``.
        rotated: (width,) those of ``|X H|``, H the Hadamard matrix; None where the width has none.
    """

    values: Tensor
    weight: Tensor
    abs: Tensor
    rotated: Tensor | None

    @classmethod
    def of(cls, activations: Tensor, weight: Tensor | None = None) -> "Stream":
        """Take ``activations`` (tokens, width), each row with its ``weight``."""
        values = activations.double()
        w = torch.ones(len(values), device=values.device) if weight is None else weight
        w = w.to(values.device).double()
        rotated = None
        if has_hadamard(values.shape[1]):
            # It feeds a mean of absolute values only, for which float32 will do.
            rotated = w @ rotate(activations.float()).abs().double()
            # A column without signal holds the rounding of whole tokens.
            noise = (
                8 * torch.finfo(torch.float32).eps * (w @ torch.linalg.vector_norm(values, dim=1))
            )
            rotated = rotated.where(rotated > noise, 0.0)
        return cls(values, w, w @ values.abs(), rotated)


class Moments:
    """Additive float64 sufficient statistics of features ``F`` (tokens, p) and ``Delta``.

    ``Delta = X_post - X_pre`` (tokens, C) is what the removed layers added to the stream. Tokens
    may each carry a weight ``w``; without one, ``w = 1``.

    Args:
        width: of the stream, C.
        regressor: the features, or their spelling; by default the stream ``X_pre`` itself.
        hidden: width of the MLP, where a feature needs it.
        bias: whether least squares fits a bias as well, because the weights that will take the
            repair have one.
        boundary: which gap they belong to.
        model: fingerprint of the model they come from.
        device: where the sums are kept.

    Attributes:
        G: (p, p) Gram matrix ``F' diag(w) F``.
        cross: (p, C) cross moments ``F' diag(w) Delta``.
        f1: (p,) column sums of ``F``.
        d1: (C,) column sums of ``Delta``.
        d2: (C,) squared norm of each column of ``Delta``.
        x_abs: (C,) column sums of ``|X_pre|``.
        y_abs: (C,) column sums of ``|X_post|``.
        ratio: (C,) sum over sequences of ``mean|X_post| / mean|X_pre|`` by channel (1 where that
            channel is all zero), the statistic of LinearPatch.
        ratio_rotated: (C,) the same in the Hadamard-rotated basis; zero where the width has none.
        tokens: number of tokens with a weight above 0.
        weight: sum of their weights.
        sequences: number of calls of `update`.
        fourth: sum over tokens of ``(w |Delta|^2)^2``, for `effective_tokens`.

    Raises:
        ValueError: a width that is no whole number of at least 1, features of the MLP without its
            width, a boundary that is none, or a device that is not there.

    >>> X_pre, X_post = torch.randn(2, 100, 8)
    >>> moments = Moments(8).update(X_pre, X_post)
    >>> moments.G.shape, moments.cross.shape, moments.tokens
    (torch.Size([8, 8]), torch.Size([8, 8]), 100)
    """

    G: Tensor
    cross: Tensor
    f1: Tensor
    d1: Tensor
    d2: Tensor
    x_abs: Tensor
    y_abs: Tensor
    ratio: Tensor
    ratio_rotated: Tensor

    @checked
    def __init__(
        self,
        width: int,
        *,
        regressor: Regressor | str = STREAM,
        hidden: int | None = None,
        bias: bool = False,
        boundary: Boundary | tuple[int, int] | None = None,
        model: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least(1, width=width, hidden=hidden)
        check_device(device)
        C = operator.index(width)
        self.regressor = Regressor.parse(regressor)
        self.blocks = self.regressor.widths(C, hidden)
        p = sum(self.blocks)
        shapes = {"G": (p, p), "cross": (p, C), "f1": (p,)}
        for name in _TENSORS:
            shape = shapes.get(name, (C,))
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=device))
        self.tokens, self.sequences = 0, 0
        self.weight, self.fourth = 0.0, 0.0
        self.boundary = None if boundary is None else check_boundary(boundary)
        self.model, self.hidden, self.bias = model, hidden, bias
        self._gram: Gram | None = None

    @property
    def width(self) -> int:
        """Width of the stream, C."""
        return self.cross.shape[1]

    def __repr__(self) -> str:
        at = "" if self.boundary is None else f", boundary={self.boundary}"
        return f"Moments({self.width}, regressor='{self.regressor}', tokens={self.tokens}{at})"

    @checked
    def update(
        self,
        X_pre: Tensor,
        X_post: Tensor,
        weight: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        output: Tensor | None = None,
        real: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Self:
        """Add the tokens of one sequence; returns self.

        LinearPatch averages over sequences: for its statistic it matters which tokens come in one
        call, and so it does for a feature of the token before. For everything else it does not. A
        sequence in which no token counts adds nothing.

        Args:
            X_pre: (tokens, C) stream before the gap.
            X_post: (tokens, C) stream after it.
            weight: (tokens,) non-negative weight of each token's squared error.
            hidden: (tokens, I) what the down-projection before the gap reads, if it is needed.
            output: (tokens, C) what it returns, likewise.
            real: (tokens,) false at padding.
            used: (tokens,) tokens to learn from; by default ``real``.

        Raises:
            ValueError: shapes that do not fit, complex or non-finite values, invalid weights, or a
                token that is zero after the gap where weights divide by its norm. Nothing is added
                in that case.
        """
        sources = Sources(X_pre, hidden, output)
        self._check(sources, X_post, {"weight": weight, "real": real, "used": used})
        used = real if used is None else used
        rows = torch.ones(len(X_pre), dtype=torch.bool) if used is None else used.bool().cpu()
        sources = sources.map(lambda part: part.double().to(self.G.device))
        F = self.regressor.design(sources, real, len(self.G))
        pick = rows.to(F.device)
        part = None if weight is None else weight[rows.to(weight.device)]
        x, y = (Stream.of(S.to(self.G.device)[pick], part) for S in (X_pre, X_post))
        return self.add_sequence(F[pick], x, y)

    def add_sequence(self, F: Tensor, x: Stream, y: Stream, *, with_gram: bool = True) -> Self:
        """`update` from what several boundaries share; for the streaming pass.

        Sums are rebound, never changed in place, so that two objects may share a tensor.
        """
        delta = y.values - x.values
        w, counted = x.weight, x.weight > 0
        if not bool(counted.any()):
            return self
        if self.regressor.weight.name != "1":
            norm = torch.linalg.vector_norm(y.values, dim=-1).where(counted, 1.0)
            if not (norm > 0).all():
                raise ValueError(
                    f"a token has norm 0 after the boundary, where its weight "
                    f"{self.regressor.weight} is infinite: leave it out, or use a regressor "
                    "without a weight"
                )
            w = w * self.regressor.weight.of(norm)
        weighted = F if bool((w == 1).all()) else F * w[:, None]
        if with_gram:
            self.G = self.G + weighted.T @ F
        error = w * delta.square().sum(1)
        self.cross = torch.addmm(self.cross, weighted.T, delta)
        self.f1, self.d1 = self.f1 + weighted.sum(0), self.d1 + w @ delta
        self.d2 = self.d2 + w @ delta.square()
        self.fourth += float(error.square().sum())
        self.x_abs, self.y_abs = self.x_abs + x.abs, self.y_abs + y.abs
        self.ratio = self.ratio + ratio(y.abs, x.abs)
        if x.rotated is not None and y.rotated is not None:
            self.ratio_rotated = self.ratio_rotated + ratio(y.rotated, x.rotated)
        self.tokens += int(counted.sum())
        self.weight += float(w.sum())
        self.sequences += 1
        return self

    def _check(
        self, sources: Sources, X_post: Tensor, by_token: Mapping[str, Tensor | None]
    ) -> None:
        X_pre = sources.stream
        if X_pre.ndim != 2 or X_post.ndim != 2 or len(X_pre) != len(X_post):
            raise ValueError(
                "X_pre and X_post must be (tokens, width) with as many tokens, "
                f"got {tuple(X_pre.shape)} and {tuple(X_post.shape)}"
            )
        if X_pre.shape[1] != self.width or X_post.shape[1] != self.width:
            raise ValueError(
                f"these moments have width {self.width}, "
                f"got activations of widths {X_pre.shape[1]} and {X_post.shape[1]}"
            )
        named: dict[str, Tensor | None] = {"X_pre": X_pre, "X_post": X_post}
        named |= {"hidden": sources.hidden, "output": sources.output}
        for name, values in named.items():
            if values is None:
                continue
            if values.is_complex():
                raise ValueError(f"{name} is complex ({values.dtype}): activations are real")
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{name} has NaN or infinite activations: they would spoil every moment"
                )
        for name, values in by_token.items():
            if values is not None and values.shape != (len(X_pre),):
                raise ValueError(
                    f"{name} must have shape ({len(X_pre)},), got {tuple(values.shape)}"
                )
        weight = by_token["weight"]
        if weight is not None and not (
            not weight.is_complex() and weight.isfinite().all() and (weight >= 0).all()
        ):
            raise ValueError("weights must be finite and non-negative")

    # ------------------------------------------------------------------ what they tell

    @property
    def gram(self) -> Gram:
        """``G`` with its factorisations, which boundaries with the same start share."""
        if self._gram is None or self._gram.G is not self.G:
            self._gram = gram(self.G, self.blocks)
        return self._gram

    @property
    def B(self) -> Tensor:
        """(C, C) cross moments ``X_pre' X_post`` of the plain stream.

        Raises:
            ValueError: moments of other features.
        """
        self._require_identity("B = X_pre' X_post")
        return self.G + self.cross

    @property
    def t(self) -> float:
        """``||X_post||_F^2`` of the plain stream; `ValueError` for other features."""
        self._require_identity("t = ||X_post||^2")
        return float(self.G.trace() + 2 * self.cross.trace() + self.d2.sum())

    @property
    def pruned_error(self) -> float:
        """(Weighted) squared error of the pruned model, ``||Delta||_F^2``."""
        return float(self.d2.sum())

    @property
    def effective_tokens(self) -> float:
        """How many tokens share the objective: ``(sum_t e_t)^2 / sum_t e_t^2``.

        ``e_t = w_t |Delta_t|^2`` is what a token contributes to the error of the pruned model. All
        tokens where they are alike, about k where k of them own it; one of them owns at least the
        reciprocal. Both sums are additive, so this is exact whatever the order of the tokens.
        """
        return self.pruned_error**2 / self.fourth if self.fourth > 0 else float(self.tokens)

    @checked
    def error(self, repair: Tensor | Repair) -> float:
        """Squared error ``||F M + 1 b' - Delta||_F^2`` of any repair on these tokens.

        On training moments this is the training residual, on held-out moments the held-out error.
        Below about 1e-15 of ``||X_post||^2`` the value is rounding; it is clipped at zero.

        Args:
            repair: an `Operator`; or its ``W`` (C, C) where the regressor has an identity, as the
                plain stream, whose error is ``||X_pre W - X_post||_F^2``; or else its ``M`` (p, C).

        Raises:
            ValueError: a matrix of another shape or with NaN, or an operator that reads other
                features.
        """
        bias = None
        regressor = getattr(repair, "regressor", self.regressor)
        if regressor.features != self.regressor.features:
            raise ValueError(
                f"the operator reads {regressor}, these moments are of {self.regressor}: take "
                f"calibration.of({str(regressor)!r})"
            )
        if isinstance(repair, Tensor):
            M = repair.to(self.G)
            if self.regressor.has_identity and M.shape == self.cross.shape:
                M = M - torch.eye(len(M)).to(M)
        else:
            M, bias = repair.M.to(self.G), repair.bias
        if not torch.isfinite(M).all():
            raise ValueError("the operator has NaN or infinite entries: solve it again")
        return self.error_of(M, bias)

    @checked
    def error_of(self, M: Tensor, bias: Tensor | None = None) -> float:
        """`error` of a matrix ``M`` (p, C) on the features, and a bias (C,)."""
        if M.shape != self.cross.shape:
            raise ValueError(
                f"operator must have shape {tuple(self.cross.shape)}, got {tuple(M.shape)}"
            )
        total = (M * (self.G @ M)).sum() - 2 * (M * self.cross).sum() + self.d2.sum()
        if bias is not None:
            b = bias.to(self.G)
            total = total + 2 * b @ (M.T @ self.f1 - self.d1) + self.weight * (b @ b)
        return max(float(total), 0.0)

    @checked
    def relative_error(self, repair: Tensor | Repair) -> float:
        """`error` divided by that of the pruned model (1 = no better than pruning).

        Raises:
            ValueError: ``X_post`` equals ``X_pre`` (there is nothing to recover).
        """
        if self.pruned_error <= 0:
            raise ValueError("X_post equals X_pre: the removed layers did nothing to recover")
        return self.error(repair) / self.pruned_error

    def part(self, regressor: Regressor | str) -> "Moments":
        """The moments of some of these features, as the blocks they are here.

        Leading features come as views, and sums that no feature enters are shared.

        Raises:
            ValueError: a feature that is not here, or another weight of tokens.
        """
        narrow = Regressor.parse(regressor)
        if not self.regressor.contains(narrow):
            raise ValueError(
                f"moments of {self.regressor} do not hold those of {narrow}: collect these"
            )
        chosen = self.replaced({}, {})
        chosen.regressor = narrow
        chosen.bias = self.bias and "hidden" in narrow.sources
        every = torch.arange(len(self.G)).split(list(self.blocks))
        columns_of = dict(zip(self.regressor.features, every, strict=True))
        picked = [columns_of[feature] for feature in narrow.features]
        chosen.blocks = tuple(map(len, picked))
        columns: Any = torch.cat(picked)
        if columns.tolist() == list(range(len(columns))):
            columns = slice(len(columns))
        chosen.G = self.G[columns][:, columns]
        chosen.cross, chosen.f1 = self.cross[columns], self.f1[columns]
        return chosen

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(p,) weighted mean of ``F``, (C,) of ``Delta``."""
        return self.f1 / self.weight, self.d1 / self.weight

    def about(self, f: Tensor, d: Tensor) -> Self:
        """The second moments of ``F - f`` and ``Delta - d``, with the `means` of a fit's tokens.

        Least squares on these is least squares with a bias.
        """
        f, d, w = f.to(self.G), d.to(self.G), self.weight
        half = self.f1 - w / 2 * f
        sums = {
            "G": self.G - torch.outer(half, f) - torch.outer(f, half),
            "cross": self.cross - torch.outer(self.f1 - w * f, d) - torch.outer(f, self.d1),
            "f1": self.f1 - w * f,
            "d1": self.d1 - w * d,
            "d2": self.d2 - 2 * self.d1 * d + w * d.square(),
        }
        moved = self.replaced(sums, {})
        # Centring cancels: what is left of a large constant channel is rounding at the size of G.
        moved._gram = Gram(moved.G, self.blocks, self.G.diagonal())
        return moved

    def _require_identity(self, what: str) -> None:
        if self.regressor.features != STREAM.features:
            raise ValueError(
                f"{what} is of the plain stream, these moments are of {self.regressor}"
            )

    # ------------------------------------------------------------------ sums of sums, files

    def __add__(self, other: "Moments") -> Self:
        """Moments of both sets of tokens together.

        Every sum is added once, so the result differs from one long pass only by the rounding of
        float64 additions (relative 1e-15 per addition), and ``a + b`` equals ``b + a`` exactly.

        Raises:
            ValueError: other features, another width, boundary or model, or one with a bias.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        for what in ("width", "blocks", "boundary", "model", "regressor", "bias"):
            this, that = getattr(self, what), getattr(other, what)
            if this != that:
                raise ValueError(f"moments of different {what} cannot be added: {this} and {that}")
        mapped = {k: t + getattr(other, k).to(self.G.device) for k, t in self.tensors().items()}
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return self.replaced(mapped, counts)

    def __radd__(self, other: Any) -> Self:
        return self if other == 0 else NotImplemented  # so that sum() works

    @checked
    def to(self, device: torch.device | str) -> Self:
        """A copy on another device (float64 stays); `ValueError` if it is not there."""
        check_device(device)
        return self.replaced({name: t.to(device) for name, t in self.tensors().items()}, {})

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def counts(self) -> dict[str, float]:
        """The scalar sums by name."""
        return {name: getattr(self, name) for name in _COUNTS}

    def replaced(self, tensors: Mapping[str, Tensor], counts: Mapping[str, float]) -> Self:
        """A copy with other sums."""
        changed = copy.copy(self)
        changed._gram = None
        for name, value in (*tensors.items(), *counts.items()):
            setattr(changed, name, value)
        return changed

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an old file is replaced only once the new one is whole.

        Raises:
            OSError: it could not be written; the old file stays.
        """
        path = Path(path)
        facts = self.counts() | {
            "format": _FORMAT,
            "regressor": str(self.regressor),
            "hidden": self.hidden,
            "bias": self.bias,
            "boundary": self.boundary,
            "model": self.model,
        }
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors().items()}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"moments": json.dumps(facts)})
        except SafetensorError as error:  # of a full disk, or no such folder
            raise OSError(f"{path} could not be written ({error}): name another") from error

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("moments", "{}"))
                if facts.get("format") != _FORMAT:
                    raise ValueError("not a ghostlib moments file")
                sums = {name: file.get_tensor(name) for name in _TENSORS}
            moments = cls(
                sums["cross"].shape[1],
                regressor=facts["regressor"],
                hidden=facts["hidden"],
                bias=facts["bias"],
                boundary=facts["boundary"],
                model=facts["model"],
            )
            for name, value in sums.items():
                empty = getattr(moments, name)
                if (value.shape, value.dtype) != (empty.shape, empty.dtype):
                    raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}")
            return moments.replaced(sums, {name: facts[name] for name in _COUNTS})
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} cannot be read as moments: {error}") from error


def ratio(numerator: Tensor, denominator: Tensor, empty: float = 1.0) -> Tensor:
    """``numerator / denominator``; where that is zero 1, so that a channel without signal stays."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, empty)


def check_moments(moments: Moments) -> None:
    """Refuse moments that no operator can be solved from.

    Raises:
        ValueError: no tokens, another dtype than float64, a Gram matrix that is not symmetric, or
            sums that are not finite.
    """
    if moments.tokens < 1 or moments.weight <= 0:
        raise ValueError("these moments hold no tokens: call update(X_pre, X_post) first")
    G, cross = moments.G, moments.cross
    if G.dtype != torch.float64 or cross.dtype != torch.float64:
        raise ValueError(
            f"moments must be float64, got G in {G.dtype} and cross moments in {cross.dtype}: "
            "forming X'X squares the condition number, which float32 cannot hold"
        )
    for name, values in moments.tensors().items():
        if not torch.isfinite(values).all():
            raise ValueError(f"moments must be finite, and {name} is not: was it edited by hand?")
    rows = range(0, len(G), 1024)  # no second matrix of this size
    asymmetry = max(float((G[i : i + 1024] - G[:, i : i + 1024].T).abs_().max()) for i in rows)
    if asymmetry > 1e-9 * float(G.diagonal().abs().max()):
        raise ValueError(
            f"moments must have a symmetric Gram matrix, got max|G - G'| = {asymmetry:.2g}: "
            "was it edited by hand?"
        )


def check_alike(train: Moments, *held_out: Moments) -> None:
    """Refuse to judge a fit on held-out moments of another kind; and `check_moments` of all.

    Raises:
        ValueError: another width or another regressor; or as `check_moments`.
    """
    for moments in held_out:
        for what in ("width", "blocks", "regressor"):
            first, second = getattr(train, what), getattr(moments, what)
            if first != second:
                raise ValueError(
                    f"training and held-out moments must have one {what}, got {first} and {second}"
                )
    for moments in (train, *held_out):
        check_moments(moments)
