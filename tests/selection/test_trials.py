"""A trial resumed from the base's streams scores what the whole variant scores."""

from functools import cache

import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_windows
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ghostlib as gl
from ghostlib.models.architectures import decoder_layers
from ghostlib.models.boundaries import gaps_without
from ghostlib.selection.evidence import probe_to_keep
from ghostlib.selection.trials import Trials
from ghostlib.tutorial.cosine import fit_cosine, mlp_activations

UNFOLDABLE = {"replaceme": ("gemma2", "gemma3_text", "olmo2"), "magnitude": ("olmo2",)}
SETS = st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1).map(lambda s: tuple(sorted(s)))

STARTS = st.none() | st.sets(st.integers(0, LAYERS))


@cache
def calibrated():
    """A model, and its statistics for every gap."""
    model = tiny_model("llama")
    gaps = [b for n in range(1, LAYERS) for b in gl.contiguous(n, LAYERS)]
    return model, gl.calibrate(model, tiny_windows(), gaps, regressors=["h"])


@pytest.mark.thorough
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(base=SETS, layers=SETS, family=st.sampled_from([None, "ghost", "refit"]), starts=STARTS)
@example(base=(2, 3), layers=(4,), family="refit", starts=None)  # layer 1 is no longer folded into
def test_any_base_serves_any_trial(base, layers, family, starts):
    (model, stats), ids = calibrated(), tiny_windows(3, 12)

    def repairs(removed):
        if not family:
            return {}
        moments, gaps = stats.of(gl.OPERATORS[family].regressor), gaps_without(removed, LAYERS)
        return {gap: gl.solve(moments[gap], family) for gap in gaps if gap in moments}

    operators = repairs(layers)
    variant = gl.install(model, {g: operators.get(g) for g in gaps_without(layers, LAYERS)})
    trials = Trials(model, ids, batch_size=2, starts=starts)
    trials.rebase(base, repairs(base))
    expected = gl.window_losses(variant, ids)
    torch.testing.assert_close(trials.losses(layers, operators), expected, rtol=1e-5, atol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_windows_whose_streams_are_not_kept_score_alike(monkeypatch, share):
    model, ids = tiny_model("llama"), tiny_windows(5, 12)
    total = (LAYERS + 1) * ids.numel() * 16 * 4
    monkeypatch.setattr("ghostlib.selection.trials.KEPT", share * total)
    trials = Trials(model, ids)
    assert sum(map(bool, trials.streams)) == round(5 * share)
    for layers in ((), (2, 3), (0, 4)):
        variant = gl.prune(model, layers) if layers else model
        expected = gl.window_losses(variant, ids)
        torch.testing.assert_close(trials.losses(layers), expected, rtol=1e-5, atol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["replaceme", "magnitude", "low-rank", "affine"])
def test_every_kind_of_repair(any_tiny, name):
    layers = (1, 3, 4)  # one alone, two together
    if any_tiny.config.model_type in UNFOLDABLE.get(name, ()):
        pytest.skip("refused for this architecture: see test_installers.py")
    ids = tiny_windows(2, 12)
    options = {"rank": 5} if name == "low-rank" else {}
    gaps = gl.runs(layers, LAYERS)
    regressor = gl.OPERATORS[name].regressor
    stats = gl.calibrate(any_tiny, tiny_windows(), gaps, regressors=[regressor])
    operators = {gap: gl.solve(m, name, **options) for gap, m in stats.of(regressor).items()}
    trials = Trials(any_tiny, ids)
    expected = gl.window_losses(gl.recover(any_tiny, stats, layers, name, **options), ids)
    # Folding rescales the inputs of all norms, and their epsilon is absolute.
    tolerance = 1e-3 if name == "magnitude" else 1e-5
    torch.testing.assert_close(trials.losses(layers, operators), expected, rtol=tolerance, atol=0)


def test_a_turned_mlp_counts_like_replaceme():
    model, ids, gap = tiny_model("llama"), tiny_windows(2, 12), gl.Boundary(2, 4)
    op = fit_cosine(mlp_activations(model, tiny_windows(), gap), steps=5, learning_rate=0.1)
    expected = gl.window_losses(gl.install(model, {gap: op}), ids)
    losses = Trials(model, ids).losses(tuple(gap.removed), {gap: op})
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    pruned = gl.window_losses(gl.prune(model, gap.removed), ids)
    assert not torch.allclose(losses, pruned, rtol=1e-3)


def test_layers_before_the_first_change_do_not_run_again():
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    trials = Trials(model, ids)
    ran = layers_that_run(model, trials)
    trials.losses((3,))
    assert ran == [4, 5] * len(ids)
    ran.clear()
    trials.rebase((3,))
    assert ran == [0, 1, 2, 4, 5] * len(ids)
    ran.clear()
    trials.losses((3, 5))
    assert ran == [4] * len(ids)  # layer 5 was the last, and at least one layer must run


def layers_that_run(model, trials):
    """Indices of the layers of ``model`` that run, in order, filled as they run."""
    trials.losses((2,))  # measures the head with the whole model, once
    ran = []
    for index, layer in enumerate(decoder_layers(model)):
        # Variants share the model's parameters but not its modules: hooks are copied with them.
        layer.register_forward_hook(lambda m, a, o, index=index: ran.append(index))
    return ran


def test_only_the_streams_of_named_starts_are_kept():
    model, ids = tiny_model("llama"), tiny_windows(3, 12)
    trials = Trials(model, ids, starts=[2])
    assert [list(streams) for streams in trials.streams] == [[2]] * 3
    ran = layers_that_run(model, trials)
    trials.losses((2, 3))
    trials.losses((4,))  # differs later than at the only start
    assert ran == [4, 5] * 3 + [2, 3, 5] * 3
    ran.clear()
    trials.losses((1,))  # differs before it: a whole pass
    assert ran == [0, 2, 3, 4, 5] * 3
    with pytest.raises(ValueError, match=f"number of layers {LAYERS}, got {LAYERS + 1}"):
        Trials(model, ids, starts=[LAYERS + 1])


def test_without_windows_there_is_no_loss():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no windows to score"):
        gl.Trials(model, None, probes=probe_to_keep(model, "copying")).losses(())


def test_loss_is_the_mean_and_the_model_stays():
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    with torch.no_grad():
        before = model(ids).logits
    trials = Trials(model, ids)
    assert trials.loss((1, 2)) == pytest.approx(float(trials.losses((1, 2)).mean()))
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="predict nothing"):
        Trials(model, ids[:, :1])
    with pytest.raises(ValueError, match="do not fit a vocabulary of 97"):
        Trials(model, ids + 97)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Trials(model, ids, batch_size=0)
