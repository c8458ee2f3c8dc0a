"""The claims ledger: the paper's claims and ours, and the notebooks' measurements of them.

A notebook ends a check with `record`, which prints the claim and its verdict and stores the same
facts in the cell's output as data; `ledger` makes a page of them all.

A verdict is *holds*, *does not hold* or *undecided*. An assertion decides whether an identity
holds. A measurement is decided only where its interval excludes the other side; one without an
interval says so, and names its threshold.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from IPython.display import display

MIME = "application/vnd.ghostlib.claim+json"
HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"


class Claim(NamedTuple):
    """A statement and its source.

    Attributes:
        text: the statement.
        source: a section of the paper, or ``"ours"``.
    """

    text: str
    source: str = "ours"


CLAIMS: dict[int, Claim] = {
    1: Claim(
        "The boundary mismatch is exactly the removed layers' summed contributions: "
        "X_post = X_pre + Δ",
        "paper, section 3.1, eqs. 1–3",
    ),
    2: Claim(
        "M* = pinv(X_pre) Δ, singular values below 1e-6 of the largest dropped, and W* = I + M* "
        "minimise the alignment error",
        "paper, section 3.2.2, eqs. 4–7",
    ),
    3: Claim(
        "float64 normal equations with ε = 1e-6 serve as well, and can be streamed",
        "paper, appendix H, eqs. A15–A16, table A10",
    ),
    4: Claim(
        "At inference one matrix product per boundary; one boundary per gap",
        "paper, section 3.2.3, eq. 8",
    ),
    5: Claim(
        "Theorem 4.1: W* is the unconstrained optimum; LinearPatch's H diag(d) H⊤ is "
        "symmetric and cannot do better",
        "paper, section 4, appendix A",
    ),
    6: Claim(
        "The antisymmetric part of M* is substantial: 46.9 % and 47.7 % of its norm",
        "paper, figure 3",
    ),
    7: Claim(
        "Highest average zero-shot accuracy among training-free methods",
        "paper, table 2",
    ),
    8: Claim("Lowest average perplexity in most settings", "paper, table 3"),
    9: Claim(
        "Perplexity still improves from 16 to 32 calibration sequences, and from 32 to 64",
        "paper, tables 4 and A3, which go on to 128; that accuracy saturates at 32 is not measured",
    ),
    10: Claim(
        "The calibration corpus hardly matters, also when it is another kind of text",
        "paper, appendix F, table A7, of two corpora of English prose; extended by us",
    ),
    11: Claim(
        "Inference needs exactly the operations and parameters of fused LinearPatch",
        "paper, tables 5, A8, A9, which time it; time is undecided here",
    ),
    12: Claim("Tuning only the operator by distillation improves it further", "paper, appendix D"),
    13: Claim("Min-norm in M and min-norm in W differ exactly on directions calibration never saw"),
    14: Claim("An absolute ridge of 1e-6 does not remove the peak"),
    15: Claim("The held-out error of the pseudo-inverse peaks at tokens = width"),
    16: Claim(
        "LinearPatch's heuristic is not the best of its own family, and that family is far from "
        "the best symmetric operator",
    ),
    17: Claim(
        "No weighting of the output channels changes the unconstrained optimum; it can change a "
        "constrained one",
    ),
    18: Claim(
        "In blocks where it is born, the first token's massive activation owns the squared error",
    ),
    19: Claim(
        "With fewer tokens than channels and ε = 1e-6, moments summed in float32 multiply the "
        "error by more than ten",
    ),
    20: Claim("Streaming memory does not grow with the number of tokens"),
    21: Claim(
        "On calibration tokens the gap of any operator to the optimum is ‖X (W − W*)‖² exactly"
    ),
    22: Claim(
        "On calibration tokens one operator for a run of layers fits no worse than the composition "
        "of one per layer",
    ),
    23: Claim(
        "With several gaps, fitting each to the model as repaired so far beats fitting all to the "
        "dense model",
    ),
    24: Claim(
        "A greedy search that scores repaired models finds better layers than the block by cosine",
    ),
    25: Claim(
        "Over a block in which the massive activation is born, the unconstrained optimum can be "
        "far worse than no repair",
    ),
    26: Claim(
        "There a normalised copy of the stream and weights by the inverse norm together bring the "
        "geometric mean perplexity of four corpora to less than a third of the optimum's",
    ),
    27: Claim(
        "A repair that reads the stream and its normalised copy, with errors weighted by 1 / norm, "
        "beats ghost at a block where ghost fails (9–15) and at one where it works (12–18)",
    ),
    28: Claim(
        "The recipe is never worse than the better of no repair and ghost, wherever the block is",
    ),
    29: Claim(
        "The recipe, layers included, is below cosine with ghost; over three seeds only where it "
        "keeps cosine's layers",
    ),
    30: Claim("A boundary with branches has less than a third of a layer's parameters"),
    31: Claim(
        "At the block that cosine chooses the down-projection before the gap, solved for whole, "
        "comes within 10 % of ghost's perplexity, without a parameter or an operation more than "
        "the pruned model",
    ),
    32: Claim(
        "Solved for together, that projection and the boundary matrix are below ghost's "
        "perplexity at ghost's cost",
    ),
    33: Claim(
        "The block that cosine chooses takes copying from the context away, and ghost leaves less "
        "than half of it",
    ),
    34: Claim(
        "There none of seven repairs of one token at a time returns a tenth of the copying that is "
        "lost",
    ),
    35: Claim("Other layers, as many, keep more than half of copying once repaired"),
}


def verdict(
    interval: tuple[float, float], *, above: float | None = None, below: float | None = None
) -> str:
    """Decide from a confidence interval whether a quantity is above, below or between bounds.

    Args:
        interval: low and high end of the quantity's confidence interval.
        above: the claim is that the quantity is larger than this.
        below: the claim is that it is smaller than this; with ``above``, that it lies between.

    Returns:
        ``"holds"`` if all of the interval is on the claim's side, ``"does not hold"`` if none of it
        is, ``"undecided"`` otherwise.

    Raises:
        ValueError: low end above high end, nothing to compare with, or ``above >= below``.

    >>> [verdict(interval, above=0) for interval in ((2, 5), (-1, 5), (-3, -1))]
    ['holds', 'undecided', 'does not hold']
    >>> verdict((-0.02, 0.03), above=-0.05, below=0.05)
    'holds'
    """
    low, high = interval
    if not low <= high:
        raise ValueError(f"an interval needs low <= high, got ({low}, {high})")
    if above is None and below is None:
        raise ValueError("nothing to compare with: give above=, below= or both")
    floor = -math.inf if above is None else above
    ceiling = math.inf if below is None else below
    if not floor < ceiling:
        raise ValueError(f"no value is above {above} and below {below}")
    if floor < low and high < ceiling:
        return HOLDS
    return FAILS if high <= floor or ceiling <= low else UNDECIDED


def interval(values: Any) -> tuple[float, tuple[float, float]]:
    """Mean of independent values and its 95 % confidence interval (Student's t).

    For the keywords ``estimate`` and ``interval`` of `record`; values are, say, differences between
    two models' losses, one per window or seed.

    >>> interval([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
    (2.0, (-0.48..., 4.48...))
    """
    from ghostlib.evaluation.abilities import t_interval  # imports torch; the ledger does not

    mean, low, high = t_interval(values)
    return mean, (low, high)


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's correction of the p-values of several tests, by name, in ascending order.

    The smallest of k is multiplied by k, the next by k - 1, and so on; a corrected value is at most
    1, and not below the one before it. Rejecting where it is at most α keeps the probability of any
    false rejection at α (Holm, 1979).

    >>> holm({"a": 0.25, "b": 0.0625, "c": 0.125})
    {'b': 0.1875, 'c': 0.25, 'a': 0.25}
    """
    corrected, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = largest
    return corrected


def record(
    number: int,
    figure: str,
    *,
    holds: bool | None = None,
    estimate: float | None = None,
    interval: tuple[float, float] | None = None,
    above: float | None = None,
    below: float | None = None,
    items: int | None = None,
    seeds: int | None = None,
    windows: int | None = None,
    threshold: str = "",
    condition: str = "",
) -> None:
    """Record a measurement of a claim, as the last statement of the cell that made it.

    An identity, which the cell asserts to rounding:

        record(1, f"pieces sum to Δ up to {off:.0e} of the stream", holds=off < 1e-5)

    A single measurement without an interval, whose threshold is shown with the verdict:

        record(20, f"{extra:.2f} MB more", holds=extra < 0.1, threshold="less than 0.1 MB more")

    A measurement whose interval decides (see `verdict`):

        record(7, "ghost − linearpatch-r, points of accuracy", estimate=100 * d.difference,
               interval=(100 * d.low, 100 * d.high), above=0, items=d.n, seeds=1)

    Args:
        number: key of `CLAIMS`.
        figure: with ``holds`` the measured numbers in a few words; with ``estimate`` the name and
            unit of the quantity.
        holds: outcome of an exact check, or with ``threshold`` of a single measurement.
        estimate: of the quantity in the claim.
        interval: its 95 % confidence interval.
        above, below: bounds that the claim sets, as in `verdict`.
        items: number of questions that the estimate rests on.
        seeds: number of calibrations.
        windows: number of windows of held-out text.
        threshold: in words, where a single measurement without an interval would cease to hold.
        condition: to which the verdict is limited, if any.

    Raises:
        ValueError: an unknown number; both or neither of ``holds`` and ``estimate``; a threshold
            with an estimate; an estimate outside its interval, or without one, or without any of
            ``items``, ``seeds`` and ``windows``; arguments that `verdict` refuses.
    """
    if number not in CLAIMS:
        raise ValueError(f"no claim {number}: the ledger has 1 … {max(CLAIMS)}")
    claim = CLAIMS[number]
    if (holds is None) == (estimate is None):
        raise ValueError("give holds= for an exact check, or estimate= and interval=, and not both")
    if threshold and holds is None:
        raise ValueError("threshold= goes with holds=; an estimate has above= or below=")
    facts: dict[str, Any] = {"claim": number, "condition": condition}
    if estimate is None:
        single = f"measured once, no interval; holds if {threshold}"
        rule = single if threshold else "exact check"
        facts |= {"verdict": HOLDS if holds else FAILS, "figure": figure, "rule": rule}
    else:
        if interval is None or not interval[0] <= estimate <= interval[1]:
            raise ValueError(f"estimate {estimate} needs an interval that holds it, got {interval}")
        sample = {"items": items, "seeds": seeds, "windows": windows}
        counts = {name: n for name, n in sample.items() if n is not None}
        sizes = [f"{n:,} {name}" if n != 1 else f"one {name[:-1]}" for name, n in counts.items()]
        if not sizes:
            raise ValueError("say what the estimate rests on: items=, seeds= or windows=")
        sides = {"above": above, "below": below}
        bounds = " and ".join(f"{side} {v:.3g}" for side, v in sides.items() if v is not None)
        value = f"{estimate:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"
        facts |= {
            "verdict": verdict(interval, above=above, below=below),
            "figure": f"{figure}: {value}",
            "value": value,
            "rule": f"holds if the 95 % interval lies {bounds}; {', '.join(sizes)}",
        }
    detail = "; ".join(filter(None, (facts["rule"], condition)))
    plain = f"Claim {number} ({claim.text}): {facts['verdict']}\n{facts['figure']}\n({detail})"
    markdown = (
        f"**[Claim {number}](../docs/claims.md#claim-{number}): {facts['verdict']}.** "
        f"*{claim.text}* ({claim.source})\n\n{facts['figure']}\n\n<small>{detail}</small>"
    )
    output = {"text/plain": plain, "text/markdown": markdown, MIME: facts}
    display(output, raw=True)  # type: ignore[no-untyped-call]


class Measurement(NamedTuple):
    """An entry of `record` and its place.

    Attributes:
        notebook: its file name without the suffix, such as ``"00_quickstart"``.
        cell: execution count of the cell.
        facts: contents of the cell's output under `MIME`.
    """

    notebook: str
    cell: int
    facts: Mapping[str, Any]


def ledger(measurements: Iterable[Measurement]) -> str:
    """Page of all claims in Markdown: a table with a row per claim, then the evidence, folded.

    A claim that was measured more than once has the least favourable of its verdicts.

    Args:
        measurements: of all notebooks, in their order.
    """
    entries_of: dict[int, list[Measurement]] = {number: [] for number in CLAIMS}
    for measurement in measurements:
        entries_of[measurement.facts["claim"]].append(measurement)
    order = (HOLDS, UNDECIDED, FAILS, UNMEASURED)
    rows, evidence, verdicts = [], [], []
    for number, entries in entries_of.items():
        claim = CLAIMS[number]
        worst = max((e.facts["verdict"] for e in entries), key=order.index, default=UNMEASURED)
        verdicts.append(worst)
        values, places, details = [], [], []
        for notebook, cell, facts in entries:
            place = f"[{notebook[:2]}, cell {cell}](../notebooks/{notebook}.ipynb)"
            places.append(place)
            value = str(facts.get("value", facts["figure"]))
            limit = " (one seed)" if "one seed" in facts["rule"] else ""
            values.append(textwrap.shorten(value, 60, placeholder=" …") + limit)
            text = "; ".join(filter(None, (facts["figure"], facts["rule"], facts["condition"])))
            details.append(f"- **{facts['verdict']}** ({place}): {text}")
        row = (f"[{number}](#claim-{number})", claim.text, worst, "; ".join(values))
        cells = [cell.replace("|", "\\|") for cell in (*row, "; ".join(places))]
        rows.append(f"| {' | '.join(cells)} |")
        heading = f"{number} · {worst} · {claim.text}"
        opening = f'<a id="claim-{number}"></a>\n<details><summary>{heading}</summary>'
        body = "\n".join([f"From: {claim.source}.\n", *details])
        evidence.append(f"{opening}\n\n{body}\n\n</details>")
    tally = ", ".join(f"{word}: {verdicts.count(word)}" for word in order)
    return _PAGE.format(
        count=len(CLAIMS), tally=tally, rows="\n".join(rows), evidence="\n\n".join(evidence)
    )


_PAGE = """\
# The claims, checked

What the paper and this project assert, and what the notebooks measured. An identity holds or does
not, by an assertion that fails when it is false. A measurement holds if all of its 95 % interval
lies on the claim's side, does not hold if none of it does, and is undecided otherwise; one that was
made once and has no interval says so, and names its threshold. A claim that was measured more than
once has the least favourable of its verdicts. *One seed* marks a value from a single calibration:
its interval covers the choice of test text, not of calibration text.

The verdicts of {count} claims: {tally}.

| # | claim | verdict | measured | where |
|---|---|---|---|---|
{rows}

## The evidence

{evidence}
"""
