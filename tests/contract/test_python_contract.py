"""Every bad input to a public function ends in one clear line, and nothing is left behind."""

import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from table import CASES, GAP, IDS, MODEL, ROWS, Case, Row

import ghostlib as gl

# What takes no input that could be wrong, and why.
ASIDE = {
    "CORPORA": "a registry: unknown names are in the table as corpora",
    "CRITERIA": "a registry, likewise",
    "OPERATORS": "a registry, likewise",
    "PROBES": "a registry, likewise",
    "Profile": "made by abilities",
    "Profile.to_json": "no input",
    "Boundary": "a pair of numbers, checked where it is used",
    "Family": "a record for those who add one, checked by check_family",
    "Calibration": "made by calibrate",
    "Inspection": "made by inspect",
    "Operator": "made by solve and Operator.of",
    "RankPath": "made by rank_path",
    "Selection": "made by select_layers",
    "Similarity": "made by calibrate",
    "MassiveActivationWarning": "a warning",
    "SingularGramWarning": "a warning",
    "Moments.centred": "for fits with a bias, behind solve and the paths",
    "Moments.add_sequence": "for the streaming pass, behind update",
    "Moments.error_of": "behind error, which checks",
    "Moments.tensors": "no input",
    "Moments.counts": "no input",
    "Moments.replaced": "for copies, behind load and +",
    "Specification.files": "no input",
    "Results.of": "a query: of what is not there, there is nothing",
    "Results.get": "likewise",
    "Results.expect": "behind run_experiment, see tests/experiments/test_results.py",
    "Results.begin": "likewise",
    "Results.append": "likewise",
    "Results.refresh": "no input",
    "Results.close": "no input",
    "Results.read": "any bytes: tests/experiments/test_results.py",
    "Specification.load": "no input",
    "Specification.identity": "behind run_experiment",
    "Specification.draw_calibration": "behind run_experiment",
    "Specification.draw_selection": "behind run_experiment",
    "Specification.draw_test": "behind run_experiment",
}
ADVICE = re.compile(
    r":|;|of the form|\b(must|needs?|give|use|name|known|choose|cannot|is no|are no|leave)\b"
    r"|\b(lies?|between|such as|No such|only|got)\b",
    re.I,
)


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=[re.sub(r"\W+", " ", case.name) for case in CASES])
def test_bad_input_is_refused_in_one_line(case: Case, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(case.error) as caught:
            case.call()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable(), message
    assert len(message) < 1000, f"{len(message)} characters"
    assert re.search(case.words, message), message
    assert ADVICE.search(message), message
    if isinstance(case.value, int | float) and not isinstance(case.value, bool):
        assert str(case.value) in message, "the value is not in it"
    assert not list(tmp_path.iterdir()), "something is left behind"


def public() -> Iterator[tuple[str, Any]]:
    """Every public function, class and method by name."""
    for name in gl.__all__:
        thing = getattr(gl, name)
        yield name, thing
        if inspect.isclass(thing) and not issubclass(thing, Warning):
            methods = [m for m in vars(thing) if not m.startswith("_")]
            callables = [m for m in methods if callable(getattr(thing, m))]
            yield from ((f"{name}.{m}", getattr(thing, m)) for m in callables)


def tried(name: str) -> list[Row]:
    return [row for row in ROWS if row.name.partition("(")[0] == name]


@pytest.mark.parametrize(("name", "thing"), list(public()), ids=[name for name, _ in public()])
def test_every_public_function_and_parameter_is_in_the_table(name: str, thing: Any) -> None:
    if name in ASIDE:
        assert not tried(name), "it is in the table: take it out of ASIDE"
        return
    assert tried(name), f"{name} is not in the table"
    known = {p for row in tried(name) for p in (*row.kinds, *row.free)}
    missing = [p for p in inspect.signature(thing).parameters if p not in known and p != "self"]
    assert not missing, f"{name} takes {', '.join(missing)}, of which no bad value is tried"


def test_the_table_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 300 and len({case.name for case in CASES}) > 0.9 * len(CASES)


def test_the_model_is_as_before() -> None:
    """After every case above, or alone: no hook, no gradient, the same statistics."""
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in MODEL.modules())
    assert all(p.grad is None for p in MODEL.parameters()) and not MODEL.training
    again = gl.calibrate(MODEL, IDS, [GAP])[GAP]
    assert torch.equal(again.G, gl.calibrate(MODEL, IDS, [GAP])[GAP].G)
