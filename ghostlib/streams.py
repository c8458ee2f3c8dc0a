"""One sequence of activations and the sums over it that every boundary there can share."""

from typing import NamedTuple

import torch
from torch import Tensor

from ghostlib.hadamard import has_hadamard, rotate


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
