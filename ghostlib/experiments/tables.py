"""Tables: records of results files as typed data frames and as text."""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ghostlib.common import DENSE, one_line
from ghostlib.evaluation.abilities import t_interval
from ghostlib.evaluation.tasks import Score, paired
from ghostlib.experiments.results import Record, Results
from ghostlib.models.boundaries import read_layers

PERPLEXITY, ACCURACY, ABILITY, MEAN = "perplexity", "accuracy", "ability", "mean"
_MODEL = {"specification": str, "model": str, "seed": "int64", "layers": str, "n": "int64"}
_SCORE = {
    **_MODEL,
    **dict.fromkeys(("operator", "measure", "dataset"), str),
    **dict.fromkeys(("value", "low", "high", "bits_per_byte"), "float64"),
    "size": "int64",
    **dict.fromkeys(("dense", "relative", "relative_low", "relative_high"), "float64"),
    "evidence": object,
}


def scores(results: Results, *, normed: bool = False) -> pd.DataFrame:
    """Scores with their intervals, compared with the dense model on the same text or items.

    Models are compared window by window, or item by item: windows that are hard for both do not
    widen the interval of their ratio (Student's t of the differences of losses), and items that
    both answer alike not that of their difference (see `paired`).

    Args:
        normed: use ``acc_norm`` of tasks that have it.

    Returns:
        A row for each model (``specification, model, seed, layers, n, operator``), ``measure``
        (``"perplexity"``, ``"accuracy"``, ``"ability"``) and ``dataset``: a corpus, a task, a
        member of a group of tasks, or a probe. ``specification`` is its id, which tells apart the
        parts of a joined file; ``layers`` are the removed ones, as written by
        `ghostlib.models.boundaries.spell`, and ``n`` is their number. ``value, low, high``: the
        score and its 95 % interval; ``bits_per_byte``; ``size``: number of predicted tokens or
        items; ``dense``: the dense model's score; ``relative``: the ratio of perplexities to it or
        the difference of other scores, with ``relative_low, relative_high``; ``evidence``: the
        losses of the windows, a `Score`, or the scores of the items.
    """
    records = [part for record in results.of("score") for part in _parts(record, normed)]
    key = itemgetter("specification", "measure", "dataset")
    dense = {key(record): record for record in records if record["operator"] == DENSE}
    for record in records:
        if reference := dense.get(key(record)):
            record["dense"], pair = reference["value"], (record["evidence"], reference["evidence"])
            if record["measure"] == ACCURACY:
                result = paired(*pair, normed=record["normed"])
                relative = result.difference, result.low, result.high
            else:
                interval = mean_interval if record["measure"] == PERPLEXITY else t_interval
                relative = interval(np.subtract(*pair))
            record |= zip(("relative", "relative_low", "relative_high"), relative, strict=True)
    return _frame(results, records, _SCORE)


def _parts(record: Record, normed: bool) -> list[Record]:
    """The scores in a record: one, or the accuracy of each task of a group."""
    if record["measure"] == PERPLEXITY:
        bits = float(np.mean(record["losses"])) / math.log(2)
        per_byte = bits * record["tokens"] / record["bytes"] if record["bytes"] else math.nan
        size = {"size": record["tokens"], "bits_per_byte": per_byte}
        return [record | size | {"evidence": record["losses"]}]
    if record["measure"] == ABILITY:
        return [record | {"size": len(record["items"]), "evidence": record["items"]}]
    parts = []
    for score in (Score(**part) for part in record["scores"]):
        value, error, norm = score.acc, score.acc_se, False
        if normed and score.acc_norm is not None:
            value, error, norm = score.acc_norm, score.acc_norm_se, True
        half = math.nan if error is None else stats.norm.ppf(0.975) * error
        part = {"dataset": score.task, "value": value, "low": value - half, "high": value + half}
        part |= {"size": len(score.correct), "evidence": score, "normed": norm}
        parts.append(record | part)
    return parts


def selections(results: Results) -> pd.DataFrame:
    """The layers each criterion removes: ``specification, model, seed, layers, n, criterion``.

    ``selections(results).merge(scores(results))`` is the grid of criteria and operators.
    """
    return _frame(results, results.of("selection"), {**_MODEL, "criterion": str})


def choices(results: Results) -> pd.DataFrame:
    """The choice of the recipe for each set of layers and budget.

    Columns ``specification, model, seed, layers, n, recipe, operator``, and the ``losses`` of all
    candidates in nats per held-out calibration token.
    """
    columns = {**_MODEL, "recipe": str, "operator": str, "losses": object}
    return _frame(results, results.of("choice"), columns)


def _frame(results: Results, records: Sequence[Record], columns: dict[str, Any]) -> pd.DataFrame:
    """Typed columns of records and of their specifications."""
    specifications = {record["id"]: record for record in results.of("specification")}
    rows = []
    for record in records:
        n = len(read_layers(record["layers"])) if record["layers"] else 0
        # Without its specification, whose line may be damaged, a record is of an unknown model.
        if specification := specifications.get(record["specification"]):
            rows.append({"n": n} | {k: specification[k] for k in ("model", "seed")} | record)
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


class Ratio(NamedTuple):
    """A ratio of perplexities with its 95 % interval.

    Attributes:
        estimate: geometric mean over seeds and corpora.
        low: lower end of its interval.
        high: upper end.
        seeds: number of draws of calibration and test text.
        windows: number of scored windows of all seeds and corpora.
    """

    estimate: float
    low: float
    high: float
    seeds: int
    windows: int


def ratio(first: pd.DataFrame, second: pd.DataFrame) -> Ratio:
    """Perplexity of one model divided by another's, on the same windows, seeds and corpora.

    Differences of losses are taken window by window and averaged within a corpus, then over the
    corpora. With three seeds or more the interval is Student's t over the seeds, which differ in
    calibration text and in test text; with fewer, over the windows.

    Args:
        first: `scores` of one model: a perplexity for each seed and corpus.
        second: `scores` of another model.

    Raises:
        ValueError: different seeds, corpora or windows, several models in one table, or corpora
            with different numbers of windows, where the interval is over windows.

    >>> rows = pd.DataFrame({"seed": 0, "dataset": "wiki", "evidence": [[2.0, 3.0]]})
    >>> other = rows.assign(evidence=[[2.1, 3.3]])
    >>> round(ratio(rows, other).estimate, 3), ratio(rows, other).windows
    (0.819, 2)
    """
    keys = ["seed", "dataset"]
    evidence = [rows.set_index(keys)["evidence"].sort_index() for rows in (first, second)]
    counts, others = (one.map(len) for one in evidence)
    if not counts.index.is_unique or not counts.equals(others):
        raise ValueError("give one model each, on the same seeds and corpora, by the same windows")
    differences = evidence[0].combine(evidence[1], np.subtract)
    by_seed = differences.map(np.mean).groupby("seed").mean()
    weights = counts * counts.groupby("seed").transform("size")  # of windows, inverted
    if len(by_seed) < 3 and weights.nunique() > 1:
        raise ValueError(
            f"corpora of {sorted(counts)} windows: the interval would weigh windows and the "
            "estimate corpora; compare each corpus alone, or give three seeds"
        )
    windows = np.concatenate(differences.tolist())
    _, low, high = mean_interval(by_seed.to_numpy() if len(by_seed) > 2 else windows)
    return Ratio(float(np.exp(by_seed.mean())), low, high, len(by_seed), len(windows))


def with_means(rows: pd.DataFrame) -> pd.DataFrame:
    """`scores` of one measure, with a mean for each model that is scored on all datasets.

    Returns:
        ``rows``, and rows of the dataset ``"mean"``: the arithmetic mean of perplexities, as the
        paper reports it, or of accuracies, with equal weights and independent errors.
    """
    datasets = set(rows["dataset"])
    names = [name for name in (*_MODEL, "criterion", "operator", "measure") if name in rows]
    means: list[dict[str, Any]] = []
    for model, part in rows.groupby(names, sort=False, dropna=False):
        if set(part["dataset"]) == datasets:
            mean = dict(zip(names, model, strict=True))
            mean |= {"dataset": MEAN, "value": part["value"].mean()}
            if mean["measure"] == ACCURACY:
                mean |= {"size": part["size"].sum(), "relative": part["relative"].mean()}
                mean |= _mean_interval(part, "") | _mean_interval(part, "relative_")
            means.append(mean)
    return pd.DataFrame([*rows.to_dict("records"), *means], columns=rows.columns)


def _mean_interval(part: pd.DataFrame, prefix: str) -> dict[str, float]:
    """The interval of the mean of independent numbers, from their intervals."""
    low, high = part[f"{prefix}low"].to_numpy(), part[f"{prefix}high"].to_numpy()
    centre, half = (low + high).mean() / 2, np.linalg.norm(high - low) / len(part) / 2
    return {f"{prefix}low": centre - half, f"{prefix}high": centre + half}


def pooled(rows: pd.DataFrame, operator: str) -> Score:
    """The items of all tasks as one `Score`, for example to compare two models by `paired`.

    Args:
        rows: `scores` with one accuracy per task for this operator.

    Raises:
        ValueError: no accuracy of this operator, or several for one task.
    """
    own = rows[(rows["measure"] == ACCURACY) & (rows["operator"] == operator)]
    if not len(own) or own["dataset"].duplicated().any():
        raise ValueError(f"{operator} must have one accuracy for each task, in {len(own)} rows")
    parts: list[Score] = own.sort_values("dataset")["evidence"].tolist()
    correct = [answer for part in parts for answer in part.correct]
    normed = [answer for part in parts for answer in part.correct_norm or ()]
    correct_norm = normed if len(normed) == len(correct) else None  # a task may have none
    acc, items = sum(correct) / len(correct), " ".join(part.items for part in parts)
    return Score("all", acc, None, None, None, correct, correct_norm, items)


def wide(rows: pd.DataFrame, form: Callable[[Any], str]) -> pd.DataFrame:
    """A line for each n and operator, a column for each corpus or task, both in order of ``rows``.

    Lines also have the model, the seed, the criterion, the layers and the specification if these
    differ.

    Args:
        rows: `scores` of one measure, also merged with `selections`.
        form: the text of a row, such as `value_text` or `relative_text`.
    """
    names = ("model", "seed", "criterion")
    index = [name for name in names if name in rows and rows[name].nunique() > 1]
    index += ["n", "operator"]
    for name in ("layers", "specification"):
        if name in rows and rows.duplicated([*index, "dataset"]).any():
            index.insert(-2, name)
    texts = rows.assign(text=[form(row) for row in rows.itertuples()])
    if "criterion" in index:
        texts["criterion"] = texts["criterion"].fillna("")  # of the dense model
    lines = list(dict.fromkeys(texts[index].itertuples(index=False, name=None)))
    lines.sort(key=lambda line: line[-2])
    datasets = sorted(dict.fromkeys(rows["dataset"]), key=lambda name: name == MEAN)
    return texts.pivot(index=index, columns="dataset", values="text").loc[lines, datasets]


def report(results: Results, *, normed: bool = False) -> str:
    """All tables as text, with the removed layers, choices of ``"auto"`` and skipped cells."""
    rows = selections(results).merge(scores(results, normed=normed), how="right")
    parts = []
    for measure, part in rows.groupby("measure", sort=False):
        title, relative = _TITLES[str(measure)]
        table = part if measure == ABILITY else with_means(part)  # abilities have several units
        parts.append(f"{title}\n{_lines(wide(table, value_text))}")
        table = table[(table["operator"] != DENSE) & table["relative"].notna()]
        if len(table):
            parts.append(f"{relative} [95 % interval]\n{_lines(wide(table, relative_text))}")
    notes = [f"{r['criterion']}, n = {r['n']}: {r['layers']}" for r in results.of("selection")]
    for record in results.of("choice"):
        notes.append(f"{record['recipe']} without {record['layers']}: {record['operator']}")
    notes += [f"left out: {one_line(record['reason'])}" for record in results.of("skipped")]
    return "\n\n".join([*parts, "\n".join(notes)]).strip()


_TITLES = {
    PERPLEXITY: ("Perplexity (bits per byte)", "Perplexity ÷ dense"),
    ACCURACY: ("Zero-shot accuracy, % ± standard error", "Difference to dense, points"),
    ABILITY: ("Abilities: share right, or nats per token", "Difference to dense"),
}


_FORMS = {PERPLEXITY: (1, "#.3g"), ACCURACY: (100, "+.1f"), ABILITY: (1, "+.2f")}


def _lines(table: pd.DataFrame) -> str:
    """A `wide` table as text, with its index in one column and without the dense model's n."""
    names = []
    for *others, n, operator in table.index:
        parts = [operator, f"n = {n}" if n else "", *map(str, others)]
        names.append(", ".join(filter(None, parts)))
    table = table.rename(columns=one_line)
    return str(table.set_axis(names).rename_axis(columns=None).fillna("").to_string())


def value_text(row: Any) -> str:
    """Perplexity, with bits per byte in brackets; or accuracy ± its standard error, in per cent."""
    if row.measure == PERPLEXITY:
        bits = "" if pd.isna(row.bits_per_byte) else f" ({row.bits_per_byte:.3f})"
        return f"{row.value:,.2f}{bits}"
    if row.measure == ABILITY:
        return f"{row.value:.2f}"
    error = (row.high - row.low) / 2 / stats.norm.ppf(0.975)
    return f"{100 * row.value:.1f}" + ("" if pd.isna(error) else f" ± {100 * error:.1f}")


def relative_text(row: Any) -> str:
    """Perplexity ÷ the dense model's, or the difference of accuracies in points; and interval."""
    scale, form = _FORMS[row.measure]
    numbers = (row.relative, row.relative_low, row.relative_high)
    text, low, high = (f"{scale * number:{form}}".removesuffix(".") for number in numbers)
    return text if pd.isna(row.relative_low) else f"{text} [{low}, {high}]"


def mean_interval(losses: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """``exp`` of a mean of losses, or of their differences, and its 95 % interval by Student's t.

    The interval of a single value is NaN.
    """
    with np.errstate(over="ignore"):
        middle, low, high = np.exp(t_interval(losses)).tolist()
    return middle, low, high
