"""Every operator family against an independent reference that sees the activations themselves."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostlib.linalg.hadamard import hadamard
from ghostlib.operators.families import (
    FAMILIES as OPERATORS,
)
from ghostlib.operators.families import (
    REGRESSORS,
    Operator,
    antisymmetric_share,
    solve,
)
from ghostlib.statistics.moments import Moments

WIDTH = 8
NAMES = [
    *("identity", "scalar", "diagonal", "linearpatch-d", "linearpatch-r", "hadamard-diagonal"),
    *("orthogonal", "scaled-orthogonal", "symmetric", "low-rank", "ghost", "affine"),
]
SEEDS = st.integers(0, 10_000)


def options(name: str) -> dict[str, int]:
    return {"rank": 3} if name == "low-rank" else {}


def activations(seed: int = 0, tokens: int = 60, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Correlated X with a mean, and Y = X + (linear part) + noise + shift."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    X = randn(tokens, width) @ randn(width, width) + 0.5 * randn(width)
    Y = X + 0.5 * X @ randn(width, width) + 2 * randn(tokens, width) + randn(width)
    return X, Y


def squared(X: Tensor, W: Tensor, Y: Tensor) -> float:
    return float((X @ W - Y).square().sum())


def fit_in_span(X: Tensor, Y: Tensor, basis: list[Tensor]) -> Tensor:
    """Least squares over ``sum_k a_k basis[k]``, from stacked activations."""
    columns = np.stack([(X @ E).numpy().ravel() for E in basis], axis=1)
    a = np.linalg.lstsq(columns, Y.numpy().ravel(), rcond=None)[0]
    return sum((float(c) * E for c, E in zip(a, basis, strict=True)), torch.zeros_like(basis[0]))


def unit(i: int, j: int, width: int = WIDTH) -> Tensor:
    E = torch.zeros(width, width, dtype=torch.float64)
    E[i, j] = 1.0
    return E


EYE = torch.eye(WIDTH, dtype=torch.float64)
DIAGONAL = [unit(i, i) for i in range(WIDTH)]
SYMMETRIC = DIAGONAL + [unit(i, j) + unit(j, i) for i in range(WIDTH) for j in range(i)]
ROTATED = [(H := hadamard(WIDTH)) @ E @ H.T for E in DIAGONAL]
ALL = [unit(i, j) for i in range(WIDTH) for j in range(WIDTH)]

# --- references -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "basis"),
    [
        ("scalar", [EYE]),
        ("diagonal", DIAGONAL),
        ("hadamard-diagonal", ROTATED),
        ("symmetric", SYMMETRIC),
        ("ghost", ALL),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_linear_families_by_stacked_least_squares(
    name: str, basis: list[Tensor], seed: int
) -> None:
    X, Y = activations(seed)
    op = solve(Moments(WIDTH).update(X, Y), name)
    torch.testing.assert_close(op.W, fit_in_span(X, Y, basis), rtol=1e-7, atol=1e-7)
    assert op.dof == len(basis)


def test_affine_by_a_column_of_ones() -> None:
    X, Y = activations()
    op = solve(Moments(WIDTH).update(X, Y), "affine")
    ones = np.hstack([X.numpy(), np.ones((len(X), 1))])
    reference = torch.from_numpy(np.linalg.lstsq(ones, Y.numpy(), rcond=None)[0])
    assert op.bias is not None
    torch.testing.assert_close(op.W, reference[:-1])
    torch.testing.assert_close(op.bias, reference[-1])
    assert op.residual == pytest.approx(float((op.apply(X) - Y).square().sum()))


def test_symmetric_by_the_lyapunov_equation() -> None:
    X, Y = activations(2)
    G, B = (X.T @ X).numpy(), (X.T @ Y).numpy()
    W = solve(Moments(WIDTH).update(X, Y), "symmetric").W
    torch.testing.assert_close(W, torch.from_numpy(scipy.linalg.solve_sylvester(G, G, B + B.T)))
    assert torch.equal(W, W.T)


def test_orthogonal_families_by_scipy() -> None:
    X, Y = activations(3)
    moments = Moments(WIDTH).update(X, Y)
    Q, scale = scipy.linalg.orthogonal_procrustes(X.numpy(), Y.numpy())
    torch.testing.assert_close(solve(moments, "orthogonal").W, torch.from_numpy(Q))
    scaled = solve(moments, "scaled-orthogonal").W
    torch.testing.assert_close(scaled, torch.from_numpy(Q * scale / float((X * X).sum())))


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """Lowest value of ``loss`` that L-BFGS finds from ``start``."""

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(flat).reshape(start.shape).requires_grad_()
        reached = loss(at)
        reached.backward()
        assert at.grad is not None
        return reached.item(), at.grad.numpy().ravel()

    tight = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9, "maxfun": 20000}
    found = scipy.optimize.minimize(
        value, start.numpy().ravel(), jac=True, method="L-BFGS-B", options=tight
    )
    return float(found.fun)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_low_rank_by_a_numerical_optimiser(rank: int) -> None:
    X, Y = activations(4)
    op = solve(Moments(WIDTH).update(X, Y), "low-rank", rank=rank)
    g = torch.Generator().manual_seed(0)
    best = min(
        minimise(
            lambda AB: (X + X @ AB[:WIDTH] @ AB[WIDTH:].T - Y).square().sum(),
            torch.randn(2 * WIDTH, rank, dtype=torch.float64, generator=g),
        )
        for _ in range(3)
    )
    assert int(torch.linalg.matrix_rank(op.M)) == rank
    assert op.residual == pytest.approx(best, rel=1e-5)
    assert op.residual <= best * (1 + 1e-9)


def test_hadamard_diagonal_by_a_numerical_optimiser() -> None:
    X, Y = activations(5)
    H = hadamard(WIDTH)
    best = minimise(
        lambda d: (X @ H @ torch.diag(d) @ H.T - Y).square().sum(),
        torch.ones(WIDTH, dtype=torch.float64),
    )
    op = solve(Moments(WIDTH).update(X, Y), "hadamard-diagonal")
    assert op.residual == pytest.approx(best, rel=1e-9)


def test_linearpatch_averages_the_ratios_of_the_sequences() -> None:
    parts = [activations(seed, tokens=20 + seed) for seed in range(3)]
    moments = sum((Moments(WIDTH).update(X, Y) for X, Y in parts), start=Moments(WIDTH))
    H = hadamard(WIDTH)

    def mean_ratio(R: Tensor) -> Tensor:
        ratios = [(Y @ R).abs().mean(0) / (X @ R).abs().mean(0) for X, Y in parts]
        return torch.stack(ratios).mean(0)

    torch.testing.assert_close(solve(moments, "linearpatch-d").W, torch.diag(mean_ratio(EYE)))
    W = solve(moments, "linearpatch-r").W
    torch.testing.assert_close(W, H @ torch.diag(mean_ratio(H)) @ H.T)
    X, Y = (torch.cat(side) for side in zip(*parts, strict=True))
    pooled = solve(moments, "linearpatch-d", pooled=True).W
    torch.testing.assert_close(pooled.diagonal(), Y.abs().mean(0) / X.abs().mean(0))


@pytest.mark.parametrize("name", ["ghost", "affine", "symmetric", "low-rank"])
def test_a_ridge_is_rows_of_penalty(name: str) -> None:
    """``ridge ||M||^2`` is the error on p more tokens ``sqrt(ridge) e_i`` whose Delta is zero."""
    X, Y = activations(6)
    moments = Moments(WIDTH).update(X, Y)
    extra = math.sqrt(7.0) * EYE
    if name == "affine":  # the penalty rows must not move the bias: centre first
        X, Y = X - X.mean(0), Y - Y.mean(0)
    penalised = Moments(WIDTH).update(torch.cat([X, extra]), torch.cat([Y, extra]))
    plain = "ghost" if name == "affine" else name
    W = solve(penalised, plain, **options(name)).W
    torch.testing.assert_close(solve(moments, name, ridge=7.0, **options(name)).W, W)
    if name != "affine":
        relative = 7.0 / float(moments.G.trace() / WIDTH)
        found = solve(moments, name, relative_ridge=relative, **options(name))
        torch.testing.assert_close(found.W, W)


def test_the_papers_code_and_the_papers_text() -> None:
    X, Y = activations(7)
    moments = Moments(WIDTH).update(X, Y)
    normal = X.T @ X + 1e-6 * EYE
    M = torch.linalg.solve(normal, X.T @ (Y - X))
    torch.testing.assert_close(solve(moments, ridge=1e-6).M, M)
    M = torch.linalg.pinv(X, rtol=1e-6) @ (Y - X)
    torch.testing.assert_close(solve(moments, rcond=1e-6).M, M)


@pytest.mark.parametrize("name", ["ghost", "affine"])
def test_two_widths_are_fitted_around_zero(name: str) -> None:
    X, Y = activations()
    moments = Moments(WIDTH, 3).update(X, Y[:, :3])
    op = solve(moments, name, around="zero")
    full = solve(Moments(WIDTH).update(X, Y), name, around="zero")
    torch.testing.assert_close(op.W, full.W[:, :3])
    assert op.dof == WIDTH * 3 + (3 if name == "affine" else 0)
    with pytest.raises(ValueError, match="square"):
        _ = op.M


@pytest.mark.parametrize("name", NAMES)
def test_square_families_refuse_two_widths(name: str) -> None:
    X, Y = activations()
    with pytest.raises(ValueError, match=r"one width, got 8 and 3; .*around='zero'"):
        solve(Moments(WIDTH, 3).update(X, Y[:, :3]), name, **options(name))


# --- properties -------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from([2, 8, 30, 60]))
@pytest.mark.filterwarnings("ignore::ghostlib.linalg.gram.SingularGramWarning")
def test_training_errors_follow_the_nesting(seed: int, tokens: int) -> None:
    moments = Moments(WIDTH).update(*activations(seed, tokens))
    error = {name: solve(moments, name, **options(name)).residual for name in NAMES}
    low = [solve(moments, "low-rank", rank=r).residual for r in range(1, WIDTH + 1)]
    slack = 1e-9 * moments.t
    for chain in (
        ["identity", "scalar", "diagonal", "symmetric", "ghost", "affine"],
        ["scalar", "hadamard-diagonal", "symmetric"],
        ["linearpatch-d", "diagonal"],
        ["linearpatch-r", "hadamard-diagonal"],
        ["identity", "orthogonal", "scaled-orthogonal", "ghost"],
        ["scalar", "scaled-orthogonal"],
    ):
        for larger, smaller in pairwise(chain):
            assert error[smaller] <= error[larger] + slack, (larger, smaller)
    nested = [error["identity"], *low, error["ghost"]]
    assert all(b <= a + slack for a, b in pairwise(nested))
    assert low[-1] == pytest.approx(error["ghost"], abs=slack)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_gap_to_the_optimum_is_pythagorean(seed: int) -> None:
    X, Y = activations(seed)
    moments = Moments(WIDTH).update(X, Y)
    best = solve(moments)
    residual = X @ best.W - Y
    assert float((X.T @ residual).abs().max()) < 1e-8 * float(moments.B.abs().max())
    for name in NAMES[:-1]:  # affine has a bias
        W = solve(moments, name, **options(name)).W
        gap = float((X @ (W - best.W)).square().sum())
        assert moments.error(W) - best.residual == pytest.approx(gap, abs=1e-9 * moments.t)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
@pytest.mark.parametrize("name", ["ghost", "affine", "symmetric", "low-rank"])
def test_a_vanishing_ridge_is_the_pseudo_inverse(name: str, seed: int) -> None:
    moments = Moments(WIDTH).update(*activations(seed))
    limit = solve(moments, name, **options(name)).residual
    errors = [
        solve(moments, name, relative_ridge=10.0**-k, **options(name)).residual
        for k in range(0, 13, 2)
    ]
    if name != "low-rank":  # whose rank constraint does not commute with the penalty
        assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] == pytest.approx(limit, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_only_the_unconstrained_optimum_ignores_the_output_metric(seed: int) -> None:
    """Fitting ``Y A`` instead of ``Y`` weighs the output channels: ghost only follows."""
    X, Y = activations(seed)
    A = torch.randn(
        WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    A = A + 4 * EYE
    moments = Moments(WIDTH).update(X, Y)
    W = solve(Moments(WIDTH).update(X, Y @ A), around="zero").W
    torch.testing.assert_close(W, solve(moments, around="zero").W @ A, rtol=1e-6, atol=1e-6)
    for basis in (DIAGONAL, SYMMETRIC):
        weighted = [E @ A for E in basis]
        plain = fit_in_span(X, Y, basis)
        in_metric = fit_in_span(X, Y @ A, weighted) @ torch.linalg.inv(A)
        assert not torch.allclose(plain, in_metric, rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=30, max_size=30).filter(lambda c: sum(c) > 20), SEEDS)
@pytest.mark.filterwarnings("ignore::ghostlib.linalg.gram.SingularGramWarning")
@pytest.mark.parametrize("name", NAMES)
def test_weights_repeat_tokens(name: str, counts: list[int], seed: int) -> None:
    X, Y = activations(seed, tokens=30)
    times = torch.tensor(counts)
    weighted = Moments(WIDTH).update(X, Y, times.double())
    repeated = Moments(WIDTH).update(X.repeat_interleave(times, 0), Y.repeat_interleave(times, 0))
    one, other = (solve(m, name, **options(name)) for m in (weighted, repeated))
    torch.testing.assert_close(one.W, other.W, rtol=1e-6, atol=1e-6)
    assert one.residual == pytest.approx(other.residual, abs=1e-8 * weighted.t)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 20))
@pytest.mark.filterwarnings("ignore::ghostlib.linalg.gram.SingularGramWarning")
def test_smallest_M_and_smallest_W_agree_iff_full_column_rank(seed: int, tokens: int) -> None:
    X, Y = activations(seed, tokens)
    moments = Moments(WIDTH).update(X, Y)
    one, other = solve(moments), solve(moments, around="zero")
    assert one.rank == other.rank == min(tokens, WIDTH)
    assert one.residual == pytest.approx(other.residual, abs=1e-9 * moments.t)
    assert torch.allclose(one.W, other.W, atol=1e-6) == (tokens >= WIDTH)
    # What they differ by is the identity on the directions that were never seen.
    unseen = EYE - torch.linalg.pinv(X, rtol=1e-6) @ X
    torch.testing.assert_close(one.W - other.W, unseen, rtol=1e-6, atol=1e-6)


# --- the operator itself ----------------------------------------------------------------------


def test_the_table_of_freedom() -> None:
    C = WIDTH
    table = {
        "identity": 0,
        "scalar": 1,
        "diagonal": C,
        "linearpatch-d": C,
        "linearpatch-r": C,
        "hadamard-diagonal": C,
        "orthogonal": C * (C - 1) // 2,
        "scaled-orthogonal": C * (C - 1) // 2 + 1,
        "symmetric": C * (C + 1) // 2,
        "low-rank": 3 * (2 * C - 3),
        "ghost": C**2,
        "affine": C**2 + C,
    }
    elsewhere = {"magnitude", *REGRESSORS}  # test_folding.py, test_branches.py
    assert list(table) == [name for name in OPERATORS if name not in elsewhere] == NAMES
    moments = Moments(WIDTH).update(*activations())
    for name, dof in table.items():
        op = solve(moments, name, **options(name))
        assert (op.name, op.dof) == (name, dof)
        assert op.W.dtype == torch.float64 and op.W.shape == (C, C)
        assert op.residual == pytest.approx(moments.error(op))
        assert (op.bias is not None) == (name == "affine")


def test_rank_and_condition_are_those_of_the_matrix_inverted() -> None:
    X, Y = activations()
    moments = Moments(WIDTH).update(X, Y)
    for name in ("ghost", "symmetric", "low-rank"):
        op = solve(moments, name, **options(name))
        assert op.rank == WIDTH == moments.effective_rank()
        assert op.condition == pytest.approx(float(torch.linalg.cond(X)) ** 2)
    centred = float(torch.linalg.cond(X - X.mean(0))) ** 2
    assert solve(moments, "affine").condition == pytest.approx(centred)
    d = X.square().sum(0)
    assert solve(moments, "diagonal").condition == pytest.approx(float(d.max() / d.min()))
    for name in ("identity", "orthogonal", "linearpatch-d"):
        op = solve(moments, name)
        assert (op.rank, op.condition) == (0, 1.0)


def test_boundaries_that_share_a_gram_matrix_share_its_decomposition(
    decomposed: list[Tensor],
) -> None:
    X, Y = activations()
    moments, other = Moments(WIDTH).update(X, Y), Moments(WIDTH).update(X, 2 * Y)
    other.G = moments.G
    for name in ("ghost", "symmetric"):
        for m in (moments, other):
            solve(m, name)
    assert len(decomposed) == 1
    moments.update(X, Y)  # rebinds G
    solve(moments)
    assert len(decomposed) == 2
    torch.testing.assert_close(solve(moments).W, solve(other).W / 2)


def test_apply_keeps_dtype_and_leading_axes() -> None:
    X, Y = activations()
    moments = Moments(WIDTH).update(X, Y)
    for name in ("ghost", "affine"):
        op = solve(moments, name)
        assert op.apply(X.float()).dtype == torch.float32
        batched = op.apply(X.reshape(3, 20, WIDTH))
        torch.testing.assert_close(batched.reshape(60, WIDTH), op.apply(X))
        with pytest.raises(ValueError, match=r"acts on activations \(..., 8\), got \(5, 7\)"):
            op.apply(torch.zeros(5, 7))


def test_an_operator_prints_its_numbers_and_not_its_matrix() -> None:
    op = solve(Moments(WIDTH).update(*activations()))
    assert repr(op).startswith("Operator(name='ghost', dof=64, rank=8, condition=")
    assert "tensor" not in repr(op)
    with pytest.raises(AttributeError):
        op.name = "other"  # type: ignore[misc]
    torch.testing.assert_close(op.M + EYE, op.W)


def test_moments_accept_an_operator() -> None:
    moments = Moments(WIDTH).update(*activations())
    op = solve(moments)
    assert isinstance(op, Operator)
    assert moments.error(op) == moments.error(op.W) == op.residual


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_antisymmetric_share(seed: int) -> None:
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert antisymmetric_share(A + A.T) == pytest.approx(0.0)
    assert antisymmetric_share(A - A.T) == pytest.approx(1.0)
    symmetric, skew = (A + A.T) / 2, (A - A.T) / 2
    share = float(skew.norm() / torch.sqrt(symmetric.norm() ** 2 + skew.norm() ** 2))
    assert antisymmetric_share(A) == pytest.approx(share)


def test_antisymmetric_share_of_chance_and_of_nothing() -> None:
    A = torch.randn(500, 500, generator=torch.Generator().manual_seed(0))
    assert antisymmetric_share(A) == pytest.approx(0.5**0.5, abs=0.005)
    assert antisymmetric_share(torch.zeros(4, 4)) == 0.0
    with pytest.raises(ValueError, match=r"square matrix, got \(4, 3\)"):
        antisymmetric_share(torch.zeros(4, 3))
