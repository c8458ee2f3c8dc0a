"""Moments against the activations they summarise."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ghostlib.linalg.hadamard import hadamard
from ghostlib.models.boundaries import Boundary
from ghostlib.operators.families import FAMILIES, Family
from ghostlib.operators.solve import Operator, solve
from ghostlib.statistics.features import Regressor
from ghostlib.statistics.moments import Moments, check_alike, check_moments

pytestmark = pytest.mark.filterwarnings("error")

SUMS = ("G", "cross", "f1", "d1", "d2", "x_abs", "y_abs", "ratio", "ratio_rotated")


def pair(tokens: int, p: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(2, tokens, p, dtype=torch.float64, generator=generator)
    return X, Y


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    assert tuple(a.tensors()) == SUMS
    for name in SUMS:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance
        )
    assert (a.tokens, a.sequences) == (b.tokens, b.sequences)
    assert (a.weight, a.fourth) == pytest.approx((b.weight, b.fourth))


def test_sums_are_what_they_are_called() -> None:
    X, Y = pair(50)
    moments = Moments(8).update(X, Y)
    H = hadamard(8)
    expected = {
        "G": X.T @ X,
        "cross": X.T @ (Y - X),
        "f1": X.sum(0),
        "d1": (Y - X).sum(0),
        "d2": (Y - X).square().sum(0),
        "x_abs": X.abs().sum(0),
        "y_abs": Y.abs().sum(0),
        "ratio": Y.abs().mean(0) / X.abs().mean(0),
        "ratio_rotated": (Y @ H).abs().mean(0) / (X @ H).abs().mean(0),
    }
    for name in SUMS:
        torch.testing.assert_close(getattr(moments, name), expected[name])
    torch.testing.assert_close(moments.B, X.T @ Y)
    assert moments.t == pytest.approx(float(Y.square().sum()))
    assert moments.pruned_error == pytest.approx(float((Y - X).square().sum()))
    assert moments.fourth == pytest.approx(float((Y - X).square().sum(1).square().sum()))
    assert (moments.tokens, moments.weight, moments.sequences) == (50, 50.0, 1)
    assert (moments.width, moments.blocks) == (8, (8,))


def test_features_are_concatenated() -> None:
    """The stream, and input and output of the MLP, each with its own width."""
    X, Y = pair(30)
    hidden, output = pair(30, 5, seed=1)[0], pair(30, seed=2)[0]
    moments = Moments(8, regressor="h, x, f", hidden=5)
    assert moments.update(X, Y, hidden=hidden, output=output).blocks == (5, 8, 8)
    F = torch.cat([hidden, X, output], 1)
    torch.testing.assert_close(moments.G, F.T @ F)
    torch.testing.assert_close(moments.cross, F.T @ (Y - X))
    torch.testing.assert_close(moments.f1, F.sum(0))
    M, b = pair(21)[0], pair(1)[1][0]
    expected = float((X + F @ M + b - Y).square().sum())
    operator = Operator(M, FAMILIES["branches"], moments.regressor, b)
    assert moments.error(operator) == pytest.approx(expected)
    assert moments.error(M) == pytest.approx(float((X + F @ M - Y).square().sum()))


def test_an_unused_token_is_still_the_previous_token_of_the_next() -> None:
    X, Y = pair(6)
    real, used = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0]])
    moments = Moments(8, regressor="n(prev)").update(X, Y, real=real, used=used)
    n = X / X.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(moments.f1, n[1] + n[3])
    alone = Moments(8, regressor="n(prev)").update(X, Y, real=real)
    torch.testing.assert_close(alone.f1, n[1] + n[2] + n[3])
    weight = torch.arange(6.0)
    heavy = Moments(8, regressor="n(prev)").update(X, Y, weight, real=real, used=used)
    torch.testing.assert_close(heavy.f1, 2 * n[1] + 4 * n[3])
    assert (moments.tokens, alone.tokens, heavy.weight) == (2, 4, 6.0)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_moments_add_up_whatever_the_order(lengths: list[int], seed: int) -> None:
    parts = [pair(length, seed=seed + k) for k, length in enumerate(lengths)]
    streamed = Moments(8)
    for X, Y in parts:
        assert streamed.update(X, Y) is streamed
    separate = [Moments(8).update(X, Y) for X, Y in parts]
    assert_same(sum(separate[1:], start=separate[0]), streamed)
    assert_same(sum(separate), streamed)  # type: ignore[arg-type]
    assert_same(sum(reversed(separate)), streamed)  # type: ignore[arg-type]
    a, b = separate[0], separate[-1]
    assert_same(a + b, b + a, tolerance=0.0)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8).filter(any), st.integers(0, 99))
def test_integer_weights_repeat_tokens(counts: list[int], seed: int) -> None:
    X, Y = pair(len(counts), seed=seed)
    times = torch.tensor(counts)
    weighted = Moments(8).update(X, Y, times.double())
    repeated = Moments(8).update(X.repeat_interleave(times, 0), Y.repeat_interleave(times, 0))
    for name in SUMS:
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))
    assert weighted.weight == repeated.weight == sum(counts)
    assert weighted.tokens == sum(times > 0)
    W = torch.randn(8, 8, dtype=torch.float64)
    assert weighted.error(W) == pytest.approx(repeated.error(W))


def test_a_sequence_without_weight_adds_nothing() -> None:
    """Nor does it enter LinearPatch's average over sequences."""
    moments, (X, Y) = Moments(8).update(*pair(10)), pair(4, seed=1)
    before = copy.copy(moments)
    moments.update(X[:0], Y[:0]).update(X, Y, used=torch.zeros(4)).update(X, Y, torch.zeros(4))
    assert_same(moments, before, tolerance=0.0)
    assert Moments(8, regressor="x, n(prev)").update(X[:0], Y[:0]).sequences == 0


def test_a_width_without_a_hadamard_matrix_has_no_rotated_ratio() -> None:
    moments = Moments(6).update(*pair(20, 6))
    assert moments.ratio.all() and not moments.ratio_rotated.any()


@settings(max_examples=20)
@given(st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 99))
def test_error_is_that_of_the_activations(n: int, bias: bool, weighted: bool, seed: int) -> None:
    X, Y = pair(n, seed=seed)
    w = torch.rand(n, dtype=torch.float64) if weighted else torch.ones(n, dtype=torch.float64)
    moments = Moments(8).update(X, Y, w)
    W, b = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    M = W - torch.eye(8, dtype=torch.float64)
    op = Operator(M, FAMILIES["affine"], bias=b if bias else None)
    expected = float((w[:, None] * (op.apply(X) - Y).square()).sum())
    assert moments.error(op) == pytest.approx(expected)
    if not bias:
        assert moments.error(W) == pytest.approx(expected)


def test_error_of_the_exact_operator_is_never_negative() -> None:
    for seed in range(20):  # rounding has either sign
        X, Y = pair(100, seed=seed)
        moments = Moments(8).update(X, X @ Y[:8])
        assert 0 <= moments.error(Y[:8]) < 1e-12 * moments.t


def test_relative_error_is_relative_to_no_repair() -> None:
    X, Y = pair(100)
    moments = Moments(8).update(X, Y)
    assert moments.relative_error(torch.eye(8)) == pytest.approx(1.0)
    expected = moments.error(W := solve(moments).W) / float((Y - X).square().sum())
    assert moments.relative_error(W) == pytest.approx(expected)


def test_relative_error_needs_something_to_recover() -> None:
    X = pair(200)[0] / 3
    with pytest.raises(ValueError, match="nothing to recover"):
        Moments(8).update(X, X).relative_error(torch.eye(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_is_summed_in_float64(dtype: torch.dtype) -> None:
    X, Y = (values.to(dtype) for values in pair(30))
    moments = Moments(8).update(X, Y)
    assert moments.G.dtype == torch.float64
    torch.testing.assert_close(moments.G, X.double().T @ X.double())
    torch.testing.assert_close(moments.cross, X.double().T @ (Y.double() - X.double()))


def replaced(value: complex) -> Callable[[Tensor], Tensor]:
    """A copy of a tensor with this value in one place."""

    def replace(values: Tensor) -> Tensor:
        changed = values.to(torch.tensor(value).dtype)
        changed[3, 2] = value
        return changed

    return replace


@pytest.mark.parametrize("name", ["X_pre", "X_post", "hidden", "output"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(math.nan), "{} has NaN or infinite activations"),
        (replaced(math.inf), "{} has NaN or infinite activations"),
        (replaced(-math.inf), "{} has NaN or infinite activations"),
        (replaced(1j), r"{} is complex \(torch.complex64\): activations are real"),
        (lambda values: values[1:], "(as many tokens|{} must be of the same tokens)"),
        (lambda values: values[:, 1:], "(width|columns)"),
    ],
)
def test_update_refuses_bad_activations_and_adds_nothing(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    (x, y), (hidden, output) = pair(10), pair(10, seed=1)
    sources = {"X_pre": x, "X_post": y, "hidden": hidden[:, :5], "output": output}
    moments = Moments(8, regressor="x, h, f", hidden=5).update(**sources)
    before = copy.copy(moments)
    with pytest.raises(ValueError, match=message.format(name)):
        moments.update(**sources | {name: change(sources[name])})
    assert_same(moments, before, tolerance=0.0)


def test_a_weight_by_the_norm_needs_a_norm() -> None:
    X, Y = pair(5)
    Y[3] = 0
    moments = Moments(8, regressor="x; 1/|y|")
    with pytest.raises(ValueError, match=r"norm 0 after the boundary, where its weight 1/\|y\|"):
        moments.update(X, Y)
    assert moments.tokens == 0
    assert Moments(8).update(X, Y).tokens == 5
    used = torch.tensor([1, 1, 1, 0, 1])
    assert moments.update(X, Y, used=used).tokens == 4
    assert_same(Moments(8, regressor="x; 1/|y|").update(X, Y, used.double()), moments)


def test_update_leaves_activations_and_earlier_sums_alone() -> None:
    X, Y = pair(10)
    copies = X.clone(), Y.clone()
    moments = Moments(8).update(X, Y)
    earlier = moments.G
    value = earlier.clone()
    moments.update(X, Y, torch.full((10,), 2.0))
    assert torch.equal(X, copies[0]) and torch.equal(Y, copies[1])
    assert torch.equal(earlier, value) and moments.G is not earlier


KINDS = [
    (Moments(7), "width"),
    (Moments(8, regressor="n(x)"), "regressor"),
    (Moments(8, regressor="x; 1/|y|"), "regressor"),
    (Moments(8, regressor="x, n(x)"), "blocks"),
]
MORE_KINDS = [
    (Moments(8, boundary=(1, 2)), "boundary"),
    (Moments(8, model="another"), "model"),
    (Moments(8, bias=True), "bias"),
]


@pytest.mark.parametrize(("other", "name"), [*KINDS, *MORE_KINDS])
def test_moments_of_different_kinds_cannot_be_added(other: Moments, name: str) -> None:
    for one, two in ((Moments(8), other), (other, Moments(8))):
        with pytest.raises(ValueError, match=f"different {name} cannot be added"):
            one + two


@pytest.mark.parametrize(("other", "name"), KINDS)
def test_held_out_moments_must_be_of_the_same_kind(other: Moments, name: str) -> None:
    for one, two in ((Moments(8), other), (other, Moments(8))):
        with pytest.raises(ValueError, match=f"training and held-out moments must have one {name}"):
            check_alike(one, two)


def test_held_out_moments_may_be_of_another_boundary_or_model() -> None:
    alike = Moments(8, boundary=(1, 2)), Moments(8, model="another")
    check_alike(*(moments.update(*pair(20)) for moments in alike))


def test_only_moments_can_be_added() -> None:
    with pytest.raises(TypeError):
        Moments(8) + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + Moments(8)


def test_error_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(8, 8\), got \(7, 8\)"):
        Moments(8).error(torch.zeros(7, 8))
    with pytest.raises(ValueError, match=r"shape \(16, 8\), got \(8, 8\)"):
        Moments(8, regressor="x, n(x)").error(torch.eye(8))


@pytest.mark.parametrize("features", ["f", "n(x)", "x, n(x)"])
def test_error_refuses_an_operator_on_other_features(features: str) -> None:
    """Even of the same shape, where the number would be meaningless."""
    regressor = Regressor.parse(features)
    M = torch.zeros(8 * len(regressor.features), 8).double()
    family = FAMILIES["replaceme"] if features == "f" else Family.of(features)
    with pytest.raises(ValueError, match=r"the operator reads .*, these moments are of x: take c"):
        Moments(8).error(Operator(M, family, regressor))
    weighted = Regressor.parse(features + "; 1/|y|")  # weights may differ
    assert Moments(8, regressor=regressor).error(Operator(M, family, weighted)) == 0.0


def test_the_plain_stream_alone_has_B_and_t() -> None:
    other = Moments(8, regressor="x, n(x)").update(*pair(10))
    with pytest.raises(
        ValueError, match=r"B = X_pre' X_post is defined for the plain .* x, n\(x\)"
    ):
        _ = other.B
    with pytest.raises(ValueError, match=r"t = \|\|X_post\|\|\^2 is defined for the plain stream"):
        _ = other.t
    X, Y = pair(10)
    weighted = Moments(8, regressor="x; 1/|y|^2").update(X, Y)
    w = 1 / Y.square().sum(1)
    torch.testing.assert_close(weighted.B, X.T @ (w[:, None] * Y))
    assert weighted.t == pytest.approx(10.0)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    moments = Moments(8).update(*pair(10))
    check_moments(moments)
    getattr(moments, name).view(-1)[2] = bad
    with pytest.raises(ValueError, match=f"moments must be finite, and {name} is not"):
        check_moments(moments)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_gram_matrix_is_symmetric_up_to_rounding(size: float) -> None:
    X, Y = pair(10)
    moments = Moments(8).update(size * X, size * Y)
    largest = float(moments.G.diagonal().max())
    moments.G[0, 1] += 1e-12 * largest
    check_moments(moments)
    moments.G[0, 1] += 1e-6 * largest
    with pytest.raises(ValueError, match="must have a symmetric Gram matrix, got max"):
        check_moments(moments)


def test_a_stream_of_one_channel() -> None:
    X, Y = pair(10, 1)
    assert float(Moments(1).update(X, Y).B) == pytest.approx(float((X * Y).sum()))


def test_a_zero_channel_has_the_ratio_of_one_that_does_not_change() -> None:
    X, Y = pair(10)
    X[:, 2] = 0.0
    ratio = Moments(8).update(X, Y).ratio
    assert ratio[2] == 1.0 and (ratio[[0, 1, 3]] != 1.0).all()


def test_copy_on_a_device_and_repr() -> None:
    moments = Moments(8, boundary=(1, 3), model="m").update(*pair(10))
    moved = moments.to("cpu")
    assert moved is not moments and moved.boundary == (1, 3) and moved.model == "m"
    assert_same(moved, moments, tolerance=0.0)
    assert repr(moments) == "Moments(8, regressor='x', tokens=10, boundary=(1, 3))"
    assert repr(Moments(8)) == "Moments(8, regressor='x', tokens=0)"


@pytest.mark.parametrize("boundary", [None, Boundary(3, 7)])
@pytest.mark.parametrize("regressor", ["x", "x, z(x); 1/|y|^0.5", "h, f"])
def test_save_and_load(tmp_path: Path, boundary: Boundary | None, regressor: str) -> None:
    (X, Y), (hidden, output) = pair(10), pair(10, seed=1)
    kind: dict[str, Any] = {"regressor": regressor, "hidden": 5, "bias": boundary is None}
    moments = Moments(8, boundary=boundary, model="a/b", **kind)
    moments.update(X, Y, torch.rand(10), hidden=hidden[:, :5], output=output)
    path = tmp_path / "m.safetensors"
    Moments(3).save(path)  # to be replaced
    moments.save(path)
    loaded = Moments.load(str(path))
    assert_same(loaded, moments, tolerance=0.0)
    assert loaded.counts() == moments.counts()
    for name in ("regressor", "blocks", "bias"):
        assert getattr(loaded, name) == getattr(moments, name)
    assert (loaded.boundary, loaded.model) == (boundary, "a/b")
    assert loaded.boundary is None or isinstance(loaded.boundary, Boundary)
    assert_same(loaded + moments, moments + moments, tolerance=0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_load_refuses_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    Moments(8).update(*pair(10)).save(path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:3], b"", b"\xff" * 64 + content[64:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read as moments"):
            Moments.load(path)


def test_load_refuses_something_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"G": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a ghostlib moments file"):
        Moments.load(path)
    save_file({"G": torch.ones(2)}, path, metadata={"format": "ghostlib-moments-1"})
    with pytest.raises(ValueError, match="cannot be read as moments"):
        Moments.load(path)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "absent.safetensors")


def test_load_refuses_sums_of_another_precision_or_without_their_counts(tmp_path: Path) -> None:
    path = tmp_path / "edited.safetensors"
    Moments(8).update(*pair(20)).save(path)
    sums = load_file(path)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    save_file(sums | {"G": sums["G"].float()}, path, metadata=meta)
    with pytest.raises(ValueError, match=r"G is \(8, 8\) torch.float32"):
        Moments.load(path)
    for wrong in ("tokens", "regressor", "hidden", "bias"):
        edited = {"moments": meta["moments"].replace(f'"{wrong}"', '"wrong"')}
        save_file(sums, path, metadata=edited)
        with pytest.raises(ValueError, match=f"cannot be read as moments: '{wrong}'"):
            Moments.load(path)
    edited = {"moments": meta["moments"].replace('"regressor": "x"', '"regressor": "x, n(x)"')}
    save_file(sums, path, metadata=edited)
    with pytest.raises(ValueError, match=r"cannot be read as moments: G is \(8, 8\)"):
        Moments.load(path)


def test_half_precision_activations_do_not_overflow_the_rotated_sums() -> None:
    X = torch.ones(2048, 8, dtype=torch.float16)
    X[:, 0] = 300.0
    moments = Moments(8).update(X, 2 * X)
    torch.testing.assert_close(moments.ratio_rotated, torch.full((8,), 2.0, dtype=torch.float64))


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    Moments(8).update(*pair(10)).save(path)
    before = load_file(path)

    failure = Mock(side_effect=OSError("disk full"))
    monkeypatch.setattr("ghostlib.statistics.moments.save_file", failure)
    with pytest.raises(OSError, match="disk full"):
        Moments(8).save(path)
    assert torch.equal(load_file(path)["G"], before["G"])
    assert len(list(tmp_path.iterdir())) == 1


# --- subsets of features --------------------------------------------------------------------------

WIDE = "x, n(x), h; 1/|y|"


def collect(regressor: str) -> Moments:
    moments = Moments(8, regressor=regressor, hidden=5)
    return moments.update(*pair(20), hidden=pair(20, 5, seed=1)[0])


@pytest.mark.parametrize(
    "regressor", [WIDE, "x; 1/|y|", "h; 1/|y|", "x, h; 1/|y|", "h, x; 1/|y|", "n(x), h, x; 1/|y|"]
)
def test_a_part_equals_moments_collected_directly(regressor: str) -> None:
    wide, alone = collect(WIDE), collect(regressor)
    part = wide.part(regressor)
    assert_same(part, alone, tolerance=1e-12)
    assert (part.regressor, part.blocks) == (alone.regressor, alone.blocks)
    assert part.d2 is wide.d2


def test_a_bias_belongs_to_the_input_of_the_down_projection() -> None:
    wide = Moments(8, regressor="x, h, f", hidden=5, bias=True)
    parts = {name: wide.part(name).bias for name in ("x", "h", "x, h", "f", "x, f", "f, h")}
    assert parts == {"x": False, "h": True, "x, h": True, "f": False, "x, f": False, "f, h": True}


def test_leading_features_are_views_and_an_update_leaves_the_original_alone() -> None:
    wide = collect(WIDE)
    part, last = wide.part("x, n(x); 1/|y|"), wide.part("h; 1/|y|")
    assert part.G.data_ptr() == wide.G.data_ptr() and last.G.data_ptr() != wide.G.data_ptr()
    before = wide.to("cpu")
    part.update(*pair(5, seed=3))
    assert_same(wide, before, tolerance=0.0)
    assert part.tokens == 25


@pytest.mark.parametrize("regressor", ["x", "x; 1/|y|^2", "f; 1/|y|", "x, z(x); 1/|y|", "n(prev)"])
def test_a_missing_part_is_named(regressor: str) -> None:
    with pytest.raises(ValueError, match=r"moments of x, n\(x\), h; 1/\|y\| do not hold those of"):
        collect(WIDE).part(regressor)
