"""The recipe: which repair, how much ridge and, if asked, which layers, from calibration tokens.

A few calibration windows are kept out of every fit. Their moments choose the ridge of each
candidate, and the loss of the repaired model on them chooses among the candidates, of which the
pruned model is one. What was chosen is then solved once more from all windows. Test text plays no
part.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import AUTO, PRUNED, track
from ghostlib.models.architectures import num_layers, stream_norm
from ghostlib.models.boundaries import Boundary, runs, spell
from ghostlib.models.streams import check_windows
from ghostlib.operators.families import Family
from ghostlib.operators.paths import choose_ridge
from ghostlib.operators.solve import Operator, solve
from ghostlib.selection.criteria import needed, select_layers
from ghostlib.selection.evidence import Layers
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import Calibration, calibrate
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.cut import install

CANDIDATES = ("ghost", "two-branch", "two-branch-relative")
"""Repairs without a state, of at most 2 C^2 numbers a boundary."""

SHORTLIST = ("residual", "cosine", "block-influence")
"""Criteria that choose layers from one pass; the loss then decides between their choices."""

TOO_FEW = "the recipe fits some windows and judges by others: give at least 2"

HELD_OUT = 4096
"""Tokens kept out of the fit, or one window where that is longer."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What the recipe chose, and why.

    Attributes:
        layers: removed.
        repair: the name of its family, or ``"pruned"``.
        operators: solved from all windows, by boundary.
        ridges: their relative ridges.
        losses: nats per token on the held-out calibration tokens, by layers and repair, each
            solved without these tokens; infinite where the repaired model gives NaN.
        tokens: how many they are.
    """

    layers: Layers
    repair: str
    operators: dict[Boundary, Operator]
    ridges: dict[Boundary, float]
    losses: dict[tuple[Layers, str], float]
    tokens: int

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the dense ``model`` without the layers and with the operators in place."""
        gaps = runs(self.layers, num_layers(model))
        recovered = install(model, {gap: self.operators.get(gap) for gap in gaps})
        recovered.config.recovery |= {"recipe": self.summary}
        return recovered

    @property
    def rivals(self) -> dict[str, float]:
        """The losses of all repairs for the layers chosen."""
        return {name: loss for (ls, name), loss in self.losses.items() if ls == self.layers}

    @property
    def summary(self) -> dict[str, Any]:
        """The choice in what JSON can hold: repair, losses for its layers, held-out tokens."""
        losses = {k: loss if math.isfinite(loss) else None for k, loss in self.rivals.items()}
        return {"repair": self.repair, "losses": losses, "tokens": self.tokens}

    def __str__(self) -> str:
        """The choice explained in one line."""
        spelt = ", ".join(
            f"{spell(gap.removed)} (ridge {ridge:.0e})" for gap, ridge in self.ridges.items()
        )
        sets = len({layers for layers, _ in self.losses})
        return (
            f"{AUTO}: {self.repair} for layers {spelt or spell(self.layers)}"
            + (f", best of {sets} choices of layers" if sets > 1 else "")
            + f"; loss on {self.tokens:,} held-out calibration tokens: "
            + ", ".join(
                f"{k} {loss:.3f}" for k, loss in sorted(self.rivals.items(), key=itemgetter(1))
            )
        )


class Recipe:
    """Chooses repairs of ``model`` by the tokens of ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids without padding, at least two; of these, evenly spread,
            as many as make `HELD_OUT` tokens are kept out of the fits, but never more than half.
        candidates: families that take a relative ridge.
        batch_size: windows per forward pass.

    Raises:
        ValueError: fewer than two windows, no candidate, or one that is unknown, of another kind or
            without ground in this architecture.
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
            raise ValueError(TOO_FEW)
        if not candidates:
            raise ValueError(f"no candidate to choose from: name one, such as {CANDIDATES[-1]!r}")
        self.families = {name: Family.of(name) for name in candidates}
        for name, family in self.families.items():
            if "relative_ridge" not in family.options or family.name == "low-rank":
                raise ValueError(
                    f"the recipe cannot choose {name}, which takes no ridge alone: its candidates "
                    f"are such as {', '.join(CANDIDATES)}"
                )
        _check_ground(model, self.families.values())
        self.model, self.batch_size, self.total = model, batch_size, num_layers(model)
        count = min(max(HELD_OUT // windows.shape[1], 1), len(windows) // 2)
        kept_out = torch.zeros(len(windows), dtype=torch.bool)
        kept_out[[(2 * i + 1) * len(windows) // (2 * count) for i in range(count)]] = True
        self.fitted, self.judges = windows[~kept_out], windows[kept_out]
        self._statistics: dict[Boundary, tuple[Calibration, Calibration]] = {}

    @cached_property
    def _trials(self) -> Trials:
        return Trials(self.model, self.judges, batch_size=self.batch_size)

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
            how: dict[str, Any] = {"batch_size": self.batch_size}
            how["regressors"] = {family.regressor for family in self.families.values()}
            fit = calibrate(self.model, self.fitted, missing, **how)
            held_out = calibrate(self.model, self.judges, missing, **how)
            self._statistics |= dict.fromkeys(missing, (fit, held_out))

    def choose(self, layers: Iterable[int] | int) -> Choice:
        """The best candidate for ``layers``, or for the best on the `shortlist` of so many.

        Raises:
            ValueError: layers that cannot be removed, or NaN from every repair and from none.
        """
        asked = self.shortlist(layers) if isinstance(layers, int) else [tuple(sorted(layers))]
        self.collect(asked)
        losses: dict[tuple[Layers, str], float] = {}
        ridges: dict[tuple[Layers, str], dict[Boundary, float]] = {}
        todo = [(layers, repair) for layers in asked for repair in (PRUNED, *self.families)]
        for key in track(todo, "choosing", unit="repair"):
            layers, repair = key
            parts = self._moments(layers, repair)
            fits = {gap: fit for gap, (fit, _) in parts.items()}
            ridges[key] = {gap: choose_ridge(fits[gap], held_out=parts[gap][1]) for gap in parts}
            loss = self._trials.loss(layers, self._solve(fits, repair, ridges[key]))
            losses[key] = math.inf if math.isnan(loss) else loss
        best = min(losses, key=lambda key: losses[key])  # ties: the fewest numbers, named first
        if math.isinf(losses[best]):
            raise ValueError(
                "the pruned model and every repair of the recipe give NaN or an infinite loss: "
                "try a wider dtype (bfloat16 or float32), or other windows"
            )
        layers, repair = best
        whole = {gap: fit + judge for gap, (fit, judge) in self._moments(layers, repair).items()}
        final = self._solve(whole, repair, ridges[best])
        return Choice(layers, repair, final, ridges[best], losses, self.judges.numel())

    def _moments(self, layers: Layers, repair: str) -> dict[Boundary, tuple[Moments, Moments]]:
        """Those that ``repair`` is solved from, of the fitted and of the held-out windows."""
        if repair == PRUNED:
            return {}
        regressor = self.families[repair].regressor
        parts = {}
        for gap in runs(layers, self.total):
            fit, judge = (collected.of(regressor) for collected in self._statistics[gap])
            parts[gap] = (fit[gap], judge[gap])
        return parts

    def _solve(
        self, moments: Mapping[Boundary, Moments], repair: str, ridges: Mapping[Boundary, float]
    ) -> dict[Boundary, Operator]:
        return {
            gap: solve(m, self.families[repair], relative_ridge=ridges[gap])
            for gap, m in moments.items()
        }


def _check_ground(model: PreTrainedModel, families: Iterable[Family]) -> None:
    """Refuse normalised features, before any pass, where layers read the stream without a norm."""
    if any(family.regressor.normalised for family in families):
        try:
            stream_norm(model)
        except ValueError as error:
            raise ValueError(f"{error}: candidates=('ghost', 'ghost-relative')") from None
