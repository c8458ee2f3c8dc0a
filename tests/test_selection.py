"""Criteria against brute force, first and last layers included."""

import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_windows
from test_calibration import stored_streams

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.selection import CRITERIA


def brute_force(streams, start, stop):
    x, y = streams[start].flatten(0, 1), streams[stop].flatten(0, 1)
    cosines = [
        float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.double(), y.double(), strict=True)
    ]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("n", [1, 2, LAYERS - 1])
def test_cosine_equals_brute_force(any_tiny, n):
    ids = tiny_windows(2, 10)
    selection = gl.select_layers(any_tiny, ids, n)
    streams = stored_streams(any_tiny, ids)
    means = {start: brute_force(streams, start, start + n) for start in range(LAYERS - n + 1)}
    best = max(means, key=lambda start: (means[start], -start))
    assert selection == tuple(range(best, best + n))
    assert {b.start for b in selection.scores} == set(range(LAYERS - n + 1))
    for boundary, score in selection.scores.items():
        assert -score == pytest.approx(means[boundary.start], abs=1e-6)
    assert selection.criterion == "cosine"


def test_block_influence_takes_single_layers_anywhere():
    model, ids = tiny_model("llama"), tiny_windows(2, 10)
    selection = gl.select_layers(model, ids, 3, "block-influence")
    streams = stored_streams(model, ids)
    influence = [1 - brute_force(streams, i, i + 1) for i in range(LAYERS)]
    assert set(selection) == set(sorted(range(LAYERS), key=influence.__getitem__)[:3])
    assert list(selection) == sorted(selection)


def test_angular_orders_blocks_by_mean_angle():
    model, ids = tiny_model("llama"), tiny_windows(2, 10)
    selection = gl.select_layers(model, ids, 2, "angular")
    best = min(selection.scores, key=lambda b: (selection.scores[b], b))
    assert selection == tuple(best.removed)


def test_ties_go_to_the_lower_index(monkeypatch):
    monkeypatch.setitem(CRITERIA, "flat", CRITERIA["cosine"]._replace(score=lambda s: 0.0))
    assert gl.select_layers(tiny_model("llama"), tiny_windows(1, 8), 2, "flat") == (0, 1)


def test_a_calibration_serves_instead_of_windows():
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, gl.contiguous(2, LAYERS))
    assert gl.select_layers(model, stats, 2) == gl.select_layers(model, ids, 2)
    with pytest.raises(ValueError, match=r"needs boundaries the calibration lacks, such as"):
        gl.select_layers(model, stats, 3)


@pytest.mark.parametrize("n", [0, -1, LAYERS, 99])
@pytest.mark.parametrize("criterion", ["cosine", "block-influence"])
def test_n_must_leave_a_layer(n, criterion):
    with pytest.raises(ValueError, match=rf"n = {n} layers .* between 1 and {LAYERS - 1}"):
        gl.select_layers(tiny_model("llama"), tiny_windows(), n, criterion)


def test_unknown_criterion_is_named():
    with pytest.raises(ValueError, match="unknown criterion 'cosin'; did you mean 'cosine'"):
        gl.select_layers(tiny_model("llama"), tiny_windows(), 2, "cosin")


def test_embedded_model_chooses_the_published_block(embedded, wiki):
    """DESIGN's measurement beforehand: n = 7 by cosine removes layers 12 … 18."""
    selection = gl.select_layers(embedded[0], wiki, 7)
    assert selection == tuple(range(12, 19))
    assert Boundary(0, 7) in selection.scores and Boundary(23, 30) in selection.scores
    assert torch.tensor(list(selection.scores.values())).isfinite().all()
