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
from typing import Protocol, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghostlib.gram import gram
from ghostlib.sums import SUMS, Sums

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
