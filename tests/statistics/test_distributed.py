"""Two processes get the calibration of one, or both get the error."""

import inspect
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_moments, tiny_model, tiny_windows
from ranks import BOUNDARIES

import ghostlib as gl
from ghostlib.statistics import distributed

PROCESSES = 2
SECONDS = 300


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The outcomes of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
        f"import ranks; ranks.main(int(sys.argv[1]), {PROCESSES}, ranks.Path(sys.argv[2]))"
    )
    for process in fresh.run_all(code, *((rank, folder) for rank in range(PROCESSES))):
        assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(PROCESSES)]


def assert_equal_sums(actual: gl.Calibration, expected: gl.Calibration) -> None:
    """Equal up to the order of float64 additions."""
    assert list(actual) == list(expected) and actual.tokens == expected.tokens
    assert actual.model == expected.model
    for boundary, moments in expected.items():
        assert_same_moments(actual[boundary], moments)
    for boundary, similarity in expected.similarities.items():
        assert actual.similarities[boundary] == pytest.approx(similarity, rel=1e-12)


@pytest.mark.slow
def test_windows_are_dealt_out(outcomes: list[dict[str, Any]]) -> None:
    ids = tiny_windows(5)
    for rank, outcome in enumerate(outcomes):
        assert torch.equal(outcome["windows"], ids[rank::PROCESSES])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all", "padded"])
def test_sums_of_two_processes_are_those_of_one(outcomes: list[dict[str, Any]], case: str) -> None:
    for outcome in outcomes:
        assert_equal_sums(outcome[case], outcome[f"{case}, alone"])
    tokens = outcomes[0][case].tokens
    assert tokens == (5 * 24 if case == "all" else 5 * 23 - 7 - 4)


@pytest.mark.slow
def test_every_process_has_the_same_operator(outcomes: list[dict[str, Any]]) -> None:
    (one, alone), (other, _) = (outcome["operators"] for outcome in outcomes)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, alone)


@pytest.mark.slow
def test_a_shared_gram_matrix_stays_shared(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        calibration = outcome["all"]
        assert calibration[(2, 4)].G is calibration[(2, 3)].G
        assert calibration[(2, 4)].G is not calibration[(1, 3)].G


@pytest.mark.slow
def test_a_set_of_regressors_has_no_order(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["several regressors"].of("x, n(x)").keys() == set(BOUNDARIES)


@pytest.mark.slow
def test_similarities_need_no_moments(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        bare = outcome["similarities"]
        assert not bare and bare.similarities == outcome["all"].similarities


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no windows", "ValueError: process 1 of 2 has no windows: take at least 2 windows, or st"),
        ("same windows", "ValueError: processes 0 and 1 have the same windows"),
        ("other boundaries", "ValueError: processes 0 and 1 were called with different arg"),
        ("other options", "ValueError: processes 0 and 1 were called with different arg"),
        ("other model", "ValueError: processes hold different models: llama-6x16-"),
        ("bad ids", "RuntimeError: process 1 of 2 could not calibrate its windows: ValueError: to"),
        ("no tensor", "RuntimeError: process 0 of 2 could not calibrate its windows: ValueError"),
    ],
)
def test_an_error_in_one_process_ends_all(
    outcomes: list[dict[str, Any]], case: str, message: str
) -> None:
    messages = {outcome[case] for outcome in outcomes}
    assert len(messages) == 1 and messages.pop().startswith(message)


@pytest.mark.slow
def test_refusals_leave_the_processes_in_step(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert_equal_sums(outcome["afterwards"], outcome["all"])


def test_one_process_alone_needs_no_group() -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    assert torch.equal(gl.shard(ids), ids)
    assert_equal_sums(
        gl.calibrate_distributed(model, gl.shard(ids), BOUNDARIES),
        gl.calibrate(model, ids, BOUNDARIES),
    )
    with pytest.raises(ValueError, match="process 0 of 1 has no windows: take at least 1 windows"):
        gl.calibrate_distributed(model, ids[:0], BOUNDARIES)
    with pytest.raises(RuntimeError, match="ValueError: token ids") as caught:
        gl.calibrate_distributed(model, ids + 90, BOUNDARIES)
    assert isinstance(caught.value.__cause__, ValueError)


def test_moments_of_all_regressors_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for a second process that has the same sums."""
    regressor = "x, n(x); 1/|y|"
    one = gl.calibrate(tiny_model("llama"), tiny_windows(), BOUNDARIES, regressors=[regressor])
    before = {key: moments.to("cpu") for key, moments in one.collected.items()}
    monkeypatch.setattr(distributed, "_rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(2))
    total = distributed.all_reduce(one)
    assert total.collected.keys() == one.collected.keys()
    for key, moments in before.items():
        assert_same_moments(one.collected[key], moments)  # what was summed stays as it is
        assert_same_moments(total.collected[key], moments + moments)
    for name in ("x", regressor):
        assert list(total.of(name)) == list(one.of(name))
    assert total.tokens == 2 * one.tokens and list(total) == list(one)
    for boundary, similarity in one.similarities.items():
        assert total.similarities[boundary] == pytest.approx(similarity)


def test_backends_without_the_cpu_get_tensors_on_the_models_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: set[str] = set()

    def total(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        devices.add(str(device))
        return values

    monkeypatch.setattr(distributed, "_rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(distributed, "_gather", lambda value: [value])
    monkeypatch.setattr(distributed, "_total", total)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr(distributed, "input_device", lambda model: torch.device("meta"))
    gl.calibrate_distributed(tiny_model("llama"), tiny_windows(), [(1, 3)])
    assert devices == {"meta"}


def documented_script() -> str:
    """The script in the module's docstring."""
    doc = inspect.getdoc(distributed) or ""
    lines = doc.partition("script.py``::\n\n")[2].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line.removeprefix("    ") for line in lines[:end])


SMALLER = ("length=512, count=8", "length=64, count=2")


@pytest.mark.embedded
@pytest.mark.slow
def test_the_documented_script_runs(tmp_path: Path) -> None:
    code = documented_script()
    assert SMALLER[0] in code
    code = code.replace(*SMALLER)
    (tmp_path / "script.py").write_text(code + "\ndist.destroy_process_group()\n")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launch, "script.py"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "smollm2-ghost7" / "model.safetensors").exists()


@pytest.mark.embedded
@pytest.mark.slow
def test_the_documented_script_runs_with_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes with the environment of a launcher."""
    group, code = 'dist.init_process_group("gloo")', documented_script()
    assert group in code
    code = code.replace(group, "import accelerate; accelerate.PartialState(cpu=True)")
    code = code.replace(*SMALLER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = address | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = "RANK=sys.argv[1], LOCAL_RANK=sys.argv[1]"
    code = f"import os, sys; os.environ.update({environment}, {ranks})\n{code}"
    monkeypatch.chdir(tmp_path)
    for process in fresh.run_all(f"{code}\ndist.destroy_process_group()", (0,), (1,)):
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "smollm2-ghost7" / "model.safetensors").exists()
