"""Hadamard matrices against their definition, and the fast rotation against the dense product."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostlib.linalg.hadamard import _factors, _halves, hadamard, has_hadamard, rotate

POPULAR = [
    *(576, 640, 768, 896, 960, 1024, 1152, 1280, 1536, 1600, 2048, 2304, 2560, 2880, 3072, 3200),
    *(3584, 3712, 3840, 4096, 4544, 4608, 5120, 5376, 5632, 6144, 6656, 7168, 7680, 8192, 9216),
    *(10240, 12288, 14336, 16384, 18432),
]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 76, 104, 144, 180, 576, 896])
def test_entries_and_orthogonality(n: int) -> None:
    H = hadamard(n)
    assert H.dtype == torch.float64 and H.shape == (n, n)
    torch.testing.assert_close(H.abs(), torch.full_like(H, n**-0.5))
    torch.testing.assert_close(H.T @ H, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", POPULAR)
def test_popular_widths_have_a_matrix_with_two_small_factors(n: int) -> None:
    assert has_hadamard(n)
    first, second = (np.prod(orders) for orders in _halves(n))
    assert first * second == n
    assert first + second < n / 4, "close to a dense n x n product"


@pytest.mark.parametrize("n", [1, 2, 16, 512])
def test_powers_of_two_equal_scipy(n: int) -> None:
    np.testing.assert_array_equal(hadamard(n), scipy.linalg.hadamard(n) / n**0.5)


def test_every_multiple_of_64_up_to_2688() -> None:
    assert all(has_hadamard(n) for n in range(64, 2689, 64))


def test_has_hadamard_is_cached() -> None:
    has_hadamard(16384)
    misses = _factors.cache_info().misses
    assert has_hadamard(16384) and _factors.cache_info().misses == misses


@pytest.mark.parametrize("n", [3, 6, 9, 52, 92, 100, 116, 577, 4095])
def test_widths_without_one_are_refused_with_the_nearest(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"width {n}: .* nearest widths that work are") as caught:
        hadamard(n)
    below, above = (int(word) for word in str(caught.value).split(" are ")[1].split(" and "))
    assert below < n < above and has_hadamard(below) and has_hadamard(above)
    with pytest.raises(ValueError, match=f"width {n}"):
        rotate(torch.zeros(2, n))


@pytest.mark.parametrize("n", [0, -4])
def test_order_must_be_positive(n: int) -> None:
    for function in (hadamard, has_hadamard):
        with pytest.raises(ValueError, match="positive"):
            function(n)
        with pytest.raises(TypeError):
            function(4.0)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(
    n=st.sampled_from([1, 2, 4, 12, 24, 28, 36, 40, 112, 500, 576, 640]),
    batch=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 99),
)
def test_rotate_is_the_dense_product(n: int, batch: list[int], seed: int) -> None:
    X = torch.randn(*batch, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    H = hadamard(n)
    torch.testing.assert_close(rotate(X), X @ H)
    torch.testing.assert_close(rotate(X, inverse=True), X @ H.T)
    torch.testing.assert_close(rotate(rotate(X), inverse=True), X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotate_keeps_the_dtype_and_does_not_overflow(dtype: torch.dtype) -> None:
    # 640 values of 200 sum to 128,000, beyond float16, before they are normalised.
    X = torch.full((3, 640), 200.0).to(dtype)
    Z = rotate(X)
    assert Z.dtype == dtype and torch.isfinite(Z).all()
    expected = X.double() @ hadamard(640)
    tolerance = 32 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(Z.double(), expected, rtol=0, atol=tolerance)


def test_rotate_takes_transposed_views_and_leaves_them_alone() -> None:
    X = torch.randn(12, 5, dtype=torch.float64)
    before = X.clone()
    torch.testing.assert_close(rotate(X.T), X.T @ hadamard(12))
    assert torch.equal(X, before)


@pytest.mark.parametrize("X", [torch.ones(2, 4, dtype=torch.long), torch.tensor(1.0)])
def test_rotate_requires_floating_point_channels(X: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point activations"):
        rotate(X)
