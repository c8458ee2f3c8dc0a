"""Accuracies, and the difference of two that were measured on the same items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Score:
    """What a model scored on one task.

    Attributes:
        acc, acc_se: share of items whose right choice has the highest log-likelihood, and its
            standard error (None for a single item), both as the harness computes them.
        acc_norm, acc_norm_se: the same with log-likelihoods divided by the choices' lengths in
            characters; None for tasks that the harness scores without it.
        correct, correct_norm: 1 or 0 for each item, in the task's order.
        items: a digest of the items, equal for scores of the same ones.
    """

    task: str
    acc: float
    acc_se: float | None
    acc_norm: float | None
    acc_norm_se: float | None
    correct: Sequence[int]
    correct_norm: Sequence[int] | None
    items: str


@dataclass(frozen=True)
class Difference:
    """How much more accurate one model is than another, item by item.

    Attributes:
        difference: accuracy of the first less that of the second; between -1 and 1.
        low, high: its confidence interval.
        p_value: of McNemar's exact test that neither is better.
        first_only, second_only: items that only the one got right. n: all items.
    """

    difference: float
    low: float
    high: float
    p_value: float
    first_only: int
    second_only: int
    n: int


def paired(
    first: Score, second: Score, *, normed: bool = False, confidence: float = 0.95
) -> Difference:
    """Compare two models on the same items of one task.

    What both got right, or wrong, says nothing about the difference and does not blur it, so the
    interval is narrower than that of two separate accuracies. It is the normal approximation with
    half an item added to each of the four cells of the paired table (Agresti and Min, 2005), which
    keeps its coverage for few items and for models that never disagree.

    Args:
        first, second: what `ghostlib.tasks.zero_shot` gave, with the same ``limit``.
        normed: compare ``acc_norm`` instead of ``acc``.
        confidence: of the interval.

    Raises:
        ValueError: scores of different items, a task without ``acc_norm``, or a confidence that is
            not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if first.items != second.items:
        raise ValueError(
            f"scores of different items ({first.task}: {len(first.correct)}, {second.task}: "
            f"{len(second.correct)}): compare one task with one limit"
        )
    a, b = (score.correct_norm if normed else score.correct for score in (first, second))
    if a is None or b is None:
        raise ValueError(f"task {first.task!r} is scored without acc_norm: use normed=False")
    gained = int(np.sum(np.greater(a, b)))
    lost = int(np.sum(np.less(a, b)))
    # Agresti and Min: two items more, half of one in each cell
    n, up, down = len(a) + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((up + down) / n - centre**2) / np.sqrt(n)
    return Difference(
        difference=(gained - lost) / len(a),
        low=max(float(centre - half), -1.0),
        high=min(float(centre + half), 1.0),
        p_value=float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        first_only=gained,
        second_only=lost,
        n=len(a),
    )
