"""The grid on a tiny model: resumed, never mixed, and equal to the public functions."""

import json
import math
import re

import pytest
import torch
from conftest import LAYERS, VOCABULARY, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import ghostlib as gl
from ghostlib.experiments import grid as grids
from ghostlib.experiments.grid import REPAIRS, Grid, Plan, blocks
from ghostlib.experiments.results import Results
from ghostlib.models.boundaries import read_layers, spell
from ghostlib.recovery.recipe import SHORTLIST
from ghostlib.tutorial.stored import scored, stored, table

PLAN = Plan(
    calibration_count=2,
    calibration_length=24,
    selection_count=2,
    selection_length=12,
    test_count=2,
    test_length=16,
)


@pytest.fixture(autouse=True)
def random_text(monkeypatch):
    """Random tokens in place of corpora, a split and a corpus each its own."""

    def token_windows(corpus, tokenizer, *, split="train", length, count, seed):
        generator = torch.Generator().manual_seed(seed + len(corpus) + 100 * len(split))
        return torch.randint(3, VOCABULARY, (count, length), generator=generator)

    monkeypatch.setattr(grids, "token_windows", token_windows)


def opened(path, model, plan=PLAN) -> Grid:
    return Grid(model, None, Results.open(path, plan.settings(model)), plan)


def perplexity(model, windows) -> float:
    return gl.perplexity(model, windows)


def test_windows_of_the_plan_are_disjoint_and_ordered():
    train, scored = PLAN.train(None)
    assert train.shape == (4, 24) and scored.shape == (4, 12)
    assert PLAN.test(None).shape == (4, 16)
    longer = Plan(**{**vars(PLAN), "calibration_count": 3}).train(None)[0]
    assert torch.equal(longer[2][:12], scored[0]), "selection windows follow the calibration ones"


def test_every_cell_equals_the_public_functions(tmp_path):
    model = tiny_model("llama")
    grid = opened(tmp_path / "grid.json", model)
    choices = grid.select(["cosine", "block-influence", "greedy-recovered"], [1, 3])
    grid.score([*choices.values(), (0, 1), (1, 4)])
    rows = table(grid.results.cells)
    calib, scored = PLAN.train(None)
    test = dict(zip(PLAN.corpora, PLAN.test(None).split(2), strict=True))
    expected = gl.select_layers(model, calib, 3, "greedy-recovered", windows=scored)
    assert choices["greedy-recovered", 3] == expected
    layers = choices["block-influence", 3]
    for repair in REPAIRS:
        if repair == "none":
            variant = gl.prune(model, layers)
        elif repair == "ghost sequential":
            variant = gl.recover(model, calib, layers, fit="sequential")
        elif repair == "replaceme" and 0 in layers:
            continue
        else:
            variant = gl.recover(model, calib, layers, repair)
        mine = rows[
            (rows.criterion == "block-influence") & (rows.n == 3) & (rows.repair == repair)
        ].set_index("corpus")
        for corpus in PLAN.corpora:
            assert mine.perplexity[corpus] == pytest.approx(
                perplexity(variant, test[corpus]), rel=1e-4
            ), repair
            assert mine.dense[corpus] == pytest.approx(perplexity(model, test[corpus]), rel=1e-4)
    assert "replaceme without 0–1" not in grid.results.cells
    assert "ghost without 0–1" in grid.results.cells


def test_what_the_recipe_chose_is_kept_beside_its_cell(tmp_path, monkeypatch):
    """One choice for each set of layers, from the statistics of one pass for all of them."""
    passes, collect = [], grids.Recipe.collect

    def counted(self, choices):
        choices = list(choices)
        passes.append(sorted(set(choices) - set(passes[0] if passes else ())))
        collect(self, choices)

    monkeypatch.setattr(grids.Recipe, "collect", counted)
    model = tiny_model("llama")
    grid = opened(tmp_path / "grid.json", model)
    sets = [(1, 2), (1, 4)]
    grid.score(sets, ["none", "auto"])
    assert passes == [sets, [], []], "all at once, and nothing is left for each"
    calib, test = PLAN.train(None)[0], PLAN.test(None)
    for layers in sets:
        choice = gl.Recipe(model, calib).choose(layers)
        kept = grid.results.cells[f"choice for {spell(layers)}"]
        assert kept["repair"] == choice.repair and kept["tokens"] == 48
        assert kept["losses"] == pytest.approx(choice.rivals, rel=1e-6)
        mine = grid.results.cells[f"auto without {spell(layers)}"]
        expected = gl.window_losses(choice.apply(model), test)
        assert mine["wiki"] + mine["pydoc"] == pytest.approx(expected.tolist(), rel=1e-5)
    before = grid.results.path.read_bytes()
    monkeypatch.setattr(grids, "Recipe", None)
    opened(tmp_path / "grid.json", model).score(sets, ["none", "auto"])
    assert grid.results.path.read_bytes() == before


def test_a_repair_may_be_what_it_is_solved_from(tmp_path):
    """A regressor's text is the operator of that name; with ``sequential`` behind it too."""
    grid = opened(tmp_path / "grid.json", tiny_model("llama"))
    named, text, free = "two-branch-relative", "x, n(x); 1/|y|", "n(x); 1/|y|^0.5"
    repairs = [named, text, f"{named} sequential", f"{text} sequential", free, "none"]
    grid.score([(1, 4)], repairs)
    cells = {r: grid.results.cells[f"{r} without 1, 4"]["wiki"] for r in repairs}
    assert cells[text] == pytest.approx(cells[named])
    assert cells[f"{text} sequential"] == pytest.approx(cells[f"{named} sequential"])
    assert cells[free] != pytest.approx(cells["none"], rel=1e-3)
    calib, gaps = PLAN.train(None)[0], gl.runs((1, 4), LAYERS)
    stats = gl.calibrate(grid.model, calib, gaps, regressors=[free]).of(free)
    operators = {gap: gl.solve(stats[gap], "branches") for gap in gaps}
    variant = gl.recover(grid.model, {}, (1, 4), operators)
    expected = gl.window_losses(variant, PLAN.test(None)[:2]).tolist()
    assert cells[free] == pytest.approx(expected, rel=1e-5)
    for bad in ("x, n(y)", "x; 1/|z|", "auto sequential"):
        with pytest.raises(ValueError, match=f"unknown operator {re.escape(repr(bad))}"):
            grid.score([(2,)], [bad])


def test_other_corpora_can_be_scored(tmp_path):
    """Calibration and selection windows stay those of ``corpora``."""
    plan = Plan(**{**vars(PLAN), "test_corpora": ("longer name",)})
    model = tiny_model("llama")
    assert plan.scored == ("longer name",) and PLAN.scored == PLAN.corpora
    for mine, theirs in zip(plan.train(None), PLAN.train(None), strict=True):
        assert torch.equal(mine, theirs)
    windows = plan.test(None)
    assert windows.shape == (2, 16) and not torch.equal(windows, PLAN.test(None)[:2])
    grid = opened(tmp_path / "grid.json", model, plan)
    grid.score([(2, 3)], ["ghost"])
    variant = gl.recover(model, PLAN.train(None)[0], (2, 3))
    for key, judged in (("dense", model), ("ghost without 2–3", variant)):
        assert list(grid.results.cells[key]) == ["longer name"]
        expected = gl.window_losses(judged, windows).tolist()
        assert grid.results.cells[key]["longer name"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="other settings: test_corpora"):
        opened(tmp_path / "grid.json", model)


def test_settings_without_other_corpora_are_as_they_were():
    """So that files stored before go on."""
    model = tiny_model("llama")
    known = stored("grid")["settings"]
    mine = json.loads(json.dumps(Plan().settings(model)))
    assert mine == known | {name: mine[name] for name in ("model", "dtype")}
    assert "test_corpora" not in mine
    other = Plan(test_corpora=("wiki",)).settings(model)
    assert other == Plan().settings(model) | {"test_corpora": ["wiki"]}


def test_an_interrupted_grid_goes_on_and_computes_nothing_twice(tmp_path, monkeypatch):
    model, path = tiny_model("llama"), tmp_path / "grid.json"
    whole = opened(tmp_path / "whole.json", model)
    whole.score(blocks(2, LAYERS), ["none", "ghost"])
    original, calls = Grid._score, []

    def interrupted(self, layers, repair):
        calls.append((layers, repair))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, layers, repair)

    monkeypatch.setattr(Grid, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(path, model).score(blocks(2, LAYERS), ["none", "ghost"])
    assert len(json.loads(path.read_text())["cells"]) == 1 + 3  # dense, and three cells
    opened(path, model).score(blocks(2, LAYERS), ["none", "ghost"])
    assert len(calls) == 2 * (LAYERS - 1) + 1, "only the interrupted cell was begun twice"
    assert json.loads(path.read_text())["cells"] == whole.results.cells
    before = path.read_bytes()
    monkeypatch.setattr(grids, "calibrate", None)  # nothing is left to compute: no pass either
    opened(path, model).score(blocks(2, LAYERS), ["none", "ghost"])
    assert path.read_bytes() == before


def test_stored_choices_are_not_searched_again(tmp_path, monkeypatch):
    model, path = tiny_model("llama"), tmp_path / "grid.json"
    first = opened(path, model).select(["perplexity", "residual"], [1, 2])
    monkeypatch.setattr(grids, "select_several", None)
    assert opened(path, model).select(["perplexity", "residual"], [1, 2]) == first
    alone = gl.select_layers(model, *PLAN.train(None)[:1], 1, "residual")
    assert first["residual", 1] == alone


def test_results_of_other_settings_are_never_mixed_in(tmp_path):
    path = tmp_path / "grid.json"
    opened(path, tiny_model("llama")).score([(2,)], ["none"])
    with pytest.raises(ValueError, match="other settings: test_count = 2 there, 1 now"):
        opened(path, tiny_model("llama"), Plan(**{**vars(PLAN), "test_count": 1}))
    with pytest.raises(ValueError, match="other settings: model"):
        opened(path, tiny_model("llama", seed=1))


def test_unknown_repairs_and_criteria_are_named(tmp_path):
    grid = opened(tmp_path / "grid.json", tiny_model("llama"))
    with pytest.raises(ValueError, match="unknown operator 'gost'; did you mean 'ghost'"):
        grid.score([(2,)], ["gost"])
    with pytest.raises(ValueError, match="unknown criterion 'cosin'"):
        grid.select(["cosin"], [1])


def test_layers_are_spelt_in_runs():
    assert spell([12, 13, 14, 17, 25, 26]) == "12–14, 17, 25–26"
    assert spell((3,)) == "3"
    assert spell(iter([4, 2, 3])) == "2–4", "in any order, and read once"
    with pytest.raises(ValueError, match="no layer"):
        spell([])
    assert math.isclose(len(blocks(7, 30)), 24)


@given(st.sets(st.integers(0, 40), min_size=1).map(lambda s: tuple(sorted(s))))
def test_spelt_layers_are_read_back(layers):
    assert read_layers(spell(layers)) == read_layers(spell(layers).replace("–", "-")) == layers


@pytest.mark.parametrize("bad", ["", "a", "12-", "-3", "12,,13", "12-14-16", "15-12", "1.5", "3;4"])
def test_what_spells_no_layers_is_refused(bad):
    assert read_layers("17, 12-14") == (12, 13, 14, 17)
    with pytest.raises(ValueError, match=f"layers {re.escape(repr(bad))} are not of the form"):
        read_layers(bad)


def test_the_stored_grid_is_whole_and_says_what_it_is_of(embedded):
    """What the notebooks show: every criterion, depth and repair but the recipe's, which is later.

    The recipe stands beside no repair and ghost in a file of its own, scored on four corpora.
    """
    found = stored("grid")
    assert found["settings"] == json.loads(json.dumps(Plan().settings(embedded[0])))
    rows = table(found["cells"])
    whole = rows.set_index(["criterion", "n", "repair", "corpus"])
    for criterion in gl.CRITERIA:
        for n in (3, 5, 7, 9, 11):
            for repair in set(REPAIRS) - {"auto"}:
                for corpus in Plan().corpora:
                    assert math.isfinite(whole.perplexity[criterion, n, repair, corpus])
    beyond = stored("beyond")
    others = {"test_corpora", "test_count"}
    for name in set(beyond["settings"]) - others:
        assert beyond["settings"][name] == found["settings"][name]
    rows = table(beyond["cells"]).set_index(["criterion", "n", "repair", "corpus"])
    for criterion in SHORTLIST:
        for n in (3, 5, 7, 9, 11):
            for repair in ("none", "ghost", "auto"):
                for corpus in beyond["settings"]["test_corpora"]:
                    assert math.isfinite(rows.perplexity[criterion, n, repair, corpus])
    every = scored(beyond["cells"]).layers.value_counts()
    assert {spell(block) for block in blocks(7, 30)} <= set(every.index)
    starts = stored("starts")
    assert starts["settings"] == found["settings"]
    wanted = {f"{r} without {spell(b)}" for r in ("none", "ghost") for b in blocks(7, 30)}
    assert wanted <= set(starts["cells"])
