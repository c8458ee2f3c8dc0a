"""Moments: sufficient statistics of the tokens on both sides of a gap, for least-squares repairs.

Row-vector convention: activations are ``X`` of shape (tokens, width), a matrix acts as ``X @ W``.
The squared error of *any* matrix ``M`` on features ``F`` is a quadratic form in the second moments

    ``||F M - Delta||_F^2 = tr(M' G M) - 2 tr(M' F'Delta) + ||Delta||_F^2``,  ``G = F'F``,

so the activations are not stored: memory is O(width^2), whatever the number of tokens (paper,
appendix H, eqs. A15-A16). The moments of two sets of tokens add up. With the stream itself for
``F``, and ``W = I + M``, the same number is ``||X_pre W - X_post||_F^2``.
"""

import copy
import json
import operator
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghostlib.common import at_least, atomic_file, checked
from ghostlib.linalg.gram import Gram, gram
from ghostlib.linalg.hadamard import has_hadamard, rotate
from ghostlib.models.boundaries import Boundary, check_boundary
from ghostlib.models.placement import check_device
from ghostlib.statistics.features import STREAM, Regressor, Sources

_FORMAT = "ghostlib-moments-2"
_TENSORS = ("G", "cross", "f1", "d1", "d2", "x_abs", "y_abs", "ratio", "ratio_rotated")
_COUNTS = ("tokens", "weight", "sequences", "fourth")
_SETTINGS = ("regressor", "hidden", "bias", "boundary", "model")


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
    """One sequence of the stream in float64, with the sums that its boundaries share.

    Attributes:
        values: (tokens, width).
        weight: (tokens,) of each token's squared error.
        abs: (width,) weighted column sums of ``|X|``.
        rotated: (width,) of ``|X H|``, H the Hadamard matrix; None for a width without one.
    """

    values: Tensor
    weight: Tensor
    abs: Tensor
    rotated: Tensor | None

    @classmethod
    def of(cls, activations: Tensor, weight: Tensor | None = None) -> "Stream":
        """From ``activations`` (tokens, width) and the ``weight`` (tokens,) of each."""
        values = activations.double()
        w = values.new_ones(len(values)) if weight is None else weight.to(values)
        rotated = None
        if has_hadamard(values.shape[1]):
            # float32 suffices for a mean of absolute values.
            rotated = w @ rotate(activations.float()).abs().double()
            # A column without signal holds the rounding error of whole tokens.
            size = w @ torch.linalg.vector_norm(values, dim=1)
            noise = 8 * torch.finfo(torch.float32).eps * size
            rotated = rotated.where(rotated > noise, 0.0)
        return cls(values, w, w @ values.abs(), rotated)


class Moments:
    """Additive float64 sufficient statistics of features ``F`` (tokens, p) and ``Delta``.

    ``Delta = X_post - X_pre`` (tokens, C) is what the removed layers added to the stream. Each
    token has a weight ``w``, 1 by default.

    Args:
        width: of the stream, C.
        regressor: the features, or their spelling; by default the stream ``X_pre`` itself.
        hidden: width of the MLP, where a feature needs it.
        bias: whether least squares fits a bias, as the weights that receive the repair have one.
        boundary: the gap.
        model: fingerprint of the model.
        device: of the sums.

    Attributes:
        G: (p, p) Gram matrix ``F' diag(w) F``.
        cross: (p, C) cross moments ``F' diag(w) Delta``.
        f1: (p,) column sums of ``F``.
        d1: (C,) column sums of ``Delta``.
        d2: (C,) squared norm of each column of ``Delta``.
        x_abs: (C,) column sums of ``|X_pre|``.
        y_abs: (C,) column sums of ``|X_post|``.
        ratio: (C,) sum over sequences of ``mean|X_post| / mean|X_pre|`` by channel (1 for a channel
            that is zero), the statistic of LinearPatch.
        ratio_rotated: (C,) the same in the Hadamard basis; zero for a width without one.
        tokens: number of tokens with a positive weight.
        weight: sum of their weights.
        sequences: number of calls of `update`.
        fourth: sum over tokens of ``(w |Delta|^2)^2``, for `effective_tokens`.

    Raises:
        ValueError: a width below 1, features of the MLP without its width, an invalid boundary, or
            an unavailable device.

    >>> X_pre, X_post = torch.randn(2, 100, 8)
    >>> moments = Moments(8).update(X_pre, X_post)
    >>> moments.G.shape, moments.cross.shape, moments.tokens
    (torch.Size([8, 8]), torch.Size([8, 8]), 100)
    """

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
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.G, self.cross, self.f1 = zeros(p, p), zeros(p, C), zeros(p)
        self.d1, self.d2 = zeros(C), zeros(C)
        self.x_abs, self.y_abs = zeros(C), zeros(C)
        self.ratio, self.ratio_rotated = zeros(C), zeros(C)
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

        The split into sequences matters only for LinearPatch, whose statistic is averaged over
        them, and for features of the previous token. A sequence of zero weight adds nothing.

        Args:
            X_pre: (tokens, C) stream before the gap.
            X_post: (tokens, C) stream after the gap.
            weight: (tokens,) non-negative weight of each token's squared error.
            hidden: (tokens, I) input of the down-projection before the gap, if a feature needs it.
            output: (tokens, C) output of that down-projection, if a feature needs it.
            real: (tokens,) false at padding.
            used: (tokens,) tokens to learn from; by default ``real``.

        Raises:
            ValueError: shapes that do not fit, complex or non-finite values, invalid weights, or a
                token that is zero after the gap where weights divide by its norm. Nothing is added.
        """
        sources = Sources(X_pre, hidden, output)
        self._check(sources, X_post, {"weight": weight, "real": real, "used": used})
        device = self.G.device
        if used is None:
            used = torch.ones(len(X_pre)) if real is None else real
        used = used.to(device).bool()
        sources = sources.map(lambda source: source.double().to(device))
        F = self.regressor.design(sources, real, len(self.G))
        weight = None if weight is None else weight.to(device)[used]
        x, y = (Stream.of(S.to(device)[used], weight) for S in (X_pre, X_post))
        return self.add_sequence(F[used], x, y)

    def add_sequence(self, F: Tensor, x: Stream, y: Stream, *, with_gram: bool = True) -> Self:
        """`update` of the streaming pass, from streams that boundaries share.

        Sums are rebound, never changed in place, so that two objects may share a tensor.
        """
        delta = y.values - x.values
        w, positive = x.weight, x.weight > 0
        if not positive.any():
            return self
        if self.regressor.weight.name != "1":
            norm = torch.linalg.vector_norm(y.values, dim=-1).where(positive, 1.0)
            if not (norm > 0).all():
                raise ValueError(
                    f"a token has norm 0 after the boundary, where its weight "
                    f"{self.regressor.weight} is infinite: leave it out, or use a regressor "
                    "without a weight"
                )
            w = w * self.regressor.weight.of(norm)
        weighted = F if (w == 1).all() else F * w[:, None]
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
        self.tokens += int(positive.sum())
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
        activations = {"X_pre": X_pre, "X_post": X_post, **sources._asdict()}
        del activations["stream"]
        for name, values in activations.items():
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
        if weight is not None and (
            weight.is_complex() or not weight.isfinite().all() or (weight < 0).any()
        ):
            raise ValueError("weights must be finite and non-negative")

    # ------------------------------------------------------------------ derived quantities

    @property
    def gram(self) -> Gram:
        """``G`` with its factorisations, shared by boundaries with the same start."""
        if self._gram is None or self._gram.G is not self.G:
            self._gram = gram(self.G, self.blocks)
        return self._gram

    @property
    def B(self) -> Tensor:
        """(C, C) cross moments ``X_pre' X_post`` of the plain stream.

        Raises:
            ValueError: moments of other features.
        """
        self._require_stream("B = X_pre' X_post")
        return self.G + self.cross

    @property
    def t(self) -> float:
        """``||X_post||_F^2`` of the plain stream; `ValueError` for other features."""
        self._require_stream("t = ||X_post||^2")
        return float(self.G.trace() + 2 * self.cross.trace() + self.d2.sum())

    @property
    def pruned_error(self) -> float:
        """(Weighted) squared error of the pruned model, ``||Delta||_F^2``."""
        return float(self.d2.sum())

    @property
    def effective_tokens(self) -> float:
        """Effective number of tokens in the objective, ``(sum_t e_t)^2 / sum_t e_t^2``.

        ``e_t = w_t |Delta_t|^2`` is a token's part of the error of the pruned model. The number of
        tokens where all parts are equal, about k where k tokens dominate; the largest share of one
        token is at least its reciprocal. Both sums are additive, so the value is exact.
        """
        return self.pruned_error**2 / self.fourth if self.fourth > 0 else float(self.tokens)

    @checked
    def error(self, repair: Tensor | Repair) -> float:
        """Squared error ``||F M + 1 b' - Delta||_F^2`` of any repair on these tokens.

        Below about 1e-15 of ``||X_post||^2`` the value is rounding error; it is clipped at zero.

        Args:
            repair: an `Operator`; or its ``W`` (C, C) where the regressor has an identity, as the
                plain stream, whose error is ``||X_pre W - X_post||_F^2``; or else its ``M`` (p, C).

        Raises:
            ValueError: a matrix of another shape or with NaN, or an operator on other features.
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
        """`error` of a matrix ``M`` (p, C) and a bias (C,)."""
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
        """`error` divided by the error of the pruned model (1 = no better than pruning).

        Raises:
            ValueError: ``X_post`` equals ``X_pre`` (there is nothing to recover).
        """
        if self.pruned_error <= 0:
            raise ValueError("X_post equals X_pre: the removed layers did nothing to recover")
        return self.error(repair) / self.pruned_error

    def part(self, regressor: Regressor | str) -> "Moments":
        """The moments of a subset of the features, cut from the blocks of these.

        Leading features are views, and sums independent of the features are shared.

        Raises:
            ValueError: a feature or a token weight that these moments do not have.
        """
        narrow = Regressor.parse(regressor)
        if not self.regressor.contains(narrow):
            raise ValueError(
                f"moments of {self.regressor} do not hold those of {narrow}: collect them"
            )
        indices = torch.arange(len(self.G)).split(list(self.blocks))
        block_of = dict(zip(self.regressor.features, indices, strict=True))
        blocks = [block_of[feature] for feature in narrow.features]
        columns: Any = torch.cat(blocks)
        if columns.tolist() == list(range(len(columns))):
            columns = slice(len(columns))
        part = self.replaced({"G": self.G[columns][:, columns], "cross": self.cross[columns]})
        part.f1, part.blocks = self.f1[columns], tuple(map(len, blocks))
        part.regressor, part.bias = narrow, self.bias and "hidden" in narrow.sources
        return part

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(p,) weighted mean of ``F``, (C,) of ``Delta``."""
        return self.f1 / self.weight, self.d1 / self.weight

    def centred(self, f: Tensor, d: Tensor) -> Self:
        """The moments of ``F - f`` and ``Delta - d``, with the `means` of the training tokens.

        Least squares on centred moments is least squares with a bias.
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
        centred = self.replaced(sums)
        # Of a large constant channel, centring leaves rounding error at the size of G.
        centred._gram = Gram(centred.G, self.blocks, self.G.diagonal())
        return centred

    def _require_stream(self, name: str) -> None:
        if self.regressor.features != STREAM.features:
            raise ValueError(
                f"{name} is defined for the plain stream, these moments are of {self.regressor}"
            )

    # ------------------------------------------------------------------ addition, files

    def __add__(self, other: "Moments") -> Self:
        """Moments of the union of both sets of tokens.

        They differ from those of one pass by float64 rounding alone (relative 1e-15 per addition),
        and ``a + b`` equals ``b + a`` exactly.

        Raises:
            ValueError: other features, another width, boundary or model, or one with a bias.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        for name in ("width", "blocks", "boundary", "model", "regressor", "bias"):
            this, that = getattr(self, name), getattr(other, name)
            if this != that:
                raise ValueError(f"moments of different {name} cannot be added: {this} and {that}")
        tensors = {k: t + getattr(other, k).to(self.G.device) for k, t in self.tensors().items()}
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return self.replaced(tensors, counts)

    def __radd__(self, other: Any) -> Self:
        return self if other == 0 else NotImplemented  # so that sum() works

    @checked
    def to(self, device: torch.device | str) -> Self:
        """A copy on another device, in float64; `ValueError` if it is not available."""
        check_device(device)
        return self.replaced({name: t.to(device) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def counts(self) -> dict[str, float]:
        """The scalar sums by name."""
        return {name: getattr(self, name) for name in _COUNTS}

    def replaced(self, *sums: Mapping[str, Any]) -> Self:
        """A copy with other sums, by name."""
        changed = copy.copy(self)
        changed._gram = None
        for values in sums:
            vars(changed).update(values)
        return changed

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an old file is replaced once the new one is complete.

        Raises:
            OSError: it could not be written; the old file stays.
        """
        path = Path(path)
        facts = self.counts() | {name: getattr(self, name) for name in _SETTINGS}
        facts |= {"format": _FORMAT, "regressor": str(self.regressor)}
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors().items()}
        try:
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata={"moments": json.dumps(facts)})
        except SafetensorError as error:  # the disk is full, or there is no such folder
            raise OSError(f"{path} could not be written ({error}): name another") from error

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of `save`.

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
            moments = cls(sums["cross"].shape[1], **{name: facts[name] for name in _SETTINGS})
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
    """``numerator / denominator``, ``empty`` where that is 0: 1 keeps a channel without signal."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, empty)


def check_moments(moments: Moments) -> None:
    """Refuse invalid moments, before an operator is solved from them.

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
    """Refuse held-out moments of another kind than ``train``; and `check_moments` of all.

    Raises:
        ValueError: another width or another regressor; or as `check_moments`.
    """
    for moments in held_out:
        for name in ("width", "blocks", "regressor"):
            first, second = getattr(train, name), getattr(moments, name)
            if first != second:
                raise ValueError(
                    f"training and held-out moments must have one {name}, got {first} and {second}"
                )
    for moments in (train, *held_out):
        check_moments(moments)
