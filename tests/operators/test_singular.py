"""Degenerate inputs, where an operator is not unique, and invalid inputs."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostlib.linalg.gram import SingularGramWarning
from ghostlib.linalg.hadamard import hadamard
from ghostlib.operators.families import FAMILIES, Family
from ghostlib.operators.solve import Operator, check_options, solve, solve_quietly
from ghostlib.statistics.features import STREAM
from ghostlib.statistics.moments import Moments

# A warning without reason is an error in this file.
pytestmark = pytest.mark.filterwarnings("error")

WIDTH = 8
EYE = torch.eye(WIDTH, dtype=torch.float64)
FULL = ["symmetric", "low-rank", "ghost", "affine"]
EVERY = [name for name, family in FAMILIES.items() if family.regressor == STREAM]
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def moments(X: Tensor, Y: Tensor) -> Moments:
    return Moments(X.shape[1]).update(X, Y)


def plain(tokens: int = 50, width: int = WIDTH) -> Moments:
    """Moments of random tokens, many or too few."""
    return moments(randn(tokens, width), randn(tokens, width, seed=1))


def options(name: str) -> dict[str, int]:
    return {"rank": 3} if name == "low-rank" else {}


def warned(stats: Moments, name: str, **more: Any) -> tuple[Operator, list[str]]:
    """The operator and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        op = solve(stats, name, **options(name), **more)
    assert all(w.category is SingularGramWarning for w in caught)
    assert all(w.filename == __file__ for w in caught), "the warning must point at the caller"
    return op, [str(w.message) for w in caught]


def quietly(stats: Moments, name: str, **more: Any) -> Operator:
    return solve_quietly(stats, name, **options(name), **more)


# --- too few tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_no_tokens(name: str) -> None:
    with pytest.raises(ValueError, match="hold no tokens: call update"):
        solve(Moments(WIDTH), name, **options(name))
    X, Y = randn(5, WIDTH), randn(5, WIDTH, seed=1)
    with pytest.raises(ValueError, match="hold no tokens"):
        solve(Moments(WIDTH).update(X, Y, torch.zeros(5)), name, **options(name))


@pytest.mark.parametrize("name", FULL)
def test_one_token_is_fitted_and_other_directions_stay_unchanged(name: str) -> None:
    X, Y = randn(1, WIDTH), randn(1, WIDTH, seed=1)
    op = quietly(moments(X, Y), name)
    torch.testing.assert_close(op.apply(X), Y)
    assert op.rank == (0 if name == "affine" else 1) and op.condition == INF
    across = randn(1, WIDTH, seed=2)
    across -= X * (across @ X.T) / (X @ X.T)
    if name == "affine":  # a shift explains one token
        torch.testing.assert_close(op.W, EYE)
    elif name != "symmetric":  # whose other half turns the plane of X and Y
        torch.testing.assert_close(op.apply(across), across)


@pytest.mark.parametrize("name", EVERY)
def test_one_token_gives_finite_operators(name: str) -> None:
    op = quietly(plain(tokens=1), name)
    assert torch.isfinite(op.W).all() and math.isfinite(op.residual)
    assert float(op.W.abs().max()) < 100


@pytest.mark.parametrize("tokens", [1, 5, WIDTH - 1])
@pytest.mark.parametrize("name", FULL)
def test_fewer_tokens_than_channels_warn_with_the_numbers(name: str, tokens: int) -> None:
    stats = plain(tokens)
    rank = tokens - (name == "affine")
    op, (message,) = warned(stats, name)
    assert message == (
        f"{name}: {tokens} tokens determine {rank} of 8 directions (condition number inf), so the "
        "fit is not unique and need not generalise: calibrate on at least 80 tokens, or pass "
        "relative_ridge=1e-3 (choose_ridge finds a value)"
    )
    assert op.rank == rank and op.residual <= stats.error(EYE)


@pytest.mark.parametrize("name", FULL)
def test_an_effective_ridge_makes_up_for_missing_tokens(name: str) -> None:
    for inverse in ({"relative_ridge": 1e-3}, {"relative_ridge": 1e-6}, {"ridge": 1.0}):
        assert not warned(plain(5), name, **inverse)[1]
    for inverse in ({"relative_ridge": 1e-8}, {"ridge": 1e-9}, {"rcond": 1e-9}):
        assert len(warned(plain(5), name, **inverse)[1]) == 1


@pytest.mark.parametrize("tokens", [1, 5, 50])
@pytest.mark.parametrize("name", [name for name in EVERY if name not in FULL])
def test_families_of_few_parameters_do_not_warn(name: str, tokens: int) -> None:
    assert not warned(plain(tokens), name)[1]


@pytest.mark.parametrize("name", FULL)
def test_enough_tokens_do_not_warn(name: str) -> None:
    """As many as channels suffice, but not for a bias."""
    op, messages = warned(plain(WIDTH + (name == "affine")), name)
    assert op.rank == WIDTH and not messages
    if name == "affine":
        assert "8 tokens determine 7 of 8" in warned(plain(WIDTH), name)[1][0]


# --- degenerate activations ---------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_zero_channel_stays_unchanged(name: str) -> None:
    X, Y = randn(50, WIDTH), randn(50, WIDTH, seed=1)
    X[:, 3] = 0.0
    op = quietly(moments(X, Y), name)
    assert torch.isfinite(op.W).all()
    if name in ("diagonal", "linearpatch-d", "low-rank", "ghost", "affine"):
        torch.testing.assert_close(op.W[3], EYE[3])
    if name == "diagonal" or name in FULL:
        assert op.rank == WIDTH - 1 and op.condition == INF
    if name == "magnitude":  # where its ratio is 1
        ratios = Y.abs().mean(0) / X.abs().mean(0)
        ratios[3] = 1.0
        torch.testing.assert_close(op.W, ratios.mean() * EYE)


@pytest.mark.parametrize("name", FULL)
def test_collinear_channels_are_fitted_as_well_as_any_solution(name: str) -> None:
    X, Y = randn(50, WIDTH), randn(50, WIDTH, seed=1)
    X[:, 5] = 2 * X[:, 1] - X[:, 2]
    op, (message,) = warned(moments(X, Y), name)
    assert "50 tokens determine 7 of 8" in message
    assert op.rank == WIDTH - 1 and op.condition == INF
    if name == "ghost":
        best = torch.linalg.lstsq(X, Y, driver="gelsd").solution
        assert op.residual == pytest.approx(float((X @ best - Y).square().sum()))
        unseen = EYE - torch.linalg.pinv(X) @ X
        torch.testing.assert_close(unseen @ op.W, unseen)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize(
    "inverse", [{"rcond": 1e-12}, {"rcond": 1e-6}, {"ridge": 1e-12}, {"relative_ridge": 1e-9}]
)
def test_rounding_is_never_inverted(name: str, inverse: dict[str, float]) -> None:
    """The eigenvalue of a null direction is about 1e-16, not 0."""
    X = randn(50, 3) @ randn(3, WIDTH, seed=2) * 1e3
    op = quietly(moments(X, randn(50, WIDTH, seed=1)), name, **inverse)
    assert op.rank == 3
    assert float(op.M.abs().max()) < 10


@pytest.mark.parametrize("name", ["hadamard-diagonal", "linearpatch-r"])
def test_a_zero_channel_of_the_rotated_stream_stays_unchanged(name: str) -> None:
    H = hadamard(WIDTH)
    for seed in range(5):
        X = randn(50, 3, seed=seed) @ H[:, :3].T
        op = solve(moments(X, X + randn(50, WIDTH, seed=seed + 9)), name)
        torch.testing.assert_close((H.T @ op.W @ H).diagonal()[3:], EYE.diagonal()[3:])
        assert op.rank == (3 if name == "hadamard-diagonal" else 0)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_to_recover_gives_the_identity(name: str) -> None:
    X = randn(50, WIDTH)
    stats = moments(X, X)
    op, messages = warned(stats, name)
    torch.testing.assert_close(op.W, EYE)
    assert op.residual < 1e-12 * stats.t and not messages
    if op.bias is not None:
        assert float(op.bias.abs().max()) < 1e-12


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("inverse", [{}, {"ridge": 1e-6}, {"relative_ridge": 1.0}])
def test_a_zero_stream_gives_the_identity(name: str, inverse: dict[str, float]) -> None:
    zero = torch.zeros(5, WIDTH, dtype=torch.float64)
    op = quietly(moments(zero, zero), name, **(inverse if name in FULL else {}))
    torch.testing.assert_close(op.W, EYE)
    assert op.residual == 0.0


def test_rotations_leave_directions_without_data_unchanged() -> None:
    basis = torch.linalg.qr(randn(WIDTH, WIDTH)).Q
    seen, unseen = basis[:, :3].T, basis[:, 3:].T
    stats = moments(randn(50, 3) @ seen, randn(50, 3, seed=1) @ seen)
    W = solve(stats, "orthogonal").W
    torch.testing.assert_close(W.T @ W, EYE)
    torch.testing.assert_close(unseen @ W, unseen)
    scaled = solve(stats, "scaled-orthogonal").W
    scale = scaled.norm() / WIDTH**0.5
    torch.testing.assert_close(scaled, scale * W)


@pytest.mark.parametrize("part", [3, 7, 13, 19])
def test_the_bias_explains_a_large_constant_channel(part: int) -> None:
    """A massive activation: centring cancels it, and its rounding error must not be inverted."""
    X, Y = randn(200, WIDTH), randn(200, WIDTH, seed=1)
    X[:, 2] = 1e6 / part
    op = quietly(moments(X, Y), "affine")
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
    op = quietly(moments(X, X + Delta), name, rcond=0.1)
    assert op.rank == 4
    torch.testing.assert_close(op.W, quietly(moments(kept, kept + Delta), name).W)


def test_low_rank_of_a_singular_problem_reaches_the_optimum() -> None:
    X = randn(50, 3) @ randn(3, WIDTH, seed=2)
    stats = moments(X, randn(50, WIDTH, seed=1))
    low, messages = warned(stats, "low-rank")
    assert len(messages) == 1
    torch.testing.assert_close(low.W, quietly(stats, "ghost").W)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_unknown_options_are_refused_with_a_list_of_options(family: Family) -> None:
    known = ", ".join(family.options) or "none"
    with pytest.raises(ValueError, match=f"^{family} has no option 'rdige': it takes {known}$"):
        check_options(family, options(family.name) | {"rdige": 1})


@pytest.mark.parametrize("name", ["linearpatch-r", "hadamard-diagonal"])
def test_a_width_without_a_hadamard_matrix(name: str) -> None:
    with pytest.raises(ValueError, match=r"no Hadamard matrix for width 6: .* are 4 and 8"):
        solve(plain(width=6), name)


# --- invalid moments ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("sums", ["G", "cross"])
def test_moments_in_float32_are_refused(name: str, sums: str) -> None:
    stats = plain()
    setattr(stats, sums, getattr(stats, sums).float())
    with pytest.raises(ValueError, match=r"must be float64, got G in torch.float"):
        solve(stats, name, **options(name))


@pytest.mark.parametrize("name", EVERY)
def test_a_gram_matrix_that_is_not_symmetric_is_refused(name: str) -> None:
    stats = plain()
    stats.G = stats.G + torch.triu(torch.ones_like(stats.G), 1)
    with pytest.raises(ValueError, match=r"symmetric Gram matrix, got max\|G - G'\| = 1:"):
        solve(stats, name, **options(name))
