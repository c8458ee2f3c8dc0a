"""A run that is stopped goes on; nothing else than valid JSON of the same settings is kept."""

import errno
import json
import math
import os
import subprocess
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostlib.experiments import results as provenance
from ghostlib.experiments.results import Results

SETTINGS = {"model": "tiny", "n": (3, 5), "seed": 0}


def never() -> Any:
    raise AssertionError("a finished cell was computed again")


def test_a_stopped_run_resumes_at_the_last_finished_cell(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "grid.json"
    run = Results.open(path, SETTINGS)
    assert run.cell("a", lambda: 1.5) == 1.5

    def killed() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.cell("b", killed)
    again = Results.open(path, SETTINGS)
    assert again.cells == {"a": 1.5}
    assert again.cell("a", never) == 1.5 and again.cell("b", lambda: [2]) == [2]
    assert json.loads(path.read_text())["cells"] == {"a": 1.5, "b": [2]}
    assert [p.name for p in path.parent.iterdir()] == ["grid.json"]  # no temporary left


def test_a_value_is_the_same_before_and_after_the_file(tmp_path: Path) -> None:
    @dataclass
    class Point:
        x: float
        y: tuple[int, ...]

    values = {
        "point": Point(0.5, (1, 2)),
        "numpy": {"mean": np.float32(0.25), "all": np.arange(3)},
        "torch": torch.tensor([[1.0, 2.0]]),
        "text": "W* – Δ",
    }
    run = Results.open(tmp_path / "r.json", SETTINGS)
    first = {key: run.cell(key, partial(copy, value)) for key, value in values.items()}
    assert first == {
        "point": {"x": 0.5, "y": [1, 2]},
        "numpy": {"mean": 0.25, "all": [0, 1, 2]},
        "torch": [[1.0, 2.0]],
        "text": "W* – Δ",
    }
    assert Results.open(tmp_path / "r.json", SETTINGS).cells == first


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_every_finite_value_survives_and_no_other_is_kept(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("results") / "r.json"
    run, kept = Results.open(path, SETTINGS), {}
    for key, value in values.items():
        if finite(value):
            run.cell(key, partial(copy, value))
            kept[key] = value
        else:
            with pytest.raises(ValueError, match="no valid JSON"):
                run.cell(key, partial(copy, value))
    assert Results.open(path, SETTINGS).cells == kept


@pytest.mark.parametrize("value", [float("nan"), {"a": [np.inf]}, torch.tensor(np.nan), object()])
def test_what_is_no_json_is_refused_and_not_stored(tmp_path: Path, value: object) -> None:
    path = tmp_path / "r.json"
    run = Results.open(path, SETTINGS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^cell 'a' is no valid JSON .*finite numbers and text$"):
        run.cell("a", lambda: value)
    assert path.read_bytes() == before and run.cells == {}
    with pytest.raises(ValueError, match="settings is no valid JSON"):
        Results.open(tmp_path / "other.json", {"seed": value})


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Results.open(path, SETTINGS)
    with pytest.raises(ValueError, match=r"r\.json has .*: n = \[3, 5\] there, 7 now; name anoth"):
        Results.open(path, SETTINGS | {"n": 7})
    with pytest.raises(ValueError, match=r"model = 'tiny' there, 'big' now and 2 more; "):
        Results.open(path, {"model": "big", "seed": 0, "extra": None})
    with pytest.raises(ValueError, match="must name the seed"):
        Results.open(path, {"model": "tiny"})


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "another"}', '{"format": 1'])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.json is no results file .*name another path"):
        Results.open(path, SETTINGS)
    assert path.read_text() == text


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "r.json"
    run = Results.open(path, SETTINGS)
    run.cell("a", lambda: 1)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        with pytest.raises(OSError, match=r"No space left .*r\.json .*stays as it was.*make room"):
            run.cell("b", lambda: 2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert run.cells == {"a": 1}
    assert run.cell("b", lambda: 3) == 3  # with room again, the run goes on


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Results.open(tmp_path / "r.json", SETTINGS)
    before = run.path.read_bytes()
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: None)
    with pytest.raises(OSError, match="No space left on device"):
        run.cell("a", lambda: "x" * 100_000)
    assert run.path.read_bytes() == before


def test_the_environment_is_recorded_once_for_each_kind_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    Results.open(path, SETTINGS)
    (first,) = Results.open(path, SETTINGS).environments
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"].keys() >= {"python", "transformers", "ghostlib"}
    assert first["hardware"]["cores"] == os.cpu_count() and first["hardware"]["cpu"]
    monkeypatch.setattr(provenance, "_commit", lambda: "0" * 40)
    assert [e["commit"] for e in Results.open(path, SETTINGS).environments] == [
        first["commit"],
        "0" * 40,
    ]


def test_commit_and_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True
        )
        return done.stdout.strip()

    module = tmp_path / "provenance.py"
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    git("init")
    git("commit", "--allow-empty", "-m", "empty")
    assert provenance._commit() is None  # installed inside somebody else's checkout
    git("add", ".")
    git("commit", "-m", "module")
    assert provenance._commit() == git("rev-parse", "HEAD") and len(git("rev-parse", "HEAD")) == 40
    module.write_text("changed")
    assert provenance._commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert provenance._commit() is None  # no git at all

    def unknown(name: str) -> str:
        raise provenance.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.importlib.metadata, "version", unknown)
    assert list(provenance.environment()["versions"]) == ["python"]

    def unreadable(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert provenance._cpu()
