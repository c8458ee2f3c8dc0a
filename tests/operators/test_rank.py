"""The rank path against one solve per rank, and the choice against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ghostlib as gl

pytestmark = pytest.mark.filterwarnings("error")


def pair(width: int, tokens: int, seed: int, rank: int | None = None):
    """Moments of training and held-out tokens of one random linear map with noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    M = normal(width, rank or width) @ normal(rank or width, width)
    streams = [normal(tokens, width) for _ in range(2)]
    return [gl.Moments(width).update(X, X + X @ M + 3 * normal(tokens, width)) for X in streams]


def assert_path_equals_solves(path, train, held_out, family, rel, **options):
    for rank in range(1, train.width + 1):
        op = gl.solve(train, family, rank=rank, **options)
        assert float(path.train_error[rank - 1]) == pytest.approx(train.error(op), rel=rel)
        assert float(path.held_out_error[rank - 1]) == pytest.approx(held_out.error(op), rel=rel)


@settings(max_examples=20)
@given(width=st.integers(2, 12), seed=st.integers(0, 99), ridge=st.sampled_from([None, 1e-2]))
def test_the_path_equals_one_solve_per_rank(width, seed, ridge):
    train, held_out = pair(width, 5 * width, seed)
    path = gl.rank_path(train, held_out, relative_ridge=ridge)
    assert_path_equals_solves(path, train, held_out, "low-rank", 1e-6, relative_ridge=ridge)


def test_the_path_has_the_bias_of_the_fit():
    generator = torch.Generator().manual_seed(0)
    X, E = torch.randn(2, 60, 6, generator=generator, dtype=torch.float64)
    Y = X + X.flip(1) + E + 9
    train, held_out = (
        gl.Moments(6, regressor="n(x)", bias=True).update(X[part], Y[part])
        for part in (slice(40), slice(40, 60))
    )
    path = gl.rank_path(train, held_out)
    assert_path_equals_solves(path, train, held_out, "n(x)", 1e-9)


def test_training_error_falls_with_the_rank_and_ends_at_ghost():
    train, held_out = pair(16, 100, 0)
    path = gl.rank_path(train, held_out)
    assert (path.train_error.diff() <= 1e-9 * train.t).all()
    assert float(path.train_error[-1]) == pytest.approx(gl.solve(train, "ghost").residual, rel=1e-9)


def test_the_true_rank_is_recovered():
    train, held_out = pair(24, 60, 1, rank=3)
    errors = gl.rank_path(train, held_out).held_out_error
    assert gl.choose_rank(train, held_out) == int(errors.argmin()) + 1
    assert 2 <= gl.choose_rank(train, held_out) <= 6
    assert gl.choose_rank(train, held_out, tolerance=1e9) == 1


def test_bad_options_and_moments_are_named():
    train, held_out = pair(6, 30, 0)
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        gl.choose_rank(train, held_out, tolerance=-0.1)
    with pytest.raises(ValueError, match=r"one width, got 6 and 5"):
        gl.rank_path(train, pair(5, 30, 0)[1])
    with pytest.raises(ValueError, match="no tokens"):
        gl.rank_path(train, gl.Moments(6))
    with pytest.raises(ValueError, match="positive and finite"):
        gl.choose_rank(train, held_out, relative_ridge=-1.0)
