"""Moments of some features, cut out of those of more, against the same collected directly."""

from typing import Any

import pytest
import torch
from conftest import LAYERS, WIDTH, assert_same_moments, tiny_model, tiny_windows

import ghostlib as gl
from ghostlib.statistics.features import Regressor, widest

WIDE = "x, n(x), n(prev); 1/|y|"
NARROW = ["x; 1/|y|", "x, n(x); 1/|y|", "n(prev); 1/|y|", "n(prev), x; 1/|y|"]
GAPS = [gl.Boundary(1, 2), gl.Boundary(3, LAYERS)]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_parts_equal_what_is_collected_directly(model_type: str) -> None:
    """With either kind of norm, padding and skipped tokens."""
    model, ids = tiny_model(model_type), tiny_windows(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    how: dict[str, Any] = {"attention_mask": mask, "skip_leading": 1}
    together = gl.calibrate(model, ids, GAPS, regressors=[*NARROW, "stream", WIDE], **how)
    assert set(together.features) == {(WIDE, gap) for gap in GAPS}, "nothing else is collected"
    for name in NARROW:
        alone, found = gl.calibrate(model, ids, GAPS, regressors=[name], **how), together.of(name)
        assert list(found) == GAPS
        for gap in GAPS:
            assert_same_moments(found[gap], alone.of(name)[gap])
            assert together.of(name)[gap] is found[gap], "cut out once"
    # Adding to a part leaves the whole, and what else it shares with it, as they were.
    whole = together.of(WIDE)[GAPS[0]]
    before, x = whole.to("cpu"), torch.randn(5, WIDTH)
    together.of(NARROW[0])[GAPS[0]].update(x, x)
    assert_same_moments(whole, before)


def test_the_first_features_take_no_memory() -> None:
    stats = gl.calibrate(tiny_model("llama"), tiny_windows(), GAPS, regressors=[WIDE])
    whole, first, last = (stats.of(n)[GAPS[0]] for n in (WIDE, NARROW[1], NARROW[2]))
    assert first.G.data_ptr() == whole.G.data_ptr() and first.B.data_ptr() == whole.B.data_ptr()
    assert last.G.shape == (WIDTH, WIDTH) and last.G.data_ptr() != whole.G.data_ptr()
    assert last.y2 is whole.y2


def test_every_operator_is_solved_from_the_widest() -> None:
    model, ids, layers = tiny_model("llama"), tiny_windows(), (1, 3)
    relative = ["ghost-relative", "two-branch-relative", "three-branch-relative"]
    stats = gl.calibrate(model, ids, gl.runs(layers, LAYERS), regressors=[WIDE])
    for name in relative:
        mine = gl.recover(model, stats, layers, name, relative_ridge=1e-3)
        alone = gl.recover(model, ids, layers, name, relative_ridge=1e-3)
        torch.testing.assert_close(mine(ids).logits, alone(ids).logits)
    with pytest.raises(ValueError, match=r"no moments of x, n\(x\) were collected"):
        stats.of("x, n(x)")  # weighted otherwise


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ([], []),
        ([WIDE, *NARROW], [WIDE]),
        (["x, n(x)", "n(x), x"], ["n(x), x"]),
        (["x, n(x)", "x, n(prev)", "x"], ["x, n(prev)", "x, n(x)"]),
        (["x; 1/|y|", "x, n(x)", "x; 1/|y|^2"], ["x, n(x)", "x; 1/|y|", "x; 1/|y|^2"]),
    ],
)
def test_the_widest_hold_all(asked: list[str], kept: list[str]) -> None:
    assert [str(r) for r in widest(map(Regressor.parse, asked))] == kept
    assert [str(r) for r in widest(map(Regressor.parse, reversed(asked)))] == kept


def test_memory_counts_the_widest_alone() -> None:
    wide = gl.calibration_bytes(WIDTH, GAPS, regressors=[WIDE])
    assert gl.calibration_bytes(WIDTH, GAPS, regressors=[*NARROW, WIDE]) == wide
    apart = gl.calibration_bytes(WIDTH, GAPS, regressors=["x; 1/|y|", "x"])
    assert apart.moments > gl.calibration_bytes(WIDTH, GAPS, regressors=["x"]).moments
