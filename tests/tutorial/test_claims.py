"""The ledger: output for the reader, the page of claims, and the rules for a verdict."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ghostlib.tutorial import claims
from ghostlib.tutorial.claims import CLAIMS, MIME, Measurement, holm, ledger, record, verdict


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`record`, returning the contents of the cell's output."""
    outputs: list[Any] = []
    monkeypatch.setattr(claims, "display", lambda output, raw: outputs.append(output))

    def recorded(*args: Any, **kwargs: Any) -> Any:
        record(*args, **kwargs)
        return outputs.pop()

    return recorded


@pytest.mark.parametrize(("holds", "word"), [(True, "holds"), (False, "does not hold")])
def test_an_exact_check_shows_the_claim_and_carries_its_facts(shown, holds, word):
    figure = "ghost 0.45, symmetric 0.60"
    bundle = shown(5, figure, holds=holds, condition="on held-out text")
    assert bundle[MIME] == {
        "claim": 5,
        "figure": figure,
        "verdict": word,
        "rule": "exact check",
        "condition": "on held-out text",
    }
    for text in (bundle["text/plain"], bundle["text/markdown"]):
        for part in (CLAIMS[5].text, word, figure, "on held-out text"):
            assert part in text
    assert "(../docs/claims.md#claim-5)" in bundle["text/markdown"]


def test_a_single_measurement_names_its_threshold(shown):
    facts = shown(20, "0.02 MB more", holds=True, threshold="less than 0.1 MB more")[MIME]
    assert facts["verdict"] == "holds"
    assert facts["rule"] == "measured once, no interval; holds if less than 0.1 MB more"


@pytest.mark.parametrize(
    ("interval", "options", "word"),
    [
        ((0.1, 8), {"above": 0}, "holds"),
        ((-15, 8), {"above": 0}, "undecided"),
        ((-15, -1), {"above": 0}, "does not hold"),
        ((0, 8), {"above": 0}, "undecided"),
        ((-8, 0), {"above": 0}, "does not hold"),
        ((0.8, 0.9), {"below": 0.95}, "holds"),
        ((0.8, 0.99), {"below": 0.95}, "undecided"),
        ((0.96, 0.99), {"below": 0.95}, "does not hold"),
        ((-0.02, 0.03), {"above": -0.05, "below": 0.05}, "holds"),
        ((-0.02, 0.06), {"above": -0.05, "below": 0.05}, "undecided"),
        ((0.06, 0.09), {"above": -0.05, "below": 0.05}, "does not hold"),
        ((-0.09, 0.09), {"above": -0.05, "below": 0.05}, "undecided"),
    ],
)
def test_a_measurement_is_decided_where_its_interval_excludes_the_other_side(
    shown, interval, options, word
):
    assert verdict(interval, **options) == word
    facts = shown(
        7, "difference", estimate=sum(interval) / 2, interval=interval, items=60, **options
    )
    assert facts[MIME]["verdict"] == word


def test_a_row_states_its_rule_and_what_it_rests_on(shown):
    facts = shown(
        7,
        "ghost − linearpatch-r, points",
        estimate=-3.14159,
        interval=(-15, 8.25),
        above=0,
        items=1200,
        seeds=1,
        windows=16,
    )[MIME]
    assert facts["figure"] == "ghost − linearpatch-r, points: -3.14 [-15, 8.25]"
    assert facts["rule"] == (
        "holds if the 95 % interval lies above 0; 1,200 items, one seed, 16 windows"
    )


def test_a_row_says_plainly_that_it_rests_on_one_seed(shown):
    options = {"estimate": 1.5, "interval": (1, 2), "above": 0}
    one = shown(8, "ratio", seeds=1, windows=6, **options)[MIME]
    assert one["rule"].endswith("lies above 0; one seed, 6 windows")
    three = shown(9, "ratio", seeds=3, windows=6, **options)[MIME]
    page = ledger([Measurement("10_x", 1, one), Measurement("07_x", 2, three)])
    assert "| 1.5 [1, 2] (one seed) | [10, cell 1]" in page
    assert "| 1.5 [1, 2] | [07, cell 2]" in page


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (99, {"holds": True}, "no claim 99: the ledger has 1 … "),
        (1, {}, "give holds= for an exact check, or estimate= and interval="),
        (1, {"holds": True, "estimate": 1, "interval": (0, 2)}, "and not both"),
        (1, {"estimate": 1, "interval": (0, 2), "threshold": "more"}, "goes with holds="),
        (1, {"estimate": 1, "above": 0, "items": 1}, "needs an interval that holds it, got None"),
        (1, {"estimate": 3, "interval": (0, 2), "above": 0, "items": 1}, r"got \(0, 2\)"),
        (1, {"estimate": float("nan"), "interval": (0, 2), "above": 0, "items": 1}, "nan needs"),
        (
            1,
            {"estimate": 1, "interval": (0, 2), "above": 0},
            "rests on: items=, seeds= or windows=",
        ),
        (1, {"estimate": 1, "interval": (0, 2), "items": 1}, "give above=, below= or both"),
    ],
)
def test_bad_entries_are_refused(number, options, message):
    with pytest.raises(ValueError, match=message):
        record(number, "1", **options)


@pytest.mark.parametrize(
    ("interval", "options", "message"),
    [
        ((2, 1), {"above": 0}, r"low <= high, got \(2, 1\)"),
        ((float("nan"), 1), {"above": 0}, "low <= high"),
        ((0, 1), {}, "nothing to compare with"),
        ((0, 1), {"above": 2, "below": 1}, "no value is above 2 and below 1"),
    ],
)
def test_bad_intervals_and_bounds_are_refused(interval, options, message):
    with pytest.raises(ValueError, match=message):
        verdict(interval, **options)


def entry(number: int, word: str, notebook: str = "00_quickstart", **facts: str) -> Measurement:
    defaults = {"figure": "1 < 2", "rule": "exact check", "condition": ""}
    return Measurement(notebook, 7, {"claim": number, "verdict": word} | defaults | facts)


def test_the_page_has_a_line_for_every_claim_and_its_evidence_below():
    page = ledger(
        [
            entry(1, "holds", figure="off by | 1e-7"),
            entry(7, "undecided", "09_full", figure="points: -3 [-15, 8]", value="-3 [-15, 8]"),
            entry(8, "holds", condition="n = 7"),
            entry(8, "undecided", "09_full"),
            entry(8, "holds", "13_grid", figure="a very long figure " * 9),
            entry(9, "holds"),
            entry(9, "does not hold", "13_grid"),
            entry(9, "undecided"),
        ]
    )
    table, _, evidence = page.partition("## The evidence")
    rows = {row.split("]")[0][3:]: row for row in table.splitlines() if row.startswith("| [")}
    assert list(rows) == [str(number) for number in CLAIMS]
    assert r"off by \| 1e-7 | [00, cell 7](../notebooks/00_quickstart.ipynb) |" in rows["1"]
    assert "| undecided | -3 [-15, 8] | [09, cell 7](../notebooks/09_full.ipynb) |" in rows["7"]
    assert "| undecided |" in rows["8"] and "| does not hold |" in rows["9"]
    assert "| not measured |" in rows["2"]
    assert all(len(row) < 400 for row in rows.values())
    others = len(CLAIMS) - 4
    assert f"claims: holds: 1, undecided: 2, does not hold: 1, not measured: {others}." in table
    for number, claim in CLAIMS.items():
        assert f'<a id="claim-{number}"></a>' in evidence and claim.source in evidence
    assert evidence.count("<details>") == evidence.count("</details>") == len(CLAIMS)
    assert "a very long figure " * 8 in evidence and "n = 7" in evidence


def test_the_papers_claims_come_first_and_are_all_there():
    sources = [claim.source for claim in CLAIMS.values()]
    assert list(CLAIMS) == list(range(1, len(sources) + 1))
    assert all(source.startswith("paper") for source in sources[:12])
    assert set(sources[12:]) == {"ours"}


def test_interval_is_that_of_scipy():
    values = [0.2, 0.5, 0.1, 0.9]
    mean, ends = claims.interval(values)
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(0.425)
    assert ends == pytest.approx((reference.low, reference.high))


def test_an_interval_is_that_of_any_array() -> None:
    values = [1.0, 2.0, 4.0]
    mean, (low, high) = claims.interval(values)
    assert mean - low == pytest.approx(high - mean) and low < mean < high
    for same in (np.array(values), torch.tensor(values)):
        assert claims.interval(same) == (mean, (low, high))


@given(
    st.dictionaries(st.integers(), st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0.001, 0.999),
)
def test_holm_rejects_as_the_step_down_procedure(p_values, level):
    rejected, left = set(), dict(p_values)
    while left:  # the smallest p-value is compared with level / number left, until one is kept
        name = min(left, key=left.__getitem__)
        if left[name] * len(left) > level:
            break
        rejected.add(name)
        del left[name]
    corrected = holm(p_values)
    assert corrected.keys() == p_values.keys()
    assert list(corrected.values()) == sorted(corrected.values())
    assert {name for name, p_value in corrected.items() if p_value <= level} == rejected
