"""The recipe: which repair, how much ridge and, if asked, which layers, from calibration tokens.

A few calibration windows are kept out of every fit. Their moments choose the ridge of each
candidate, and the loss of the repaired model on them chooses among the candidates, of which no
repair is one. What was chosen is then solved once more from all windows. Test text plays no part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary, runs
from ghostlib.calibration import calibrate, check_windows
from ghostlib.collector import Calibration
from ghostlib.models import num_layers
from ghostlib.moments import Moments
from ghostlib.operators import OPERATORS, REGRESSORS, Operator, solve
from ghostlib.progress import track
from ghostlib.ridge import choose_ridge
from ghostlib.selection import Layers, needed, select_layers
from ghostlib.trials import Trials

AUTO = "auto"
"""The recipe's name where a repair is named."""

NONE = "none"
CANDIDATES = ("ghost", "two-branch", "two-branch-relative")
"""Repairs without a state, of at most 2 C^2 numbers a boundary."""

SHORTLIST = ("residual", "cosine", "block-influence")
"""Criteria that choose layers from one pass; the loss then decides between their choices."""

HELD_OUT = 4096
"""Tokens kept out of the fit, or one window where that is longer."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What the recipe chose, and why.

    Attributes:
        layers: removed. repair: the name of its operators, or ``"none"``.
        operators: solved from all windows, by boundary. ridges: their relative ridges.
        losses: nats per token on the held-out calibration tokens, by layers and repair, each
            solved without these tokens.
        tokens: how many they are.
    """

    layers: Layers
    repair: str
    operators: dict[Boundary, Operator]
    ridges: dict[Boundary, float]
    losses: dict[tuple[Layers, str], float]
    tokens: int

    def __str__(self) -> str:
        """The choice explained in one line."""
        gaps = runs(self.layers, max(self.layers) + 2)
        spelt = ", ".join(
            f"{gap.start}–{gap.stop - 1}"
            + (f" (ridge {self.ridges[gap]:.0e})" if gap in self.ridges else "")
            for gap in gaps
        )
        sets = len({layers for layers, _ in self.losses})
        mine = sorted(
            (loss, repair) for (ls, repair), loss in self.losses.items() if ls == self.layers
        )
        return (
            f"{AUTO}: {self.repair} for layers {spelt}"
            + (f", best of {sets} choices of layers" if sets > 1 else "")
            + f"; loss on {self.tokens:,} held-out calibration tokens: "
            + ", ".join(f"{repair} {loss:.3f}" for loss, repair in mine)
        )


class Recipe:
    """Chooses repairs of ``model`` by the tokens of ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids without padding, at least two; of these, evenly spread,
            as many as make `HELD_OUT` tokens are kept out of the fits, but never more than half.
        candidates: ``"ghost"`` and those with features or token weights, see `REGRESSORS`.
        batch_size: windows per forward pass.

    Raises:
        ValueError: fewer than two windows, no candidate, or one that is unknown or of another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        *,
        candidates: Sequence[str] = CANDIDATES,
        batch_size: int = 1,
    ) -> None:
        check_windows(model, windows)
        if len(windows) < 2:
            raise ValueError("the recipe fits some windows and judges by others: give at least 2")
        if not candidates:
            raise ValueError(f"no candidate to choose from: name one, such as {CANDIDATES[-1]!r}")
        for name in candidates:
            OPERATORS[name]
            if name != "ghost" and REGRESSORS.get(name, "mlp") == "mlp":
                raise ValueError(
                    f"the recipe cannot choose {name}: its candidates are 'ghost' and operators "
                    f"with features or token weights, such as {CANDIDATES[-1]!r}"
                )
        self.model, self.candidates, self.batch_size = model, tuple(candidates), batch_size
        count = min(max(HELD_OUT // windows.shape[1], 1), len(windows) // 2)
        kept_out = torch.zeros(len(windows), dtype=torch.bool)
        kept_out[[(2 * i + 1) * len(windows) // (2 * count) for i in range(count)]] = True
        self.fitted, self.judges = windows[~kept_out], windows[kept_out]
        self.total = num_layers(model)
        self._statistics: dict[Boundary, tuple[Calibration, Calibration]] = {}
        self._trials: Trials | None = None

    def shortlist(self, n: int) -> list[Layers]:
        """What each of `SHORTLIST` would remove, from one pass over the fitted windows."""
        wanted = {gap for name in SHORTLIST for gap in needed(name, n, self.total)}
        known = calibrate(self.model, self.fitted, sorted(wanted), batch_size=self.batch_size)
        chosen = [tuple(select_layers(self.model, known, n, name)) for name in SHORTLIST]
        return list(dict.fromkeys(chosen))

    def collect(self, choices: Iterable[Layers]) -> None:
        """Collect in one pass what all of ``choices`` will be solved from."""
        gaps = {gap for layers in choices for gap in runs(layers, self.total)}
        if missing := sorted(gaps - set(self._statistics)):
            regressors = {REGRESSORS.get(name, "stream") for name in self.candidates}
            fit, held_out = (
                calibrate(
                    self.model, part, missing, regressors=regressors, batch_size=self.batch_size
                )
                for part in (self.fitted, self.judges)
            )
            self._statistics |= dict.fromkeys(missing, (fit, held_out))

    def choose(self, layers: Iterable[int] | int) -> Choice:
        """The best candidate for ``layers``, or for the best on the `shortlist` of so many."""
        asked = self.shortlist(layers) if isinstance(layers, int) else [tuple(sorted(layers))]
        self.collect(asked)
        if self._trials is None:
            self._trials = Trials(self.model, self.judges, batch_size=self.batch_size)
        losses: dict[tuple[Layers, str], float] = {}
        ridges: dict[tuple[Layers, str], dict[Boundary, float]] = {}
        todo = [(layers, repair) for layers in asked for repair in (NONE, *self.candidates)]
        for key in track(todo, "choosing", unit="repair"):
            layers, repair = key
            gaps = runs(layers, self.total) if repair != NONE else []
            ridges[key] = {gap: self._ridge(gap, repair) for gap in gaps}
            found = {gap: self._solve(gap, repair, r) for gap, r in ridges[key].items()}
            losses[key] = self._trials.loss(layers, found)
        best = min(losses, key=lambda key: losses[key])  # ties: the fewest numbers, named first
        layers, repair = best
        final = {gap: self._solve(gap, repair, r, again=True) for gap, r in ridges[best].items()}
        tokens = self.judges.numel()
        return Choice(layers, repair, final, ridges[best], losses, tokens)

    def _ridge(self, gap: Boundary, repair: str) -> float:
        fit, held_out = self._moments(gap, repair)
        return choose_ridge(fit, held_out=held_out)

    def _solve(self, gap: Boundary, repair: str, ridge: float, again: bool = False) -> Operator:
        """From the fitted windows, or ``again`` from all."""
        fit, held_out = self._moments(gap, repair)
        return solve(fit + held_out if again else fit, repair, relative_ridge=ridge)

    def _moments(self, gap: Boundary, repair: str) -> tuple[Moments, Moments]:
        regressor = REGRESSORS.get(repair, "stream")
        fit, held_out = self._statistics[gap]
        return fit.of(regressor)[gap], held_out.of(regressor)[gap]
