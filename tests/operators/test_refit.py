"""refit and ghost-refit: least squares on the input of the last down-projection."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostlib.linalg.gram import SingularGramWarning
from ghostlib.operators.families import FAMILIES
from ghostlib.operators.paths import COARSE_RIDGES, choose_ridges
from ghostlib.operators.solve import solve
from ghostlib.statistics.moments import Moments

C, INNER, TOKENS = 6, 15, 200


def activations(seed: int = 0, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Stream and MLP around a gap, related as in a model: f = h D, and Delta partly of both."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    h, D = randn(tokens, INNER), randn(INNER, C)
    f = h @ D
    X = randn(tokens, C) + 0.3 * f
    Delta = X @ randn(C, C) + torch.tanh(h) @ randn(INNER, C) + 0.1 * randn(tokens, C)
    return {"X": X, "Y": X + Delta, "h": h, "f": f}


def moments(spelling: str, data: dict[str, Tensor], *, bias: bool = False) -> Moments:
    empty = Moments(C, regressor=spelling, hidden=INNER, bias=bias)
    return empty.update(data["X"], data["Y"], hidden=data["h"], output=data["f"])


def design(name: str, data: dict[str, Tensor]) -> np.ndarray:
    features = {"refit": ["h"], "ghost-refit": ["X", "h"], "replaceme": ["f"], "ghost": ["X"]}
    return np.hstack([data[key].numpy() for key in features[name]])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["refit", "ghost-refit"])
def test_equals_lstsq_on_stored_activations(name: str, bias: bool) -> None:
    data = activations()
    F, Delta = design(name, data), (data["Y"] - data["X"]).numpy()
    if bias:
        F = np.hstack([F, np.ones((len(F), 1))])
    expected, *_ = np.linalg.lstsq(F, Delta, rcond=None)
    op = solve(moments(str(FAMILIES[name].regressor), data, bias=bias), name, rcond=1e-9)
    p = op.M.shape[0]
    np.testing.assert_allclose(op.M, expected[:p], rtol=1e-7, atol=1e-8)
    if bias:
        assert op.bias is not None
        np.testing.assert_allclose(op.bias, expected[p], rtol=1e-7, atol=1e-8)
    else:
        assert op.bias is None
    assert op.residual == pytest.approx(((F @ expected - Delta) ** 2).sum(), rel=1e-8)
    assert op.dof == p * C + bias * C


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_sets_are_nested(seed: int) -> None:
    data = activations(seed)
    errors: dict[tuple[float, ...], float] = {
        name: solve(moments(str(FAMILIES[name].regressor), data), name, rcond=1e-9).residual
        for name in ("replaceme", "refit", "ghost", "ghost-refit")
    }
    nothing = float((data["Y"] - data["X"]).square().sum())
    slack = 1e-9 * nothing
    assert errors["ghost-refit"] <= errors["refit"] + slack <= errors["replaceme"] + 2 * slack
    assert errors["ghost-refit"] <= errors["ghost"] + slack
    assert errors["replaceme"] <= nothing


def test_the_error_of_a_repair_is_that_on_stored_activations() -> None:
    train, held_out = activations(0), activations(1)
    op = solve(moments("x, h", train), "ghost-refit")
    repaired = op.apply(held_out["X"], hidden=held_out["h"])
    direct = float((repaired - held_out["Y"]).square().sum())
    assert moments("x, h", held_out).error(op) == pytest.approx(direct, rel=1e-9)


def test_weights_are_those_of_the_regressor() -> None:
    data = activations()
    norm = torch.linalg.vector_norm(data["Y"], dim=1).numpy()
    root = norm[:, None] ** -0.5
    F, Delta = design("ghost-refit", data), (data["Y"] - data["X"]).numpy()
    expected, *_ = np.linalg.lstsq(root * F, root * Delta, rcond=None)
    op = solve(moments("x, h; 1/|y|", data), "ghost-refit-relative", rcond=1e-9)
    np.testing.assert_allclose(op.M, expected, rtol=1e-6, atol=1e-8)


# --- ridges by feature ------------------------------------------------------------------------


def test_a_ridge_for_each_feature_is_the_penalised_problem() -> None:
    data = activations()
    stats = moments("x, h", data)
    ridges = (0.01, 0.3)
    F, Delta = design("ghost-refit", data), (data["Y"] - data["X"]).numpy()
    units = [np.sqrt((F[:, :C] ** 2).sum() / C), np.sqrt((F[:, C:] ** 2).sum() / INNER)]
    rows = np.repeat([units[k] * np.sqrt(ridges[k]) for k in (0, 1)], [C, INNER])
    augmented = np.vstack([F, np.diag(rows)])
    target = np.vstack([Delta, np.zeros((C + INNER, C))])
    expected, *_ = np.linalg.lstsq(augmented, target, rcond=None)
    op = solve(stats, "ghost-refit", relative_ridge=ridges)
    np.testing.assert_allclose(op.M, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="3 values for 2 features"):
        solve(stats, "ghost-refit", relative_ridge=(0.1, 0.2, 0.3))


def test_choose_ridges_returns_the_best_of_the_grid() -> None:
    train, held_out = (moments("x, h", activations(seed, tokens=40)) for seed in (0, 1))
    grid = COARSE_RIDGES[::2]
    chosen = choose_ridges(train, held_out, grid)
    errors: dict[tuple[float, ...], float] = {
        (a, b): held_out.error(solve(train, "ghost-refit", relative_ridge=(a, b)))
        for a in grid
        for b in grid
    }
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=0.02)
    neighbours = [
        errors[pair]
        for pair in errors
        if sum(abs(grid.index(x) - grid.index(y)) for x, y in zip(pair, chosen, strict=True)) == 1
    ]
    assert errors[chosen] <= min(neighbours)


def test_choose_ridges_refuses() -> None:
    train = moments("x, h", activations())
    with pytest.raises(ValueError, match="no ridge to try"):
        choose_ridges(train, train, [])
    with pytest.raises(ValueError, match="must be positive"):
        choose_ridges(train, train, [0.0])
    with pytest.raises(ValueError, match="must have one"):
        choose_ridges(train, moments("x", activations()))
    empty = Moments(C, regressor="x, h", hidden=INNER)
    for pair in ((train, empty), (empty, train)):
        with pytest.raises(ValueError, match="hold no tokens"):
            choose_ridges(*pair)


# --- the fold ---------------------------------------------------------------------------------


def test_a_matrix_that_cannot_be_folded_raises_the_ridge_with_a_warning() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(TOKENS, C, dtype=torch.float64, generator=generator)
    h = torch.randn(TOKENS, INNER, dtype=torch.float64, generator=generator)
    # The layers erase one channel: I + M is singular at the optimum.
    Y = X.clone()
    Y[:, 0] = 0
    stats = Moments(C, regressor="x, h", hidden=INNER).update(X, Y, hidden=h)
    with pytest.warns(SingularGramWarning, match="too close to singular to fold"):
        op = solve(stats, "ghost-refit", relative_ridge=1e-9)
    assert torch.linalg.cond(op.M[:C] + torch.eye(C)) < 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(stats, "ghost-refit", relative_ridge=1e-3)
    with pytest.raises(ValueError, match="no single W"):
        _ = op.W
