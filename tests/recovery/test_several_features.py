"""Repairs of several features inside models: recovered, saved, tried and fitted in sequence."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, WIDTH, saved_and_loaded, stored_streams, tiny_model, tiny_windows
from torch import Tensor
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.models.architectures import receiver
from ghostlib.operators.families import FAMILIES
from ghostlib.operators.solve import solve
from ghostlib.selection.trials import Trials
from ghostlib.statistics.features import STREAM

GAP = gl.Boundary(2, 4)
BRANCHED = [
    name
    for name, family in FAMILIES.items()
    if family.regressor != STREAM and not family.regressor.reads_mlp
]
READS_RAW = ("olmo2",)
RIDGE = 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", BRANCHED)
def test_recovered_models_of_every_architecture(
    any_tiny: PreTrainedModel, name: str, tmp_path: Path
) -> None:
    ids, layers = tiny_windows(4, 40), (0, 2, 3, LAYERS - 1)  # the first, two together, the last
    if any_tiny.config.model_type in READS_RAW and name != "ghost-relative":
        with pytest.raises(ValueError, match="read their stream without a norm"):
            gl.recover(any_tiny, ids, layers, name)
        return
    recovered = gl.recover(any_tiny, ids, layers, name, relative_ridge=RIDGE)
    saved_and_loaded(recovered, ids, tmp_path)
    pruned, count = gl.prune(any_tiny, layers), len(gl.runs(layers, LAYERS))
    k = len(FAMILIES[name].regressor.features)
    added = gl.count_parameters(recovered) - gl.count_parameters(pruned)
    assert added == count * k * WIDTH**2 and k <= (3 if "three" in name else 2)
    assert gl.flops(recovered, 7).boundary == 2 * 7 * added


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"bias": True}, {"rank": 3, "bias": True}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_does_what_the_operator_does(kind: str, options: dict) -> None:
    model, ids, name = tiny_model(kind), tiny_windows(4, 20), "three-branch-relative"
    regressor = FAMILIES[name].regressor
    stats = gl.calibrate(model, ids, [GAP], regressors=[regressor])
    op = solve(stats.of(regressor)[GAP], name, relative_ridge=RIDGE, **options)
    recovered = gl.install(model, {GAP: op})
    outputs: list[Tensor] = []
    module: Any = receiver(recovered, 2)
    module.boundary.register_forward_hook(lambda m, a, out: outputs.append(out))
    direct = gl.recover(model, stats, GAP.removed, name, relative_ridge=RIDGE, **options)
    with torch.no_grad():
        torch.testing.assert_close(direct(ids).logits, recovered(ids).logits)
    expected = op.apply(stored_streams(model, ids)[2])
    torch.testing.assert_close(outputs[0], expected, rtol=1e-3, atol=1e-3)
    if "rank" in options:
        assert module.boundary.A.shape == (3 * WIDTH, 3)


def test_an_operator_for_another_model_is_refused() -> None:
    ids, name = tiny_windows(), "two-branch"
    regressor = FAMILIES[name].regressor
    stats = gl.calibrate(tiny_model("gpt2"), ids, [GAP], regressors=[regressor])
    op = solve(stats.of(regressor)[GAP], name)
    with pytest.raises(ValueError, match=r"reads x, z\(x\), and the layers of a llama read x, n"):
        gl.install(tiny_model("llama"), {GAP: op})
    with pytest.raises(ValueError, match=r"must have width 16, got 8"):
        gl.install(tiny_model("gpt2"), {GAP: replace(op, M=op.M[:, :8])})


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["two-branch-relative", "three-branch-relative"])
def test_trials_and_sequential_fits(name: str) -> None:
    model, ids, layers = tiny_model("llama"), tiny_windows(3, 16), (1, 3)
    gaps = gl.runs(layers, LAYERS)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    fitted = gl.fit_sequential(model, ids, gaps, name, attention_mask=mask, relative_ridge=RIDGE)
    regressor = FAMILIES[name].regressor
    teacher = gl.calibrate(model, ids, gaps, attention_mask=mask, regressors=[regressor])
    moments = teacher.of(regressor)
    first = solve(moments[gaps[0]], name, relative_ridge=RIDGE)
    torch.testing.assert_close(fitted[gaps[0]].M, first.M)
    # the second gap learns from the output of the first repair
    partly = gl.install(model, {gaps[0]: first})
    x_pre, x_post = (stored_streams(m, ids, attention_mask=mask) for m in (partly, model))
    later = gl.Moments(WIDTH, regressor=moments[gaps[1]].regressor)
    for x, y, real in zip(x_pre[2], x_post[4], mask.bool(), strict=True):
        later.update(x, y, real=real)
    second = solve(later, name, relative_ridge=RIDGE)
    torch.testing.assert_close(fitted[gaps[1]].M, second.M, rtol=1e-3, atol=1e-3)
    trials = Trials(model, ids)
    expected = gl.window_losses(gl.install(model, dict(fitted)), ids)
    torch.testing.assert_close(trials.losses(layers, fitted), expected, rtol=1e-5, atol=0)
    trials.rebase((1,), {gaps[0]: fitted[gaps[0]]})
    torch.testing.assert_close(trials.losses(layers, fitted), expected, rtol=1e-5, atol=0)


def test_every_operator_is_solved_from_the_widest() -> None:
    model, ids, layers = tiny_model("llama"), tiny_windows(), (1, 3)
    relative = ["ghost-relative", "two-branch-relative", "three-branch-relative"]
    widest = FAMILIES[relative[-1]].regressor
    stats = gl.calibrate(model, ids, gl.runs(layers, LAYERS), regressors=[widest])
    for name in relative:
        cut = gl.recover(model, stats, layers, name, relative_ridge=RIDGE)
        alone = gl.recover(model, ids, layers, name, relative_ridge=RIDGE)
        with torch.no_grad():
            torch.testing.assert_close(cut(ids).logits, alone(ids).logits)


def test_moments_that_were_not_collected_are_named() -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, [GAP])
    with pytest.raises(ValueError, match=r"no moments of x, n\(x\) were collected: calibrate\("):
        gl.recover(model, stats, GAP.removed, "two-branch")


def test_few_tokens_that_own_the_objective_are_reported_to_the_caller() -> None:
    model = tiny_model("llama")
    X = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(0))
    Y = X.clone()
    Y[:4, 1] += 1e4
    moments = {GAP: gl.Moments(WIDTH).update(X, Y)}
    message = r"boundary \(2, 4\): 4 of 1000 tokens own the squared error that ghost minimises"
    with pytest.warns(gl.MassiveActivationWarning, match=message) as caught:
        gl.recover(model, moments, GAP.removed)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", gl.MassiveActivationWarning)
        gl.recover(model, moments, GAP.removed, "linearpatch-d")  # minimises no squared error
        gl.recover(model, tiny_windows(), GAP.removed, relative_ridge=RIDGE)
