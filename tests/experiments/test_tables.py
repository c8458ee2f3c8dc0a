"""Tables compare models on the same windows and items, and are typed whatever is in them."""

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ghostlib.evaluation.tasks import Score, paired
from ghostlib.experiments import results as module
from ghostlib.experiments.results import Results
from ghostlib.experiments.tables import (
    choices,
    mean_interval,
    pooled,
    ratio,
    relative_text,
    report,
    scores,
    selections,
    value_text,
    wide,
    with_means,
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setattr(module, "environment", lambda: {"versions": {}})
    results = Results(tmp_path / "a.jsonl")
    results.begin({"model": "tiny", "seed": 0})
    return results


def perplexity(results: Results, operator: str, on: str, losses: Any, layers: str = "2–3") -> None:
    names = {"layers": "" if operator == "dense" else layers, "operator": operator, "dataset": on}
    content = {"value": mean_interval(losses)[0], "losses": losses, "tokens": 100, "bytes": 300}
    results.append("score", **names, measure="perplexity", **content)


def quiz(results: Results, operator: str, parts: dict[str, tuple[list[int], Any]]) -> None:
    def mean(hits: Any) -> Any:
        return None if hits is None else float(np.mean(hits))

    def error(hits: Any) -> Any:
        return None if hits is None else float(np.std(hits, ddof=1) / len(hits) ** 0.5)

    scores = [
        asdict(Score(task, mean(hits), error(hits), mean(norm), error(norm), hits, norm, task))
        for task, (hits, norm) in parts.items()
    ]
    names = {"layers": "" if operator == "dense" else "2–3", "operator": operator}
    names |= {"measure": "accuracy", "dataset": ", ".join(parts)}
    results.append("score", **names, value=0.5, scores=scores)


def test_ratios_are_paired_by_window(results: Results) -> None:
    """Windows differ by far more than models do; the interval must not see that."""
    hard = np.linspace(0, 3, 9)
    noise = 0.01 * np.array([1, -1, 2, -2, 0, 1, -1, 2, -2])
    perplexity(results, "dense", "text", hard)
    perplexity(results, "ghost", "text", hard + 0.5 + noise)
    row = scores(results).query("operator == 'ghost'").iloc[0]
    half = 2.306 * noise.std(ddof=1) / 3  # Student's t with 8 degrees of freedom
    assert row.relative == pytest.approx(math.exp(0.5))
    interval = math.exp(0.5 - half), math.exp(0.5 + half)
    assert (row.relative_low, row.relative_high) == pytest.approx(interval, rel=1e-4)
    assert row.dense == pytest.approx(math.exp(1.5)) and (row.n, row.layers) == (2, "2–3")
    assert row.bits_per_byte == pytest.approx(2.0 / math.log(2) * 100 / 300)
    assert value_text(row) == f"{math.exp(2):.2f} (0.962)"
    assert relative_text(row) == "1.65 [1.63, 1.67]"


def test_one_window_has_no_interval(results: Results) -> None:
    perplexity(results, "dense", "text", [2.0])
    perplexity(results, "ghost", "text", [2.0])
    row = scores(results).iloc[1]
    assert row.relative == 1 and math.isnan(row.relative_low) and relative_text(row) == "1.00"
    assert "7.39" in report(results) and "nan" not in report(results).lower()


def test_without_the_dense_model_nothing_is_compared(results: Results) -> None:
    perplexity(results, "ghost", "text", [1.0, 2.0])
    row = scores(results).iloc[0]
    assert math.isnan(row.relative) and math.isnan(row.dense)
    assert "÷" not in report(results) and "4.48" in report(results)


def test_the_interval_of_a_mean_loss_is_students() -> None:
    middle, low, high = mean_interval([1.0, 2.0, 4.0])
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    expected = [math.exp(7 / 3 + shift) for shift in (0, -half, half)]
    assert [middle, low, high] == pytest.approx(expected, rel=1e-6)
    assert mean_interval([800.0, 801.0])[0] == math.inf


def test_means_over_tasks_and_their_errors(results: Results) -> None:
    rng = np.random.default_rng(0)
    hits = {name: rng.integers(0, 2, (2, 40)).tolist() for name in ("dense", "ghost", "norm")}
    for name in ("dense", "ghost"):
        for i, task in enumerate("ab"):
            norm = hits["norm"][i] if task == "b" else None
            quiz(results, name, {task: (hits[name][i], norm)})
    rows = with_means(scores(results)).set_index(["operator", "dataset"])
    own, mean = rows.loc["ghost"], rows.loc[("ghost", "mean")]
    assert mean["value"] == pytest.approx(np.mean(hits["ghost"]))
    halves = (own["high"] - own["low"])[["a", "b"]] / 2
    assert mean["high"] - mean["low"] == pytest.approx(math.hypot(*halves))
    assert halves["a"] == pytest.approx(1.96 * own.loc["a", "evidence"].acc_se, rel=1e-3)
    assert mean["size"] == 80
    pair = [
        paired(own.loc[task, "evidence"], rows.loc[("dense", task), "evidence"]) for task in "ab"
    ]
    assert mean["relative"] == pytest.approx(np.mean([p.difference for p in pair]))
    half = math.hypot(*(p.high - p.low for p in pair)) / 4
    assert mean["relative_high"] - mean["relative_low"] == pytest.approx(2 * half)
    assert mean["relative_low"] < mean["relative"] < mean["relative_high"]
    normed = scores(results, normed=True).set_index(["operator", "dataset"])
    assert normed.loc[("ghost", "a"), "value"] == own.loc["a", "value"]
    assert normed.loc[("ghost", "b"), "value"] == pytest.approx(np.mean(hits["norm"][1]))
    assert "mean" in report(results) and "nan" not in report(results).lower()


def test_the_items_of_all_tasks_are_those_of_one(results: Results) -> None:
    quiz(results, "ghost", {"b": ([1, 0, 1], None)})
    quiz(results, "ghost", {"a": ([0, 0], None)})
    quiz(results, "pruned", {"a": ([1, 0], None), "b": ([1, 0, 1], None)})
    rows = scores(results)
    score = pooled(rows, "ghost")
    assert score.correct == [0, 0, 1, 0, 1]
    assert (score.acc, score.task, score.acc_se) == (0.4, "all", None)
    result = paired(score, pooled(rows, "pruned"))
    assert (result.first_only, result.second_only, result.n) == (0, 1, 5)
    assert score.correct_norm is None  # the tasks have no acc_norm
    for wrong in (rows, pd.concat([rows, rows])):
        with pytest.raises(ValueError, match="must have one accuracy for each task"):
            pooled(wrong, "dense" if wrong is rows else "ghost")


def test_the_items_of_all_tasks_keep_the_normed_answers(results: Results) -> None:
    quiz(results, "ghost", {"b": ([1, 0, 1], [0, 0, 1]), "a": ([0, 0], [1, 0])})
    quiz(results, "pruned", {"b": ([1, 0, 1], [0, 0, 0]), "a": ([0, 1], [0, 0])})
    ghost, pruned = (pooled(scores(results), name) for name in ("ghost", "pruned"))
    assert ghost.correct_norm == [1, 0, 0, 0, 1]
    result = paired(ghost, pruned, normed=True)
    assert (result.first_only, result.second_only, result.n) == (2, 0, 5)


def test_a_model_that_is_not_scored_everywhere_has_no_mean(results: Results) -> None:
    for on in ("one", "two"):
        perplexity(results, "dense", on, [1.0, 2.0])
    perplexity(results, "ghost", "one", [1.5, 2.5])
    rows = with_means(scores(results)).set_index(["operator", "dataset"]).value
    assert ("dense", "mean") in rows and ("ghost", "mean") not in rows
    assert rows["dense", "mean"] == pytest.approx(math.exp(1.5))
    assert "nan" not in report(results).lower()


def test_a_group_of_tasks_has_a_row_for_each_member(results: Results) -> None:
    quiz(results, "dense", {"a": ([0, 1, 1, 1], None), "b": ([0, 0, 1, 1], None)})
    rows = scores(results)
    assert rows.dataset.tolist() == ["a", "b"] and rows.value.tolist() == [0.75, 0.5]
    assert isinstance(rows.evidence[0], Score) and rows["size"].tolist() == [4, 4]


def test_wide_tables_name_what_differs(results: Results) -> None:
    for on in ("one", "two"):
        perplexity(results, "dense", on, [1.0, 2.0])
        for layers in ("2–3", "4–5", "4"):
            perplexity(results, "ghost", on, [1.5, 2.5], layers)
    table = wide(scores(results).query("layers != '4–5'"), value_text)
    assert list(table.columns) == ["one", "two"]
    assert table.index.tolist() == [(0, "dense"), (1, "ghost"), (2, "ghost")]
    table = wide(with_means(scores(results)), value_text)
    assert list(table.columns) == ["one", "two", "mean"]
    assert ("4–5", 2, "ghost") in table.index
    for criterion, layers in {"cosine": "2–3", "residual": "4–5", "angular": "2–3"}.items():
        results.append("selection", criterion=criterion, n=2, layers=layers)
    rows = selections(results).merge(scores(results))
    assert len(rows) == 6 and set(rows.criterion) == {"cosine", "residual", "angular"}
    assert ("angular", 2, "ghost") in wide(rows, value_text).index
    text = report(results)
    assert "ghost, n = 2, cosine" in text and "cosine, n = 2: 2–3" in text


def test_choices_and_skipped_cells_are_reported(results: Results) -> None:
    losses = {"pruned": 2.0, "ghost": 1.5}
    results.append("choice", recipe="auto", layers="2–3", operator="ghost", losses=losses)
    names = {"layers": "0–1", "operator": "replaceme", "dataset": ""}
    results.append("skipped", **names, reason="layer 0 is removed")
    row = choices(results).iloc[0]
    assert (row.layers, row.n, row.operator, row.losses) == ("2–3", 2, "ghost", losses)
    assert report(results) == "auto without 2–3: ghost\nleft out: layer 0 is removed"


def test_empty_tables_have_their_columns(results: Results) -> None:
    assert report(results) == ""
    for table in (scores, selections, choices):
        empty = table(results)
        assert not len(empty) and {"model", "seed", "layers", "n"} <= set(empty.columns)
        assert pd.api.types.is_integer_dtype(empty["n"])
    assert pd.api.types.is_float_dtype(scores(results)["value"])


def test_ratio_over_windows_and_over_seeds() -> None:
    """Against the definition: log ratios, by corpus, by seed; Student's t over seeds or windows."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [(seed, on, rng.normal(3, 1, 4).tolist()) for seed in range(3) for on in ("one", "two")],
        columns=["seed", "dataset", "evidence"],
    )
    other = rows.assign(evidence=[[x + 0.5 for x in losses] for losses in rows["evidence"]])
    other.at[0, "evidence"] = rows["evidence"][0]
    over_seeds = ratio(rows, other.sample(frac=1, random_state=0))
    assert over_seeds[:3] == pytest.approx(mean_interval([-0.25, -0.5, -0.5]))
    assert over_seeds[3:] == (3, 24)
    over_windows = ratio(rows[rows.seed == 0], other[other.seed == 0])
    assert over_windows[1:3] == pytest.approx(mean_interval([0.0] * 4 + [-0.5] * 4)[1:])
    assert over_windows[3:] == (1, 8)


def test_ratio_needs_one_model_each_on_the_same_text() -> None:
    rows = pd.DataFrame({"seed": [0, 0], "dataset": ["a", "b"], "evidence": [[1.0], [2.0]]})
    for wrong in (rows[:1], pd.concat([rows, rows])):
        with pytest.raises(ValueError, match="one model each, on the same seeds and corpora"):
            ratio(rows, wrong)
    with pytest.raises(ValueError, match="by the same windows"):
        ratio(rows, rows.assign(evidence=[[1.0], [2.0, 3.0]]))


def test_a_ratio_and_its_interval_weigh_alike() -> None:
    # Two windows that are much worse and a hundred that are equal gave 1.74 [0.99, 1.06].
    rows = pd.DataFrame({"seed": 0, "dataset": ["a", "b"], "evidence": [[1.0, 1.2], [0.0] * 100]})
    other = rows.assign(evidence=[[0.0] * 2, [0.0] * 100])
    with pytest.raises(ValueError, match=r"corpora of \[2, 100\] windows: .*each corpus alone"):
        ratio(rows, other)
    assert ratio(rows[:1], other[:1]).estimate == pytest.approx(math.exp(1.1))
    first, second = (pd.concat([r.assign(seed=s) for s in range(3)]) for r in (rows, other))
    assert ratio(first, second).seeds == 3, "an interval over seeds weighs as the estimate"
    uneven = first.assign(evidence=[[0.0, 1.0]] * 6)[:3]  # a seed of two corpora, and one of one
    with pytest.raises(ValueError, match="compare each corpus alone"):
        ratio(uneven, uneven)


def test_files_of_two_specifications_are_reported_together(
    results: Results, tmp_path: Path
) -> None:
    other = Results(tmp_path / "b.jsonl")
    other.begin({"model": "tiny", "seed": 0, "windows": 6})
    for part in (results, other):
        for operator, loss in (("dense", 1.0), ("ghost", 1.5)):
            perplexity(part, operator, "text", [loss, loss + 1])
        part.append("selection", criterion="cosine", n=2, layers="2–3")
    joined = Results(tmp_path / "joined.jsonl")
    joined.read(results.path.read_bytes() + other.path.read_bytes())
    ids = [record["id"] for record in joined.of("specification")]
    table = wide(scores(joined), value_text)
    assert len(table) == 4 and set(table.index.get_level_values("specification")) == set(ids)
    text = report(joined)
    for name in ids:
        assert len(re.findall(f"^ghost, n = 2, 2–3, {name} ", text, re.M)) == 2  # and ÷ dense
    assert not any(name in report(results) for name in ids)


def test_scores_are_compared_with_the_dense_models_of_one_measure(results: Results) -> None:
    """A corpus and a probe may have one name."""
    for operator, value in (("dense", 0.25), ("ghost", 0.75)):
        perplexity(results, operator, "names", [value, value + 1])
        names = {"layers": "" if operator == "dense" else "2–3", "operator": operator}
        content = {"measure": "ability", "dataset": "names", "value": value, "items": [value] * 3}
        results.append("score", **names, **content)
    rows = scores(results).query("operator == 'ghost'").set_index("measure")
    assert rows["relative"].tolist() == pytest.approx([math.exp(0.5), 0.5])
    assert rows["dense"].tolist() == pytest.approx([math.exp(0.75), 0.25])
