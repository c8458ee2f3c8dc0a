"""Features, weights and regressors: values, spellings, subsets and invalid input."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ghostlib.statistics.features import (
    FEATURES,
    STREAM,
    UNIFORM,
    WEIGHTS,
    Feature,
    Regressor,
    Sources,
    previous,
    rms_norm,
    standardise,
    widest,
)

pytestmark = pytest.mark.filterwarnings("error")

ALL = ["x", "f", "h", "n(x)", "x, n(x), n(prev)", "x, z(x), z(prev); 1/|y|^2", "x, h; 1/|y|^0.5"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# --- features and weights -----------------------------------------------------------------------


def test_features_are_norms_without_weights() -> None:
    x = 5 * randn(3, 4, 16) + 1
    torch.testing.assert_close(rms_norm(x), nn.RMSNorm(16, eps=0).double()(x))
    torch.testing.assert_close(standardise(x), nn.LayerNorm(16, eps=0).double()(x))
    assert not torch.allclose(rms_norm(x), standardise(x), atol=0.1)


@pytest.mark.parametrize("feature", FEATURES.values(), ids=str)
def test_a_feature_of_zero_is_zero(feature: Feature) -> None:
    assert not feature.of(torch.zeros(2, 16)).any()


def test_rounding_of_equal_channels_is_not_amplified() -> None:
    for value in (0.1, 1e4 / 3, 1e-9):
        assert not standardise(torch.full((1, 17), value)).any()


@pytest.mark.parametrize("function", [rms_norm, standardise])
def test_normalised_features_do_not_depend_on_the_scale_of_any_token(function: Any) -> None:
    x = randn(7, 16)
    scales = torch.tensor([1e-30, 1e-9, 1e9, 1.0, 1e-3, 1e6, 1e30]).double()[:, None]
    torch.testing.assert_close(function(scales * x), function(x))
    for scale in scales:
        torch.testing.assert_close(function(scale * x), function(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normalised_without_overflow(dtype: torch.dtype) -> None:
    half = torch.full((2, 16), 300.0, dtype=dtype)  # whose square is too large for float16
    assert rms_norm(half).dtype == standardise(half).dtype == dtype
    assert (rms_norm(half) == 1).all() and not standardise(half).any()


@pytest.mark.parametrize(
    ("name", "power"), [("1", 0), ("1/|y|^0.5", -0.5), ("1/|y|", -1), ("1/|y|^2", -2)]
)
def test_weights_are_powers_of_the_norm(name: str, power: float) -> None:
    norm = torch.tensor([0.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(WEIGHTS[name].of(norm), norm**power)
    assert str(WEIGHTS[name]) == name


# --- the previous token -------------------------------------------------------------------------


def test_the_previous_token_skips_padding_and_resumes() -> None:
    x = torch.arange(1.0, 13.0).view(2, 6, 1)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]]).bool()
    before, last = previous(x, real)
    assert before[..., 0].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 9, 10, 10]]
    assert last[:, 0].tolist() == [6, 12]
    for cut in range(1, 6):  # in two parts
        first, state = previous(x[:, :cut], real[:, :cut])
        second, state = previous(x[:, cut:], real[:, cut:], state)
        assert torch.equal(torch.cat([first, second], 1), before) and torch.equal(state, last)


@settings(max_examples=25)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3))
def test_the_previous_token_by_a_loop(rows: list[list[bool]]) -> None:
    x = randn(len(rows), 5, 2)
    before, last = previous(x, torch.tensor(rows))
    for row, real in enumerate(rows):
        expected = torch.zeros(2, dtype=torch.float64)
        for token in range(5):
            assert torch.equal(before[row, token], expected)
            expected = x[row, token] if real[token] else expected
        assert torch.equal(last[row], expected)
    assert torch.equal(previous(x)[0], previous(x, torch.ones(len(rows), 5).bool())[0])


# --- designs ------------------------------------------------------------------------------------


def by_hand(regressor: str, x: Tensor, hidden: Tensor, output: Tensor) -> np.ndarray:
    """The design of one sequence with numpy."""
    stream = x.numpy()
    n = stream / np.sqrt((stream**2).mean(1, keepdims=True))
    centred = stream - stream.mean(1, keepdims=True)
    z = centred / centred.std(1, keepdims=True)
    blocks = {"x": stream, "n(x)": n, "z(x)": z, "h": hidden.numpy(), "f": output.numpy()}
    for letter, now in (("n", n), ("z", z)):
        blocks[f"{letter}(prev)"] = np.vstack([np.zeros_like(now[:1]), now[:-1]])
    return np.hstack([blocks[name] for name in regressor.partition("; ")[0].split(", ")])


@pytest.mark.parametrize("spelling", ALL)
def test_designs_by_hand(spelling: str) -> None:
    x, hidden, output = randn(7, 6), randn(7, 4, seed=1), randn(7, 6, seed=2)
    regressor, sources = Regressor.parse(spelling), Sources(x, hidden, output)
    F = regressor.design(sources)
    torch.testing.assert_close(F, torch.from_numpy(by_hand(spelling, x, hidden, output)))
    assert F.shape[1] == sum(regressor.widths(6, 4))
    batch = sources.map(lambda part: torch.stack([part, 2 * part]))
    torch.testing.assert_close(regressor.design(batch)[0], F)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_padding_is_never_the_previous_token(kind: torch.dtype) -> None:
    x, real = randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 1])
    F = Regressor.parse("n(prev)").design(Sources(x), real.to(kind))
    expected = rms_norm(x)[[0, 0, 1, 2, 2, 4]]
    expected[:2] = 0
    torch.testing.assert_close(F, expected)


ONES, BATCH = torch.ones(3, 4), torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("spelling", "sources", "real", "message"),
    [
        ("h", Sources(ONES), None, "h reads the MLP before the gap: pass hidden=… as well"),
        ("x, f", Sources(ONES), None, "x, f reads the MLP .* pass output=… as well"),
        ("h", Sources(ONES, ONES[:2]), None, r"hidden must be of the same .*, \(3,\), got \(2,\)"),
        ("x", Sources(BATCH, output=ONES), None, r"output .* stream, \(2, 3\), got \(3,\)"),
        ("n(prev)", Sources(torch.ones(4)), None, "reads the previous token: pass sequences"),
        ("x", Sources(ONES), torch.ones(2), r"mask must have shape \(3,\), got \(2,\)"),
        ("n(prev)", Sources(BATCH), torch.ones(3), r"mask .* shape \(2, 3\), got \(3,\)"),
    ],
)
def test_designs_refuse_sources_that_do_not_fit(
    spelling: str, sources: Sources, real: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Regressor.parse(spelling).design(sources, real)


def test_the_width_of_the_mlp_is_required() -> None:
    assert Regressor.parse("x, h, f").widths(6, 4) == (6, 4, 6)
    assert Regressor.parse("x, f").widths(6) == (6, 6)
    with pytest.raises(ValueError, match=r"moments of x, h need the width of the MLP: pass hidden"):
        Regressor.parse("x, h").widths(6)


# --- regressors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ALL)
def test_regressors_are_read_back(spelling: str) -> None:
    regressor = Regressor.parse(spelling)
    assert str(regressor) == spelling and Regressor.parse(str(regressor)) == regressor
    assert Regressor.parse(regressor) is regressor
    assert hash(Regressor.parse(spelling)) == hash(regressor)
    spaces = spelling.replace(", ", " ,").replace("; ", ";")
    assert Regressor.parse(spaces) == regressor


def test_a_regressor_is_resolved_for_the_norm_of_a_model() -> None:
    both = Regressor.parse("x, n(x), n(prev), h; 1/|y|")
    layer = both.resolve("layer")
    assert str(layer) == "x, z(x), z(prev), h; 1/|y|"
    assert layer.resolve("layer") == layer and layer.resolve("rms") == layer.generic == both


@pytest.mark.parametrize(
    ("spelling", "normalised", "sources", "previous", "identity"),
    [
        ("x", False, {"stream"}, False, True),
        ("f; 1/|y|", False, {"output"}, False, True),
        ("h", False, {"hidden"}, False, False),
        ("n(x)", True, {"stream"}, False, False),
        ("x, z(prev)", True, {"stream"}, True, False),
        ("x, h, f", False, {"stream", "hidden", "output"}, False, False),
    ],
)
def test_properties_of_a_regressor(
    spelling: str, normalised: bool, sources: set[str], previous: bool, identity: bool
) -> None:
    regressor = Regressor.parse(spelling)
    assert (regressor.normalised, regressor.reads_previous) == (normalised, previous)
    assert regressor.sources == sources and regressor.reads_mlp == (sources != {"stream"})
    assert regressor.has_identity == identity


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("x, n(y)", r"unknown feature 'n\(y\)'; did you mean 'n\(x\)'"),
        ("X", "unknown feature 'X'"),
        ("", "unknown feature ''"),
        ("x n(x)", r"unknown feature 'x n\(x\)'"),
        ("x,", "unknown feature ''"),
        ("x; 1/|z|", r"unknown weight '1/\|z\|'; did you mean '1/\|y\|'"),
        ("; 1/|y|", "unknown feature ''"),
        ("x, x", "regressor 'x, x' names a feature twice: name each once"),
        ("x, n(x), x; 1/|y|", "names a feature twice"),
        (None, "unknown feature 'None'"),
        (3, "unknown feature '3'"),
        (["x"], r"unknown feature .\['x'\]"),
    ],
)
def test_bad_spellings_are_named(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regressor.parse(bad)


def test_a_regressor_made_by_hand_is_checked_too() -> None:
    x = FEATURES["x"]
    with pytest.raises(ValueError, match="needs a tuple of features, such as"):
        Regressor(())
    with pytest.raises(ValueError, match="needs a tuple of features"):
        Regressor([x])  # which has no hash
    with pytest.raises(ValueError, match="names a feature twice"):
        Regressor((x, FEATURES["n(x)"], x))
    assert Regressor((x,)) == STREAM and STREAM.weight == UNIFORM


# --- wider and narrower -------------------------------------------------------------------------

WIDE = "x, n(x), n(prev); 1/|y|"
NARROW = ["x; 1/|y|", "x, n(x); 1/|y|", "n(prev); 1/|y|", "n(prev), x; 1/|y|"]


@pytest.mark.parametrize(
    ("regressors", "expected"),
    [
        ([], []),
        ([WIDE, *NARROW], [WIDE]),
        (["x, n(x)", "n(x), x"], ["n(x), x"]),
        (["x, n(x)", "x, n(prev)", "x"], ["x, n(prev)", "x, n(x)"]),
        (["x; 1/|y|", "x, n(x)", "x; 1/|y|^2"], ["x, n(x)", "x; 1/|y|", "x; 1/|y|^2"]),
        (["x", "f", "x, h"], ["x, h", "f"]),
    ],
)
def test_the_widest_contain_all(regressors: list[str], expected: list[str]) -> None:
    assert [str(r) for r in widest(map(Regressor.parse, regressors))] == expected
    assert [str(r) for r in widest(map(Regressor.parse, reversed(regressors)))] == expected


def test_containing_a_regressor_takes_its_features_and_its_weight() -> None:
    wide = Regressor.parse(WIDE)
    for name in NARROW:
        assert wide.contains(Regressor.parse(name)) and wide.contains(wide)
        assert not Regressor.parse(name).contains(wide)
    for name in ("x", "x, n(x)", "x, z(x); 1/|y|", "h; 1/|y|"):
        assert not wide.contains(Regressor.parse(name))
