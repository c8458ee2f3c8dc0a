"""The stored results are complete, as labelled, and still the numbers that were computed."""

import math

import numpy as np
import pytest

import ghostlib as gl
from ghostlib.experiments.tables import choices, scores, selections
from ghostlib.models.boundaries import spell
from ghostlib.recovery.recipe import SHORTLIST
from ghostlib.text.corpora import CORPORA
from ghostlib.tutorial import stored as module
from ghostlib.tutorial.stored import FILES, over_seeds, stored

pytestmark = pytest.mark.thorough

OPERATORS = ("pruned", "magnitude", "linearpatch-d", "linearpatch-r", "replaceme", "ghost")
REFITS = ("refit", "ghost-refit", "ghost-refit-relative")
BLOCKS = {spell(range(start, start + 7)) for start in range(24)}


@pytest.mark.parametrize(
    ("name", "layers", "operator", "dataset", "seed", "first", "last"),
    [
        ("grid", "", "dense", "wiki", 0, 2.519789861511246, 2.581635048594236),
        ("starts", "0–6", "pruned", "pydoc", 0, 11.048274269405814, 10.033002948568713),
        ("beyond", "0–6", "auto", "wiki", 0, 4.5854028818668215, 3.841415648123765),
        ("ablation", "12–18", "x; 1/|y|", "wiki", 2, 3.212357375831754, 3.4038128282534705),
    ],
)
def test_a_few_numbers(name, layers, operator, dataset, seed, first, last):
    rows = scores(stored(name)).set_index(["layers", "operator", "dataset", "seed"])
    row = rows.loc[(layers, operator, dataset, seed)]
    assert (row.evidence[0], row.evidence[-1]) == (first, last)
    assert row.value == pytest.approx(math.exp(np.mean(row.evidence)))


@pytest.mark.parametrize("name", ["ablation", "beyond"])
def test_every_local_file_has_a_name_for_readers(name):
    assert set(scores(stored(name))["dataset"]) - set(CORPORA) == set(FILES)


@pytest.mark.parametrize(("task", "items"), [("wiki-topic", 297), ("wiki-description", 300)])
def test_zero_shot_items_are_all_there(task, items):
    rows = scores(stored("zeroshot")).query("dataset == @task").set_index("operator")
    assert set(rows.index) == {"dense", "pruned", "linearpatch-r", "replaceme", "ghost"}
    assert set(rows["size"]) == {items} and rows["evidence"].map(lambda s: s.items).nunique() == 1


def test_the_grid_is_complete():
    """Every criterion, depth and operator except the recipe and the choice by abilities."""
    rows = selections(stored("grid")).merge(scores(stored("grid")))
    values = rows.set_index(["criterion", "n", "operator", "dataset"]).value
    criteria = [name for name in gl.CRITERIA if name != "abilities"]
    for criterion in criteria:
        for n in (3, 5, 7, 9, 11):
            for operator in (*OPERATORS, "ghost sequential", *REFITS):
                for corpus in ("wiki", "pydoc"):
                    assert math.isfinite(values[criterion, n, operator, corpus])
    assert len(values) == len(criteria) * 5 * 10 * 2
    assert rows.groupby("dataset").dense.nunique().tolist() == [1, 1]


def test_copying_is_stored_for_every_block():
    """And where it is lost, as at the block that cosine chooses, no repair returns it."""
    rows = scores(stored("abilities")).query("measure == 'ability' and dataset == 'copying'")
    lost = rows[rows.layers == "12–18"]
    assert (lost.value / lost.dense).min() > 3.5
    repairs = lost[~lost.operator.str.endswith("sequential")]
    assert set(repairs.groupby("operator")["seed"].nunique()) == {3}
    draws = rows.groupby(["operator", "layers"])["seed"].nunique()
    for n in (7, 4):
        every = [spell(block.removed) for block in gl.contiguous(n, 30)]
        for operator in ("pruned", "linearpatch-r", "ghost", "two-branch-relative"):
            assert draws[operator][every].min() >= 3
        for operator in ("replaceme", *REFITS):  # which need a layer before the gap
            assert draws[operator][every[1:]].min() >= 3


@pytest.mark.parametrize("n", [4, 7])
def test_every_probe_is_stored_for_every_block_and_every_repair(n):
    blocks = {spell(range(start, start + n)) for start in range(31 - n)}
    rows = scores(stored("abilities")).query("measure == 'ability' and layers in @blocks")
    layers = rows.groupby(["dataset", "operator"])["layers"].agg(set)
    assert len(layers) == 11 * 8
    first = {spell(range(n))}  # before layer 0 there is no projection to write to
    for (_, repair), removed in layers.items():
        assert removed == (blocks - first if repair in ("replaceme", *REFITS) else blocks)


def test_what_claims_rest_on_is_there_for_three_draws():
    rows = scores(stored("seeds"))
    assert set(rows["evidence"].map(len)) == {16}
    for layers, operators in (
        ("12–18", ("replaceme", "ghost")),
        ("12–15, 17, 25–26", ("ghost", "ghost sequential")),
        ("4–6, 12–18, 28", ("ghost",)),
    ):
        for operator in operators:
            here = rows[(rows.layers == layers) & (rows.operator == operator)]
            assert sorted(zip(here.seed, here.dataset, strict=True)) == [
                (seed, corpus) for seed in range(3) for corpus in ("pydoc", "wiki")
            ]


def test_the_claim_on_table_3_rests_on_three_draws_and_sixteen_windows():
    rows = scores(stored("draws")).query("layers != ''")
    assert len(rows) == 3 * 26 * 3 * 2 and set(rows["evidence"].map(len)) == {16}
    assert set(rows["layers"]) == set(selections(stored("grid"))["layers"])
    assert set(rows.groupby(["layers", "operator", "dataset"])["seed"].nunique()) == {3}


def test_claims_of_the_recipe_rest_on_three_draws_and_sixteen_windows():
    rows = scores(stored("recipe")).query("layers != ''")
    assert set(rows["layers"]) == {"0–6", "13–15"} and set(rows["seed"]) == {0, 1, 2}
    assert len(rows) == 3 * 2 * 3 * 4
    ablation = scores(stored("ablation")).query("layers != ''")
    assert set(ablation["layers"]) == {"12–18", "9–15"} and len(ablation) == 3 * 2 * 12 * 4
    for table in (rows, ablation):
        assert set(table["evidence"].map(len)) == {16}


def test_every_block_and_the_recipe():
    starts, beyond = scores(stored("starts")), scores(stored("beyond"))
    for rows, operators in ((starts, ("pruned", "ghost")), (beyond, ("pruned", "ghost", "auto"))):
        for operator in operators:
            assert set(rows[rows.operator == operator].layers) >= BLOCKS
        for operator in REFITS:
            assert set(rows[rows.operator == operator].layers) >= BLOCKS - {"0–6"}
    assert set(choices(stored("beyond")).layers) >= BLOCKS
    rows = selections(stored("beyond")).merge(beyond).set_index(["criterion", "n", "operator"])
    for criterion in SHORTLIST:
        for n in (3, 5, 7, 9, 11):
            assert set(rows.loc[(criterion, n, "auto")].dataset) >= {"wiki", "pydoc"}


@pytest.mark.embedded
def test_they_are_of_a_specification_that_can_be_run(embedded):
    identity = gl.Specification(windows=8, test_windows=3, test_length=1024).identity(embedded[0])
    for name in ("grid", "starts"):
        (record,) = stored(name).of("specification")
        assert {k: v for k, v in record.items() if k not in ("kind", "id")} == {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in identity.items()
        }
    assert {record["seed"] for record in stored("ablation").of("specification")} == {0, 1, 2}


def test_further_draws_are_stored_and_recomputed_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DATA", tmp_path)
    monkeypatch.setenv("GHOSTLIB_RECOMPUTE", "1")
    seeds = []

    def compute(seed):
        seeds.append(seed)
        return {"loss": np.arange(3.0) + seed, "error": 10.0 + seed}

    draws = over_seeds("toy", compute, {"loss": [0, 1, 2], "error": 10})
    assert seeds == [1, 2] and [d["error"] for d in draws] == [10, 11, 12]
    assert list(tmp_path.iterdir()) == [tmp_path / "toy-draws.json"]
    monkeypatch.delenv("GHOSTLIB_RECOMPUTE")
    again = over_seeds("toy", compute, {"loss": [0, 1.001, 2], "error": 10})
    assert seeds == [1, 2], "nothing is computed"
    for one, other in zip(draws, again, strict=True):
        np.testing.assert_array_equal(one["loss"], other["loss"])
    for first in ({"loss": [0, 1.1, 2], "error": 10}, {"error": 10}):
        with pytest.raises(ValueError, match="'loss' differs from what is stored in toy-draws"):
            over_seeds("toy", compute, first)


@pytest.mark.parametrize(
    ("name", "count"),
    [("constrained", 3), ("few-tokens", 2), ("sequences", 3), ("sources", 3), ("tuning", 3)],
)
def test_further_draws_differ(name, count):
    """``count`` draws of the same numbers, all finite, no two equal."""
    draws = [*module.json.loads((module._DATA / f"{name}-draws.json").read_text()).values()]
    flat = [np.concatenate([np.ravel(v) for v in draw.values()]) for draw in draws]
    assert len(flat) == count and len({tuple(draw) for draw in draws}) == 1
    assert np.isfinite(flat).all() and len({part.tobytes() for part in flat}) == count
