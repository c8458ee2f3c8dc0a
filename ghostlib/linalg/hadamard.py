"""Hadamard matrices: rotations that spread every channel evenly over all the others.

LinearPatch (NeurIPS 2025) matches channel magnitudes in such a rotated basis. Nothing is tabulated
here: a matrix of order n is a Kronecker product of those that Sylvester's and Paley's constructions
give over prime fields. That covers every multiple of 64 up to 2,688, hence all widths in common
use; Paley's construction over prime powers would add just one multiple of 64 below 8,192 (2,752).
"""

import math
import operator
from functools import cache, lru_cache, reduce

import torch
from torch import Tensor

# Widest dense factor `rotate` multiplies by: fewer, wider passes beat many narrow ones until here.
_BLOCK = 64


def has_hadamard(n: int) -> bool:
    """Whether `hadamard` can build order ``n``; cached, and no matrix is built.

    Raises:
        ValueError: ``n`` is not positive. TypeError: ``n`` is not an integer.
    """
    return _factors(_check_order(n)) is not None


def hadamard(n: int) -> Tensor:
    """The normalised Hadamard matrix ``H`` of order ``n``: entries ``±1/sqrt(n)``, ``H'H = I``.

    Args:
        n: order; 1, 2, or a multiple of 4 that factorises into Sylvester and Paley orders.

    Returns:
        (n, n) float64 matrix. It is not symmetric in general.

    Raises:
        ValueError: no construction known here reaches ``n``; the message names the nearest widths.

    >>> hadamard(576).shape
    torch.Size([576, 576])
    """
    signs = [_primitive(order) for order in _require_factors(n)]
    return reduce(torch.kron, signs, torch.ones(1, 1, dtype=torch.float64)) / math.sqrt(n)


def rotate(X: Tensor, *, inverse: bool = False) -> Tensor:
    """``X @ H``, or ``X @ H'`` with ``inverse``, one Kronecker factor at a time.

    For ``H = H_1 ⊗ H_2 ⊗ …`` a row of ``X`` is an array with one axis per factor, and each factor
    multiplies its own axis: O(n * sum of the factors) per row in place of O(n^2).

    Args:
        X: (..., n) activations of any floating dtype, on any device.
        inverse: undo the rotation.

    Returns:
        (..., n) rotated activations, in the dtype of ``X``. Half precision is computed in float32:
        the sums grow like ``sqrt(n)`` before they are normalised.

    Raises:
        ValueError: a width without a Hadamard matrix, or values that are not floating point.

    >>> rotate(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """
    if X.ndim == 0 or not X.is_floating_point():
        raise ValueError(
            f"rotate needs floating-point activations of shape (..., width), "
            f"got {X.dtype} of shape {tuple(X.shape)}"
        )
    n = X.shape[-1]
    work = X.dtype if X.dtype in (torch.float32, torch.float64) else torch.float32
    Z = X.to(work)
    for orders in _blocks(n):
        H = _signs(orders, work, X.device)
        # The first axis is multiplied and becomes the last: after all factors, order is restored.
        Z = Z.reshape(-1, len(H), n // len(H)).transpose(1, 2) @ (H.T if inverse else H)
    return (Z.reshape(X.shape) / math.sqrt(n)).to(X.dtype)


def _check_order(n: int) -> int:
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"the order of a Hadamard matrix must be positive, got {n}")
    return n


def _require_factors(n: int) -> tuple[int, ...]:
    n = _check_order(n)
    factors = _factors(n)
    if factors is None:
        below = next(m for m in range(n - 1, 0, -1) if has_hadamard(m))
        above = next(m for m in range(n + 1, 2 * n + 4) if has_hadamard(m))
        raise ValueError(
            f"no Hadamard matrix for width {n}: it must be 1, 2, or a multiple of 4 that is a "
            f"product of Sylvester and Paley orders (2, 12, 20, 28, 36, 44 …); "
            f"the nearest widths that work are {below} and {above}"
        )
    return factors


@cache
def _factors(n: int) -> tuple[int, ...] | None:
    """Primitive orders with product ``n`` and the smallest sum (the cost of `rotate`), or None."""
    if n == 1:
        return ()
    if n > 2 and n % 4:
        return None
    found = [
        (*rest, order)
        for order in range(2, n + 1)
        if n % order == 0 and _is_primitive(order) and (rest := _factors(n // order)) is not None
    ]
    return tuple(sorted(min(found, key=sum))) if found else None


@cache
def _blocks(n: int) -> tuple[tuple[int, ...], ...]:
    """The factors of ``n`` grouped into dense blocks no wider than `_BLOCK` where possible."""
    blocks: list[tuple[int, ...]] = []
    width = 0
    for order in _require_factors(n):
        if blocks and width * order <= _BLOCK:
            blocks[-1] += (order,)
            width *= order
        else:
            blocks.append((order,))
            width = order
    return tuple(blocks)


@lru_cache(maxsize=64)
def _signs(orders: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kronecker product of the primitive matrices of ``orders``; entries ±1."""
    return reduce(torch.kron, map(_primitive, orders)).to(device, dtype)


def _is_primitive(n: int) -> bool:
    return n == 2 or _paley_one(n) or _paley_two(n)


def _paley_one(n: int) -> bool:
    """Order ``q + 1`` for a prime ``q = 3 mod 4``."""
    return n % 4 == 0 and _is_prime(n - 1)


def _paley_two(n: int) -> bool:
    """Order ``2 (q + 1)`` for a prime ``q = 1 mod 4``."""
    return n % 4 == 0 and (n // 2) % 4 == 2 and _is_prime(n // 2 - 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _primitive(n: int) -> Tensor:
    """The (n, n) float64 matrix of ±1 that Sylvester or Paley give for a primitive order."""
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if _paley_one(n):
        # The core S is skew-symmetric with S S' = (n - 1) I, so I + S has orthogonal rows.
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, sign=-1.0)
    # The core S is symmetric; each of its entries ±1 and its zeros become blocks of order 2.
    S = _bordered(n // 2 - 1, sign=1.0)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(S, off) + torch.kron(torch.eye(n // 2, dtype=torch.float64), on)


def _bordered(q: int, sign: float) -> Tensor:
    """Paley's conference matrix of order ``q + 1``: Legendre symbols of ``i - j`` with a border.

    Zero diagonal, ±1 elsewhere, ``S S' = q I``; ``sign`` is that of the first column, 1 where -1
    is a square modulo ``q`` (``S`` symmetric) and -1 where it is not (``S`` skew-symmetric).
    """
    legendre = torch.full((q,), -1.0, dtype=torch.float64)
    legendre[torch.arange(1, q) ** 2 % q] = 1.0
    legendre[0] = 0.0
    step = torch.arange(q)
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0] = 1.0, sign
    S[1:, 1:] = legendre[(step[:, None] - step[None, :]) % q]
    return S
