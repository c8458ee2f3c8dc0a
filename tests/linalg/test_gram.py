"""Gram matrices and their regularised inverses against the activations themselves."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostlib.linalg import gram as module
from ghostlib.linalg.gram import Gram, Spectrum, check_ridge, gram

pytestmark = pytest.mark.filterwarnings("error")

SEEDS = st.integers(0, 10_000)
INF, NAN = math.inf, math.nan


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def features(tokens: int, blocks: Sequence[int], seed: int = 0) -> Tensor:
    """Concatenated features, each a thousand times the size of the previous one."""
    parts = [1000.0**k * randn(tokens, width, seed=seed + k) for k, width in enumerate(blocks)]
    return torch.cat(parts, 1)


def in_units(F: Tensor, blocks: Sequence[int]) -> Tensor:
    """Each feature divided by the root mean square norm of its columns."""
    parts = F.split(list(blocks), 1)
    return torch.cat([part / part.square().sum(0).mean().sqrt() for part in parts], 1)


# --- the spectrum -------------------------------------------------------------------------------


def test_the_spectrum_is_that_of_scipy() -> None:
    X = randn(20, 6)
    spectrum = Spectrum.of(X.T @ X)
    values, vectors = scipy.linalg.eigh((X.T @ X).numpy())
    torch.testing.assert_close(spectrum.values, torch.from_numpy(values))
    along = (spectrum.vectors.T @ torch.from_numpy(vectors)).abs()
    torch.testing.assert_close(along, torch.eye(6).double(), rtol=0, atol=1e-9)
    singular = torch.linalg.svdvals(X).flip(0)
    torch.testing.assert_close(spectrum.values.sqrt(), singular)
    assert spectrum.condition == pytest.approx(float(torch.linalg.cond(X)) ** 2)


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rounding_error_is_not_significant(rank: int, size: float) -> None:
    X = size * randn(50, rank) @ randn(rank, 6, seed=1)
    spectrum = Spectrum.of(X.T @ X)
    assert (spectrum.values >= 0).all()
    assert (
        int((spectrum.values > spectrum.noise).sum())
        == int(spectrum.significant(1e-15).sum())
        == rank
    )
    assert spectrum.condition == INF


def test_rcond_applies_to_singular_values_and_not_to_eigenvalues() -> None:
    Q = torch.linalg.qr(randn(20, 5)).Q * 10.0 ** -torch.arange(5)
    spectrum = Spectrum.of(Q.T @ Q)
    counts = [int(spectrum.significant(rcond).sum()) for rcond in (0.5, 0.05, 5e-4)]
    assert counts == [1, 2, 4]


def test_noise_grows_with_the_width_but_not_below_64() -> None:
    narrow, wide = (Spectrum.of(torch.eye(p).double()).noise for p in (64, 256))
    assert Spectrum.of(torch.eye(2).double()).noise == narrow
    assert wide == pytest.approx(4 * narrow)


# --- units and regularisation -------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(6,), (4, 2), (3, 2, 1)])
def test_every_feature_is_measured_in_its_own_unit(blocks: tuple[int, ...]) -> None:
    F = features(40, blocks)
    G = Gram(F.T @ F, blocks)
    torch.testing.assert_close(F / G.unit, in_units(F, blocks))
    expected = torch.linalg.svdvals(in_units(F, blocks)).square().flip(0)
    torch.testing.assert_close(G.spectrum.values, expected)
    assert G.spectrum.condition == pytest.approx(float(expected[-1] / expected[0]))
    assert Gram(F.T @ F).blocks == (6,)


def test_a_zero_feature_has_the_unit_one() -> None:
    F = torch.cat([torch.zeros(9, 2).double(), randn(9, 3)], 1)
    G = Gram(F.T @ F, (2, 3))
    assert G.unit[:2].tolist() == [1, 1] and float(G.unit[2]) != 1
    assert G.regularise().rank == 3


OPTIONS: list[dict[str, Any]] = [
    {},
    {"rcond": 1e-3},
    {"ridge": 1e-9},
    {"ridge": 2.0},
    {"relative_ridge": 1e-9},
    {"relative_ridge": 0.5},
    {"relative_ridge": [0.5]},
    {"relative_ridge": [0.1, 10.0]},
    {"relative_ridge": (0.3, 0.3)},
]


def penalty(F: Tensor, blocks: Sequence[int], options: dict[str, Any]) -> Tensor:
    """Diagonal of the penalty."""
    if "ridge" in options:
        return torch.full((F.shape[1],), options["ridge"], dtype=torch.float64)
    means = torch.stack([part.square().sum(0).mean() for part in F.split(list(blocks), 1)])
    ridges = torch.tensor(options.get("relative_ridge", 0.0)).double()
    return (ridges * means).repeat_interleave(torch.tensor(blocks))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=5)
@given(SEEDS)
def test_solve_is_ridge_regression(options: dict[str, Any], seed: int) -> None:
    blocks = (4, 2)
    F, D = features(30, blocks, seed), randn(30, 3, seed=seed + 9)
    shift = penalty(F, blocks, options)
    rows = torch.cat([F, torch.diag(shift.sqrt())])
    expected = torch.linalg.lstsq(rows, torch.cat([D, torch.zeros(6, 3).double()])).solution
    unit = F.square().sum(0).sqrt()[:, None]
    for has_spectrum in (False, True):
        G = Gram(F.T @ F, blocks)
        if has_spectrum:  # which is then used
            assert G.spectrum.condition < INF
        inverse = G.regularise(**options)
        solved = inverse.solve(F.T @ D)
        torch.testing.assert_close(unit * solved, unit * expected, rtol=1e-7, atol=1e-7)
        assert inverse.rank == 6 and inverse.diagnosis(30) is None
        V = inverse.spectrum.vectors.T / inverse.scaling  # the same inverse by its definition
        explicit = V.T @ torch.diag(inverse.gain) @ V @ F.T @ D
        torch.testing.assert_close(unit * explicit, unit * expected, rtol=1e-7, atol=1e-7)


def test_truncation_applies_to_the_features_in_their_units() -> None:
    blocks = (5, 3)
    F = features(40, blocks)
    scaled = in_units(F, blocks)
    U, s, Vh = torch.linalg.svd(scaled, full_matrices=False)
    inverse = Gram(F.T @ F, blocks).regularise(rcond=float(s[4] / s[0]) * 1.001)
    assert inverse.rank == 4
    D = randn(40, 2, seed=5)
    unit = (F / scaled)[0]
    expected = Vh[:4].T @ torch.diag(1 / s[:4]) @ U[:, :4].T @ D / unit[:, None]
    torch.testing.assert_close(inverse.solve(F.T @ D), expected)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_the_explained_error_of_a_ridge_is_the_reduction_of_the_error(
    options: dict[str, Any],
) -> None:
    F, D = features(30, (4, 2)), randn(30, 3, seed=5)
    inverse = Gram(F.T @ F, (4, 2)).regularise(**options)
    M = inverse.solve(F.T @ D)
    expected = float(D.square().sum() - (F @ M - D).square().sum())
    assert inverse.explained(M, F.T @ D) == pytest.approx(expected)


def test_the_explained_error_of_a_truncated_fit_is_unknown() -> None:
    F = features(30, (4, 2))
    inverse = Gram(F.T @ F, (4, 2)).regularise()
    assert inverse.explained(inverse.solve(F.T @ F), F.T @ F) is None


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_a_ridge_scales_with_the_features(size: float) -> None:
    """``G + ridge`` for features of any size, in one unit for all features."""
    F = features(30, (4, 2))
    plain = Gram(F.T @ F, (4, 2)).regularise(ridge=2.0)
    scaled = Gram(size * F.T @ F, (4, 2)).regularise(ridge=size * 2.0)
    assert scaled.kept.all()
    torch.testing.assert_close(size * scaled.gain, plain.gain)


def test_one_ridge_applies_to_every_feature() -> None:
    F = features(30, (4, 2))
    G, C = Gram(F.T @ F, (4, 2)), F.T @ randn(30, 2, seed=3)
    one = G.regularise(relative_ridge=0.2).solve(C)
    for same in ([0.2], [0.2, 0.2], (0.2,)):
        torch.testing.assert_close(G.regularise(relative_ridge=same).solve(C), one)
    other = G.regularise(relative_ridge=[0.2, 0.4]).solve(C)
    assert not torch.allclose(other, one)


# --- factors, ranks and diagnoses ---------------------------------------------------------------


def test_an_effective_ridge_needs_no_spectrum(decomposed: list[Tensor]) -> None:
    F = features(30, (4, 2))
    for options in OPTIONS[2:]:
        inverse = Gram(F.T @ F, (4, 2)).regularise(**options)
        inverse.solve(F.T @ randn(30, 2))
        assert inverse.diagnosis(30) is None
        assert not decomposed, options
    assert inverse.rank == 6 and len(decomposed) == 1  # on request


def test_other_units_need_no_other_spectrum(decomposed: list[Tensor]) -> None:
    F = features(30, (4, 2))
    G, C = Gram(F.T @ F, (4, 2)), F.T @ randn(30, 2)
    assert G.spectrum.values.all()
    for options in OPTIONS[4:]:
        G.regularise(**options).solve(C)
    assert len(decomposed) == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"relative_ridge": ridges} for ridges in ([1.0, 1e-9], [1e-9, 1.0], (1e-9, 1e-9))),
        *({"ridge": ridge} for ridge in (1e-6, 1e-3)),
    ],
    ids=str,
)
def test_a_small_ridge_for_one_feature_hides_no_missing_direction(options: dict[str, Any]) -> None:
    F = features(3, (4, 2))
    inverse = Gram(F.T @ F, (4, 2)).regularise(**options)
    inverse.solve(F.T @ randn(3, 2))
    assert "3 tokens determine 3 of 6 directions" in (inverse.diagnosis(3) or "")
    assert Gram(F.T @ F, (4, 2)).regularise(relative_ridge=[1e-3, 1.0]).diagnosis(3) is None


def wilkinson(p: int) -> Tensor:
    """A singular matrix ``R'R`` whose Cholesky pivots are all 1."""
    R = torch.eye(p).double() - torch.triu(torch.ones(p, p).double(), 1)
    return R.T @ R


@pytest.mark.parametrize(
    ("G", "rank"),
    [
        (torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0]).double()), 3),
        ((F := randn(3, 8)).T @ F, 3),
        ((F := randn(50, 2) @ randn(2, 8, seed=1)).T @ F, 2),
        (wilkinson(60), 59),
        (torch.zeros(4, 4).double(), 0),
    ],
)
@pytest.mark.parametrize("relative", [1e-14, 1e-10, 1e-8, 9e-7, 1e-6, 1e-3])
def test_a_ridge_without_effect_hides_no_missing_direction(
    G: Tensor, rank: int, relative: float
) -> None:
    absolute = relative * float(G.diagonal().mean() or 1.0)
    for options in ({"relative_ridge": relative}, {"ridge": absolute}):
        inverse = Gram(G).regularise(**options)
        inverse.solve(G)
        assert (inverse.diagnosis(9) is None) == (relative >= 1e-6)
        assert inverse.rank == rank


def test_the_diagnosis_has_numbers_and_remedies() -> None:
    F = randn(5, 8)
    inverse = Gram(F.T @ F).regularise()
    assert inverse.diagnosis(5) == (
        "5 tokens determine 5 of 8 directions (condition number inf), so the fit is not unique and "
        "need not generalise: calibrate on at least 80 tokens, or pass relative_ridge=1e-3 "
        "(choose_ridge finds a value)"
    )
    assert inverse.diagnosis(5, nullity=3) is None
    assert "5 of 7 directions" in (inverse.diagnosis(5, nullity=1) or "")


@pytest.mark.parametrize("ridge", [1e-12, 1e-9])
def test_rounding_error_in_a_null_direction_is_dropped(ridge: float) -> None:
    F, D = 1e3 * randn(50, 3) @ randn(3, 8, seed=2), randn(50, 8, seed=1)
    solved = Gram(F.T @ F).regularise(relative_ridge=ridge).solve(F.T @ D)
    torch.testing.assert_close(solved, torch.linalg.pinv(F) @ D, rtol=1e-5, atol=1e-9)


def test_centring_leaves_rounding_error_of_the_size_of_the_terms() -> None:
    X = randn(200, 4)
    X[:, 2] = 1e6 / 7
    centred = X.T @ X - torch.outer(X.sum(0), X.mean(0))
    kept = Gram(centred, terms=(X.T @ X).diagonal()).regularise()
    assert kept.rank == 3 and kept.diagnosis(200) is not None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_terms_are_measured_in_the_units_of_their_feature(scale: float) -> None:
    """A large feature does not increase the rounding error of a small one."""
    small, large = randn(200, 3), scale * randn(200, 3, seed=1)
    F = torch.cat([small, large], 1)
    centred = F.T @ F - torch.outer(F.sum(0), F.mean(0))
    assert Gram(centred, (3, 3), (F.T @ F).diagonal()).regularise().rank == 6


def test_a_matrix_that_is_not_positive_definite_falls_back_on_its_spectrum() -> None:
    """Rounding error larger than an effective ridge, where Cholesky fails."""
    V = torch.linalg.qr(randn(4, 4)).Q
    G = V @ torch.diag(torch.tensor([-1e-5, 1.0, 1.0, 2.0]).double()) @ V.T
    G = (G + G.T) / 2
    inverse = Gram(G).regularise(relative_ridge=1e-6)
    solved = inverse.solve(G)
    assert torch.isfinite(solved).all() and float(solved.abs().max()) < 2


# --- one Gram for one matrix --------------------------------------------------------------------


def test_one_matrix_is_decomposed_once(decomposed: list[Tensor]) -> None:
    F = randn(20, 6)
    G = F.T @ F
    first = gram(G)
    assert gram(G) is first and gram(G, (6,)) is first
    assert first.regularise().rank == gram(G).regularise(rcond=1e-3).rank == 6
    assert len(decomposed) == 1
    assert gram(G, (4, 2)) is not first and gram(G.clone()) is not first


def test_the_cache_holds_no_unused_matrix() -> None:
    before = len(module._cache)
    X = randn(9, 6)
    kept = gram(X.T @ X)
    assert kept.spectrum.values.all() and len(module._cache) == before + 1
    del kept
    assert len(module._cache) == before, "freed at once, not when garbage is collected"


# --- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 1.0, "rcond": 0.1}, "choose one of rcond, ridge and relative_ridge, got {'rco"),
        ({"ridge": 1.0, "relative_ridge": 1.0}, "choose one of"),
        ({"rcond": 0.0}, "rcond must lie between 0 and 1, got 0.0"),
        ({"rcond": 1.0}, "rcond must lie between 0 and 1, got 1.0"),
        ({"rcond": -1e-6}, "rcond must lie"),
        ({"rcond": NAN}, "rcond must lie"),
        ({"ridge": 0.0}, "positive and finite, got 0.0; for none use rcond"),
        ({"relative_ridge": 0.0}, "positive and finite"),
        ({"relative_ridge": [0.1, -0.1]}, "positive and finite, got -0.1"),
        ({"relative_ridge": [-0.1]}, "positive and finite, got -0.1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gram(torch.eye(6).double(), (4, 2)).regularise(**options)


@pytest.mark.parametrize("ridges", [[], [1.0, 1.0], [1.0, 2.0], [1.0] * 4])
def test_ridges_are_one_or_one_for_each_feature(ridges: list[float]) -> None:
    message = f"relative_ridge has {len(ridges)} values for 3 features: give one, or one"
    with pytest.raises(ValueError, match=message):
        Gram(torch.eye(6).double(), (2, 2, 2)).regularise(relative_ridge=ridges)


def test_options_may_be_none() -> None:
    inverse = Gram(torch.eye(3).double()).regularise(rcond=None, ridge=None, relative_ridge=None)
    assert inverse.rcond == module.RCOND


@pytest.mark.parametrize("bad", [0, -1.0, NAN, INF, -INF])
def test_a_ridge_is_positive_and_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="a ridge must be positive and finite"):
        check_ridge(bad)
    assert check_ridge(1) == 1.0
