"""Sequential fitting against brute force: least squares on the streams of the repaired model."""

import pytest
import torch
from conftest import LAYERS, VOCABULARY, stored_streams, tiny_model, tiny_windows
from torch import Tensor
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.models.architectures import decoder_layers, receiver
from ghostlib.models.layers import down_projection
from ghostlib.recovery import sequential
from ghostlib.recovery.sequential import dense_streams

GAPS = [Boundary(1, 2), Boundary(3, 4), Boundary(5, 6)]
REMOVED = [1, 3, 5]


def by_hand(model, ids) -> dict[Boundary, torch.Tensor]:
    """Each operator by lstsq, the earlier ones installed through the public surgery."""
    dense = stored_streams(model, ids)
    operators: dict[Boundary, gl.Operator] = {}
    for k, gap in enumerate(GAPS):
        # everything before this gap pruned and repaired, and the gap's own layer still there
        so_far = gl.install(model, operators)
        x = stored_streams(so_far, ids)[gap.start - k]
        X, Y = x.flatten(0, 1).double(), dense[gap.stop].flatten(0, 1).double()
        operators[gap] = gl.solve(gl.Moments(X.shape[1]).update(X, Y), "ghost")
        W = torch.linalg.lstsq(X, Y).solution
        torch.testing.assert_close(operators[gap].W, W, rtol=1e-5, atol=1e-5)
    return {gap: op.W for gap, op in operators.items()}


@pytest.mark.thorough
def test_each_boundary_is_fitted_to_the_repaired_stream(any_tiny):
    ids = tiny_windows(4, 24)
    expected = by_hand(any_tiny, ids)
    fitted = gl.fit_sequential(any_tiny, ids, GAPS, batch_size=3)
    assert list(fitted) == GAPS
    for gap in GAPS:
        torch.testing.assert_close(fitted[gap].W, expected[gap], rtol=1e-3, atol=1e-3)
    teacher = gl.calibrate(any_tiny, ids, GAPS)
    first = gl.solve(teacher[GAPS[0]])
    torch.testing.assert_close(fitted[GAPS[0]].W, first.W, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(fitted[GAPS[2]].W, gl.solve(teacher[GAPS[2]]).W, rtol=1e-2, atol=1e-2)


def read_sources(model: PreTrainedModel, ids: Tensor, place: int) -> dict[str, Tensor]:
    """Sources of the features, (windows, tokens, width), where the stream enters ``place``."""
    sources: dict[str, Tensor] = {}

    def on_mlp(module, args, output):
        shape = (*ids.shape, -1)
        sources["h"], sources["f"] = args[0].reshape(shape), output.reshape(shape)

    def on_stream(module, args, kwargs):
        sources["x"] = args[0] if args else kwargs["hidden_states"]

    mlp, stream = down_projection(model, place - 1), receiver(model, place)
    with (
        torch.no_grad(),
        mlp.register_forward_hook(on_mlp),
        stream.register_forward_pre_hook(on_stream, with_kwargs=True),
    ):
        model(ids, use_cache=False)
    return sources


def design(name: str, kind: str, sources: dict[str, Tensor]) -> Tensor:
    """(tokens, p) features of a family, computed from their sources."""
    x = sources["x"]
    centred = x - x.mean(-1, keepdim=True) if kind == "gpt2" else x
    n = centred / centred.square().mean(-1, keepdim=True).sqrt()
    before = torch.zeros_like(n)
    before[:, 1:] = n[:, :-1]
    features = {
        "replaceme": [sources["f"]],
        "refit": [sources["h"]],
        "ghost-refit": [x, sources["h"]],
        "three-branch": [x, n, before],
    }[name]
    F = torch.cat(features, -1).flatten(0, 1)
    if kind == "gpt2" and "refit" in name:  # whose down-projection has a bias to be fitted
        F = torch.cat([F, torch.ones(len(F), 1, dtype=F.dtype)], 1)
    return F


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["replaceme", "refit", "ghost-refit", "three-branch"])
def test_every_source_is_that_of_the_model_repaired_by_surgery(kind: str, name: str) -> None:
    """Least squares on activations of the model that `install` made of the earlier repairs."""
    model, ids = tiny_model(kind).double(), tiny_windows(6, 24)
    dense = stored_streams(model, ids)
    fitted = gl.fit_sequential(model, ids, GAPS, name, batch_size=4, rcond=1e-7)
    for k, gap in enumerate(GAPS):
        so_far = gl.install(model, {g: fitted[g] for g in GAPS[:k]}) if k else model
        sources = read_sources(so_far, ids, gap.start - k)
        x, y = sources["x"].flatten(0, 1), dense[gap.stop].flatten(0, 1)
        # standardised channels sum to zero, so that the smallest of many solutions is compared
        solution = torch.linalg.pinv(design(name, kind, sources), rtol=1e-7) @ (y - x)
        p = fitted[gap].M.shape[0]
        torch.testing.assert_close(fitted[gap].M, solution[:p], rtol=1e-5, atol=1e-6)
        # and the repaired stream, as surgery makes it, leaves the residual that was reported
        repaired = gl.install(model, {g: fitted[g] for g in GAPS[: k + 1]})
        module = receiver(repaired, gap.start - k)
        received = {}
        boundary = getattr(module, "boundary", None)
        if boundary is not None:
            boundary.register_forward_hook(lambda m, a, out, r=received: r.update(x=out))
        sources = read_sources(repaired, ids, gap.start - k) | received
        residual = float((sources["x"].flatten(0, 1) - y).square().sum())
        assert residual == pytest.approx(fitted[gap].residual, rel=1e-6)


@pytest.mark.thorough
def test_a_spelling_fits_as_the_family_it_spells() -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    ridge = {"relative_ridge": 1e-3}
    named = gl.fit_sequential(model, ids, GAPS, "two-branch-relative", **ridge)
    spelt = gl.fit_sequential(model, ids, GAPS, "x, n(x); 1/|y|", **ridge)
    for gap in GAPS:
        assert torch.equal(named[gap].M, spelt[gap].M)
    recovered = gl.recover(model, ids, REMOVED, "x, n(x); 1/|y|", fit="sequential", **ridge)
    with torch.no_grad():
        assert torch.equal(recovered(ids).logits, gl.install(model, named)(ids).logits)


def test_few_tokens_that_own_a_boundary_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tiny_windows(6, 40)
    text = r"boundary \(3, 4\): 1 of 240 tokens own the squared error that ghost minimises"
    streams = dense_streams(model, ids, [1, 2, 4, 6])
    streams[4][2, 7] += 10_000
    with pytest.warns(gl.MassiveActivationWarning, match=text):
        gl.fit_sequential(model, ids, GAPS, streams=streams)
    monkeypatch.setattr(sequential, "dense_streams", lambda *args, **options: streams)
    with pytest.warns(gl.MassiveActivationWarning, match=text):
        gl.recover(model, ids, REMOVED, fit="sequential")


def test_too_few_tokens_are_reported() -> None:
    with pytest.warns(gl.SingularGramWarning, match="12 tokens"):
        gl.fit_sequential(tiny_model("llama"), tiny_windows(1, 12), GAPS)


def test_recover_installs_the_sequential_operators():
    model, ids = tiny_model("llama"), tiny_windows()
    fitted = gl.fit_sequential(model, ids, GAPS, relative_ridge=1e-3)
    recovered = gl.recover(model, ids, REMOVED, fit="sequential", relative_ridge=1e-3)
    one = gl.recover(model, ids, [2, 3], fit="sequential")
    with torch.no_grad():
        assert torch.equal(recovered(ids).logits, gl.install(model, fitted)(ids).logits)
        assert torch.equal(one(ids).logits, gl.recover(model, ids, [2, 3])(ids).logits)


def test_padding_and_leading_tokens_stay_out():
    model, ids = tiny_model("llama"), tiny_windows(3, 40)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, 30:], mask[1, 30:] = 0, 0
    padded[2], mask[2] = 0, 0
    options = {"attention_mask": mask, "skip_leading": 2}
    fitted = gl.fit_sequential(model, padded, GAPS, **options, relative_ridge=1e-3)
    teacher = gl.calibrate(model, padded, GAPS, **options)
    first = gl.solve(teacher[GAPS[0]], relative_ridge=1e-3)
    torch.testing.assert_close(fitted[GAPS[0]].W, first.W)
    padded[1, 30:] = 5
    other = gl.fit_sequential(model, padded, GAPS, **options, relative_ridge=1e-3)
    for gap in GAPS:
        torch.testing.assert_close(fitted[gap].W, other[gap].W)


def test_no_layer_runs_twice():
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    ran: list[int] = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda m, a, o, index=index: ran.append(index))
    gl.fit_sequential(model, ids, [(1, 2), (3, 4)], relative_ridge=1e-3)
    # The dense model up to the last X_post, then only the layer between the two gaps.
    assert ran == [0, 1, 2, 3] * 2 + [2] * 2


def test_recorded_streams_are_used_and_checked():
    model, ids = tiny_model("llama"), tiny_windows()
    streams = dense_streams(model, ids, range(LAYERS + 1), batch_size=2)
    fitted = gl.fit_sequential(model, ids, GAPS, streams=streams)
    expected = gl.fit_sequential(model, ids, GAPS)
    for gap in GAPS:
        torch.testing.assert_close(fitted[gap].W, expected[gap].W, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"streams must hold index 2 .* got nothing"):
        gl.fit_sequential(model, ids, GAPS, streams={1: streams[1]})
    with pytest.raises(ValueError, match=r"index 1 for \(2, 24\) tokens, got \(4, 24, 16\)"):
        gl.fit_sequential(model, ids[:2], GAPS, streams=streams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": [(1, 3), (3, 4)]}, "overlap, touch or are out of order"),
        ({"attention_mask": torch.zeros(4, 24)}, "leave no token to learn from"),
        ({"skip_leading": 24}, "leave no token to learn from"),
    ],
)
def test_bad_input_is_named_before_any_pass(changes, message) -> None:
    arguments = {"windows": tiny_windows(), "boundaries": GAPS} | changes
    with pytest.raises(ValueError, match=message):
        gl.fit_sequential(tiny_model("llama"), **arguments)


def test_streams_of_bad_windows_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="do not fit a vocabulary"):
        dense_streams(model, tiny_windows() + VOCABULARY, [0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -2"):
        dense_streams(model, tiny_windows(), [0], batch_size=-2)


def test_what_has_no_sequential_fit_is_refused():
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, GAPS)
    with pytest.raises(ValueError, match=r"'fit' belongs to a pass .* or give token windows"):
        gl.recover(model, stats, REMOVED, fit="sequential")
    with pytest.raises(ValueError, match=r"boundary \(0, 1\) has no layer before it: keep layer 0"):
        gl.fit_sequential(model, ids, [(0, 1), *GAPS[1:]], "replaceme")
