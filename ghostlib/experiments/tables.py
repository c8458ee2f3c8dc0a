"""Tables of an evaluation: from the cells of a results file to rows, and to text."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ghostlib.evaluation.tasks import Score, paired

MEAN = "mean"


def perplexities(cells: Mapping[str, Any], *, confidence: float = 0.95) -> pd.DataFrame:
    """Perplexity of every model on every corpus, and how many times that of the dense model it is.

    The ratio's interval comes from the differences of the windows' losses (Student's t): all models
    read the same windows, so what makes a window hard for both does not widen it.

    Args:
        cells: of the `Results` that `ghostlib.experiments.run.evaluate` returns.

    Returns:
        Columns ``operator, n, corpus, perplexity, bits_per_byte, windows, tokens, ratio, low,
        high``. A row of corpus ``"mean"`` has the arithmetic mean of the perplexities, as the paper
        reports it, where a model is scored on all corpora.
    """
    rows = []
    models = _models(cells, "perplexity", lambda cell: {cell["corpus"]: cell})
    dense = models.get(("dense", 0), {})
    for (operator, n), measured in models.items():
        for corpus, found in measured.items():
            low = high = ratio = math.nan
            if corpus in dense:
                ratio, low, high = _ratio(
                    found["window_nll"], dense[corpus]["window_nll"], confidence
                )
            kept = ("perplexity", "bits_per_byte", "windows", "tokens")
            rows.append(
                {"operator": operator, "n": n, "corpus": corpus}
                | {name: found[name] for name in kept}
                | {"ratio": ratio, "low": low, "high": high}
            )
        if measured.keys() >= dense.keys():
            mean = float(np.mean([found["perplexity"] for found in measured.values()]))
            rows.append({"operator": operator, "n": n, "corpus": MEAN, "perplexity": mean})
    return pd.DataFrame(rows)


def accuracies(
    cells: Mapping[str, Any], *, normed: bool = False, confidence: float = 0.95
) -> pd.DataFrame:
    """Accuracy of every model on every task, and its difference to the dense model, item by item.

    Args:
        cells: of the `Results` that `ghostlib.experiments.run.evaluate` returns.
        normed: ``acc_norm`` of tasks that have it.

    Returns:
        Columns ``operator, n, task, acc, se, items, difference, low, high``, see `paired`. A row of
        task ``"mean"`` has the mean over tasks, all of one weight, where a model is scored on all;
        the tasks' errors are taken as independent.
    """
    rows = []
    models = _models(cells, "scores", lambda parts: {p["task"]: Score(**p) for p in parts})
    dense = models.get(("dense", 0), {})
    for (operator, n), measured in models.items():
        mine = []
        for task, score in measured.items():
            norm = normed and score.acc_norm is not None
            acc, se = (score.acc_norm, score.acc_norm_se) if norm else (score.acc, score.acc_se)
            row = {"operator": operator, "n": n, "task": task, "acc": acc, "se": se}
            row |= {"items": len(score.correct)}
            if task in dense:
                by = paired(score, dense[task], normed=norm, confidence=confidence)
                row |= {"difference": by.difference, "low": by.low, "high": by.high}
            mine.append(row)
        rows += mine
        if mine and measured.keys() >= dense.keys():
            rows.append({"operator": operator, "n": n, "task": MEAN} | _mean(mine))
    return pd.DataFrame(rows)


def wide(rows: pd.DataFrame, columns: str, form: Callable[[Any], str]) -> pd.DataFrame:
    """A line for each n and operator, a column for each corpus or task, both in order of ``rows``.

    Args:
        columns: ``"corpus"`` or ``"task"``.
        form: the text of a row, such as `perplexity_text` or `difference_text`.
    """
    texts = rows.assign(text=[form(row) for row in rows.itertuples()])
    order = list(dict.fromkeys(zip(rows["n"], rows["operator"], strict=True)))
    order.sort(key=lambda line: line[0])
    names = sorted(dict.fromkeys(rows[columns]), key=lambda name: name == MEAN)
    return texts.pivot(index=["n", "operator"], columns=columns, values="text").loc[order, names]


def report(cells: Mapping[str, Any], *, normed: bool = False) -> str:
    """All tables as text."""

    def repaired(rows: pd.DataFrame) -> pd.DataFrame:
        return rows[rows["operator"] != "dense"]

    parts = []
    if len(rows := perplexities(cells)):
        parts += [
            ("Perplexity (bits per byte)", wide(rows, "corpus", perplexity_text)),
            (
                "Perplexity ÷ dense [95 % interval]",
                wide(repaired(rows[rows["corpus"] != MEAN]), "corpus", ratio_text),
            ),
        ]
    if len(rows := accuracies(cells, normed=normed)):
        parts += [
            ("Zero-shot accuracy, % ± standard error", wide(rows, "task", accuracy_text)),
            (
                "Difference to dense, points [95 % interval]",
                wide(repaired(rows), "task", difference_text),
            ),
        ]
    return "\n\n".join(f"{title}\n{_text(table)}" for title, table in parts)


def _models(
    cells: Mapping[str, Any], kind: str, read: Callable[[Any], dict[str, Any]]
) -> dict[tuple[str, int], dict[str, Any]]:
    """``{(operator, n): {corpus or task: what was measured}}``."""
    models: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in cells.values():
        if kind in cell:
            models.setdefault((cell["operator"], cell["n"]), {}).update(read(cell[kind]))
    return models


def _ratio(
    mine: Sequence[float], dense: Sequence[float], confidence: float
) -> tuple[float, float, float]:
    """Ratio of perplexities and its interval, from losses of the same windows."""
    differences = np.subtract(mine, dense)
    mean, count = differences.mean(), len(differences)
    if count < 2:
        return math.exp(mean), math.nan, math.nan
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * differences.std(ddof=1) / count**0.5
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of tasks: of accuracies, and of differences where all have one."""
    mean: dict[str, Any] = {
        "acc": np.mean([row["acc"] for row in rows]),
        "se": _together([row["se"] if row["se"] is not None else math.nan for row in rows]),
        "items": sum(row["items"] for row in rows),
    }
    if all("difference" in row for row in rows):
        middle = np.mean([(row["low"] + row["high"]) / 2 for row in rows])
        half = _together([(row["high"] - row["low"]) / 2 for row in rows])
        difference = np.mean([row["difference"] for row in rows])
        mean |= {"difference": difference, "low": middle - half, "high": middle + half}
    return mean


def _together(errors: Sequence[float]) -> float:
    """The error of a mean of independent numbers."""
    return float(np.sqrt(np.sum(np.square(errors))) / len(errors))


def perplexity_text(row: Any) -> str:
    """Perplexity and, in brackets, bits per byte."""
    bits = "" if pd.isna(row.bits_per_byte) else f" ({row.bits_per_byte:.3f})"
    return f"{row.perplexity:,.2f}{bits}"


def ratio_text(row: Any) -> str:
    """Perplexity ÷ that of the dense model, and its interval."""
    return f"{row.ratio:.3g}" + _interval(row.low, row.high, ".3g")


def accuracy_text(row: Any) -> str:
    """Accuracy ± its standard error, in per cent."""
    return f"{100 * row.acc:.1f}" + ("" if pd.isna(row.se) else f" ± {100 * row.se:.1f}")


def difference_text(row: Any) -> str:
    """Accuracy less that of the dense model, and its interval, in points."""
    return f"{100 * row.difference:+.1f}" + _interval(100 * row.low, 100 * row.high, "+.1f")


def _interval(low: float, high: float, form: str) -> str:
    return "" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]"


def _text(table: pd.DataFrame) -> str:
    """Lines of a `wide` table; the dense model's n is left out."""
    names = [f"{operator}, n = {n}" if n else operator for n, operator in table.index]
    return str(table.set_axis(names).rename_axis(columns=None).fillna("").to_string())
