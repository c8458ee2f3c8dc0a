"""The memory estimate against the tensors of a calibration."""

from types import SimpleNamespace

import psutil
import pytest
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
    """Total bytes of the storages of ``tensors``, without duplicates."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


REGRESSORS = [[], ["x, n(x)"], ["x; 1/|y|", "x, n(prev); 1/|y|"], ["x, h", "f; 1/|y|"]]


@pytest.mark.thorough
@pytest.mark.parametrize("regressors", REGRESSORS, ids=str)
@pytest.mark.parametrize("boundaries", CASES.values(), ids=CASES)
def test_moments_are_what_calibrate_returns(boundaries, regressors):
    model = tiny_model("llama")
    stats = gl.calibrate(model, tiny_windows(), boundaries, regressors=regressors)
    actual = distinct_bytes(t for m in stats.collected.values() for t in m.tensors().values())
    estimate = gl.calibration_bytes(model, boundaries, regressors=regressors)
    assert estimate.moments == actual
    of_width = gl.calibration_bytes(WIDTH, boundaries, regressors=regressors, hidden=24)
    assert of_width == estimate


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
def test_streams_are_the_peak_of_stored_activations(boundaries, kind, monkeypatch):
    """At every layer: the streams of open boundaries, and the current one."""
    count, length, peak = 3, 20, 0
    moments, features = kind != "similarities", kind == "features"

    class Recorder(calibration._Collector):
        def on_stream(self, index, stream):
            nonlocal peak
            batches = list(self.open.values())
            tensors = [batch.directions for batch in batches]
            tensors += [s.values for batch in batches for s in batch.sequences]
            tensors += [
                F for batch in batches for designs in batch.designs.values() for F in designs
            ]
            current = stream.numel() * (12 if moments else 4) + stream.numel() * 16 * features
            peak = max(peak, distinct_bytes(tensors) + current)
            super().on_stream(index, stream)

    monkeypatch.setattr(calibration, "_Collector", Recorder)
    options = {"batch_size": count, "moments": moments}
    options |= {"regressors": ["x, n(x)"]} if features else {}
    gl.calibrate(tiny_model("llama"), tiny_windows(count, length), boundaries, **options)
    estimate = gl.calibration_bytes(WIDTH, boundaries, length=length, **options)
    assert estimate.streams == peak
    assert estimate.total == estimate.moments + estimate.streams + estimate.working
    assert (estimate.moments > 0) == moments


@pytest.mark.parametrize("batch", [1, 3])
def test_working_memory_is_estimated_from_above(batch):
    """A Gram matrix and its new sum for each sequence, and a window on both sides of the gap."""
    options = {"length": 100, "batch_size": batch}
    working = gl.calibration_bytes(64, [(1, 2)], regressors=["x, n(x)"], **options).working
    least = (2 * batch * 128**2 + 2 * 100 * 64) * 8
    assert least <= working <= 3 * least
    both_ends = 2 * batch * 100 * 64 * 4
    assert gl.calibration_bytes(64, [(1, 2)], moments=False, **options).working >= both_ends


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
def test_calibrate_raises_before_the_pass_without_the_memory(monkeypatch, moments):
    model, windows = tiny_model("llama"), tiny_windows()
    needed = gl.calibration_bytes(model, [(2, 4)], length=windows.shape[1], moments=moments).total
    monkeypatch.setattr(calibration, "available_bytes", lambda: needed)
    gl.calibrate(model, windows, [(2, 4)], moments=moments)
    monkeypatch.setattr(calibration, "available_bytes", lambda: needed - 1)
    monkeypatch.setattr(model, "forward", lambda **inputs: pytest.fail("a forward pass"))
    with pytest.raises(MemoryError, match=r"this calibration needs .* are available"):
        gl.calibrate(model, windows, [(2, 4)], moments=moments)


def test_the_message_names_the_bytes(monkeypatch):
    monkeypatch.setattr(calibration, "available_bytes", lambda: 250_000_000)
    needed = calibration.CalibrationBytes(12_000_000_000, 45_600_000, 300_000_000)
    with pytest.raises(MemoryError) as caught:
        calibration.require_memory(needed)
    assert str(caught.value) == (
        "this calibration needs 12.3 GB of memory (moments 12.0 GB, streams 45.6 MB, "
        "working 300.0 MB) and 250.0 MB are available: name fewer boundaries or use shorter windows"
    )


def cgroup(folder, limit: str, current: int = 3000):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    return folder


def test_a_container_has_its_limit_less_its_working_set(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert calibration.available_bytes(tmp_path) == 10_000  # no such files
    assert calibration.available_bytes(cgroup(tmp_path, "max")) == 10_000
    assert calibration.available_bytes(cgroup(tmp_path, "4000")) == 4000 - (3000 - 500)
    assert calibration.available_bytes(cgroup(tmp_path, "2000")) == 0
    assert calibration.available_bytes(cgroup(tmp_path, "90000")) == 10_000
    monkeypatch.undo()
    assert 0 < calibration.available_bytes() <= psutil.virtual_memory().total
