"""Least squares on several features against numpy on stored activations."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ghostlib as gl
from ghostlib.operators.families import FAMILIES, least_squares
from ghostlib.operators.paths import RIDGES
from ghostlib.operators.solve import solve
from ghostlib.statistics.features import STREAM, Regressor

pytestmark = pytest.mark.filterwarnings("error")

BRANCHED = [
    name
    for name, family in FAMILIES.items()
    if family.regressor != STREAM and not family.regressor.reads_mlp
]
ALL = [
    *sorted({str(FAMILIES[name].regressor) for name in BRANCHED}),
    *("x, z(x), z(prev); 1/|y|^2", "n(x)", "h", "x, h; 1/|y|", "f"),
]
SEEDS = st.integers(0, 10_000)
Streams = tuple[Tensor, Tensor, Tensor, Tensor]


def streams(seed: int = 0, tokens: int = 80, width: int = 6) -> Streams:
    """X with a massive token, Y that depends on X, n(X) and the previous token, and an MLP."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    hidden = randn(tokens, 4)
    output = hidden @ randn(4, width)
    X = randn(tokens, width) @ randn(width, width) + randn(width) + output
    X[0] *= 40
    n = X / X.square().mean(1, keepdim=True).sqrt()
    before = torch.cat([torch.zeros(1, width).double(), n[:-1]])
    Y = X + 0.3 * X @ randn(width, width) + n @ randn(width, width) + before @ randn(width, width)
    return X, Y + randn(tokens, width), hidden, output


def moments_of(regressor: str | Regressor, *parts: Streams) -> gl.Moments:
    moments = gl.Moments(parts[0][0].shape[1], regressor=regressor, hidden=4)
    for X, Y, hidden, output in parts:
        moments.update(X, Y, hidden=hidden, output=output)
    return moments


def by_hand(
    regressor: str, X: Tensor, Y: Tensor, hidden: Tensor, output: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, Delta and the root of the token weight, which scales the rows of both."""
    names, _, weight = regressor.partition("; ")
    x = X.numpy()
    n = x / np.sqrt((x**2).mean(1, keepdims=True))
    centred = x - x.mean(1, keepdims=True)
    z = centred / centred.std(1, keepdims=True)
    blocks = {"x": x, "n(x)": n, "z(x)": z, "h": hidden.numpy(), "f": output.numpy()}
    for letter, now in (("n", n), ("z", z)):
        blocks[f"{letter}(prev)"] = np.vstack([np.zeros_like(now[:1]), now[:-1]])
    F = np.hstack([blocks[name] for name in names.split(", ")])
    norm = np.linalg.norm(Y.numpy(), axis=1, keepdims=True)
    root = np.sqrt({"": norm**0, "1/|y|": norm**-1, "1/|y|^2": norm**-2}[weight])
    return root * F, root * (Y - X).numpy(), root


@pytest.mark.parametrize("regressor", ALL)
def test_the_fit_is_that_of_lstsq_on_stored_activations(regressor: str) -> None:
    parts = [streams(seed) for seed in range(2)]
    F, D, _ = (
        np.vstack(side) for side in zip(*(by_hand(regressor, *p) for p in parts), strict=True)
    )
    moments = moments_of(regressor, *parts)
    torch.testing.assert_close(moments.G, torch.from_numpy(F.T @ F))
    M = np.linalg.lstsq(F, D, rcond=None)[0]
    fit = least_squares(moments)
    assert fit.inverse is not None and fit.inverse.rank == len(M) - regressor.count("z(")
    torch.testing.assert_close(fit.M, torch.from_numpy(M), rtol=1e-6, atol=1e-7)
    assert moments.error(fit) == pytest.approx(float(((F @ M - D) ** 2).sum()), rel=1e-9)
    assert moments.pruned_error == pytest.approx(float((D**2).sum()))
    share = moments.error(fit) / moments.pruned_error
    assert moments.relative_error(fit) == pytest.approx(share)
    assert moments.relative_error(fit._replace(M=0 * fit.M)) == pytest.approx(1.0)


@pytest.mark.parametrize("regressor", ["x, n(x)", "x, n(x), n(prev); 1/|y|", "x, h; 1/|y|^2"])
def test_bias_and_rank_and_ridge_by_their_own_references(regressor: str) -> None:
    part = streams(3)
    moments, (F, D, root) = moments_of(regressor, part), by_hand(regressor, *part)
    # a bias is a column of ones, scaled as the rows are
    solved = np.linalg.lstsq(np.hstack([F, root]), D, rcond=None)[0]
    fit = least_squares(moments, bias=True)
    assert fit.bias is not None
    torch.testing.assert_close(fit.M, torch.from_numpy(solved[:-1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.bias, torch.from_numpy(solved[-1]), rtol=1e-6, atol=1e-6)
    # a ridge is rows of penalty, in the units of each feature: one for all, or one for each
    widths = Regressor.parse(regressor).widths(6, 4)
    starts = np.cumsum((0, *widths[:-1]))
    means = np.add.reduceat((F**2).sum(0), starts) / widths
    for ridges in ([0.3] * len(widths), [0.01, 3.0, 0.2][: len(widths)]):
        rows = np.diag(np.sqrt(np.repeat(ridges * means, widths)))
        penalised = np.vstack([F, rows]), np.vstack([D, 0 * rows[:, :6]])
        M = np.linalg.lstsq(*penalised, rcond=None)[0]
        each = least_squares(moments, relative_ridge=ridges).M
        torch.testing.assert_close(each, torch.from_numpy(M), rtol=1e-7, atol=1e-8)
        if len(set(ridges)) == 1:
            assert torch.equal(least_squares(moments, relative_ridge=ridges[0]).M, each)
    # reduced rank: the fitted values' own truncated SVD
    full = np.linalg.lstsq(F, D, rcond=None)[0]
    _, _, Vh = np.linalg.svd(F @ full)
    for r in (1, 4, 6):
        low = least_squares(moments, rank=r)
        expected = torch.from_numpy(full @ Vh[:r].T @ Vh[:r])
        torch.testing.assert_close(low.M, expected, rtol=1e-5, atol=1e-6)


def test_the_operator_is_the_fit_with_its_dof() -> None:
    part = streams(1)
    for options, dof in (
        ({}, 12 * 6),
        ({"bias": True}, 12 * 6 + 6),
        ({"rank": 4}, 4 * (12 + 6 - 4)),
        ({"rank": 4, "bias": True}, 4 * (12 + 6 - 4) + 6),
    ):
        moments = moments_of("x, n(x)", part)
        fit, op = least_squares(moments, **options), solve(moments, "two-branch", **options)
        assert torch.equal(op.M, fit.M) and op.dof == dof and op.rank == 12
        assert (op.bias is None) == (fit.bias is None) == ("bias" not in options)
        missed = float((op.apply(part[0]) - part[1]).square().sum())
        assert op.residual == moments.error(op) == pytest.approx(missed)
    for name in ("branches", FAMILIES["branches"], "x, n(x)"):
        same = solve(moments, name)
        assert same.name == "branches" and same.regressor == moments.regressor


@pytest.mark.parametrize("name", ["ghost-relative", "three-branch-relative"])
def test_ridge_and_rank_are_chosen_on_held_out_moments(name: str) -> None:
    regressor = FAMILIES[name].regressor
    train, held_out = (
        moments_of(regressor, *(streams(seed) for seed in seeds)) for seeds in ([0, 1], [2, 3])
    )
    ridges = (1e-4, 1e-2, 1.0)
    path = gl.ridge_path(train, ridges, held_out)
    assert path.held_out_error is not None
    for ridge, fitted, error in zip(ridges, path.train_error, path.held_out_error, strict=True):
        op = solve(train, name, relative_ridge=ridge)
        assert op.residual == pytest.approx(float(fitted), rel=1e-9)
        assert held_out.error(op) == pytest.approx(float(error), rel=1e-9)
    best = gl.choose_ridge(train, ridges, held_out=held_out)
    assert best == ridges[int(path.held_out_error.argmin())]
    ranks = gl.rank_path(train, held_out, relative_ridge=1e-2)
    for rank in (1, 3, 6):
        op = solve(train, name, rank=rank, relative_ridge=1e-2)
        assert op.residual == pytest.approx(float(ranks.train_error[rank - 1]), rel=1e-9)
        assert held_out.error(op) == pytest.approx(float(ranks.held_out_error[rank - 1]), rel=1e-9)
    for other in ("n(x)", "x"):
        with pytest.raises(ValueError, match=r"must have one (blocks|regressor), got"):
            gl.ridge_path(train, ridges, moments_of(other, streams()))


@pytest.mark.thorough
@settings(max_examples=15)
@given(SEEDS, st.sampled_from(BRANCHED), st.floats(-3, 3))
def test_no_choice_of_a_ridge_depends_on_scale_basis_or_order(
    seed: int, name: str, exponent: float
) -> None:
    """Held-out errors along the path, relative to no repair, and the ridge chosen from them."""
    regressor = FAMILIES[name].regressor
    pairs = [[streams(seed + k, tokens=40)[:2] for k in part] for part in ((0, 1, 2), (3, 4))]
    R = 10**exponent * torch.linalg.qr(pairs[0][0][0][:6]).Q
    rotated = [[(X @ R, Y @ R) for X, Y in reversed(part)] for part in pairs]
    if not regressor.reads_previous:
        rotated = [[(X.flip(0), Y.flip(0)) for X, Y in part] for part in rotated]
    chosen, paths = [], []
    for parts in (pairs, rotated):
        train, held_out = (gl.Moments(6, regressor=regressor) for _ in parts)
        for moments, part in zip((train, held_out), parts, strict=True):
            for X, Y in part:
                moments.update(X, Y)
        path = gl.ridge_path(train, held_out=held_out)
        assert path.held_out_error is not None
        paths.append(path.held_out_error / held_out.pruned_error)
        chosen.append(RIDGES.index(gl.choose_ridge(train, held_out=held_out)))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-6, atol=1e-9)
    assert paths[0][chosen[1]] == pytest.approx(float(paths[0][chosen[0]]), rel=1e-6)


# --- invalid input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must lie between 1 and the width 6, got 0"),
        ({"rank": 7}, "got 7"),
        ({"relative_ridge": 0.0}, "positive and finite"),
        ({"relative_ridge": [1.0, 1.0, 1.0]}, "3 values for 2 features"),
        ({"rcond": 1e-3, "relative_ridge": 1.0}, "choose one"),
        ({"around": "zero"}, "two-branch has no option 'around': it takes rcond, ridge, relative_"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(moments_of("x, n(x)", streams()), "two-branch", **options)


@pytest.mark.parametrize(
    ("name", "regressor", "message"),
    [
        ("two-branch", "x", r"two-branch is solved from moments of x, n\(x\), these are of x: cal"),
        (
            "ghost",
            "x, n(x)",
            r"ghost is .* of x, these are of x, n\(x\): calibrate\(…, regressors=",
        ),
        ("ghost", "x; 1/|y|", r"these are of x; 1/\|y\|: .*\['x'\]\)\.of\('x'\)"),
        ("two-branch", "n(x), x", r"these are of n\(x\), x"),
        ("three-branch", "x, n(x)", "three-branch is solved from"),
        ("replaceme", "x", "replaceme is solved from moments of f, these are of x"),
        ("ghost", "f", "ghost is solved from moments of x, these are of f"),
        ("branches", "x", "branches is solved from"),
        ("branches", "x, h", "branches is solved from"),
    ],
)
def test_a_family_is_solved_from_its_own_moments(name: str, regressor: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(moments_of(regressor, streams()), name)


def test_a_family_is_solved_for_either_norm() -> None:
    moments = moments_of("x, z(x)", streams())
    op, same = solve(moments, "two-branch"), solve(moments, "x, n(x)")
    assert str(op.regressor) == "x, z(x)"
    torch.testing.assert_close(op.apply(streams()[0]), same.apply(streams()[0]))


def test_too_few_tokens_are_reported() -> None:
    with pytest.warns(gl.SingularGramWarning, match="9 tokens determine 9 of 12 directions"):
        solve(moments_of("x, n(x)", streams(tokens=9)), "two-branch")
    with pytest.warns(gl.SingularGramWarning, match="9 tokens determine 9 of 11 directions"):
        solve(moments_of("x, z(x)", streams(tokens=9)), "two-branch")
    solve(moments_of("x, n(x)", streams(tokens=9)), "two-branch", relative_ridge=1e-3)


def test_a_spelt_regressor_is_solved_from_its_own_moments_only() -> None:
    moments = moments_of("x, n(x)", streams())
    assert solve(moments, "branches", relative_ridge=(1e-3, 0.1)).M.shape == (12, 6)
    with pytest.raises(ValueError, match=r"solved from moments of x; 1/\|y\|, these are of x, n"):
        solve(moments, "x; 1/|y|")
    assert solve(moments_of("x, z(x)", streams()), "x, z(x)").M.shape == (12, 6)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple])
def test_ridges_may_be_any_list(kind: Any) -> None:
    moments = moments_of("x, n(x)", streams())
    expected = solve(moments, "two-branch", relative_ridge=[0.25, 0.5]).M
    M = solve(moments, "two-branch", relative_ridge=kind([0.25, 0.5])).M
    torch.testing.assert_close(M, expected)


def test_options_of_none_leave_the_default_of_the_family() -> None:
    moments = moments_of("h", streams())
    default = solve(moments, "refit").M
    assert torch.equal(solve(moments, "refit", relative_ridge=None, ridge=None).M, default)
    assert not torch.equal(solve(moments, "refit", rcond=1e-6, ridge=None).M, default)
