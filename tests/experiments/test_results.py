"""A results file survives kills, full disks, damage and other writers, and keeps finite JSON."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostlib.experiments import results as module
from ghostlib.experiments.results import Results, read_results

SPECIFICATION = {"model": "tiny", "windows": [3, 5], "seed": 0}


@pytest.fixture(autouse=True)
def one_environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "environment" not in request.node.name:
        monkeypatch.setattr(module, "environment", lambda: {"versions": {}})


def begin(path: Path, **changes: Any) -> Results:
    results = Results(path)
    results.begin(SPECIFICATION | changes)
    return results


def put(results: Results, cell: int | str, value: Any = None) -> None:
    value = math.sqrt(cell) if isinstance(cell, int) and value is None else value
    names = {"layers": str(cell), "operator": "ghost", "measure": "perplexity", "dataset": "wiki"}
    results.append("score", **names, value=value)


def cells(results: Results) -> dict[str, Any]:
    return {record["layers"]: record["value"] for record in results.of("score")}


def fill(path: Path, count: int = 12) -> None:
    results = begin(path)
    for cell in range(count):
        put(results, cell)
    results.close()


COMPLETE = {str(cell): math.sqrt(cell) for cell in range(12)}


def in_children(work: Callable[[], object], count: int = 1) -> list[int]:
    """The wait statuses of processes that do ``work`` at the same time."""
    children = []
    for _ in range(count):
        if not (child := os.fork()):
            try:
                work()
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def test_the_first_record_creates_a_file_with_its_specification(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    results = begin(path)
    assert not list(tmp_path.iterdir())
    put(results, 2)
    results.close()
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["specification", "environment", "score"]
    assert read_results(path).of("specification")[0].items() >= SPECIFICATION.items()
    put(begin(path), 2, "another value")
    assert cells(read_results(path)) == {"2": math.sqrt(2)}, "a finished cell is not written"


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment_and_resumed(tmp_path: Path, seed: int) -> None:
    """With nothing, a part or all of the line that is being written."""
    path, rng = tmp_path / "a.jsonl", random.Random(seed)
    moment, share, write = rng.randrange(12), rng.random(), os.write

    def killed(file: int, data: bytes) -> int:
        nonlocal moment
        if (moment := moment - 1) < 0:
            write(file, data[: round(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    def work() -> None:
        os.write = killed
        fill(path)

    assert [os.WTERMSIG(status) for status in in_children(work)] == [signal.SIGKILL]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fill(path)
        assert cells(read_results(path)) == COMPLETE
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_three_writers_lose_nothing_and_write_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert in_children(lambda: fill(path, 60), 3) == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 + 60
    assert cells(read_results(path)) == {str(cell): math.sqrt(cell) for cell in range(60)}
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_records_of_another_run_are_read(tmp_path: Path) -> None:
    first, second = begin(tmp_path / "a.jsonl"), begin(tmp_path / "a.jsonl")
    put(first, 1)
    second.refresh()
    assert second.get("score", "1", "ghost", "perplexity", "wiki") and cells(second) == {"1": 1.0}
    put(second, 4)
    put(first, 4, "another value")
    assert cells(first) == cells(second) == {"1": 1.0, "4": 2.0}


@pytest.mark.parametrize("size", [0, 10, 150, 400])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    results = begin(path)
    put(results, 1)
    before = path.read_bytes()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + size,) * 2)
        with pytest.raises(OSError, match=r"a\.jsonl could not be written and stays as it was; ma"):
            put(results, 2, "x" * 1000)

    assert in_children(work) == [0]
    assert path.read_bytes() == before
    put(results, 2, 3.0)  # with room again, the run continues
    assert cells(read_results(path)) == {"1": 1.0, "2": 3.0}


def test_a_torn_last_line_is_named_and_its_cell_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path)
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match=r"a\.jsonl, line 14 is damaged .*its cell computed again"):
        assert len(cells(read_results(path))) == 11
    with pytest.warns(UserWarning, match="line 14 is damaged"):
        fill(path)
    assert path.read_bytes().startswith(torn + b"\n")
    with pytest.warns(UserWarning, match="line 14 is damaged"):
        assert cells(read_results(path)) == COMPLETE


@pytest.mark.parametrize("number", range(1, 15))
@pytest.mark.parametrize("damage", [b"\0", b"\xff\xfe", b"NaN", b'{"kind":"score"}', b"[]", b"7"])
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, number: int, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    fill(path)
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=f"line {number} is damaged"):
        fill(path)
    with pytest.warns(UserWarning, match=f"line {number} is damaged"):
        results = read_results(path)
    assert cells(results) == COMPLETE
    assert len(results.of("specification")) == 1, "a damaged header is written again"


@given(st.binary(max_size=300))
def test_any_bytes_are_results_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("results") / "a.jsonl"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            results = begin(path)
        except ValueError as error:
            assert "\n" not in str(error) and "a.jsonl is no results file" in str(error)
            assert path.read_bytes() == data
        else:
            put(results, 4)
            assert cells(read_results(path)) == {"4": 2.0}


def finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.thorough
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_every_finite_value_survives_and_no_other_is_kept(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("results") / "a.jsonl"
    results, expected = begin(path), {}
    for cell, value in values.items():
        if finite(value):
            put(results, cell, value)
            expected[cell] = value
        else:
            with pytest.raises(ValueError, match="must be finite numbers and text"):
                put(results, cell, value)
    if expected:
        assert cells(read_results(path)) == cells(results) == expected
    else:
        assert not path.exists()


def test_arrays_are_stored_as_lists(tmp_path: Path) -> None:
    results = begin(tmp_path / "a.jsonl")
    put(results, "numpy", {"mean": np.float32(0.25), "all": np.arange(3), "pair": (1, 2)})
    put(results, "torch", torch.tensor([[1.0, 2.0]]))
    expected = {"numpy": {"mean": 0.25, "all": [0, 1, 2], "pair": [1, 2]}, "torch": [[1.0, 2.0]]}
    assert cells(results) == cells(read_results(results.path)) == expected
    for bad in (object(), torch.tensor(math.nan), {"a": [np.inf]}):
        with pytest.raises(ValueError, match="must be finite numbers and text"):
            put(results, "bad", bad)


def test_another_specification_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another specification: windows = \[3, 5\] there, 7 now"):
        begin(path, windows=7)
    with pytest.raises(ValueError, match=r"model = 'tiny' there, 'big' now and 2 more; name anot"):
        begin(path, model="big", windows=1, seed=2)
    Results(path).expect({"seed": 0})  # a part of the specification
    assert path.read_bytes() == before


def test_files_of_several_specifications_are_joined(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.jsonl" for seed in range(3)]
    for seed, path in enumerate(paths):
        put(begin(path, seed=seed), 4)
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    parts = [read_results(path).records for path in paths]
    assert read_results(joined).records == parts[0] | parts[1] | parts[2]
    assert len(read_results(joined).of("score")) == 3
    put(begin(joined, seed=1), 9)
    assert len(read_results(joined).of("score")) == 4
    with pytest.raises(ValueError, match="seed = 0 there, 3 now"):
        begin(joined, seed=3)


def test_a_file_that_changed_is_refused_by_its_name(tmp_path: Path) -> None:
    def of_file(name: str, digest: str) -> Results:
        results = Results(tmp_path / name)
        results.begin(SPECIFICATION, [{"field": "perplexity", "name": "x.jsonl", "digest": digest}])
        return results

    put(begin(tmp_path / "a.jsonl"), 1)  # older files have no such records
    for cell in (2, 3):
        put(of_file("a.jsonl", "one"), cell)
    put(of_file("b.jsonl", "one"), 4)
    put(of_file("c.jsonl", "two"), 5)
    before = (tmp_path / "a.jsonl").read_text()
    assert before.count('"kind":"file"') == 1
    with pytest.raises(ValueError, match=r"results of another perplexity file 'x\.jsonl': give"):
        of_file("a.jsonl", "two")
    assert (tmp_path / "a.jsonl").read_text() == before
    (tmp_path / "a.jsonl").write_text(before + (tmp_path / "b.jsonl").read_text())
    assert cells(of_file("a.jsonl", "one")).keys() == {"1", "2", "3", "4"}
    (tmp_path / "b.jsonl").write_text(before + (tmp_path / "c.jsonl").read_text())
    for digest in ("one", "two"):  # parts of different text
        with pytest.raises(ValueError, match="results of another perplexity file"):
            of_file("b.jsonl", digest)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "another"}', "notes\n"])
def test_a_file_of_another_kind_is_refused_unchanged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    for read in (begin, read_results):
        with pytest.raises(ValueError, match=r"notes\.txt is no results file: name another"):
            read(path)
    assert path.read_text() == text


def test_a_path_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, access = tmp_path / "fixed", os.access
    folder.mkdir()
    # not even by root, who runs the tests
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != folder and access(p, mode))
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"a\.jsonl cannot be written \(.*fixed\)"):
        begin(folder / "a.jsonl")
    with pytest.raises(PermissionError, match=r"a\.jsonl cannot be written \(.*file\)"):
        begin(tmp_path / "file" / "a.jsonl")
    with pytest.raises(PermissionError, match=r"fixed cannot be written .*: name another file"):
        begin(folder)
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "none.jsonl")


def test_each_environment_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    for cell in (1, 2):
        put(begin(path), cell)
    (first,) = read_results(path).of("environment")
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"].keys() >= {"python", "transformers", "ghostlib"}
    assert first["hardware"]["cores"] == os.cpu_count()
    monkeypatch.setattr(module, "_commit", lambda: "0" * 40)
    put(begin(path), 3)
    results = read_results(path)
    by_id = {record["id"]: record["commit"] for record in results.of("environment")}
    commits = [by_id[record["environment"]] for record in results.of("score")]
    assert commits == [first["commit"], first["commit"], "0" * 40]


def test_the_commit_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "results.py"
    file.write_text("")
    monkeypatch.setattr(module, "__file__", str(file))
    git("init")
    git("commit", "--allow-empty", "-m", "empty")
    assert module._commit() is None  # installed inside somebody else's checkout
    git("add", ".")
    git("commit", "-m", "module")
    assert module._commit() == git("rev-parse", "HEAD") and len(git("rev-parse", "HEAD")) == 40
    file.write_text("changed")
    assert module._commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert module._commit() is None  # no git at all


def test_reading_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, ghostlib.experiments.results, ghostlib.experiments.spec;"
        "sys.exit(bool({'torch', 'transformers', 'pandas'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
