"""The ridge path against one solve per value, and the ways to choose a value."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostlib.operators.families import least_squares
from ghostlib.operators.paths import (
    COARSE_RIDGES,
    RIDGES,
    choose_ridge,
    choose_ridges,
    cross_validate,
    ridge_path,
)
from ghostlib.operators.solve import solve, solve_quietly
from ghostlib.statistics.moments import Moments

pytestmark = pytest.mark.filterwarnings("error")

WIDTH = 8
SEEDS = st.integers(0, 10_000)


def activations(seed: int, tokens: int, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    """Tokens of one stream: the map from X to Y is the same for every seed."""
    fixed, g = torch.Generator().manual_seed(1234), torch.Generator().manual_seed(seed)
    mix, map_ = (torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=fixed) for _ in range(2))
    X = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=g) @ mix
    E = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=g)
    return X, X + 0.2 * X @ map_ + noise * E


def moments(seed: int, tokens: int, noise: float = 2.0) -> Moments:
    return Moments(WIDTH).update(*activations(seed, tokens, noise))


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([1, 5, 8, 40]))
def test_the_path_is_a_solve_per_value(seed: int, tokens: int) -> None:
    train, held_out = moments(seed, tokens), moments(seed + 1, 30)
    ridges = [1e-13, 1e-4, 1e-2, 1.0, 100.0]
    path = ridge_path(train, ridges, held_out)
    assert path.held_out_error is not None
    X, _ = activations(seed, tokens)
    for k, ridge in enumerate(ridges):
        op = solve_quietly(train, relative_ridge=ridge)
        terms = float(op.M.norm() ** 2 * train.G.norm()) + train.t  # which cancel
        assert float(path.train_error[k]) == pytest.approx(op.residual, abs=1e-14 * terms)
        assert float(path.held_out_error[k]) == pytest.approx(held_out.error(op), rel=1e-6)
        absolute = ridge * float(train.G.trace()) / WIDTH
        hat = X @ torch.linalg.solve(X.T @ X + absolute * torch.eye(WIDTH).double(), X.T)
        assert float(path.dof[k]) == pytest.approx(WIDTH * float(hat.trace()))


def test_without_held_out_moments_there_is_no_held_out_error() -> None:
    path = ridge_path(moments(0, 30))
    assert path.held_out_error is None
    assert path.ridges.tolist() == pytest.approx(RIDGES) and len(path.gcv) == len(RIDGES)


def test_the_path_runs_from_the_optimum_to_the_identity() -> None:
    train = moments(0, 30)
    path = ridge_path(train, [1e-12, *RIDGES, 1e12])
    assert (path.train_error.diff() >= -1e-9 * train.t).all()
    assert (path.dof.diff() < 0).all()
    assert float(path.train_error[0]) == pytest.approx(solve(train).residual)
    assert float(path.train_error[-1]) == pytest.approx(train.error(torch.eye(WIDTH)))
    assert float(path.dof[0]) == pytest.approx(WIDTH**2)
    assert float(path.dof[-1]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("weight", ["1", "1/|y|"])
def test_the_path_has_the_bias_of_the_fit(weight: str) -> None:
    def part(seed: int, tokens: int) -> Moments:
        X, Y = activations(seed, tokens)
        return Moments(WIDTH, regressor=f"n(x); {weight}", bias=True).update(X + 3, Y + 20)

    train, held_out, ridges = part(0, 30), part(1, 40), [1e-3, 0.1, 1.0, 10.0]
    path = ridge_path(train, ridges, held_out)
    assert path.held_out_error is not None
    for k, ridge in enumerate(ridges):
        op = solve(train, f"n(x); {weight}", relative_ridge=ridge)
        assert op.bias is not None
        assert float(path.train_error[k]) == pytest.approx(op.residual, rel=1e-9)
        assert float(path.held_out_error[k]) == pytest.approx(held_out.error(op), rel=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
def test_gcv_is_leave_one_token_out_with_the_mean_leverage(ridge: float, bias: bool) -> None:
    X, Y = activations(3, 30)
    X, Y, n = X + 3 * bias, Y + 20 * bias, len(X)
    path = ridge_path(Moments(WIDTH, bias=bias).update(X, Y), [ridge])
    Z = X - bias * X.mean(0)
    penalty = ridge * Z.square().sum() / WIDTH * torch.eye(WIDTH).double()
    hat = Z @ torch.linalg.solve(Z.T @ Z + penalty, Z.T) + bias / n  # plus the mean
    residual = (torch.eye(n).double() - hat) @ (Y - X)
    expected = (residual / (1 - hat.trace() / n)).square().sum() / n
    assert float(path.gcv[0]) == pytest.approx(float(expected))
    assert float(path.dof[0]) == pytest.approx(WIDTH * float(hat.trace()))


def test_gcv_of_an_interpolating_fit_is_infinite() -> None:
    path = ridge_path(moments(0, 5), [1e-12, 1.0])
    assert path.gcv.isinf().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"up to 1e-12 interpolates the 5 training tokens"):
        choose_ridge(moments(0, 5), [1e-13, 1e-12])


def test_one_decomposition_for_the_whole_path(decomposed: list[Tensor]) -> None:
    train = moments(0, 30)
    ridge_path(train, RIDGES, moments(1, 30))
    solve(train, relative_ridge=0.1)
    assert len(decomposed) == 1


@settings(max_examples=10)
@given(SEEDS)
def test_cross_validation_is_fitting_the_other_folds(seed: int) -> None:
    folds = [moments(seed + k, 6 + k) for k in range(4)]
    ridges = [1e-3, 0.1, 10.0]
    errors = cross_validate(folds, ridges)
    assert errors.shape == (4, 3)
    for index, fold in enumerate(folds):
        parts = [activations(seed + k, 6 + k) for k in range(4) if k != index]
        X, Y = (torch.cat(side) for side in zip(*parts, strict=True))
        others = Moments(WIDTH).update(X, Y)
        for k, ridge in enumerate(ridges):
            expected = fold.error(solve(others, relative_ridge=ridge))
            assert float(errors[index, k]) == pytest.approx(expected, rel=1e-6)


def test_three_ways_to_choose() -> None:
    train, held_out = moments(0, 30), moments(1, 200)
    path = ridge_path(train, RIDGES, held_out)
    assert path.held_out_error is not None
    assert choose_ridge(train) == pytest.approx(RIDGES[int(path.gcv.argmin())])
    best = RIDGES[int(path.held_out_error.argmin())]
    assert choose_ridge(train, held_out=held_out) == pytest.approx(best)
    folds = [moments(k, 10) for k in range(4)]
    best = RIDGES[int(cross_validate(folds).sum(0).argmin())]
    assert choose_ridge(folds) == pytest.approx(best)


def test_a_chosen_ridge_generalises_better_than_none() -> None:
    train, test = moments(0, 9, noise=4.0), moments(1, 500, noise=4.0)
    chosen = solve(train, relative_ridge=choose_ridge(train))
    assert test.error(chosen) < 0.8 * test.error(solve(train))


def test_ties_go_to_the_larger_ridge() -> None:
    X, _ = activations(0, 30)
    same = Moments(WIDTH).update(X, X)  # M = 0 whatever the ridge
    assert choose_ridge(same, [0.1, 10.0, 1.0], held_out=same) == 10.0


def test_the_grids_are_evenly_spaced_on_a_logarithmic_scale() -> None:
    np.testing.assert_allclose(RIDGES, np.logspace(-8, 2, 51))
    np.testing.assert_allclose(COARSE_RIDGES, np.logspace(-6, 1, 15))


def test_errors_of_an_exact_fit_are_zero_up_to_rounding_and_never_negative() -> None:
    for seed in range(10):  # rounding has either sign
        train, held_out = moments(seed, 30, noise=0.0), moments(seed + 99, 30, noise=0.0)
        path = ridge_path(train, [1e-13, 1e-12], held_out)
        for values in (path.train_error, path.held_out_error, path.gcv):
            assert values is not None and (values >= 0).all()
            assert (values < 1e-9 * train.t).all() and (values < 0.1).all()


def test_coordinate_descent_makes_no_unnecessary_fit(monkeypatch: Any) -> None:
    """It stops at the ends of the grid, and at the first ridge that is not better."""
    train, held_out = moments(0, 500, noise=0.0), moments(1, 500, noise=0.0)
    fitted = []

    def recorder(train: Moments, *, relative_ridge: list[float]) -> Any:
        fitted.append(relative_ridge[0])
        return least_squares(train, relative_ridge=relative_ridge)

    monkeypatch.setattr("ghostlib.operators.paths.least_squares", recorder)
    grid = [1e-4, 1e-2, 1.0, 100.0]
    assert choose_ridges(train, held_out, grid, start=1e-4) == (1e-4,)
    assert fitted == [1e-2, 1e-4]
    fitted.clear()
    assert choose_ridges(train, held_out, grid, start=1.0) == (1e-4,)
    assert fitted == [100.0, 1.0, 1e-2, 1e-4]


def test_a_generator_of_ridges_is_read_once() -> None:
    folds = [moments(k, 10) for k in range(3)]
    values = np.logspace(-3, 1, 5)
    assert cross_validate(folds, (r for r in values)).shape == (3, 5)
    assert choose_ridge(folds, (float(r) for r in values)) in values


def test_folds_and_held_out_moments_exclude_each_other() -> None:
    train = moments(0, 30)
    with pytest.raises(ValueError, match="not both"):
        choose_ridge([train, train], held_out=train)
