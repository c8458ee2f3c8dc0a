"""The claims ledger: what the paper and we assert, and how a notebook enters what it measured.

A notebook ends a check with `record`. That prints one line for the reader and leaves the same facts
in the cell's output as data, from which ``tools/notebooks.py fill`` builds the table in the README.
"""

from typing import NamedTuple

from IPython.display import display

MIME = "application/vnd.ghostlib.claim+json"


class Claim(NamedTuple):
    """A statement and where it is made: a section of the paper, or ``"ours"``."""

    text: str
    source: str


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
        "Theorem 4.1: W* is the unconstrained optimum; LinearPatch's H D H' is symmetric and "
        "cannot do better",
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
        "Accuracy saturates at 32 calibration sequences; perplexity still improves to 128",
        "paper, tables 4 and A3",
    ),
    10: Claim("The calibration corpus hardly matters", "paper, appendix F, table A7"),
    11: Claim(
        "Inference costs what fused LinearPatch costs; 1.24 times faster prefill at 7/32",
        "paper, tables 5, A8, A9",
    ),
    12: Claim("Tuning only the operator by distillation improves it further", "paper, appendix D"),
    13: Claim(
        "Min-norm in M and min-norm in W differ exactly on directions calibration never saw", "ours"
    ),
    14: Claim("An absolute ridge of 1e-6 is no regularisation at any calibration size", "ours"),
    15: Claim("The held-out error of the pseudo-inverse peaks at tokens = width", "ours"),
    16: Claim(
        "LinearPatch's heuristic is not the best of its own family, and that family is far from "
        "the best symmetric operator",
        "ours",
    ),
    17: Claim(
        "No weighting of the output channels changes the unconstrained optimum; the constrained "
        "ones all change",
        "ours",
    ),
    18: Claim(
        "In blocks where it is born, the first token's massive activation owns the objective",
        "ours",
    ),
    19: Claim("Moments accumulated in float32 lose the operator where float64 keeps it", "ours"),
    20: Claim("Streaming memory does not grow with the number of tokens", "ours"),
    21: Claim("The gap of any operator to the optimum is ‖X (W − W*)‖² exactly", "ours"),
    22: Claim(
        "One operator for a run of layers fits no worse than the composition of one per layer",
        "ours",
    ),
    23: Claim(
        "With several gaps, fitting each to the model as repaired so far beats fitting all to the "
        "dense model",
        "ours",
    ),
    24: Claim(
        "A greedy search that scores repaired models finds better layers than the block by cosine",
        "ours",
    ),
    25: Claim(
        "Over a block in which the giant is born, the unconstrained optimum can be far worse than "
        "no repair",
        "ours",
    ),
    26: Claim(
        "There a normalised copy of the stream and weights by the inverse norm together bring "
        "perplexity to less than a third of the optimum's",
        "ours",
    ),
    27: Claim(
        "A repair that reads the stream and its normalised copy, with errors weighted by 1 / norm, "
        "beats ghost where ghost fails and where it does not",
        "ours",
    ),
    28: Claim(
        "The recipe is never worse than the better of no repair and ghost, wherever the block is",
        "ours",
    ),
    29: Claim(
        "With layers of its own choice the recipe is below ghost on the block by cosine",
        "ours",
    ),
    30: Claim("Branches cost less than a third of a layer a boundary, and no time", "ours"),
}


class _Entry:
    """Shows as one line of text; carries its facts under `MIME`."""

    def __init__(self, number: int, figure: str, verdict: str) -> None:
        self.facts = {"claim": number, "figure": figure, "verdict": verdict}

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> dict[str, object]:
        line = f"Claim {self.facts['claim']} {self.facts['verdict']}: {self.facts['figure']}"
        return {"text/plain": line, MIME: self.facts}


def record(number: int, figure: str, *, holds: bool, condition: str = "") -> None:
    """Enter what was measured for a claim, as the last statement of the cell that measured it.

    Args:
        number: key of `CLAIMS`.
        figure: the measured numbers in a few words, two or three significant digits.
        holds: the outcome of the check, computed in the cell.
        condition: what must be added for it to hold; empty if nothing.

    Raises:
        ValueError: an unknown number, or a condition on a claim that does not hold.
    """
    if number not in CLAIMS:
        raise ValueError(f"no claim {number}: the ledger has 1 … {max(CLAIMS)}")
    if condition and not holds:
        raise ValueError("a claim that does not hold takes no condition: say it in the figure")
    kept = f"holds with a condition ({condition})" if condition else "holds"
    display(_Entry(number, figure, kept if holds else "does not hold here"))
