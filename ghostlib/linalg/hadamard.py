"""Hadamard matrices: rotations that spread every channel evenly over all channels.

LinearPatch (NeurIPS 2025) matches channel magnitudes in such a rotated basis. A matrix of order n
is a Kronecker product of Sylvester and Paley matrices over prime fields. That covers every multiple
of 64 up to 2,688, hence all widths in common use; Paley's construction over prime powers would add
just one multiple of 64 below 8,192 (2,752).
"""

import operator
from functools import cache, lru_cache, reduce
from math import isqrt, prod, sqrt

import torch
from torch import Tensor


def has_hadamard(n: int) -> bool:
    """Whether `hadamard` can build order ``n``, without building a matrix; cached.

    Raises:
        ValueError: ``n`` is not positive.
        TypeError: ``n`` is not an integer.

    >>> has_hadamard(576), has_hadamard(577)
    (True, False)
    """
    return _factors(_order(n)) is not None


def hadamard(n: int) -> Tensor:
    """The normalised Hadamard matrix ``H`` of order ``n``: entries ``±1/sqrt(n)``, ``H'H = I``.

    For a power of two, the same as ``scipy.linalg.hadamard(n) / sqrt(n)``.

    Args:
        n: order; 1, 2, or a multiple of 4 that factorises into Sylvester and Paley orders.

    Returns:
        (n, n) float64 matrix. It is not symmetric in general.

    Raises:
        ValueError: no construction reaches ``n``; the message names the nearest widths that work.
        TypeError: ``n`` is not an integer.

    >>> hadamard(576).shape
    torch.Size([576, 576])
    """
    return _kronecker(_require_factors(n)) / sqrt(n)


def rotate(X: Tensor, *, inverse: bool = False) -> Tensor:
    """``X @ H``, or ``X @ H'`` with ``inverse``, by the two Kronecker factors of ``H = A ⊗ B``.

    ``A`` multiplies the first axis of a row reshaped to (a, b) and ``B`` the second: O(n (a + b))
    operations per row instead of O(n^2).

    Args:
        X: (..., n) activations of any floating dtype, on any device.
        inverse: undo the rotation.

    Returns:
        (..., n) rotated activations, in the dtype of ``X``. Half precision is computed in float32:
        sums grow like ``sqrt(n)`` before they are normalised.

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
    for orders in _halves(n):
        H = _signs(orders, work, X.device)
        # Each product moves the first axis to the end, so two of them restore the order.
        Z = Z.reshape(-1, len(H), n // len(H)).transpose(1, 2) @ (H.T if inverse else H)
    return (Z.reshape(X.shape) / sqrt(n)).to(X.dtype)


def _order(n: int) -> int:
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"the order of a Hadamard matrix must be positive, got {n}")
    return n


def _require_factors(n: int) -> tuple[int, ...]:
    factors = _factors(_order(n))
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
    """Sorted primitive orders with product ``n`` and the smallest sum, or None."""
    if n == 1:
        return ()
    if n > 2 and n % 4:
        return None
    products = [
        (*rest, order)
        for order in range(2, n + 1)
        if n % order == 0 and _is_primitive(order) and (rest := _factors(n // order)) is not None
    ]
    return tuple(sorted(min(products, key=sum))) if products else None


@cache
def _halves(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors of ``n`` split in two, with products as close to each other as possible."""
    factors = _require_factors(n)
    splits = [(factors[:i], factors[i:]) for i in range(len(factors) + 1)]
    return min(splits, key=lambda halves: prod(halves[0]) + prod(halves[1]))


@lru_cache(maxsize=64)
def _signs(orders: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`_kronecker` in this dtype and on this device, cached for `rotate`."""
    return _kronecker(orders).to(device, dtype)


def _kronecker(orders: tuple[int, ...]) -> Tensor:
    """Kronecker product of the primitive matrices of ``orders``; float64 entries ±1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return reduce(torch.kron, [_primitive(order) for order in orders], one)


def _is_primitive(n: int) -> bool:
    return n == 2 or _paley_one(n) or _paley_two(n)


def _paley_one(n: int) -> bool:
    """Order ``q + 1`` for a prime ``q = 3 mod 4``."""
    return n % 4 == 0 and _is_prime(n - 1)


def _paley_two(n: int) -> bool:
    """Order ``2 (q + 1)`` for a prime ``q = 1 mod 4``."""
    return n % 8 == 4 and _is_prime(n // 2 - 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


def _primitive(n: int) -> Tensor:
    """Sylvester's or Paley's (n, n) float64 matrix of ±1 for a primitive order."""
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n == 2:
        return sylvester
    if _paley_one(n):
        # The core S is skew-symmetric with S S' = (n - 1) I, so I + S has orthogonal rows.
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, sign=-1.0)
    # The core S is symmetric; each of its entries ±1 and its zeros become blocks of order 2.
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    S = _bordered(n // 2 - 1, sign=1.0)
    return torch.kron(S, sylvester) + torch.kron(torch.eye(n // 2, dtype=torch.float64), zero)


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
