"""Inputs that leave an operator undetermined, and inputs that are refused: what happens in each."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostlib.linalg.gram import SingularGramWarning
from ghostlib.operators.families import FAMILIES as OPERATORS
from ghostlib.operators.families import REGRESSORS, Operator, solve
from ghostlib.statistics.moments import Moments

WIDTH = 8
EYE = torch.eye(WIDTH, dtype=torch.float64)
FULL = ["symmetric", "low-rank", "ghost", "affine"]
EVERY = [name for name in OPERATORS if name not in REGRESSORS]
NAN, INF = float("nan"), float("inf")


def options(name: str) -> dict[str, int]:
    return {"rank": 3} if name == "low-rank" else {}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def moments(X: Tensor, Y: Tensor) -> Moments:
    return Moments(X.shape[1], Y.shape[1]).update(X, Y)


def quiet(found: Moments, name: str, **more: float) -> Operator:
    """Solve without the warning, which has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularGramWarning)
        return solve(found, name, **options(name), **more)


# --- too few tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_no_tokens(name: str) -> None:
    with pytest.raises(ValueError, match="hold no tokens: call update"):
        solve(Moments(WIDTH), name, **options(name))
    unseen = Moments(WIDTH).update(randn(5, WIDTH), randn(5, WIDTH), torch.zeros(5))
    with pytest.raises(ValueError, match="hold no tokens"):
        solve(unseen, name, **options(name))


@pytest.mark.parametrize("name", FULL)
def test_one_token_is_fitted_and_everything_else_left_alone(name: str) -> None:
    X, Y = randn(1, WIDTH), randn(1, WIDTH, seed=1)
    op = quiet(moments(X, Y), name)
    torch.testing.assert_close(op.apply(X), Y)
    assert op.rank == (0 if name == "affine" else 1) and op.condition == INF
    across = randn(1, WIDTH, seed=2)
    across -= X * (across @ X.T) / (X @ X.T)
    if name == "affine":  # a shift explains one token
        torch.testing.assert_close(op.W, EYE)
    elif name != "symmetric":  # whose other half turns the plane of X and Y
        torch.testing.assert_close(op.apply(across), across)


@pytest.mark.parametrize("name", EVERY)
def test_one_token_gives_finite_operators_everywhere(name: str) -> None:
    op = quiet(moments(randn(1, WIDTH), randn(1, WIDTH, seed=1)), name)
    assert torch.isfinite(op.W).all() and math.isfinite(op.residual)


@pytest.mark.parametrize("name", FULL)
def test_fewer_tokens_than_channels_warn_with_the_numbers(name: str) -> None:
    found = moments(randn(5, WIDTH), randn(5, WIDTH, seed=1))
    rank = 4 if name == "affine" else 5
    message = rf"{name}: 5 tokens determine {rank} of 8 .* inf.*at least 80 tokens.*relative_ridge"
    with pytest.warns(SingularGramWarning, match=message) as caught:
        op = solve(found, name, **options(name))
    assert caught[0].filename == __file__, "the warning must point at the caller"
    assert op.rank == rank and op.residual <= found.error(EYE)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in FULL])
def test_families_of_few_parameters_do_not_warn(name: str) -> None:
    solve(moments(randn(5, WIDTH), randn(5, WIDTH, seed=1)), name)


def test_as_many_tokens_as_channels_suffice_but_not_for_a_bias() -> None:
    found = moments(randn(WIDTH, WIDTH), randn(WIDTH, WIDTH, seed=1))
    assert solve(found).rank == WIDTH
    with pytest.warns(SingularGramWarning, match="8 tokens determine 7 of 8"):
        solve(found, "affine")


# --- degenerate activations -------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_channel_that_is_always_zero_stays_as_it_is(name: str) -> None:
    X, Y = randn(50, WIDTH), randn(50, WIDTH, seed=1)
    X[:, 3] = 0.0
    op = quiet(moments(X, Y), name)
    assert torch.isfinite(op.W).all()
    if name in ("diagonal", "linearpatch-d", "low-rank", "ghost", "affine"):
        torch.testing.assert_close(op.W[3], EYE[3])
    if name in FULL:
        assert op.rank == WIDTH - 1 and op.condition == INF
    if name == "diagonal":
        assert op.rank == WIDTH - 1 and op.condition == INF


@pytest.mark.parametrize("name", FULL)
def test_collinear_channels_are_fitted_as_well_as_any_solution(name: str) -> None:
    X, Y = randn(50, WIDTH), randn(50, WIDTH, seed=1)
    X[:, 5] = 2 * X[:, 1] - X[:, 2]
    with pytest.warns(SingularGramWarning, match="50 tokens determine 7 of 8"):
        op = solve(moments(X, Y), name, **options(name))
    assert op.rank == WIDTH - 1 and op.condition == INF
    if name == "ghost":
        best = torch.linalg.lstsq(X, Y, driver="gelsd").solution
        assert op.residual == pytest.approx(float((X @ best - Y).square().sum()))
        never = EYE - torch.linalg.pinv(X) @ X
        torch.testing.assert_close(never @ op.W, never)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("how", [{"rcond": 1e-12}, {"rcond": 1e-6}, {"ridge": 1e-12}])
def test_rounding_is_never_inverted(name: str, how: dict[str, float]) -> None:
    """A null direction has an eigenvalue of about 1e-16, not 0, which nothing may divide by."""
    X = randn(50, 3) @ randn(3, WIDTH, seed=2) * 1e3
    op = quiet(moments(X, randn(50, WIDTH, seed=1)), name, **how)
    assert op.rank == 3
    assert float(op.M.abs().max()) < 10


@pytest.mark.parametrize("name", EVERY)
def test_nothing_to_recover_gives_the_identity(name: str) -> None:
    X = randn(50, WIDTH)
    found = moments(X, X)
    op = solve(found, name, **options(name))
    torch.testing.assert_close(op.W, EYE)
    assert op.residual < 1e-12 * found.t
    if op.bias is not None:
        assert float(op.bias.abs().max()) < 1e-12


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", [{}, {"ridge": 1e-6}, {"relative_ridge": 1.0}])
def test_a_silent_stream_gives_the_identity(name: str, how: dict[str, float]) -> None:
    zero = torch.zeros(5, WIDTH, dtype=torch.float64)
    op = quiet(moments(zero, zero), name, **(how if name in FULL else {}))
    torch.testing.assert_close(op.W, EYE)
    assert op.residual == 0.0


def test_rotations_leave_unseen_directions_alone() -> None:
    basis = torch.linalg.qr(randn(WIDTH, WIDTH)).Q
    seen, unseen = basis[:, :3].T, basis[:, 3:].T
    found = moments(randn(50, 3) @ seen, randn(50, 3, seed=1) @ seen)
    W = solve(found, "orthogonal").W
    torch.testing.assert_close(W.T @ W, EYE)
    torch.testing.assert_close(unseen @ W, unseen)
    scaled = solve(found, "scaled-orthogonal").W
    scale = scaled.norm() / WIDTH**0.5
    torch.testing.assert_close(scaled, scale * W)


@pytest.mark.parametrize("part", [3, 7, 13, 19])
def test_a_large_constant_channel_is_the_business_of_the_bias(part: int) -> None:
    """A massive activation: centring cancels it, and its rounding must not be inverted."""
    X, Y = randn(200, WIDTH), randn(200, WIDTH, seed=1)
    X[:, 2] = 1e6 / part
    op = quiet(moments(X, Y), "affine")
    assert op.rank == WIDTH - 1 and float(op.M.abs().max()) < 10
    torch.testing.assert_close(op.W[2], EYE[2])
    centred = torch.cat([X[:, :2], X[:, 3:], torch.ones(200, 1)], 1)
    best = torch.linalg.lstsq(centred, Y).solution
    expected = float((centred @ best - Y).square().sum())
    assert float((op.apply(X) - Y).square().sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["symmetric", "low-rank", "ghost"])
def test_rcond_truncates_the_activations(name: str) -> None:
    """Dropping singular values is fitting ``Delta`` to the truncated SVD of ``X``."""
    U, _, Vh = torch.linalg.svd(randn(50, WIDTH), full_matrices=False)
    X = U * 2.0 ** -torch.arange(WIDTH) @ Vh
    kept = U[:, :4] * 2.0 ** -torch.arange(4) @ Vh[:4]
    Delta = randn(50, WIDTH, seed=1)
    op = quiet(moments(X, X + Delta), name, rcond=0.1)
    assert op.rank == 4
    torch.testing.assert_close(op.W, quiet(moments(kept, kept + Delta), name).W)


def test_low_rank_of_a_singular_problem_reaches_the_optimum() -> None:
    X = randn(50, 3) @ randn(3, WIDTH, seed=2)
    found = moments(X, randn(50, WIDTH, seed=1))
    best = quiet(found, "ghost")
    with pytest.warns(SingularGramWarning):
        low = solve(found, "low-rank", rank=3)
    torch.testing.assert_close(low.W, best.W)


# --- options out of range ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("kind", ["ridge", "relative_ridge"])
@pytest.mark.parametrize("value", [0.0, -1e-6, NAN, INF])
def test_a_ridge_must_be_positive_and_finite(name: str, kind: str, value: float) -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    with pytest.raises(ValueError, match=r"positive and finite, got .*; for none use rcond"):
        solve(found, name, **options(name), **{kind: value})


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("rcond", [0.0, 1.0, -1e-6, 2.0, NAN])
def test_rcond_is_a_fraction(name: str, rcond: float) -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    with pytest.raises(ValueError, match="rcond must lie between 0 and 1"):
        solve(found, name, **options(name), rcond=rcond)


@pytest.mark.parametrize(
    "how", [{"rcond": 1e-6, "ridge": 1.0}, {"ridge": 1.0, "relative_ridge": 1.0}]
)
def test_one_regularisation_at_a_time(how: dict[str, Any]) -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    with pytest.raises(ValueError, match="choose one of rcond, ridge and relative_ridge, got"):
        solve(found, **how)


@pytest.mark.parametrize("rank", [0, -1, WIDTH + 1])
def test_rank_lies_within_the_width(rank: int) -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    with pytest.raises(ValueError, match=rf"between 1 and the width 8, got {rank}"):
        solve(found, "low-rank", rank=rank)


def test_rank_is_required_and_whole() -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    with pytest.raises(ValueError, match="low-rank needs rank="):
        solve(found, "low-rank")
    with pytest.raises(TypeError, match="integer"):
        solve(found, "low-rank", rank=2.5)


def test_unknown_names_and_options() -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    with pytest.raises(ValueError, match="unknown operator 'gost'; did you mean 'ghost'"):
        solve(found, "gost")
    with pytest.raises(TypeError, match="rdige"):
        solve(found, "ghost", rdige=1.0)
    with pytest.raises(ValueError, match="'identity' or 'zero', got 'one'"):
        solve(found, "ghost", around="one")


@pytest.mark.parametrize("name", ["linearpatch-r", "hadamard-diagonal"])
def test_a_width_without_a_hadamard_matrix(name: str) -> None:
    found = moments(randn(50, 6), randn(50, 6, seed=1))
    with pytest.raises(ValueError, match=r"no Hadamard matrix for width 6: .* are 4 and 8"):
        solve(found, name)


# --- moments that were tampered with ----------------------------------------------------------


@pytest.mark.parametrize("name", ["identity", "diagonal", "ghost"])
def test_moments_in_float32_are_refused(name: str) -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    found.G = found.G.float()
    with pytest.raises(ValueError, match=r"must be float64, got G in torch.float32"):
        solve(found, name)


def test_a_gram_matrix_that_is_not_symmetric_is_refused() -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    found.G = found.G + torch.triu(torch.ones_like(found.G), 1)
    with pytest.raises(ValueError, match=r"symmetric Gram matrix, got max\|G - G'\| = 1\b"):
        solve(found)


@pytest.mark.parametrize("name", ["G", "B"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_sums_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    found = moments(randn(50, WIDTH), randn(50, WIDTH, seed=1))
    spoiled = getattr(found, name).clone()
    spoiled[2, 2] = bad
    setattr(found, name, spoiled)
    with pytest.raises(ValueError, match="must be finite"):
        solve(found)
