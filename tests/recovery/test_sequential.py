"""Sequential fitting against brute force: least squares on what the repaired model lets through."""

import pytest
import torch
from conftest import LAYERS, stored_streams, tiny_model, tiny_windows

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.models.architectures import decoder_layers
from ghostlib.models.streams import tap
from ghostlib.recovery.sequential import dense_streams

GAPS = [Boundary(1, 2), Boundary(3, 4), Boundary(5, 6)]
LAYERS_OF = [1, 3, 5]


def by_hand(model, ids) -> dict[Boundary, torch.Tensor]:
    """Each operator by lstsq, the earlier ones installed through the public surgery."""
    dense = stored_streams(model, ids)
    found: dict[Boundary, gl.Operator] = {}
    for k, gap in enumerate(GAPS):
        if k == 0:
            x = dense[gap.start]
        else:
            ops = {g: found[g] for g in GAPS[:k]}
            # everything before this gap pruned and repaired, and the gap's own layer still there
            so_far = gl.install(model, ops)
            streams: dict[int, torch.Tensor] = {}
            with tap(so_far, [gap.start - k], streams.__setitem__) as run:
                run(input_ids=ids)
            x = streams[gap.start - k]
        X, Y = x.flatten(0, 1).double(), dense[gap.stop].flatten(0, 1).double()
        moments = gl.Moments(X.shape[1]).update(X, Y)
        found[gap] = gl.solve(moments, "ghost")
        W = torch.linalg.lstsq(X, Y).solution
        torch.testing.assert_close(found[gap].W, W, rtol=1e-5, atol=1e-5)
    return {gap: op.W for gap, op in found.items()}


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


def test_recover_installs_the_sequential_operators():
    model, ids = tiny_model("llama"), tiny_windows()
    fitted = gl.fit_sequential(model, ids, GAPS, relative_ridge=1e-3)
    recovered = gl.recover(model, ids, LAYERS_OF, fit="sequential", relative_ridge=1e-3)
    by_operator = gl.install(model, fitted)
    with torch.no_grad():
        assert torch.equal(recovered(ids).logits, by_operator(ids).logits)
    one = gl.recover(model, ids, [2, 3], fit="sequential")
    with torch.no_grad():
        assert torch.equal(one(ids).logits, gl.recover(model, ids, [2, 3])(ids).logits)


def test_padding_and_leading_tokens_stay_out():
    model, ids = tiny_model("llama"), tiny_windows(3, 40)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, 30:], mask[1, 30:] = 0, 0
    padded[2], mask[2] = 0, 0
    how = {"skip_leading": 2, "relative_ridge": 1e-3}
    full = gl.fit_sequential(model, padded, GAPS, attention_mask=mask, **how)
    teacher = gl.calibrate(model, padded, GAPS, attention_mask=mask, skip_leading=2)
    first = gl.solve(teacher[GAPS[0]], relative_ridge=1e-3)
    torch.testing.assert_close(full[GAPS[0]].W, first.W)
    noise = padded.clone()
    noise[1, 30:] = 5
    again = gl.fit_sequential(model, noise, GAPS, attention_mask=mask, **how)
    for gap in GAPS:
        torch.testing.assert_close(full[gap].W, again[gap].W)


def test_no_layer_runs_twice():
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    ran: list[int] = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda m, a, o, index=index: ran.append(index))
    gl.fit_sequential(model, ids, [(1, 2), (3, 4)], relative_ridge=1e-3)
    # The dense model as far as the last X_post, then only the layer between the two gaps.
    assert ran == [0, 1, 2, 3] * 2 + [2] * 2


def test_streams_at_hand_are_used_and_checked():
    model, ids = tiny_model("llama"), tiny_windows()
    streams = dense_streams(model, ids, range(LAYERS + 1), batch_size=2)
    fitted = gl.fit_sequential(model, ids, GAPS, streams=streams)
    again = gl.fit_sequential(model, ids, GAPS)
    for gap in GAPS:
        torch.testing.assert_close(fitted[gap].W, again[gap].W, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"streams must hold index 2 .* got nothing"):
        gl.fit_sequential(model, ids, GAPS, streams={1: streams[1]})
    with pytest.raises(ValueError, match=r"index 1 for \(2, 24\) tokens, got \(4, 24, 16\)"):
        gl.fit_sequential(model, ids[:2], GAPS, streams=streams)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([(1, 3), (2, 4)], "overlap, touch or are out of order"),
        ([(1, 3), (3, 4)], "overlap, touch or are out of order"),
        ([(3, 4), (1, 2)], "overlap, touch or are out of order"),
        ([(1, 9)], "does not fit a model of 6 layers"),
        ([], "no boundary to fit"),
    ],
)
def test_bad_boundaries_are_named(boundaries, message):
    with pytest.raises(ValueError, match=message):
        gl.fit_sequential(tiny_model("llama"), tiny_windows(), boundaries)


def test_what_has_no_sequential_fit_is_refused():
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, GAPS)
    with pytest.raises(ValueError, match="'fit' belongs to a pass .* or give token windows"):
        gl.recover(model, stats, LAYERS_OF, fit="sequential")
    with pytest.raises(ValueError, match=r"boundary \(0, 1\) has no layer before it: keep layer 0"):
        gl.fit_sequential(model, ids, [(0, 1), *GAPS[1:]], "replaceme")
    with pytest.raises(ValueError, match="fit must be 'teacher' or 'sequential', got 'student'"):
        gl.recover(model, ids, LAYERS_OF, fit="student")
