"""Branches: features, weights and their closed form against stored activations and brute force."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, WIDTH, saved_and_loaded, tiny_model, tiny_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.models.architectures import receiver
from ghostlib.models.layers import stream_norm
from ghostlib.models.streams import tap
from ghostlib.operators.paths import RIDGES
from ghostlib.operators.solve import REGRESSORS, solve
from ghostlib.selection.trials import Trials
from ghostlib.statistics.features import (
    FEATURES,
    WEIGHTS,
    Regressor,
    design,
    generic,
    observe,
    previous,
    rms_norm,
    standardise,
)

GAP = gl.Boundary(2, 4)
BRANCHED = [name for name, regressor in REGRESSORS.items() if regressor != "mlp"]
READS_RAW = ("olmo2",)
SEEDS = st.integers(0, 10_000)
RIDGE = 1e-3
SINGULAR = pytest.mark.filterwarnings("ignore::ghostlib.linalg.gram.SingularGramWarning")


def streams(seed: int = 0, tokens: int = 80, width: int = 6) -> tuple[Tensor, Tensor]:
    """X with a massive token in it, and Y that depends on X, n(X) and the token before."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    X = randn(tokens, width) @ randn(width, width) + randn(width)
    X[0] *= 40
    n = X / X.square().mean(1, keepdim=True).sqrt()
    before = torch.cat([torch.zeros(1, width).double(), n[:-1]])
    Y = X + 0.3 * X @ randn(width, width) + n @ randn(width, width) + before @ randn(width, width)
    return X, Y + randn(tokens, width)


def moments_of(regressor: str, *pairs: tuple[Tensor, Tensor]) -> gl.Moments:
    width = pairs[0][0].shape[1]
    count = len(Regressor.parse(regressor).features)
    moments = gl.Moments(count * width, width, regressor=regressor)
    for X, Y in pairs:
        observe(moments, X, Y)
    return moments


def by_hand(regressor: str, X: Tensor, Y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of features and of Delta, both scaled by the root of the token's weight."""
    listed, _, weight = regressor.partition("; ")
    x = X.numpy()
    n = x / np.sqrt((x**2).mean(1, keepdims=True))
    centred = x - x.mean(1, keepdims=True)
    z = centred / centred.std(1, keepdims=True)
    known = {"x": x, "n(x)": n, "z(x)": z}
    for letter, now in (("n", n), ("z", z)):
        known[f"{letter}(prev)"] = np.vstack([np.zeros_like(now[:1]), now[:-1]])
    F = np.hstack([known[name] for name in listed.split(", ")])
    norm = np.linalg.norm(Y.numpy(), axis=1)
    w = {"": norm**0, "1/|y|": norm**-1, "1/|y|^2": norm**-2}[weight][:, None]
    return np.sqrt(w) * F, np.sqrt(w) * (Y - X).numpy()


ALL = [*(r for name, r in REGRESSORS.items() if r != "mlp"), "x, z(x), z(prev); 1/|y|^2", "n(x)"]

# --- the closed form --------------------------------------------------------------------------


@pytest.mark.parametrize("regressor", ALL)
def test_the_fit_is_that_of_lstsq_on_stored_activations(regressor: str) -> None:
    pairs = [streams(seed) for seed in range(2)]
    F, D = (
        np.vstack(part) for part in zip(*(by_hand(regressor, X, Y) for X, Y in pairs), strict=True)
    )
    moments = moments_of(regressor, *pairs)
    torch.testing.assert_close(moments.G, torch.from_numpy(F.T @ F))
    M = np.linalg.lstsq(F, D, rcond=None)[0]
    fit = gl.operators.families.branches(moments)
    torch.testing.assert_close(fit.W, torch.from_numpy(M), rtol=1e-6, atol=1e-7)
    assert fit.dof == M.size and fit.rank == len(M) - regressor.count("z(")
    assert fit.trouble is None
    assert moments.error(fit.W) == pytest.approx(float(((F @ M - D) ** 2).sum()), rel=1e-9)
    assert moments.nothing == pytest.approx(float((D**2).sum()))
    assert moments.relative_error(fit.W) == pytest.approx(moments.error(fit.W) / moments.nothing)
    assert moments.relative_error(torch.zeros_like(fit.W)) == pytest.approx(1.0)


@pytest.mark.parametrize("regressor", ["x, n(x)", "x, n(x), n(prev); 1/|y|"])
def test_bias_and_rank_and_ridge_by_their_own_references(regressor: str) -> None:
    X, Y = streams(3)
    moments, (F, D) = moments_of(regressor, (X, Y)), by_hand(regressor, X, Y)
    root = by_hand("x", X, Y)[0][:, :1] / X.numpy()[:, :1]
    if "; " in regressor:
        root = np.sqrt(1 / np.linalg.norm(Y.numpy(), axis=1))[:, None]
    # a bias is a column of ones, scaled as the rows are
    solved = np.linalg.lstsq(np.hstack([F, root]), D, rcond=None)[0]
    fit = gl.operators.families.branches(moments, bias=True)
    assert fit.bias is not None
    torch.testing.assert_close(fit.W, torch.from_numpy(solved[:-1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.bias, torch.from_numpy(solved[-1]), rtol=1e-6, atol=1e-6)
    assert fit.dof == solved.size
    # a ridge is rows of penalty, in units of each block
    C = X.shape[1]
    blocks = (F**2).reshape(len(F), -1, C).sum((0, 2)) / C
    rows = np.diag(np.sqrt(0.3 * blocks.repeat(C)))
    penalised = np.linalg.lstsq(np.vstack([F, rows]), np.vstack([D, 0 * rows[:, :C]]), rcond=None)
    ridge = gl.operators.families.branches(moments, relative_ridge=0.3).W
    torch.testing.assert_close(ridge, torch.from_numpy(penalised[0]), rtol=1e-7, atol=1e-8)
    # reduced rank: the fitted values' own truncated SVD
    full = np.linalg.lstsq(F, D, rcond=None)[0]
    _, _, Vh = np.linalg.svd(F @ full)
    for r in (1, 4, C):
        low = gl.operators.families.branches(moments, rank=r)
        expected = full @ Vh[:r].T @ Vh[:r]
        torch.testing.assert_close(low.W, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
        assert low.dof == r * (len(full) + C - r)


def test_more_features_never_fit_worse() -> None:
    for seed in range(5):
        pair = streams(seed)
        errors = [
            solve(moments_of(REGRESSORS[name], pair), name).residual
            for name in ("two-branch", "three-branch")
        ]
        plain = solve(gl.Moments(6).update(*pair)).residual
        assert plain >= errors[0] >= errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must lie between 1 and the width 6, got 0"),
        ({"rank": 7}, "got 7"),
        ({"relative_ridge": 0.0}, "positive and finite"),
        ({"rcond": 1e-3, "relative_ridge": 1.0}, "choose one"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(moments_of("x, n(x)", streams()), "two-branch", **options)
    with pytest.raises(TypeError):
        solve(moments_of("x, n(x)", streams()), "two-branch", ridge=1e-6)


def test_a_family_is_solved_from_its_own_moments() -> None:
    with pytest.raises(ValueError, match=r"two-branch is solved from moments of the x, n\(x\), th"):
        solve(gl.Moments(6).update(*streams()), "two-branch")
    with pytest.raises(ValueError, match=r"ghost is solved .* stream, these are of the x, n\(x\)"):
        solve(moments_of("x, n(x)", streams()))
    with pytest.raises(ValueError, match="different regressor"):
        _ = moments_of("x, n(x)", streams()) + moments_of("x, n(x); 1/|y|", streams())


def test_too_few_tokens_are_reported() -> None:
    with pytest.warns(gl.SingularGramWarning, match="determine .* of 12 directions"):
        solve(moments_of("x, n(x)", streams(tokens=9)), "two-branch")


@pytest.mark.parametrize("name", ["ghost-relative", "three-branch-relative"])
def test_ridge_and_rank_are_chosen_on_held_out_moments(name: str) -> None:
    train, held_out = (
        moments_of(REGRESSORS[name], *(streams(seed) for seed in seeds))
        for seeds in ([0, 1], [2, 3])
    )
    ridges = (1e-4, 1e-2, 1.0)
    path = gl.ridge_path(train, ridges, held_out)
    assert path.held_out_error is not None
    for ridge, mine, theirs in zip(ridges, path.train_error, path.held_out_error, strict=True):
        op = solve(train, name, relative_ridge=ridge)
        assert op.residual == pytest.approx(float(mine), rel=1e-9)
        assert held_out.error(op) == pytest.approx(float(theirs), rel=1e-9)
    best = gl.choose_ridge(train, ridges, held_out=held_out)
    assert best == ridges[int(path.held_out_error.argmin())]
    ranks = gl.rank_path(train, held_out, relative_ridge=1e-2)
    for rank in (1, 3, 6):
        op = solve(train, name, rank=rank, relative_ridge=1e-2)
        assert op.residual == pytest.approx(float(ranks.train_error[rank - 1]), rel=1e-9)
        assert held_out.error(op) == pytest.approx(float(ranks.held_out_error[rank - 1]), rel=1e-9)
    for other in (moments_of("n(x)", streams()), gl.Moments(6).update(*streams())):
        with pytest.raises(ValueError, match=r"must have one (width|regressor), got"):
            gl.ridge_path(train, ridges, other)


# --- invariances ------------------------------------------------------------------------------


def rotation(seed: int, width: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=g)).Q


HOW = st.sampled_from([{}, {"relative_ridge": 1e-2}, {"rcond": 0.03}, {"rank": 2}])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(BRANCHED), HOW, st.floats(-3, 3))
@SINGULAR
def test_the_scale_of_the_stream_changes_nothing(seed, name, how, exponent) -> None:
    """Twice the stream gives twice the repair, and the same repaired stream."""
    X, Y = streams(seed)
    a = 10**exponent
    one = solve(moments_of(REGRESSORS[name], (X, Y)), name, **how)
    other = solve(moments_of(REGRESSORS[name], (a * X, a * Y)), name, **how)
    torch.testing.assert_close(other.apply(a * X) / a, one.apply(X), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(BRANCHED), HOW)
@SINGULAR
def test_a_rotated_basis_gives_the_rotated_repair(seed, name, how) -> None:
    X, Y = streams(seed)
    R = rotation(seed)
    one = solve(moments_of(REGRESSORS[name], (X, Y)), name, **how)
    other = solve(moments_of(REGRESSORS[name], (X @ R, Y @ R)), name, **how)
    torch.testing.assert_close(other.apply(X @ R) @ R.T, one.apply(X), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(BRANCHED), HOW, st.integers(1, 3))
@SINGULAR
def test_order_and_number_of_tokens_change_nothing(seed, name, how, copies) -> None:
    """Tokens are permuted where features do not look back; sequences always, and repeated."""
    parts = [streams(seed + k, tokens=30) for k in range(3)]
    one = solve(moments_of(REGRESSORS[name], *parts), name, **how)
    if "prev" not in REGRESSORS[name]:
        g = torch.Generator().manual_seed(seed)
        parts = [(X[p], Y[p]) for X, Y in parts for p in [torch.randperm(len(X), generator=g)]]
    other = solve(moments_of(REGRESSORS[name], *(parts[::-1] * copies)), name, **how)
    torch.testing.assert_close(other.W, one.W, rtol=1e-6, atol=1e-6)
    together = moments_of(REGRESSORS[name], parts[0]) + moments_of(REGRESSORS[name], *parts[1:])
    torch.testing.assert_close(solve(together, name, **how).W, one.W, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(BRANCHED), st.floats(-3, 3))
def test_no_choice_of_a_ridge_depends_on_scale_basis_or_order(seed, name, exponent) -> None:
    """Held-out errors along the path, in units of doing nothing, and so the ridge chosen."""
    pairs = [[streams(seed + k, tokens=40) for k in part] for part in ((0, 1, 2), (3, 4))]
    R = 10**exponent * rotation(seed)
    turned = [[(X @ R, Y @ R) for X, Y in reversed(part)] for part in pairs]
    if "prev" not in REGRESSORS[name]:
        turned = [[(X.flip(0), Y.flip(0)) for X, Y in part] for part in turned]
    chosen, paths = [], []
    for parts in (pairs, turned):
        train, held_out = (moments_of(REGRESSORS[name], *part) for part in parts)
        path = gl.ridge_path(train, held_out=held_out)
        assert path.held_out_error is not None
        paths.append(path.held_out_error / held_out.nothing)
        chosen.append(RIDGES.index(gl.choose_ridge(train, held_out=held_out)))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-6, atol=1e-9)
    assert paths[0][chosen[1]] == pytest.approx(float(paths[0][chosen[0]]), rel=1e-6)


def test_where_every_token_is_massive_there_is_nothing_special() -> None:
    X, Y = streams(1)
    for name in BRANCHED:
        calm = moments_of(REGRESSORS[name], (X, Y))
        massive = moments_of(REGRESSORS[name], (1e4 * X, 1e4 * Y))
        assert massive.effective_tokens == pytest.approx(calm.effective_tokens)


# --- features and weights ---------------------------------------------------------------------


def test_features_are_what_norms_return_before_their_weights() -> None:
    x = 5 * torch.randn(3, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x), nn.RMSNorm(16, eps=0).double()(x))
    torch.testing.assert_close(standardise(x), nn.LayerNorm(16, eps=0).double()(x))
    for name, feature in FEATURES.items():
        assert not feature.of(torch.zeros(2, 16)).any(), name
    assert not standardise(torch.full((1, 16), 0.1)).any()
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.full((2, 16), 300.0, dtype=dtype)  # whose square is too large for float16
        assert rms_norm(half).dtype == dtype and (rms_norm(half) == 1).all()


def test_the_token_before_skips_padding_and_goes_on() -> None:
    x = torch.arange(1.0, 13.0).view(2, 6, 1)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]]).bool()
    found, last = previous(x, real)
    assert found[..., 0].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 9, 10, 10]]
    assert last[:, 0].tolist() == [6, 12]
    for cut in range(1, 6):  # in two parts
        first, state = previous(x[:, :cut], real[:, :cut])
        second, state = previous(x[:, cut:], real[:, cut:], state)
        assert torch.equal(torch.cat([first, second], 1), found) and torch.equal(state, last)


def test_weights_are_functions_of_the_norm_alone() -> None:
    norm = torch.tensor([0.5, 4.0])
    assert WEIGHTS["1"](norm).tolist() == [1, 1]
    assert WEIGHTS["1/|y|"](norm).tolist() == [2, 0.25]
    assert WEIGHTS["1/|y|^2"](norm).tolist() == [4, 0.0625]


def test_regressors_are_read_back_and_errors_named() -> None:
    for text in ALL:
        assert str(Regressor.parse(text)) == text
    both = Regressor.parse("x, n(x), n(prev); 1/|y|")
    assert str(both.resolve("layer")) == "x, z(x), z(prev); 1/|y|"
    assert both.resolve("layer").resolve("rms") == both
    assert generic(str(both.resolve("layer"))) == str(both)
    with pytest.raises(ValueError, match=r"unknown feature 'n\(y\)'; did you mean 'n\(x\)'"):
        Regressor.parse("x, n(y)")
    with pytest.raises(ValueError, match=r"unknown weight '1/\|z\|'"):
        Regressor.parse("x; 1/|z|")
    with pytest.raises(ValueError, match="names a feature twice"):
        Regressor.parse("x, x")


def test_bad_weights_and_tokens_are_refused() -> None:
    X, Y = streams()
    moments = gl.Moments(6)
    for bad in (float("nan"), -1.0, float("inf")):
        with pytest.raises(ValueError, match="weights must be finite and non-negative"):
            moments.update(X, Y, torch.full((len(X),), bad))
    with pytest.raises(ValueError, match="hold no tokens"):
        solve(gl.Moments(6).update(X, Y, torch.zeros(len(X))))
    Y[3] = 0
    with pytest.raises(ValueError, match=r"norm 0 after the boundary, where its weight 1/\|y\|"):
        moments_of("x; 1/|y|", (X, Y))
    assert moments_of("x, n(x)", (X, Y)).tokens == len(X)
    Y[3, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        moments_of("x, n(x)", (X, Y))


# --- the streaming pass -----------------------------------------------------------------------


def stored(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    with tap(model, GAP, seen.__setitem__) as run:
        run(input_ids=ids) if mask is None else run(input_ids=ids, attention_mask=mask)
    return seen


@pytest.mark.parametrize("name", ["two-branch-relative", "three-branch"])
def test_streamed_moments_equal_stored_activations(any_tiny: PreTrainedModel, name: str) -> None:
    regressor = REGRESSORS[name]
    ids = tiny_windows(3, 20)
    if any_tiny.config.model_type in READS_RAW:
        with pytest.raises(ValueError, match=r"reads its stream without a norm: .*ghost-relative"):
            gl.calibrate(any_tiny, ids, [GAP], regressors=[regressor])
        return
    found = gl.calibrate(any_tiny, ids, [GAP], batch_size=2, regressors=[regressor]).of(regressor)
    seen = stored(any_tiny, ids)
    kind = Regressor.parse(regressor).resolve(stream_norm(any_tiny))
    expected = moments_of(
        str(kind), *((seen[2][i].double(), seen[4][i].double()) for i in range(len(ids)))
    )
    assert found[GAP].regressor == expected.regressor and found[GAP].boundary == GAP
    for what in ("G", "B", "x1", "y2"):
        mine, theirs = getattr(found[GAP], what), getattr(expected, what)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert found[GAP].effective_tokens == pytest.approx(expected.effective_tokens, rel=1e-4)


def test_the_norm_a_model_is_said_to_have_is_the_one_it_has(any_tiny: PreTrainedModel) -> None:
    if any_tiny.config.model_type in READS_RAW:
        return
    norm = receiver(any_tiny, LAYERS)
    x = torch.randn(4, WIDTH) + 2
    blind = torch.allclose(norm(x), norm(x + 3), atol=1e-3)  # to what all channels share
    assert blind == (stream_norm(any_tiny) == "layer")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_leading_tokens(side: str) -> None:
    """A skipped token is still the one before the next; padding never is."""
    model, ids, regressor = tiny_model("llama"), tiny_windows(2, 12), "x, n(x), n(prev); 1/|y|"
    padded, mask = torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, 15, dtype=torch.long)
    rows = slice(3, None) if side == "left" else slice(0, 12)
    padded[:, rows], mask[:, rows] = ids, 1
    how: dict[str, Any] = {"skip_leading": 1, "regressors": [regressor]}
    one = gl.calibrate(model, ids, [GAP], **how).of(regressor)[GAP]
    other = gl.calibrate(model, padded, [GAP], attention_mask=mask, **how).of(regressor)[GAP]
    assert one.tokens == other.tokens == 22
    torch.testing.assert_close(one.G, other.G, rtol=1e-4, atol=1e-4)
    seen = stored(model, ids)
    F = torch.cat([design(Regressor.parse(regressor).features, x)[1:] for x in seen[2].double()])
    w = 1 / seen[4][:, 1:].double().flatten(0, 1).norm(dim=1)
    torch.testing.assert_close(one.G, F.T @ (w[:, None] * F), rtol=1e-4, atol=1e-4)


def test_what_was_not_collected_is_named(tmp_path) -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, [GAP])
    assert stats.of("stream") is stats and stats.of("mlp") == {}
    with pytest.raises(ValueError, match=r"no moments of x, n\(x\) were collected: calibrate\("):
        gl.recover(model, stats, GAP.removed, "two-branch")
    with pytest.raises(ValueError, match="leave moments=True"):
        gl.calibrate(model, ids, [GAP], moments=False, regressors=["x, n(x)"])
    with pytest.raises(ValueError, match="unknown feature"):
        gl.calibrate(model, ids, [GAP], regressors=["y"])
    stats = gl.calibrate(model, ids, [GAP], regressors=["mlp", "stream", "x, n(x)"])
    assert set(stats.mlp) == set(stats) == set(stats.of("x, n(x)")) == {GAP}
    moments = stats.of("x, n(x)")[GAP]
    moments.save(tmp_path / "m.safetensors")
    again = gl.Moments.load(tmp_path / "m.safetensors")
    assert again.regressor == "x, n(x)" and again.effective_tokens == moments.effective_tokens
    assert torch.equal(solve(again, "two-branch").W, solve(moments, "two-branch").W)


def test_memory_counts_what_is_kept() -> None:
    plain = gl.calibration_bytes(WIDTH, [GAP])
    richer = gl.calibration_bytes(WIDTH, [GAP], regressors=["x, n(x)"])
    stats = gl.calibrate(tiny_model("llama"), tiny_windows(), [GAP], regressors=["x, n(x)"])
    tensors = [v for v in vars(stats.of("x, n(x)")[GAP]).values() if isinstance(v, Tensor)]
    assert richer.moments - plain.moments == sum(t.numel() * 8 for t in tensors)
    assert richer.streams > plain.streams and richer.working > plain.working


# --- recovered models -------------------------------------------------------------------------


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("layers", [(2, 3), (0, 3, LAYERS - 1)])
def test_recovered_models_of_every_architecture(any_tiny, name, layers, tmp_path) -> None:
    ids = tiny_windows(4, 40)
    if any_tiny.config.model_type in READS_RAW and name != "ghost-relative":
        with pytest.raises(ValueError, match="reads its stream without a norm"):
            gl.recover(any_tiny, ids, layers, name)
        return
    recovered = gl.recover(any_tiny, ids, layers, name, relative_ridge=RIDGE)
    saved_and_loaded(recovered, ids, tmp_path)
    pruned, count = gl.prune(any_tiny, layers), len(gl.runs(layers, LAYERS))
    k = len(Regressor.parse(REGRESSORS[name]).features)
    added = gl.count_parameters(recovered) - gl.count_parameters(pruned)
    assert added == count * k * WIDTH**2 and k <= (3 if "three" in name else 2)
    assert gl.flops(recovered, 7).boundary == 2 * 7 * added


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"bias": True}, {"rank": 3, "bias": True}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_does_what_the_operator_does(kind: str, options: dict) -> None:
    model, ids, name = tiny_model(kind), tiny_windows(4, 20), "three-branch-relative"
    stats = gl.calibrate(model, ids, [GAP], regressors=[REGRESSORS[name]])
    op = solve(stats.of(REGRESSORS[name])[GAP], name, relative_ridge=RIDGE, **options)
    recovered = gl.recover(model, {}, GAP.removed, {GAP: op})
    seen: list[Tensor] = []
    module: Any = receiver(recovered, 2)
    module.boundary.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        recovered(ids)
    expected = op.apply(stored(model, ids)[2])
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-3)
    if "rank" in options:
        assert module.boundary.A.shape == (3 * WIDTH, 3)
    again = gl.recover(model, stats, GAP.removed, name, relative_ridge=RIDGE, **options)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, recovered(ids).logits)


def test_an_operator_for_another_model_is_refused() -> None:
    ids, name = tiny_windows(), "two-branch"
    stats = gl.calibrate(tiny_model("gpt2"), ids, [GAP], regressors=[REGRESSORS[name]])
    op = solve(stats.of(REGRESSORS[name])[GAP], name)
    assert torch.equal(op.M, op.W)
    with pytest.raises(ValueError, match=r"reads x, z\(x\), and the layers of a llama read x, n"):
        gl.recover(tiny_model("llama"), {}, GAP.removed, {GAP: op})
    with pytest.raises(ValueError, match=r"must have shape \(32, 16\), got \(16, 16\)"):
        gl.recover(tiny_model("gpt2"), {}, GAP.removed, {GAP: replace(op, W=op.W[:16])})
    with pytest.raises(ValueError, match=r"acts on activations \(..., 16\), got \(3, 32\)"):
        op.apply(torch.zeros(3, 32))


@pytest.mark.parametrize("name", ["two-branch-relative", "three-branch-relative"])
def test_trials_and_sequential_fits(name: str) -> None:
    model, ids, layers = tiny_model("llama"), tiny_windows(3, 16), (1, 3)
    gaps = gl.runs(layers, LAYERS)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    how: dict[str, Any] = {"attention_mask": mask, "relative_ridge": RIDGE}
    fitted = gl.fit_sequential(model, ids, gaps, name, **how)
    teacher = gl.calibrate(model, ids, gaps, attention_mask=mask, regressors=[REGRESSORS[name]])
    moments = teacher.of(REGRESSORS[name])
    first = solve(moments[gaps[0]], name, relative_ridge=RIDGE)
    torch.testing.assert_close(fitted[gaps[0]].W, first.W)
    # the second gap learns from what the first repair lets through
    partly = gl.recover(model, {}, [1], {gaps[0]: first})
    seen: dict[int, Tensor] = {}
    with tap(partly, [2], seen.__setitem__) as run:
        run(input_ids=ids, attention_mask=mask)
    dense: dict[int, Tensor] = {}
    with tap(model, [4], dense.__setitem__) as run:
        run(input_ids=ids, attention_mask=mask)
    again = gl.Moments(*moments[gaps[1]].B.shape, regressor=moments[gaps[1]].regressor)
    for x, y, real in zip(seen[2], dense[4], mask.bool(), strict=True):
        observe(again, x, y, real)
    second = solve(again, name, relative_ridge=RIDGE)
    torch.testing.assert_close(fitted[gaps[1]].W, second.W, rtol=1e-3, atol=1e-3)
    trials = Trials(model, ids)
    expected = gl.window_losses(gl.recover(model, {}, layers, fitted), ids)
    torch.testing.assert_close(trials.losses(layers, fitted), expected, rtol=1e-5, atol=0)
    trials.rebase((1,), {gaps[0]: fitted[gaps[0]]})
    torch.testing.assert_close(trials.losses(layers, fitted), expected, rtol=1e-5, atol=0)


# --- the diagnostic ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["stream", *ALL]), st.floats(-3, 3))
def test_effective_tokens_by_brute_force(seed: int, regressor: str, exponent: float) -> None:
    X, Y = streams(seed)
    if regressor == "stream":
        moments, D = gl.Moments(6).update(X, Y), (Y - X).numpy()
        half = gl.Moments(6).update(X[:30], Y[:30]) + gl.Moments(6).update(X[30:], Y[30:])
        assert half.effective_tokens == pytest.approx(moments.effective_tokens)
        a, order = 10**exponent, torch.randperm(len(X))
        changed = gl.Moments(6).update(
            (a * X @ rotation(seed))[order], (a * Y @ rotation(seed))[order]
        )
        assert changed.effective_tokens == pytest.approx(moments.effective_tokens, rel=1e-6)
    else:
        moments, D = moments_of(regressor, (X, Y)), by_hand(regressor, X, Y)[1]
    e = (D**2).sum(1)
    assert moments.effective_tokens == pytest.approx(e.sum() ** 2 / (e**2).sum(), rel=1e-6)
    assert e.max() / e.sum() >= 1 / moments.effective_tokens - 1e-9
    assert 1 <= moments.effective_tokens <= len(X) + 1e-9


def born_massive(share: float = 0.001) -> tuple[Tensor, Tensor]:
    """A block in which few ordinary tokens, no different before, become far larger."""
    g = torch.Generator().manual_seed(0)
    n, width = 4000, WIDTH
    X = torch.randn(n, width, dtype=torch.float64, generator=g)
    Y = X + 0.3 * X @ torch.randn(width, width, dtype=torch.float64, generator=g)
    few = torch.arange(int(n * share))
    Y[few, 1] += 10_000 * (1 + 0.2 * torch.randn(len(few), dtype=torch.float64, generator=g))
    return X, Y


def test_few_tokens_that_own_the_objective_are_reported_and_rightly() -> None:
    model, (X, Y) = tiny_model("llama"), born_massive()
    moments = {GAP: gl.Moments(WIDTH).update(X, Y)}
    assert moments[GAP].effective_tokens == pytest.approx(4, rel=0.2)
    text = r"boundary \(2, 4\): 4 of 4000 tokens own the squared error that ghost .*two-branch-rel"
    with pytest.warns(gl.MassiveActivationWarning, match=text) as caught:
        gl.recover(model, moments, GAP.removed)
    advice = str(caught[0].message)
    assert "operator='auto'" in advice
    assert "skip_leading" not in advice  # measured to be no remedy: notebook 10
    # and indeed: all other tokens fare worse than without a repair, and weighted they do not
    relative = moments_of("x; 1/|y|^2", (X, Y))
    X, Y = X[4:], Y[4:]
    nothing = float((Y - X).square().sum())
    harm = float((solve(moments[GAP]).apply(X) - Y).square().sum()) / nothing
    assert harm > 2
    # the weighted moments know it without the tokens
    assert relative.relative_error(solve(moments[GAP]).M) > 1.5
    helped = solve(moments_of("x, n(x); 1/|y|", born_massive()), "two-branch-relative")
    assert float((helped.apply(X) - Y).square().sum()) / nothing < 0.5


def test_no_report_without_a_reason() -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    X, Y = born_massive()
    with warnings.catch_warnings():
        warnings.simplefilter("error", gl.MassiveActivationWarning)
        gl.recover(model, ids, GAP.removed, relative_ridge=RIDGE)
        gl.recover(model, {GAP: gl.Moments(WIDTH).update(X[4:], Y[4:])}, GAP.removed)
        massive = {GAP: gl.Moments(WIDTH).update(X, Y)}
        gl.recover(model, massive, GAP.removed, "linearpatch-d")
    with pytest.raises(ValueError, match="needs equal widths"):
        _ = gl.Moments(6, 3).nothing
