"""Moments against the activations they summarise."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ghostlib.linalg.hadamard import hadamard
from ghostlib.models.boundaries import Boundary
from ghostlib.operators.solve import Operator, solve
from ghostlib.statistics.moments import Moments

SUMS = ("G", "B", "y2", "x1", "y1", "x_abs", "y_abs", "ratio", "ratio_rotated")


def pair(tokens: int, p: int = 8, q: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, p, dtype=torch.float64, generator=generator)
    return X, torch.randn(tokens, q or p, dtype=torch.float64, generator=generator)


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    for name in SUMS:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance
        )
    assert (a.tokens, a.sequences) == (b.tokens, b.sequences)
    assert a.weight == pytest.approx(b.weight)


def test_sums_are_what_they_are_called() -> None:
    X, Y = pair(50)
    moments = Moments(8).update(X, Y)
    H = hadamard(8)
    expected = {
        "G": X.T @ X,
        "B": X.T @ Y,
        "y2": Y.square().sum(0),
        "x1": X.sum(0),
        "y1": Y.sum(0),
        "x_abs": X.abs().sum(0),
        "y_abs": Y.abs().sum(0),
        "ratio": Y.abs().mean(0) / X.abs().mean(0),
        "ratio_rotated": (Y @ H).abs().mean(0) / (X @ H).abs().mean(0),
    }
    for name in SUMS:
        torch.testing.assert_close(getattr(moments, name), expected[name])
    assert moments.t == pytest.approx(float(Y.square().sum()))
    assert (moments.tokens, moments.weight, moments.sequences) == (50, 50.0, 1)
    assert (moments.width, moments.out_width) == (8, 8)


@settings(max_examples=25, deadline=None)
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


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8).filter(any), st.integers(0, 99))
def test_integer_weights_repeat_tokens(counts: list[int], seed: int) -> None:
    X, Y = pair(len(counts), seed=seed)
    times = torch.tensor(counts)
    weighted = Moments(8).update(X, Y, times.double())
    repeated = Moments(8).update(X.repeat_interleave(times, 0), Y.repeat_interleave(times, 0))
    for name in SUMS:
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))
    assert weighted.weight == repeated.weight == sum(counts)
    W = torch.randn(8, 8, dtype=torch.float64)
    assert weighted.error(W) == pytest.approx(repeated.error(W))


def test_two_widths() -> None:
    X, Y = pair(20, 8, 3)
    moments = Moments(8, 3).update(X, Y)
    assert moments.B.shape == (8, 3) and (moments.width, moments.out_width) == (8, 3)
    W = torch.randn(8, 3, dtype=torch.float64)
    assert moments.error(W) == pytest.approx(float((X @ W - Y).square().sum()))
    assert not moments.ratio.any() and not moments.ratio_rotated.any()
    with pytest.raises(ValueError, match="equal widths"):
        moments.relative_error(W)


def test_a_width_without_a_hadamard_matrix_keeps_no_rotated_ratio() -> None:
    moments = Moments(6).update(*pair(20, 6))
    assert moments.ratio.all() and not moments.ratio_rotated.any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 99))
def test_error_is_that_of_the_activations(n: int, bias: bool, weighted: bool, seed: int) -> None:
    X, Y = pair(n, seed=seed)
    w = torch.rand(n, dtype=torch.float64) if weighted else torch.ones(n, dtype=torch.float64)
    moments = Moments(8).update(X, Y, w)
    W, b = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    op = Operator(W, "any", 64, 8, 1.0, 0.0, b if bias else None)
    expected = float((w[:, None] * (op.apply(X) - Y).square()).sum())
    assert moments.error(op) == pytest.approx(expected)
    if not bias:
        assert moments.error(W) == pytest.approx(expected)


def test_error_of_the_exact_operator_is_never_negative() -> None:
    X, _ = pair(100)
    W = torch.randn(8, 8, dtype=torch.float64)
    moments = Moments(8).update(X, X @ W)
    assert 0 <= moments.error(W) < 1e-12 * moments.t


def test_relative_error_compares_with_doing_nothing() -> None:
    X, Y = pair(100)
    moments = Moments(8).update(X, Y)
    assert moments.relative_error(torch.eye(8)) == pytest.approx(1.0)
    expected = moments.error(W := solve(moments).W) / float((Y - X).square().sum())
    assert moments.relative_error(W) == pytest.approx(expected)


def test_relative_error_needs_something_to_recover() -> None:
    X = torch.randint(-9, 9, (40, 8), generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(ValueError, match="nothing to recover"):
        Moments(8).update(X, X).relative_error(torch.eye(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_is_summed_in_float64(dtype: torch.dtype) -> None:
    X, Y = (values.to(dtype) for values in pair(30))
    moments = Moments(8).update(X, Y)
    assert moments.G.dtype == torch.float64
    torch.testing.assert_close(moments.G, X.double().T @ X.double())
    torch.testing.assert_close(moments.B, X.double().T @ Y.double())


def test_effective_rank_counts_singular_values() -> None:
    X, Y = pair(40)
    X = X[:, :5] @ torch.randn(5, 8, dtype=torch.float64)
    moments = Moments(8).update(X, Y)
    assert moments.effective_rank() == 5
    Q = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64))[0]
    moments = Moments(8).update(Q * 10.0 ** -torch.arange(8), Y)
    assert [moments.effective_rank(rcond) for rcond in (0.5, 1.5e-2, 1.5e-5)] == [1, 2, 5]
    assert Moments(8).effective_rank() == 0


@pytest.mark.parametrize("rcond", [0.0, 1.0, -1.0, float("nan")])
def test_effective_rank_needs_a_fraction(rcond: float) -> None:
    with pytest.raises(ValueError, match="rcond must lie between 0 and 1"):
        Moments(8).effective_rank(rcond)


@pytest.mark.parametrize("widths", [(0,), (-1,), (8, 0)])
def test_widths_must_be_positive(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Moments(*widths)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("x", "y", "weight", "message"),
    [
        ((5, 8), (4, 8), None, r"as many tokens, got \(5, 8\) and \(4, 8\)"),
        ((2, 5, 8), (2, 5, 8), None, r"must be \(tokens, width\)"),
        ((5, 7), (5, 8), None, "have widths 8 and 8, got activations of widths 7 and 8"),
        ((5, 8), (5, 9), None, "got activations of widths 8 and 9"),
        ((5, 8), (5, 8), [1.0, 1.0], r"weight must have shape \(5,\), got \(2,\)"),
        ((5, 8), (5, 8), [1.0, 1.0, -1.0, 1.0, 1.0], "finite and non-negative"),
        ((5, 8), (5, 8), [1.0, 1.0, NAN, 1.0, 1.0], "finite and non-negative"),
    ],
)
def test_update_refuses(x: tuple, y: tuple, weight: list[float] | None, message: str) -> None:
    moments = Moments(8)
    w = None if weight is None else torch.tensor(weight)
    with pytest.raises(ValueError, match=message):
        moments.update(torch.ones(x), torch.ones(y), w)
    assert moments.tokens == 0 and not moments.G.any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1])
def test_update_refuses_what_is_not_finite_and_adds_nothing(bad: float, which: int) -> None:
    moments = Moments(8).update(*pair(10))
    before = Moments(8).update(*pair(10))
    spoiled = pair(10, seed=1)
    spoiled[which][3, 2] = bad
    with pytest.raises(ValueError, match=f"{'XY'[which]} has NaN or infinite"):
        moments.update(*spoiled)
    assert_same(moments, before, tolerance=0.0)


def test_update_leaves_activations_and_earlier_sums_alone() -> None:
    X, Y = pair(10)
    copies = X.clone(), Y.clone()
    moments = Moments(8).update(X, Y)
    held = moments.G
    value = held.clone()
    moments.update(X, Y, torch.full((10,), 2.0))
    assert torch.equal(X, copies[0]) and torch.equal(Y, copies[1])
    assert torch.equal(held, value) and moments.G is not held


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Moments(7, 8), "width"),
        (Moments(8, 7), "out_width"),
        (Moments(8, boundary=(1, 2)), "boundary"),
        (Moments(8, model="another"), "model"),
    ],
)
def test_moments_of_different_things_cannot_be_added(other: Moments, what: str) -> None:
    with pytest.raises(ValueError, match=f"different {what} cannot be added"):
        Moments(8) + other


def test_only_moments_can_be_added() -> None:
    with pytest.raises(TypeError):
        Moments(8) + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + Moments(8)


def test_error_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(8, 8\), got \(7, 8\)"):
        Moments(8).error(torch.zeros(7, 8))


def test_copy_on_a_device_and_repr() -> None:
    moments = Moments(8, boundary=(1, 3), model="m").update(*pair(10))
    moved = moments.to("cpu")
    assert moved is not moments and moved.boundary == (1, 3) and moved.model == "m"
    assert_same(moved, moments, tolerance=0.0)
    assert "width=8" in repr(moments) and "tokens=10" in repr(moments) and "1, 3" in repr(moments)
    assert "boundary" not in repr(Moments(8))


@pytest.mark.parametrize("boundary", [None, Boundary(3, 7)])
def test_save_and_load(tmp_path: Path, boundary: Boundary | None) -> None:
    X, Y = pair(10, 8, 4)
    moments = Moments(8, 4, boundary=boundary, model="a/b").update(X, Y, torch.rand(10))
    path = tmp_path / "m.safetensors"
    Moments(3).save(path)  # to be replaced
    moments.save(path)
    loaded = Moments.load(str(path))
    assert_same(loaded, moments, tolerance=0.0)
    assert loaded.weight == moments.weight
    assert (loaded.boundary, loaded.model) == (boundary, "a/b")
    assert loaded.boundary is None or isinstance(loaded.boundary, Boundary)
    assert_same(loaded + moments, moments + moments, tolerance=0.0)
    assert [found.name for found in tmp_path.iterdir()] == ["m.safetensors"]


def test_load_refuses_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    Moments(8).update(*pair(10)).save(path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:3], b"", b"\xff" * 64 + whole[64:]):
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
    save_file(sums, path, metadata={k: v for k, v in meta.items() if k != "tokens"})
    with pytest.raises(ValueError, match="cannot be read as moments: 'tokens'"):
        Moments.load(path)


def test_half_precision_activations_do_not_overflow_the_rotated_sums() -> None:
    X = torch.ones(2048, 8, dtype=torch.float16)
    X[:, 0] = 300.0
    moments = Moments(8).update(X, 2 * X)
    torch.testing.assert_close(moments.ratio_rotated, torch.full((8,), 2.0, dtype=torch.float64))


def test_a_difference_that_is_rounding_leaves_nothing_to_recover() -> None:
    X, _ = pair(200)
    X = X.double() / 3
    with pytest.raises(ValueError, match="nothing to recover"):
        Moments(8).update(X, X).relative_error(torch.eye(8))


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    Moments(8).update(*pair(10)).save(path)
    before = load_file(path)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ghostlib.statistics.moments.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Moments(8).save(path)
    assert torch.equal(load_file(path)["G"], before["G"])
    assert len(list(tmp_path.iterdir())) == 1
