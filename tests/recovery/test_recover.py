"""`recover` records what it did, and refuses by name what it cannot do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_windows
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib import Boundary

GAPS = [Boundary(1, 3), Boundary(4, 5)]
REMOVED = [1, 2, 4]
RIDGE = {"relative_ridge": 1e-3}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Any:
    return model(tiny_windows()).logits


# --- the record -------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("operator", "reads"),
    [
        ("ghost", "x"),
        ("two-branch-relative", "x, n(x); 1/|y|"),
        ("replaceme", "f"),
        ("x, n(prev)", "x, n(prev)"),
    ],
)
def test_the_configuration_records_the_recovery(
    model: PreTrainedModel, operator: str, reads: str
) -> None:
    recovered = gl.recover(model, tiny_windows(), REMOVED, operator, **RIDGE)
    name = "branches" if "," in operator else operator
    assert recovered.config.recovery == {
        "removed": REMOVED,
        "repairs": [{"boundary": list(gap), "operator": name, "reads": reads} for gap in GAPS],
    }
    modules = [] if operator == "replaceme" else [[1, 2], [4]]
    assert [e["removed"] for e in getattr(recovered.config, "ghost", [])] == modules
    assert not hasattr(model.config, "recovery")


def test_only_repairs_at_the_gap_are_modules(model: PreTrainedModel) -> None:
    ids, gaps = tiny_windows(), [Boundary(1, 2), Boundary(3, 4), Boundary(5, 6)]
    stats = gl.calibrate(model, ids, gaps, regressors=["f"])
    ghost = gl.solve(stats[gaps[1]], "ghost", **RIDGE)
    folded = gl.solve(stats.of("f")[gaps[2]], "replaceme", **RIDGE)
    recovered = gl.install(model, {gaps[2]: folded, gaps[0]: None, gaps[1]: ghost})
    record = recovered.config.recovery
    assert [r["operator"] for r in record["repairs"]] == ["pruned", "ghost", "replaceme"]
    assert "reads" not in record["repairs"][0] and record["removed"] == [1, 3, 5]
    assert [(e["receiver"], e["removed"]) for e in recovered.config.ghost] == [(2, [3])]
    assert gl.prune(model, [1]).config.recovery == {
        "removed": [1],
        "repairs": [{"boundary": [1, 2], "operator": "pruned"}],
    }


@pytest.mark.thorough
def test_a_sequential_fit_and_a_recipe_are_recorded(model: PreTrainedModel) -> None:
    ids = tiny_windows(6, 40)
    recovered = gl.recover(model, ids, REMOVED, fit="sequential", **RIDGE)
    assert recovered.config.recovery["fit"] == "sequential"
    recovered = gl.recover(model, ids, REMOVED, "auto", verbose=False)
    recipe = recovered.config.recovery["recipe"]
    names = {repair["operator"] for repair in recovered.config.recovery["repairs"]}
    assert names == {recipe["repair"]}


# --- inputs -----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_windows_statistics_and_operators_give_the_same_model(model: PreTrainedModel) -> None:
    ids = tiny_windows()
    expected = logits(gl.recover(model, ids, REMOVED, **RIDGE))
    stats = gl.calibrate(model, ids, [*GAPS, Boundary(0, 5)])
    assert torch.equal(logits(gl.recover(model, stats, REMOVED, **RIDGE)), expected)
    plain = {tuple(gap): stats[gap] for gap in GAPS}
    assert torch.equal(logits(gl.recover(model, plain, REMOVED, **RIDGE)), expected)
    solved = {gap: gl.solve(stats[gap], **RIDGE) for gap in reversed(GAPS)}
    assert torch.equal(logits(gl.install(model, solved)), expected)
    tuples = {tuple(gap): op for gap, op in solved.items()}
    assert torch.equal(logits(gl.install(model, tuples)), expected)


def test_arguments_of_the_pass_have_their_effect(model: PreTrainedModel) -> None:
    ids = tiny_windows(6, 40)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    options: dict[str, Any] = {"attention_mask": mask, "skip_leading": 3, "batch_size": 4}
    stats = gl.calibrate(model, ids, GAPS, **options)
    recovered = gl.recover(model, ids, REMOVED, **options, **RIDGE)
    assert torch.equal(logits(recovered), logits(gl.recover(model, stats, REMOVED, **RIDGE)))
    assert not torch.equal(logits(recovered), logits(gl.recover(model, ids, REMOVED, **RIDGE)))


def test_too_few_tokens_are_reported(model: PreTrainedModel) -> None:
    with pytest.warns(gl.SingularGramWarning, match="10 tokens"):
        gl.recover(model, tiny_windows(1, 10), REMOVED)


# --- bad input --------------------------------------------------------------------------------

MASK = torch.ones(4, 24)
MOMENTS = {gap: gl.Moments(WIDTH) for gap in GAPS}
PASS = {"attention_mask": MASK, "skip_leading": 5, "batch_size": -3, "fit": "sequential"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers of a type that is not a whole number": (
        {"layers": torch.tensor([False, True])},
        r"layers must be a list \(each a whole number\) or .*, got a Tensor of torch\.bool",
    ),
    "only padding": ({"attention_mask": MASK * 0}, "leave no token"),
    "a recipe's option": ({"budget": "any"}, "ghost has no option 'budget'"),
    **{
        f"{name} without effect": (
            {"calibration": MOMENTS, name: value},
            f"'{name}' belongs to a pass over windows",
        )
        for name, value in PASS.items()
    },
    "no tokens": ({"calibration": MOMENTS}, "these moments hold no tokens"),
    "no layer before the gap": (
        {"layers": [0, 3], "operator": "replaceme"},
        r"boundary \(0, 1\) has no layer before it: keep layer 0",
    ),
    "no layer before the gap, from statistics": (
        {"layers": [0, 3], "operator": "replaceme", "calibration": MOMENTS},
        r"boundary \(0, 1\) has no layer before it: keep layer 0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_one_line(
    model: PreTrainedModel, changes: dict[str, Any], message: str
) -> None:
    arguments = {"calibration": tiny_windows(), "layers": REMOVED} | changes
    with pytest.raises(ValueError, match=message) as caught:
        gl.recover(model, **arguments)
    assert "\n" not in str(caught.value)


def test_a_recovered_model_is_refused_before_the_pass(model: PreTrainedModel) -> None:
    gl.prune(gl.install(model, {}), [1])  # the copy has all its layers: it is dense
    stock = [gl.prune(model, [2]), gl.recover(model, tiny_windows(), [2], "refit", **RIDGE)]
    for recovered in (gl.recover(model, tiny_windows(), [2], **RIDGE), *stock):
        recovered.forward = None  # no pass could be made
        for make in (
            lambda m=recovered: gl.recover(m, tiny_windows(), [1]),
            lambda m=recovered: gl.prune(m, [1]),
            lambda m=recovered: gl.install(m, {}),
        ):
            with pytest.raises(ValueError, match="recovered before: start from the dense model"):
                make()


def test_layers_of_any_kind_of_integer(model: PreTrainedModel) -> None:
    expected = logits(gl.prune(model, [1, 2]))
    for layers in (range(1, 3), (2, 1), {1, 2}, np.array([1, 2]), torch.tensor([1, 2])):
        assert torch.equal(logits(gl.prune(model, layers)), expected)


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        ("low-rank", {}, "low-rank needs rank="),
        ("low-rank", {"rank": WIDTH + 1}, f"between 1 and the width {WIDTH}, got {WIDTH + 1}"),
        ("two-branch", {"rank": 0}, "between 1 and the width"),
        ("ghost", {"around": "foo"}, "around must be 'identity' or 'zero', got 'foo'"),
        ("two-branch", {"relative_ridge": (1e-3, -1.0)}, "positive and finite, got -1.0"),
        ("ghost", {"relative_ridge": (1e-3, 1e-3)}, "has 2 values for 1 features"),
    ],
)
@pytest.mark.parametrize("fit", ["teacher", "sequential"])
def test_an_option_out_of_range_is_refused_before_any_pass(
    model: PreTrainedModel, operator: str, options: dict[str, Any], message: str, fit: str
) -> None:
    passes: list[Any] = []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with handle, pytest.raises(ValueError, match=message):
        gl.recover(model, tiny_windows(), REMOVED, operator, fit=fit, **options)
    assert not passes


def test_a_family_of_ones_own_without_a_ridge(model: PreTrainedModel) -> None:
    """Default options do not make it search for one."""
    pooled = replace(gl.OPERATORS["linearpatch-d"], name="lp", default=(("pooled", True),))
    recovered = gl.recover(model, tiny_windows(), REMOVED, pooled)
    expected = gl.recover(model, tiny_windows(), REMOVED, "linearpatch-d", pooled=True)
    assert torch.equal(logits(recovered), logits(expected))
