"""Memory counted beforehand against the tensors a calibration really holds."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import LAYERS, WIDTH, tiny_model, tiny_windows
from hypothesis import given
from hypothesis import strategies as st

import ghostlib as gl
from ghostlib.statistics import calibration

pytestmark = pytest.mark.filterwarnings("error")

CASES = {
    "one": [(2, 4)],
    "same start": [(1, 2), (1, 4), (1, 6)],
    "nested and apart": [(0, 6), (1, 3), (2, 3), (4, 5)],
    "a boundary twice": [(2, 4), (2, 4)],
    "all of two": gl.contiguous(2, LAYERS),
}


def distinct_bytes(tensors) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


REGRESSORS = [[], ["x, n(x)"], ["x; 1/|y|", "x, n(prev); 1/|y|"], ["x, h", "f; 1/|y|"]]


@pytest.mark.thorough
@pytest.mark.parametrize("regressors", REGRESSORS, ids=str)
@pytest.mark.parametrize("boundaries", CASES.values(), ids=CASES)
def test_moments_are_what_calibrate_returns(boundaries, regressors):
    model = tiny_model("llama")
    stats = gl.calibrate(model, tiny_windows(), boundaries, regressors=regressors)
    held = distinct_bytes(t for m in stats.collected.values() for t in m.tensors().values())
    counted = gl.calibration_bytes(model, boundaries, regressors=regressors)
    assert counted.moments == held
    of_width = gl.calibration_bytes(WIDTH, boundaries, regressors=regressors, hidden=24)
    assert of_width == counted


def test_memory_counts_the_widest_alone():
    gaps = [(1, 2), (3, LAYERS)]
    wide = gl.calibration_bytes(WIDTH, gaps, regressors=["x, n(x), n(prev)"])
    parts = ["x", "n(x)", "n(prev), x"]
    assert gl.calibration_bytes(WIDTH, gaps, regressors=[*parts, "x, n(x), n(prev)"]) == wide
    plain = gl.calibration_bytes(WIDTH, gaps, regressors=parts[:1])
    assert all(w > p for w, p in zip(wide, plain, strict=True))
    apart = gl.calibration_bytes(WIDTH, gaps, regressors=["x; 1/|y|"])
    assert apart.moments > plain.moments


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["similarities", "stream", "features"])
@pytest.mark.parametrize("boundaries", CASES.values(), ids=CASES)
def test_streams_are_what_waits_at_once(boundaries, kind, monkeypatch):
    """At every stream: those that wait, and the one that has just arrived."""
    count, length, most = 3, 20, 0
    moments, features = kind != "similarities", kind == "features"

    class Watched(calibration._Collector):
        def on_stream(self, index, stream):
            nonlocal most
            waiting = list(self.open.values())
            tensors = [w.directions for w in waiting]
            tensors += [s.values for w in waiting for s in w.sequences]
            tensors += [F for w in waiting for designs in w.designs.values() for F in designs]
            arrived = stream.numel() * (12 if moments else 4) + stream.numel() * 16 * features
            most = max(most, distinct_bytes(tensors) + arrived)
            super().on_stream(index, stream)

    monkeypatch.setattr(calibration, "_Collector", Watched)
    options = {"batch_size": count, "moments": moments}
    options |= {"regressors": ["x, n(x)"]} if features else {}
    gl.calibrate(tiny_model("llama"), tiny_windows(count, length), boundaries, **options)
    counted = gl.calibration_bytes(WIDTH, boundaries, length=length, **options)
    assert counted.streams == most
    assert counted.total == counted.moments + counted.streams + counted.working
    assert (counted.moments > 0) == moments


@pytest.mark.parametrize("batch", [1, 3])
def test_working_memory_is_estimated_from_above(batch):
    """A Gram matrix and its new sum for each sequence, and a window on both sides of the gap."""
    how = {"length": 100, "batch_size": batch}
    working = gl.calibration_bytes(64, [(1, 2)], regressors=["x, n(x)"], **how).working
    held = (2 * batch * 128**2 + 2 * 100 * 64) * 8
    assert held <= working <= 3 * held
    both_ends = 2 * batch * 100 * 64 * 4
    assert gl.calibration_bytes(64, [(1, 2)], moments=False, **how).working >= both_ends


def test_one_boundary_of_an_8b_model():
    needed = gl.calibration_bytes(4096, [(20, 27)])
    assert needed.moments == 2 * 4096**2 * 8 + 7 * 4096 * 8  # 268 MB and the column sums


@given(
    boundaries=st.lists(
        st.tuples(st.integers(0, 8), st.integers(1, 4)).map(lambda b: (b[0], b[0] + b[1])),
        min_size=1,
        max_size=6,
    ),
    more=st.tuples(st.integers(0, 8), st.integers(9, 12)),
)
def test_another_boundary_never_needs_less(boundaries, more):
    before, after = (gl.calibration_bytes(32, b) for b in (boundaries, [*boundaries, more]))
    assert all(a >= b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("width", "boundaries", "options", "message"),
    [
        (0, [(0, 1)], {}, "width must be at least 1, got 0"),
        (8, [(0, 1)], {"length": 0}, "length must be at least 1, got 0"),
        (8, [(0, 1)], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (8, [], {}, "no boundary to count"),
        (8, [(1, 2)], {"regressors": ["x, h"]}, "need the width of the MLP: pass hidden="),
        (8, [(1, 2)], {"regressors": ["y"]}, "unknown feature 'y'"),
    ],
)
def test_errors(width, boundaries, options, message):
    with pytest.raises(ValueError, match=message):
        gl.calibration_bytes(width, boundaries, **options)


@pytest.mark.parametrize("moments", [True, False])
def test_calibrate_refuses_to_begin_without_the_memory(monkeypatch, moments):
    model, windows = tiny_model("llama"), tiny_windows()
    needed = gl.calibration_bytes(model, [(2, 4)], length=windows.shape[1], moments=moments).total
    monkeypatch.setattr(calibration, "available_bytes", lambda: needed)
    gl.calibrate(model, windows, [(2, 4)], moments=moments)
    monkeypatch.setattr(calibration, "available_bytes", lambda: needed - 1)
    monkeypatch.setattr(model, "forward", lambda **inputs: pytest.fail("it has begun"))
    with pytest.raises(MemoryError, match=r"this calibration needs .* are available"):
        gl.calibrate(model, windows, [(2, 4)], moments=moments)


def test_the_message_says_how_much(monkeypatch):
    monkeypatch.setattr(calibration, "available_bytes", lambda: 250_000_000)
    with pytest.raises(MemoryError) as caught:
        calibration.require_memory(
            calibration.CalibrationBytes(12_000_000_000, 45_600_000, 300_000_000)
        )
    assert str(caught.value) == (
        "this calibration needs 12.3 GB of memory (moments 12.0 GB, streams 45.6 MB, "
        "working 300.0 MB) and 250.0 MB are available: name fewer boundaries or use shorter windows"
    )


def cgroup(folder, limit: str, current: int = 3000):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    return folder


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert calibration.available_bytes(tmp_path) == 10_000  # no such files
    assert calibration.available_bytes(cgroup(tmp_path, "max")) == 10_000
    assert calibration.available_bytes(cgroup(tmp_path, "4000")) == 4000 - (3000 - 500)
    assert calibration.available_bytes(cgroup(tmp_path, "2000")) == 0
    assert calibration.available_bytes(cgroup(tmp_path, "90000")) == 10_000


def test_this_machine_has_memory_left():
    assert 0 < calibration.available_bytes() <= psutil.virtual_memory().total
    assert torch.zeros(1).nbytes < calibration.available_bytes()
