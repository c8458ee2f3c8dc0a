"""The paired comparison against counting, simulation and enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostlib.evaluation.tasks import Score, paired


def score(correct: list[int], norm: list[int] | None = None, items: str = "same") -> Score:
    return Score("quiz", float(np.mean(correct)), 0.1, None, None, correct, norm, items)


answers = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


@given(answers)
def test_counts_and_symmetry(pairs: list[tuple[int, int]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    result, mirrored = paired(score(a), score(b)), paired(score(b), score(a))
    assert result.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert result.first_only == sum(x > y for x, y in pairs) and result.n == len(pairs)
    assert -1 <= result.low <= result.difference <= result.high <= 1 and result.low < result.high
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))
    assert mirrored.p_value == pytest.approx(result.p_value)
    wider = paired(score(a), score(b), confidence=0.999)
    assert wider.low <= result.low and wider.high >= result.high


@given(st.integers(0, 7), st.integers(0, 7))
def test_p_value_is_that_of_all_sign_flips(gained: int, lost: int) -> None:
    """Under "neither is better" each disagreement is as likely the other way round."""
    a, b = [1] * gained + [0] * lost + [1, 0], [0] * gained + [1] * lost + [1, 0]
    flips = [sum(signs) for signs in itertools.product((-1, 1), repeat=gained + lost)]
    extreme = np.mean([abs(total) >= abs(gained - lost) for total in flips])
    assert paired(score(a), score(b)).p_value == pytest.approx(extreme)


@pytest.mark.thorough
@pytest.mark.parametrize("table", [(0.5, 0.2, 0.1, 0.2), (0.7, 0.02, 0.02, 0.26)])
def test_the_interval_covers_the_truth_as_often_as_it_says(table: tuple[float, ...]) -> None:
    """Probabilities that both, only the first, only the second, or neither is right."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        cells = rng.choice(4, size=100, p=table)
        result = paired(score(list((cells < 2) * 1)), score(list((cells % 2 == 0) * 1)))
        hits += result.low <= table[1] - table[2] <= result.high
    assert 0.93 < hits / 1000 <= 1


def test_it_is_narrower_than_two_separate_intervals() -> None:
    a = [1, 0] * 50
    b = [*a[:-2], 0, 0]
    result = paired(score(a), score(b))
    assert result.high - result.low < 0.1 < 2 * 1.96 * (2 * 0.25 / 100) ** 0.5


def test_models_that_never_disagree_have_an_interval() -> None:
    result = paired(score([1] * 20), score([1] * 20))
    assert result.low < 0 < result.high and result.difference == 0 and result.p_value == 1


def test_normed_scores_and_errors() -> None:
    a, b = score([1, 1], [0, 1]), score([1, 1], [0, 0])
    assert paired(a, b).difference == 0 and paired(a, b, normed=True).difference == 0.5
    with pytest.raises(ValueError, match=r"different items \(quiz: 2, quiz: 1\): compare one task"):
        paired(a, score([1], items="others"))
    with pytest.raises(ValueError, match="task 'quiz' is scored without acc_norm"):
        paired(score([1]), score([1]), normed=True)
