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
    made = []
    for _ in range(2):
        X = normal(tokens, width)
        made.append(gl.Moments(width).update(X, X + X @ M + 3 * normal(tokens, width)))
    return made


@settings(max_examples=20)
@given(width=st.integers(2, 12), seed=st.integers(0, 99), ridge=st.sampled_from([None, 1e-2]))
def test_the_path_equals_one_solve_per_rank(width, seed, ridge):
    train, held_out = pair(width, 5 * width, seed)
    path = gl.rank_path(train, held_out, relative_ridge=ridge)
    for rank in range(1, width + 1):
        op = gl.solve(train, "low-rank", rank=rank, relative_ridge=ridge)
        assert float(path.train_error[rank - 1]) == pytest.approx(train.error(op), rel=1e-6)
        assert float(path.held_out_error[rank - 1]) == pytest.approx(held_out.error(op), rel=1e-6)


def test_the_path_has_the_bias_that_the_fit_has():
    generator = torch.Generator().manual_seed(0)
    X, E = torch.randn(2, 60, 6, generator=generator, dtype=torch.float64)
    Y, how = X + X.flip(1) + E + 9, {"regressor": "n(x)", "bias": True}
    train, held_out = (
        gl.Moments(6, **how).update(X[part], Y[part]) for part in (slice(40), slice(40, 60))
    )
    path = gl.rank_path(train, held_out)
    for rank in range(1, 7):
        op = gl.solve(train, "n(x)", rank=rank)
        assert float(path.train_error[rank - 1]) == pytest.approx(train.error(op), rel=1e-9)
        assert float(path.held_out_error[rank - 1]) == pytest.approx(held_out.error(op), rel=1e-9)


def test_training_error_falls_with_the_rank_and_ends_at_ghost():
    train, held_out = pair(16, 100, 0)
    path = gl.rank_path(train, held_out)
    assert (path.train_error.diff() <= 1e-9 * train.t).all()
    assert float(path.train_error[-1]) == pytest.approx(gl.solve(train, "ghost").residual, rel=1e-9)


def test_the_rank_of_the_truth_is_found():
    train, held_out = pair(24, 60, 1, rank=3)
    errors = gl.rank_path(train, held_out).held_out_error
    assert gl.choose_rank(train, held_out) == int(errors.argmin()) + 1
    assert 2 <= gl.choose_rank(train, held_out) <= 6
    assert gl.choose_rank(train, held_out, tolerance=1e9) == 1


def test_bad_ranks_and_moments_are_named():
    train, held_out = pair(6, 30, 0)
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        gl.choose_rank(train, held_out, tolerance=-0.1)
    with pytest.raises(ValueError, match=r"one width, got 6 and 5"):
        gl.rank_path(train, pair(5, 30, 0)[1])
    with pytest.raises(ValueError, match=r"one regressor, got x and n\(x\)"):
        X = torch.ones(9, 6)
        gl.rank_path(train, gl.Moments(6, regressor="n(x)").update(X, X))
    for one, other in ((train, gl.Moments(6)), (gl.Moments(6), held_out)):
        with pytest.raises(ValueError, match="no tokens"):
            gl.rank_path(one, other)
    with pytest.raises(ValueError, match="positive and finite"):
        gl.choose_rank(train, held_out, relative_ridge=-1.0)
