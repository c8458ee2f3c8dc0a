"""Tables: from the records of results files to typed data frames, and to text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    """Every score, with its interval, and beside the dense model's on the same text or items.

    Models are compared window by window, or item by item: what makes a window hard for both does
    not widen the interval of their ratio (Student's t of the differences of losses), and what both
    answer alike not that of their difference (see `paired`).

    Args:
        normed: ``acc_norm`` of tasks that have it.

    Returns:
        A row for each model (``specification, model, seed, layers, n, operator``), ``measure``
        (``"perplexity"``, ``"accuracy"``, ``"ability"``) and ``dataset``: a corpus, a task, a
        member of a group of tasks, or a probe. ``specification`` is its id, which tells apart the
        parts of a joined file; ``layers`` are those removed, as `ghostlib.models.boundaries.spell`
        writes them, and ``n`` is their number. ``value, low, high``: the score and its 95 %
        interval; ``bits_per_byte``; ``size``: predicted tokens, or items; ``dense``: the dense
        model's score; ``relative``: the ratio of perplexities to it or the difference of other
        scores, with ``relative_low, relative_high``; ``evidence``: the losses of the windows, a
        `Score`, or those of the items.
    """
    records = [part for record in results.of("score") for part in _parts(record, normed)]
    on = itemgetter("specification", "measure", "dataset")
    dense = {on(record): record for record in records if record["operator"] == DENSE}
    for record in records:
        if reference := dense.get(on(record)):
            record["dense"], pair = reference["value"], (record["evidence"], reference["evidence"])
            if record["measure"] == ACCURACY:
                by = paired(*pair, normed=record["normed"])
                compared = by.difference, by.low, by.high
            else:
                interval = mean_interval if record["measure"] == PERPLEXITY else t_interval
                compared = interval(np.subtract(*pair))
            record |= zip(("relative", "relative_low", "relative_high"), compared, strict=True)
    return _frame(results, records, _SCORE)


def _parts(record: Record, normed: bool) -> list[Record]:
    """A perplexity; or the accuracy of each part of a task."""
    if record["measure"] == PERPLEXITY:
        bits = float(np.mean(record["losses"])) / math.log(2)
        per_byte = bits * record["tokens"] / record["bytes"] if record["bytes"] else math.nan
        more = {"size": record["tokens"], "evidence": record["losses"], "bits_per_byte": per_byte}
        return [record | more]
    if record["measure"] == ABILITY:
        return [record | {"size": len(record["items"]), "evidence": record["items"]}]
    parts = []
    for score in (Score(**part) for part in record["scores"]):
        value, error, norm = score.acc, score.acc_se, False
        if normed and score.acc_norm is not None:
            value, error, norm = score.acc_norm, score.acc_norm_se, True
        half = math.nan if error is None else stats.norm.ppf(0.975) * error
        more = {"dataset": score.task, "value": value, "low": value - half, "high": value + half}
        parts.append(
            record | more | {"size": len(score.correct), "evidence": score, "normed": norm}
        )
    return parts


def selections(results: Results) -> pd.DataFrame:
    """What each criterion removes: ``specification, model, seed, layers, n, criterion`` a row.

    ``selections(results).merge(scores(results))`` is the grid of criteria and operators.
    """
    return _frame(results, results.of("selection"), {**_MODEL, "criterion": str})


def choices(results: Results) -> pd.DataFrame:
    """What the recipe chose: a row for each set of layers and budget, ``specification, model, seed,
    layers, n, recipe, operator``, and ``losses``, those of all candidates, in nats per calibration
    token that was held out."""
    columns = {**_MODEL, "recipe": str, "operator": str, "losses": object}
    return _frame(results, results.of("choice"), columns)


def _frame(results: Results, records: Sequence[Record], columns: dict[str, Any]) -> pd.DataFrame:
    """Typed columns of records and of their specifications."""
    known = {record["id"]: record for record in results.of("specification")}
    rows = []
    for record in records:
        n = len(read_layers(record["layers"])) if record["layers"] else 0
        # The line of a specification may be damaged: what it is of is unknown then.
        if specification := known.get(record["specification"]):
            rows.append({"n": n} | {k: specification[k] for k in ("model", "seed")} | record)
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


class Ratio(NamedTuple):
    """A ratio of perplexities, its 95 % interval, and what it rests on.

    Attributes:
        estimate: geometric mean over seeds and corpora.
        low: lower end of its interval.
        high: upper end.
        seeds: how many draws of calibration and test text.
        windows: scored windows of all seeds and corpora.
    """

    estimate: float
    low: float
    high: float
    seeds: int
    windows: int


def ratio(first: pd.DataFrame, second: pd.DataFrame) -> Ratio:
    """Perplexity of one model over another's, on the same windows of the same seeds and corpora.

    Differences of losses are taken window by window and averaged within a corpus, then over the
    corpora. With three seeds or more the interval is Student's t over the seeds, which differ in
    calibration text and in test text; with fewer, over the windows.

    Args:
        first: `scores` of one perplexity for each seed and corpus.
        second: the same of another model.

    Raises:
        ValueError: seeds, corpora or windows that differ, several models in one of the two, or
            corpora that do not weigh the same in windows, where these decide the interval.

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
    gaps = evidence[0].combine(evidence[1], np.subtract)
    by_seed = gaps.map(np.mean).groupby("seed").mean()
    shares = counts * counts.groupby("seed").transform("size")  # those of windows, inverted
    if len(by_seed) < 3 and shares.nunique() > 1:
        raise ValueError(
            f"corpora of {sorted(counts)} windows: the interval would weigh windows and the "
            "estimate corpora; compare each corpus alone, or give three seeds"
        )
    windows = np.concatenate(gaps.tolist())
    _, low, high = mean_interval(by_seed.to_numpy() if len(by_seed) > 2 else windows)
    return Ratio(float(np.exp(by_seed.mean())), low, high, len(by_seed), len(windows))


def with_means(rows: pd.DataFrame) -> pd.DataFrame:
    """`scores` of one measure, and one more row for each model that is scored everywhere.

    Returns:
        ``rows`` and those of the dataset ``"mean"``: of perplexities the arithmetic mean, as the
        paper reports it; of accuracies the mean over tasks, all of one weight, whose errors are
        taken as independent.
    """
    everything = set(rows["dataset"])
    names = [name for name in (*_MODEL, "criterion", "operator", "measure") if name in rows]
    means: list[dict[str, Any]] = []
    for model, part in rows.groupby(names, sort=False, dropna=False):
        if set(part["dataset"]) == everything:
            mean = dict(zip(names, model, strict=True))
            mean |= {"dataset": MEAN, "value": part["value"].mean()}
            if mean["measure"] == ACCURACY:
                mean |= {"size": part["size"].sum(), "relative": part["relative"].mean()}
                mean |= _mean_interval(part, "") | _mean_interval(part, "relative_")
            means.append(mean)
    return pd.DataFrame([*rows.to_dict("records"), *means], columns=rows.columns)


def _mean_interval(part: pd.DataFrame, prefix: str) -> dict[str, float]:
    """The interval of the mean of independent numbers, from theirs."""
    low, high = part[f"{prefix}low"].to_numpy(), part[f"{prefix}high"].to_numpy()
    centre, half = (low + high).mean() / 2, np.linalg.norm(high - low) / len(part) / 2
    return {f"{prefix}low": centre - half, f"{prefix}high": centre + half}


def pooled(rows: pd.DataFrame, operator: str) -> Score:
    """The items of all tasks as those of one, such as to compare two models by `paired`.

    Args:
        rows: `scores`, in which the operator has one accuracy a task.

    Raises:
        ValueError: no accuracy of this operator, or several of a task.
    """
    found = rows[(rows["measure"] == ACCURACY) & (rows["operator"] == operator)]
    if not len(found) or found["dataset"].duplicated().any():
        raise ValueError(f"{operator} must have one accuracy for each task, in {len(found)} rows")
    parts: list[Score] = found.sort_values("dataset")["evidence"].tolist()
    correct = [answer for part in parts for answer in part.correct]
    normed = [answer for part in parts for answer in part.correct_norm or ()]
    return replace(
        parts[0],
        task="all",
        acc=sum(correct) / len(correct),
        acc_se=None,
        acc_norm=None,
        acc_norm_se=None,
        correct=correct,
        correct_norm=normed if len(normed) == len(correct) else None,  # else one has none
        items=" ".join(part.items for part in parts),
    )


def wide(rows: pd.DataFrame, form: Callable[[Any], str]) -> pd.DataFrame:
    """A line for each n and operator, a column for each corpus or task, both in order of ``rows``.

    Lines name the model, the seed, the criterion, the layers and the specification as well where
    these differ.

    Args:
        rows: `scores` of one measure, also merged with `selections`.
        form: the text of a row, such as `value_text` or `relative_text`.
    """
    differ = ("model", "seed", "criterion")
    lines = [name for name in differ if name in rows and rows[name].nunique() > 1]
    lines += ["n", "operator"]
    if rows.duplicated([*lines, "dataset"]).any():
        lines.insert(-2, "layers")
    if "specification" in rows and rows.duplicated([*lines, "dataset"]).any():
        lines.insert(-2, "specification")
    texts = rows.assign(text=[form(row) for row in rows.itertuples()])
    if "criterion" in lines:
        texts["criterion"] = texts["criterion"].fillna("")  # the dense model's
    order = list(dict.fromkeys(texts[lines].itertuples(index=False, name=None)))
    order.sort(key=lambda line: line[-2])
    names = sorted(dict.fromkeys(rows["dataset"]), key=lambda name: name == MEAN)
    return texts.pivot(index=lines, columns="dataset", values="text").loc[order, names]


def report(results: Results, *, normed: bool = False) -> str:
    """All tables as text; which layers were removed, what ``"auto"`` chose, what was left out."""
    rows = selections(results).merge(scores(results, normed=normed), how="right")
    parts = []
    for measure, part in rows.groupby("measure", sort=False):
        title, compared = _TITLES[str(measure)]
        repaired = part if measure == ABILITY else with_means(part)  # which have several units
        parts.append(f"{title}\n{_lines(wide(repaired, value_text))}")
        repaired = repaired[(repaired["operator"] != DENSE) & repaired["relative"].notna()]
        if len(repaired):
            parts.append(f"{compared} [95 % interval]\n{_lines(wide(repaired, relative_text))}")
    notes = [f"{r['criterion']}, n = {r['n']}: {r['layers']}" for r in results.of("selection")]
    chosen = results.of("choice")
    notes += [f"{r['recipe']} without {r['layers']}: {r['operator']}" for r in chosen]
    for record in results.of("skipped"):
        notes.append(f"left out: {one_line(record['reason'])}")
    return "\n\n".join([*parts, "\n".join(notes)]).strip()


_TITLES = {
    PERPLEXITY: ("Perplexity (bits per byte)", "Perplexity ÷ dense"),
    ACCURACY: ("Zero-shot accuracy, % ± standard error", "Difference to dense, points"),
    ABILITY: ("Abilities: share right, or nats per token", "Difference to dense"),
}


_FORMS = {PERPLEXITY: (1, "#.3g"), ACCURACY: (100, "+.1f"), ABILITY: (1, "+.2f")}


def _lines(table: pd.DataFrame) -> str:
    """A `wide` table with the names of its lines in one column, without the dense model's n."""
    names = []
    for *others, n, operator in table.index:
        parts = [operator, f"n = {n}" if n else "", *map(str, others)]
        names.append(", ".join(filter(None, parts)))
    table = table.rename(columns=one_line)
    return str(table.set_axis(names).rename_axis(columns=None).fillna("").to_string())


def value_text(row: Any) -> str:
    """Perplexity and, in brackets, bits per byte; accuracy ± its standard error, in per cent."""
    if row.measure == PERPLEXITY:
        bits = "" if pd.isna(row.bits_per_byte) else f" ({row.bits_per_byte:.3f})"
        return f"{row.value:,.2f}{bits}"
    if row.measure == ABILITY:
        return f"{row.value:.2f}"
    error = (row.high - row.low) / 2 / stats.norm.ppf(0.975)
    return f"{100 * row.value:.1f}" + ("" if pd.isna(error) else f" ± {100 * error:.1f}")


def relative_text(row: Any) -> str:
    """Perplexity ÷ the dense model's, or accuracy less that, in points; and the interval."""
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
