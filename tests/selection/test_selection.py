"""Criteria against brute force, first and last layers included."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache

import pytest
import torch
from conftest import LAYERS, stored_streams, tiny_model, tiny_windows

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.models.architectures import decoder_layers
from ghostlib.models.streams import final_hidden
from ghostlib.selection.criteria import (
    CRITERIA,
    Selection,
    needed_boundaries,
    select_several,
    sizes_to_search,
)
from ghostlib.selection.evidence import probe_to_keep
from ghostlib.selection.trials import Trials


def cosines(streams, start, stop):
    x, y = (streams[index].flatten(0, 1).double() for index in (start, stop))
    return torch.nn.functional.cosine_similarity(x, y)


def relative_residual(streams, start, stop):
    """Squared error of least squares on stored activations, relative to the target."""
    x, y = (streams[index].flatten(0, 1).double() for index in (start, stop))
    W = torch.linalg.lstsq(x, y).solution
    return float((x @ W - y).square().sum() / y.square().sum())


def by_hand(model, ids, repaired: bool) -> Callable[[tuple[int, ...]], float]:
    """Mean loss by removed layers, from public functions and the model's own loss."""
    gaps = [gap for n in range(1, LAYERS) for gap in gl.contiguous(n, LAYERS)]
    stats = gl.calibrate(model, ids, gaps) if repaired else None

    @cache
    def loss(layers: tuple[int, ...]) -> float:
        variant = gl.recover(model, stats, layers) if repaired else gl.prune(model, layers)
        with torch.no_grad():
            return float(sum(variant(w[None], labels=w[None]).loss for w in ids) / len(ids))

    return loss


def greedy_by_hand(loss: Callable[[tuple[int, ...]], float], n: int) -> tuple[int, ...]:
    chosen: tuple[int, ...] = ()
    for _ in range(n):
        children = [tuple(sorted({*chosen, i})) for i in range(LAYERS) if i not in chosen]
        chosen = min(children, key=loss)
    return chosen


@pytest.mark.thorough
@pytest.mark.parametrize("n", [1, 2, LAYERS - 1])
def test_cosine_equals_brute_force(any_tiny, n):
    ids = tiny_windows(2, 10)
    selection = gl.select_layers(any_tiny, ids, n)
    streams = stored_streams(any_tiny, ids)
    means = {s: float(cosines(streams, s, s + n).mean()) for s in range(LAYERS - n + 1)}
    best = max(means, key=lambda start: (means[start], -start))
    assert selection == tuple(range(best, best + n))
    assert {layers[0] for layers in selection.scores} == set(range(LAYERS - n + 1))
    for layers, score in selection.scores.items():
        assert -score == pytest.approx(means[layers[0]], abs=1e-6)
    assert (selection.criterion, selection.n) == ("cosine", n)


@pytest.mark.thorough
def test_tries_limit_a_greedy_search_to_what_costs_least_alone():
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    full = gl.select_layers(model, ids, 3, "perplexity")
    assert gl.select_layers(model, ids, 3, "perplexity", tries=LAYERS).scores == full.scores
    few = gl.select_layers(model, ids, 3, "perplexity", tries=2)
    alone = sorted(range(LAYERS), key=lambda layer: full.scores[layer,])
    pairs = [layers for layers in few.scores if len(layers) == 2]
    assert pairs == [tuple(sorted((alone[0], layer))) for layer in alone[1:3]]
    with pytest.raises(ValueError, match="tries must be at least 1, got 0"):
        gl.select_layers(model, ids, 3, "perplexity", tries=0)


def test_block_influence_takes_single_layers_anywhere():
    model, ids = tiny_model("llama"), tiny_windows(2, 10)
    selection = gl.select_layers(model, ids, 3, "block-influence")
    streams = stored_streams(model, ids)
    influence = [1 - float(cosines(streams, i, i + 1).mean()) for i in range(LAYERS)]
    assert set(selection) == set(sorted(range(LAYERS), key=influence.__getitem__)[:3])
    assert list(selection) == sorted(selection)
    assert selection.scores[(4,)] == pytest.approx(influence[4], abs=1e-6)


def test_angular_orders_blocks_by_mean_angle():
    model, ids = tiny_model("llama"), tiny_windows(2, 10)
    selection = gl.select_layers(model, ids, 2, "angular")
    streams = stored_streams(model, ids)
    for layers, score in selection.scores.items():
        angles = cosines(streams, layers[0], layers[-1] + 1).clamp(-1, 1).arccos() / math.pi
        assert score == pytest.approx(float(angles.mean()), abs=1e-6)
    assert selection == min(selection.scores, key=lambda ls: (selection.scores[ls], ls))


@pytest.mark.parametrize("n", [1, 2, LAYERS - 1])
def test_residual_equals_least_squares_on_stored_activations(n):
    model, ids = tiny_model("llama"), tiny_windows(4, 24)
    selection = gl.select_layers(model, ids, n, "residual")
    streams = stored_streams(model, ids)
    expected = {s: relative_residual(streams, s, s + n) for s in range(LAYERS - n + 1)}
    assert {layers[0]: score for layers, score in selection.scores.items()} == pytest.approx(
        expected, abs=1e-6
    )
    assert selection[0] == min(expected, key=lambda start: expected[start])


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_taylor_equals_gradients_by_backward(model_type):
    model, ids = tiny_model(model_type), tiny_windows(3, 12)
    selection = gl.select_layers(model, ids, 2, "taylor")
    assert all(p.grad is None for p in model.parameters()), "the model must stay as it is"
    reference = tiny_model(model_type)
    for window in ids:
        (reference(window[None], labels=window[None]).loss / len(ids)).backward()
    for index, layer in enumerate(decoder_layers(reference)):
        expected = sum(float((p * p.grad).abs().sum().detach()) for p in layer.parameters())
        assert selection.scores[(index,)] == pytest.approx(expected, rel=1e-4)
    ranked = sorted(selection.scores, key=lambda layers: selection.scores[layers])
    assert selection == tuple(sorted(layer for (layer,) in ranked[:2]))


def test_taylor_serves_frozen_models():
    model, ids = tiny_model("llama").requires_grad_(False), tiny_windows(2, 12)
    frozen = gl.select_layers(model, ids, 2, "taylor")
    assert frozen.scores == gl.select_layers(tiny_model("llama"), ids, 2, "taylor").scores
    assert not any(p.requires_grad for p in model.parameters())


def test_taylor_is_the_same_in_training_mode_and_without_gradients():
    model, ids = tiny_model("gpt2"), tiny_windows(2, 12)
    expected = gl.select_layers(model, ids, 2, "taylor").scores
    with torch.no_grad():
        assert gl.select_layers(model.train(), ids, 2, "taylor").scores == expected
    assert model.training
    with pytest.raises(ValueError, match="windows of one token predict nothing"):
        gl.select_layers(model, ids[:, :1], 2, "taylor")


def test_taylor_counts_weights_that_no_token_meets_as_nothing():
    """Such as an expert that is never chosen."""
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    expected = gl.select_layers(model, ids, 2, "taylor").scores
    decoder_layers(model)[2].spare = torch.nn.Linear(3, 3)
    assert gl.select_layers(model, ids, 2, "taylor").scores == expected


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma3_text"])
@pytest.mark.parametrize("criterion", ["perplexity", "greedy-recovered"])
def test_greedy_criteria_equal_brute_force(model_type, criterion):
    model, ids = tiny_model(model_type), tiny_windows(4, 24)
    selection = gl.select_layers(model, ids, 3, criterion)
    loss = by_hand(model, ids, repaired=criterion == "greedy-recovered")
    assert selection == greedy_by_hand(loss, 3)
    # every layer at the first step, every other layer at the second and third
    assert [sum(len(k) == n for k in selection.scores) for n in (1, 2, 3)] == [6, 5, 4]
    for layers, score in selection.scores.items():
        assert score == pytest.approx(loss(layers), rel=1e-4)


@pytest.mark.thorough
def test_smaller_choices_lie_on_the_path_of_a_greedy_search():
    model, ids = tiny_model("llama"), tiny_windows(2, 16)
    long = gl.select_layers(model, ids, 3, "perplexity")
    for n in (1, 2):
        assert long.first(n) == gl.select_layers(model, ids, n, "perplexity")
    with pytest.raises(ValueError, match="no set of 4 layers was scored: choose n <= 3"):
        long.first(4)


def test_a_smaller_choice_is_the_best_of_its_own_size():
    scores = {(0,): 3.0, (1,): 2.0, (2,): 2.5, (0, 1): 1.0, (1, 2): 4.0}
    assert Selection((0, 1), "perplexity", scores).first(1) == (1,)
    assert [sizes_to_search(c, (3, 1, 2)) for c in ("cosine", "perplexity")] == [[1, 2, 3], [3]]


@pytest.mark.thorough
def test_abilities_weigh_a_probe_beside_the_text():
    model, ids = tiny_model("llama", num_hidden_layers=3), tiny_windows(2, 20)
    stats = gl.calibrate(model, ids, needed_boundaries("abilities", 1, 3))
    text = gl.select_layers(model, stats, 1, "greedy-recovered", windows=ids).scores
    heavy = gl.select_layers(model, stats, 1, "abilities", windows=ids, weight=2.0).scores
    default = gl.select_layers(model, stats, 1, "abilities", windows=ids).scores
    probe = probe_to_keep(model, "copying")
    for layer in (0, 2):
        variant = gl.recover(model, stats, [layer])
        with torch.no_grad():
            hidden = [final_hidden(variant, rows) for rows in probe.batches]
        copying = float(probe.values(variant, hidden)["copying"].mean())
        assert heavy[layer,] == pytest.approx(text[layer,] + 2.0 * copying, rel=1e-4)
        assert default[layer,] == pytest.approx(text[layer,] + 0.1 * copying, rel=1e-4)


@pytest.mark.thorough
def test_a_greedy_search_keeps_the_streams_of_each_step_once(monkeypatch):
    model, ids, bases = tiny_model("llama"), tiny_windows(2, 12), []
    rebase = Trials.rebase

    def counted(trials, layers, *operators):
        bases.append(layers)
        rebase(trials, layers, *operators)

    monkeypatch.setattr(Trials, "rebase", counted)
    selection = gl.select_layers(model, ids, 3, "perplexity")
    assert bases == [(), selection.first(1), selection.first(2)]


@pytest.mark.thorough
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_several_depths_are_chosen_as_each_alone(criterion, monkeypatch):
    model, ids, ns = tiny_model("llama"), tiny_windows(3, 20), (2, 1)
    alone = {n: gl.select_layers(model, ids, n, criterion) for n in ns}
    boundaries = needed_boundaries(criterion, ns, LAYERS)
    assert len(set(boundaries)) == len(boundaries)
    assert set(boundaries) == {b for n in ns for b in needed_boundaries(criterion, n, LAYERS)}
    stats = gl.calibrate(model, ids, boundaries) if boundaries else ids
    searches, original = [], gl.select_layers

    def counted(model, calibration, n, *args, **options):
        searches.append(n)
        return original(model, calibration, n, *args, **options)

    monkeypatch.setattr("ghostlib.selection.criteria.select_layers", counted)
    selections = select_several(model, stats, ns, criterion, windows=ids)
    assert selections == alone and list(selections) == list(ns)
    expected = [2] if CRITERIA[criterion].search == "greedy" else [1, 2]
    assert searches == sizes_to_search(criterion, ns) == expected
    for n, chosen in selections.items():
        assert (chosen.criterion, chosen.n) == (criterion, n)
        scores = {layers: chosen.scores[layers] for layers in alone[n].scores}
        assert scores == pytest.approx(alone[n].scores)


@pytest.mark.thorough
def test_selection_windows_may_differ_from_calibration_windows():
    model, ids, other = tiny_model("llama"), tiny_windows(), tiny_windows(3, 20, seed=1)
    stats = gl.calibrate(model, ids, needed_boundaries("greedy-recovered", 2, LAYERS))
    with pytest.raises(ValueError, match=r"'greedy-recovered' scores token windows: pass windows="):
        gl.select_layers(model, stats, 2, "greedy-recovered")
    selection = gl.select_layers(model, stats, 2, "greedy-recovered", windows=other)
    assert selection == gl.select_layers(model, ids, 2, "greedy-recovered", windows=other)
    score = selection.scores[(3,)]
    variant = gl.recover(model, stats, [3])
    with torch.no_grad():
        expected = sum(float(variant(w[None], labels=w[None]).loss) for w in other) / len(other)
    assert score == pytest.approx(expected, rel=1e-4)


def test_ties_go_to_the_lower_index(monkeypatch):
    for search in ("block", "each", "greedy"):
        flat = CRITERIA["cosine"]._replace(search=search, score=lambda e, layers: 0.0)
        monkeypatch.setitem(CRITERIA, "flat", flat)
        assert gl.select_layers(tiny_model("llama"), tiny_windows(1, 8), 2, "flat") == (0, 1)


def test_a_calibration_serves_instead_of_windows():
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, gl.contiguous(2, LAYERS))
    assert gl.select_layers(model, stats, 2) == gl.select_layers(model, ids, 2)
    with pytest.raises(ValueError, match=r"needs boundaries the calibration lacks, such as"):
        gl.select_layers(model, stats, 3)


def test_statistics_of_another_model_are_refused():
    stats = gl.calibrate(tiny_model("llama", seed=5), tiny_windows(), gl.contiguous(2, LAYERS))
    with pytest.raises(ValueError, match=r"collected on model llama-.*, not on llama-"):
        gl.select_layers(tiny_model("llama"), stats, 2, "residual")


def test_a_selection_can_be_copied_and_pickled():
    selection = Selection((3, 1), "cosine", {(1, 3): 0.5})
    pickled = pickle.loads(pickle.dumps(selection))
    for copied in (copy.copy(selection), copy.deepcopy(selection), pickled):
        assert copied == selection == (1, 3) and vars(copied) == vars(selection)


def test_the_residual_of_a_weighted_repair_has_no_unit():
    """Only the final norm sees the scale of a stream that layers read through norms."""
    scores = []
    for scale in (1.0, 16.0):
        model = tiny_model("llama")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(scale)
            for layer in decoder_layers(model):
                layer.self_attn.o_proj.weight.mul_(scale)
                layer.mlp.down_proj.weight.mul_(scale)
            model.config.rms_norm_eps = 0.0
            for norm in model.modules():
                if hasattr(norm, "variance_epsilon"):
                    norm.variance_epsilon = 0.0
        chosen = gl.select_layers(model, tiny_windows(2), 2, "residual", operator="n(x); 1/|y|")
        scores.append(list(chosen.scores.values()))
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert all(0 < score < 1 for score in scores[0])


@pytest.mark.thorough
def test_one_pass_serves_every_start_and_length():
    model, ids = tiny_model("llama"), tiny_windows()
    everything = [b for n in range(1, LAYERS) for b in gl.contiguous(n, LAYERS)]
    stats = gl.calibrate(model, ids, everything)
    for criterion in ("cosine", "residual", "block-influence"):
        for n in (1, 3):
            apart = gl.select_layers(model, ids, n, criterion)
            together = gl.select_layers(model, stats, n, criterion)
            assert together == apart
            assert together.scores == pytest.approx(apart.scores)


def test_statistics_that_were_not_collected_are_named():
    model, ids = tiny_model("llama"), tiny_windows()
    stats = gl.calibrate(model, ids, needed_boundaries("residual", 2, LAYERS), moments=False)
    with pytest.raises(ValueError, match=r"lacks for .0, 2.: calibrate with moments=True"):
        gl.select_layers(model, stats, 2, "residual")
    with pytest.raises(ValueError, match="'taylor' scores token windows: pass windows="):
        gl.select_layers(model, stats, 2, "taylor")


@pytest.mark.thorough
def test_padding_is_never_scored():
    model, ids = tiny_model("llama"), tiny_windows()
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with pytest.raises(ValueError, match="'perplexity' would score the padding"):
        gl.select_layers(model, ids, 1, "perplexity", attention_mask=mask)
    other = tiny_windows(2, 16, seed=1)
    chosen = gl.select_layers(model, ids, 1, "greedy-recovered", attention_mask=mask, windows=other)
    stats = gl.calibrate(
        model, ids, needed_boundaries("greedy-recovered", 1, LAYERS), attention_mask=mask
    )
    assert chosen == gl.select_layers(model, stats, 1, "greedy-recovered", windows=other)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_model_of_one_layer_has_none_to_spare(criterion):
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="num_layers must be at least 2, got 1"):
        gl.select_layers(model, tiny_windows(), 1, criterion)


@pytest.mark.parametrize("search", ["block", "each", "greedy"])
def test_a_score_that_is_not_a_number_is_refused(monkeypatch, search):
    broken = CRITERIA["cosine"]._replace(search=search, score=lambda e, layers: math.nan)
    monkeypatch.setitem(CRITERIA, "broken", broken)
    with pytest.raises(ValueError, match=r"criterion 'broken' scores NaN without layers \(0,"):
        gl.select_layers(tiny_model("llama"), tiny_windows(), 1, "broken")


def test_a_score_that_is_infinite_is_never_chosen(monkeypatch):
    infinite = CRITERIA["cosine"]._replace(score=lambda e, layers: math.inf)
    monkeypatch.setitem(CRITERIA, "infinite", infinite)
    with pytest.raises(ValueError, match="that can be removed: no candidate has a finite score"):
        gl.select_layers(tiny_model("llama"), tiny_windows(), 1, "infinite")


def numbered():
    """A model whose attention is scaled by the number of the layer, so none can move up."""
    return tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)


@pytest.mark.thorough
@pytest.mark.parametrize("criterion", ["perplexity", "greedy-recovered"])
def test_a_search_skips_layers_that_cannot_be_removed(criterion):
    selection = gl.select_layers(numbered(), tiny_windows(), 3, criterion)
    assert selection == (3, 4, 5)
    assert selection.scores[(0,)] == math.inf > selection.scores[(5,)]


@pytest.mark.thorough
def test_a_repair_before_the_gap_never_chooses_the_first_layer():
    model, ids = tiny_model("llama", num_hidden_layers=4), tiny_windows()
    selection = gl.select_layers(model, ids, 3, "greedy-recovered", operator="replaceme")
    assert selection == (1, 2, 3)
    assert selection.scores[(0,)] == math.inf
    block = gl.select_layers(model, ids, 3, "residual", operator="replaceme")
    assert block == (1, 2, 3) and block.scores[(0, 1, 2)] == math.inf


@pytest.mark.thorough
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_layers_that_cannot_go_are_named(criterion, monkeypatch):
    model, ids = tiny_model("llama"), tiny_windows()
    monkeypatch.setattr("ghostlib.selection.criteria.refusal", lambda model, layers: "they hold it")
    with pytest.raises(ValueError, match=f"'{criterion}' finds nothing .* removed: they hold it"):
        gl.select_layers(model, ids, 2, criterion)


def test_layers_that_cannot_go_together_are_named():
    message = "'block-influence' finds no 5 layers that can go together"
    with pytest.raises(ValueError, match=message):
        gl.select_layers(numbered(), tiny_windows(), 5, "block-influence")


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_windows_of_another_vocabulary_are_refused(criterion):
    with pytest.raises(ValueError, match="do not fit a vocabulary of 97"):
        gl.select_layers(tiny_model("llama"), tiny_windows() + 97, 2, criterion)


def test_unknown_criterion_is_named():
    with pytest.raises(ValueError, match="unknown criterion 'cosin'; did you mean 'cosine'"):
        gl.select_layers(tiny_model("llama"), tiny_windows(), 2, "cosin")


def test_embedded_model_chooses_the_published_block(embedded, wiki):
    """DESIGN's measurement beforehand: n = 7 by cosine removes layers 12 … 18."""
    selection = gl.select_layers(embedded[0], wiki, 7)
    assert selection == tuple(range(12, 19))
    assert tuple(Boundary(0, 7).removed) in selection.scores
    assert tuple(Boundary(23, 30).removed) in selection.scores
    assert torch.tensor(list(selection.scores.values())).isfinite().all()
