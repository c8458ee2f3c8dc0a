"""The recipe: chooses the repair, its ridge and, on request, the layers from calibration tokens.

A few calibration windows are held out of every fit. Their moments choose the ridge of each
candidate, and the loss of the repaired model on them chooses among the candidates, which include
the pruned model. The choice is then solved again from all windows; test text plays no part. Loss on
text does not show which abilities were lost: ``keep`` names one that counts as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import AUTO, PRUNED, Registry, at_least, checked, track
from ghostlib.models.architectures import num_layers
from ghostlib.models.boundaries import Boundary, runs, spell
from ghostlib.models.streams import check_windows
from ghostlib.operators.families import Family
from ghostlib.operators.paths import choose_ridge, choose_ridges
from ghostlib.operators.solve import Operator, solve, warn_of_massive_activations
from ghostlib.selection.criteria import needed_boundaries, select_layers
from ghostlib.selection.evidence import WEIGHT, Layers, check_weight, probe_to_keep
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import Calibration, calibrate, suited
from ghostlib.statistics.features import Regressor
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.cut import install
from ghostlib.surgery.installers import check_place, projection_before

Ridge = float | tuple[float, ...]
Variant = tuple[Layers, str]  # removed layers, and the repair of their gaps

BUDGETS: Registry[tuple[str, ...]] = Registry("budget")
"""Families that the recipe chooses from: ``"none"`` is folded into the stock checkpoint and adds no
parameter and no operation; ``"matrix"`` costs at most what ghost costs; ``"any"`` up to two
matrices per boundary. None of them has a state."""
BUDGETS["none"] = ("replaceme", "refit")
BUDGETS["matrix"] = ("refit", "ghost", "ghost-relative", "ghost-refit", "ghost-refit-relative")
BUDGETS["any"] = (*BUDGETS["matrix"], "two-branch", "two-branch-relative")

_SAFE = (PRUNED, "ghost")
_MARGIN = 0.01
"""Nats by which a repair may be worse than the better of the safe ones on a held-out window."""
_MIN_GAIN = 0.05
"""Nats that a repair of several matrices must gain over all others: smaller gains on a few windows
do not carry over to other text."""

SHORTLIST = ("residual", "cosine", "block-influence")
"""Criteria that choose layers from one pass; the loss then decides between their choices."""

TOO_FEW = "the recipe fits some windows and judges by others: give at least 2"

HELD_OUT = 4096
"""Tokens held out of the fit, or one window where that is longer."""

TRIES = 9
"""Layers that the search by an ability tries in each step after the first."""
_SEARCHED = 1024  # held-out tokens that this search scores


@dataclass(frozen=True, eq=False)
class Choice:
    """The choice of a recipe, and the losses it rests on.

    Attributes:
        layers: removed layers.
        repair: name of the family, or ``"pruned"``.
        operators: operators solved from all windows, by boundary.
        ridges: their relative ridges.
        losses: nats per token on the held-out calibration tokens, by layers and repair, each
            solved without these tokens; infinite where the repaired model gives NaN.
        tokens: number of held-out tokens.
        keep: the probe that counted besides the loss, or None.
        kept: its scores, by layers and repair.
    """

    layers: Layers
    repair: str
    operators: dict[Boundary, Operator]
    ridges: dict[Boundary, Ridge]
    losses: dict[Variant, float]
    tokens: int
    keep: str | None = None
    kept: dict[Variant, float] = field(default_factory=dict)

    def apply(self, model: PreTrainedModel, *, share: bool = True) -> PreTrainedModel:
        """A copy of the dense ``model`` without the layers and with the operators in place.

        Args:
            model: the dense model.
            share: as in `install`.
        """
        gaps = runs(self.layers, num_layers(model))
        recovered = install(model, {gap: self.operators.get(gap) for gap in gaps}, share=share)
        recovered.config.recovery |= {"recipe": self.summary}
        return recovered

    @property
    def rivals(self) -> dict[str, float]:
        """Losses of all repairs for the chosen layers."""
        return {name: loss for (ls, name), loss in self.losses.items() if ls == self.layers}

    @property
    def summary(self) -> dict[str, Any]:
        """The choice as JSON values: repair, losses for its layers, held-out tokens."""
        losses = {k: loss if math.isfinite(loss) else None for k, loss in self.rivals.items()}
        kept = {self.keep: self.kept[self.layers, self.repair]} if self.keep else {}
        return {"repair": self.repair, "losses": losses, "tokens": self.tokens} | kept

    def __str__(self) -> str:
        """The choice explained in one line."""
        gaps = [f"{spell(gap.removed)} (ridge {_ridge_text(r)})" for gap, r in self.ridges.items()]
        losses = sorted(self.rivals.items(), key=itemgetter(1))
        sets = len({layers for layers, _ in self.losses})
        return (
            f"{AUTO}: {self.repair} for layers {', '.join(gaps) or spell(self.layers)}"
            + (f", best of {sets} choices of layers" if sets > 1 else "")
            + f"; loss on {self.tokens:,} held-out calibration tokens: "
            + ", ".join(f"{name} {loss:.3f}" for name, loss in losses)
            + (f"; {self.keep} {self.kept[self.layers, self.repair]:.2f}" if self.keep else "")
        )


class Recipe:
    """Chooses repairs of ``model`` from the tokens of ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids without padding, at least two windows. `HELD_OUT`
            tokens in evenly spread windows, but at most half, are held out of the fits.
        budget: cost limit of the repair, a name in `BUDGETS`; its families that do not fit the
            architecture are left out.
        candidates: families that take a relative ridge, instead of those of the budget.
        batch_size: windows per forward pass.
        keep: a probe of random tokens, such as ``"copying"``, whose score counts besides the loss.
            A search by it joins the shortlist of layers and scores one model for every layer it
            considers: minutes for the embedded model.
        weight: nats of text that are worth one nat of the probe.

    Raises:
        ValueError: fewer than two windows; no candidate, or one that is unknown, takes no ridge or
            does not fit the architecture; a probe that cannot be run.
    """

    @checked
    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        *,
        budget: str = "any",
        candidates: Sequence[str | Family] | None = None,
        batch_size: int = 1,
        keep: str | None = None,
        weight: float = WEIGHT,
    ) -> None:
        check_windows(model, windows)
        if len(windows) < 2:
            raise ValueError(TOO_FEW)
        usual = BUDGETS[budget]
        if candidates is not None and not candidates:
            raise ValueError(f"no candidate to choose from: name one, such as {usual[-1]!r}")
        names = affordable(model, budget) if candidates is None else candidates
        self.families: Registry[Family] = Registry("candidate")
        for name in names:
            self.families[str(name)] = family = Family.of(name)
            if "relative_ridge" not in family.options or family.name == "low-rank":
                raise ValueError(
                    f"the recipe cannot choose {name}, which takes no ridge alone: name others, "
                    f"such as {', '.join(usual)}"
                )
            check_architecture(model, family)
        at_least(1, batch_size=batch_size)
        self.model, self.batch_size, self.total = model, batch_size, num_layers(model)
        check_weight(weight)
        self.keep, self.weight = keep, weight
        self._probes = None if keep is None else probe_to_keep(model, keep)
        count = min(max(HELD_OUT // windows.shape[1], 1), len(windows) // 2)
        held_out = torch.zeros(len(windows), dtype=torch.bool)
        held_out[[(2 * i + 1) * len(windows) // (2 * count) for i in range(count)]] = True
        self.fitted, self.judges = windows[~held_out], windows[held_out]
        self._statistics: dict[Boundary, tuple[Calibration, Calibration]] = {}
        self._cached_ridges: dict[Variant, dict[Boundary, Ridge]] = {}
        self._cached_trials: dict[Variant, tuple[Tensor, float]] = {}
        self._cached_operators: dict[Variant, dict[Boundary, Operator]] = {}

    @cached_property
    def _trials(self) -> Trials:
        return Trials(self.model, self.judges, batch_size=self.batch_size, probes=self._probes)

    @checked
    def shortlist(self, n: int) -> list[Layers]:
        """The layers that each of `SHORTLIST` removes, from one pass over the fitted windows."""
        criteria = shortlisted(self.keep)
        gaps = sorted({gap for name in criteria for gap in needed_boundaries(name, n, self.total)})
        calibration = calibrate(self.model, self.fitted, gaps, batch_size=self.batch_size)
        search: dict[str, Any] = {"windows": self.judges[:1, :_SEARCHED]}
        if self.keep is not None:
            search |= {"keep": self.keep, "weight": self.weight, "tries": TRIES}
        selections = [
            select_layers(self.model, calibration, n, name, **search) for name in criteria
        ]
        return list(dict.fromkeys(map(tuple, selections)))

    @checked
    def collect(self, choices: Iterable[Layers]) -> None:
        """Collect the moments that all of ``choices`` need, in one pass where possible."""
        gaps = {gap for layers in choices for gap in runs(layers, self.total)}
        passes: dict[frozenset[Regressor], list[Boundary]] = {}  # one, where layers are alike
        for gap in sorted(gaps - set(self._statistics)):
            # `calibrate` itself leaves out the MLP that a gap at layer 0 lacks.
            start, families = gap.start or 1, self.families.values()
            regressors = frozenset(f.regressor for f in families if has_place(self.model, f, start))
            passes.setdefault(regressors, []).append(gap)
        for regressors, missing in passes.items():
            options: dict[str, Any] = {"batch_size": self.batch_size, "regressors": regressors}
            fit = calibrate(self.model, self.fitted, missing, **options)
            held_out = calibrate(self.model, self.judges, missing, **options)
            self._statistics |= dict.fromkeys(missing, (fit, held_out))

    @checked
    def choose(self, layers: Iterable[int] | int, *, among: Iterable[str] | None = None) -> Choice:
        """The best candidate for ``layers``; given their number, for the sets of the `shortlist`.

        Args:
            layers: layers to remove, or their number.
            among: names of the candidates to compare; all by default. Earlier trials are reused.

        Raises:
            ValueError: layers that cannot be removed, an unknown candidate, or NaN from the pruned
                model and from every repair.
        """
        names = self.families if among is None else among
        families = {name: self.families[name] for name in names}
        sets = [tuple(sorted(layers))] if isinstance(layers, Iterable) else self.shortlist(layers)
        self.collect(sets)
        variants = [(ls, name) for ls in sets for name in (PRUNED, *self._placed(ls, families))]
        trials = {v: self._try(v) for v in track(variants, "choosing", unit="repair")}
        by_window = {v: loss for v, (loss, _) in trials.items()}
        kept = {v: score for v, (_, score) in trials.items()} if self.keep else {}
        losses = {v: float(loss.mean()) for v, loss in by_window.items()}
        totals = {v: loss + self.weight * kept.get(v, 0.0) for v, loss in losses.items()}
        admitted = [v for v in variants if _is_admissible(v, by_window)]
        best = min(admitted, key=totals.__getitem__)  # ties: the cheapest, which comes first
        single = [v for v in admitted if not self._has_several_matrices(v[1])]
        best_single = min(single, key=totals.__getitem__)
        if totals[best] > totals[best_single] - _MIN_GAIN:
            best = best_single
        if math.isinf(losses[best]):
            raise ValueError(
                "the pruned model and every repair of the recipe give NaN or an infinite loss: "
                "try a wider dtype (bfloat16 or float32), or other windows"
            )
        operators, ridges, tokens = self._final(best), self._ridges(best), self.judges.numel()
        return Choice(*best, operators, ridges, losses, tokens, self.keep, kept)

    @checked
    def fit(self, layers: Iterable[int], repair: str) -> dict[Boundary, Operator]:
        """Solve one candidate for ``layers``, with the ridges that fit the held-out windows best.

        Like the operators of `choose`, these are solved from all windows.

        Raises:
            ValueError: layers that cannot be removed, an unknown candidate, or one that has no
                place before one of the gaps.
        """
        family, removed = self.families[repair], tuple(sorted(layers))
        check_place(self.model, runs(removed, self.total), family)
        self.collect([removed])
        fitted = {gap: fit for gap, (fit, _) in self._moments((removed, repair)).items()}
        warn_of_massive_activations(fitted, family)
        return self._final((removed, repair))

    def _ridges(self, variant: Variant) -> dict[Boundary, Ridge]:
        """The ridge of each gap that fits the held-out windows best."""
        if variant not in self._cached_ridges:
            moments = track(self._moments(variant).items(), "choosing ridges")
            self._cached_ridges[variant] = {gap: _choose_ridge(*pair) for gap, pair in moments}
        return self._cached_ridges[variant]

    def _try(self, variant: Variant) -> tuple[Tensor, float]:
        """Losses on the held-out windows of a repair solved without them, and the probe's score."""
        if variant not in self._cached_trials:
            layers, moments = variant[0], self._moments(variant)
            operators = self._solve(variant, {gap: fit for gap, (fit, _) in moments.items()})
            losses, score = self._trials.losses(layers, operators).nan_to_num(math.inf), math.nan
            if self.keep is not None:
                score = float(self._trials.abilities(layers, operators)[self.keep].mean())
                score = score if math.isfinite(score) else math.inf
            self._cached_trials[variant] = losses, score
        return self._cached_trials[variant]

    def _final(self, variant: Variant) -> dict[Boundary, Operator]:
        """Operators solved from all windows; cached for the last set of layers."""
        cached = self._cached_operators
        self._cached_operators = {v: ops for v, ops in cached.items() if v[0] == variant[0]}
        if variant not in self._cached_operators:
            moments = {
                gap: fit + held_out for gap, (fit, held_out) in self._moments(variant).items()
            }
            self._cached_operators[variant] = self._solve(variant, moments)
        return self._cached_operators[variant]

    def _has_several_matrices(self, repair: str) -> bool:
        """Whether the repair multiplies several features of the stream at the boundary."""
        features = () if repair == PRUNED else self.families[repair].regressor.features
        return sum(feature.source == "stream" for feature in features) > 1

    def _placed(self, layers: Layers, families: Mapping[str, Family]) -> list[str]:
        """Families that have a place at every gap: some need a layer before it."""
        starts = [gap.start for gap in runs(layers, self.total)]
        return [n for n, f in families.items() if all(has_place(self.model, f, s) for s in starts)]

    def _moments(self, variant: Variant) -> dict[Boundary, tuple[Moments, Moments]]:
        """Moments that a repair is solved from, of the fitted and of the held-out windows."""
        layers, repair = variant
        if repair == PRUNED:
            return {}
        regressor, moments = self.families[repair].regressor, {}
        for gap in runs(layers, self.total):
            fit, held_out = (collected.of(regressor) for collected in self._statistics[gap])
            moments[gap] = (fit[gap], held_out[gap])
        return moments

    def _solve(
        self, variant: Variant, moments: Mapping[Boundary, Moments]
    ) -> dict[Boundary, Operator]:
        ridges, name = self._ridges(variant), variant[1]
        return {
            gap: solve(m, self.families[name], relative_ridge=ridges[gap])
            for gap, m in moments.items()
        }


def _choose_ridge(fit: Moments, held_out: Moments) -> Ridge:
    """One ridge for all features; one for each if they are of the stream and of the MLP."""
    if len(fit.regressor.sources) > 1:
        return choose_ridges(fit, held_out)
    return choose_ridge(fit, held_out=held_out)


def _is_admissible(variant: Variant, by_window: Mapping[Variant, Tensor]) -> bool:
    """Whether a repair harms no held-out window, compared with the better of the safe ones.

    The mean over windows alone would let a gain on one kind of text pay for a loss on another.
    """
    layers, repair = variant
    safe = [loss for (ls, name), loss in by_window.items() if ls == layers and name in _SAFE]
    limit = torch.stack(safe).amin(0) + _MARGIN
    return repair in _SAFE or bool((by_window[variant] <= limit).all())


def shortlisted(keep: str | None) -> tuple[str, ...]:
    """`SHORTLIST`, and the search by the ability to ``keep``, if any."""
    return SHORTLIST if keep is None else (*SHORTLIST, "abilities")


def _ridge_text(ridge: Ridge) -> str:
    """A ridge, or one for each feature, as text."""
    return "/".join(f"{r:.0e}" for r in (ridge if isinstance(ridge, tuple) else (ridge,)))


def check_architecture(model: PreTrainedModel, family: Family) -> None:
    """Refuse, before any pass, a family that does not fit the architecture.

    Raises:
        ValueError: normalised features where layers read the stream without a norm, or a repair of
            the MLP where every layer normalises its output or has weights that cannot be changed;
            the message names families that fit.
    """
    try:
        suited(model, family.regressor)
        starts = range(1, num_layers(model) + 1)
        if not any(has_place(model, family, start) for start in starts):
            projection_before(model, 1, family.name)  # raises the reason
    except ValueError as error:
        raise ValueError(f"{error}: candidates=('ghost', 'ghost-relative')") from None


def has_place(model: PreTrainedModel, family: Family, start: int) -> bool:
    """Whether a gap at layer ``start`` can take the family's repair; layers may differ."""
    with suppress(ValueError):
        check_place(model, [Boundary(start, start + 1)], family)
        return True
    return False


@checked
def affordable(model: PreTrainedModel, budget: str) -> list[str]:
    """The families of a budget that fit the architecture.

    Raises:
        ValueError: an unknown budget.
    """
    names = []
    for name in BUDGETS[budget]:
        with suppress(ValueError):
            check_architecture(model, Family.of(name))
            names.append(name)
    return names
