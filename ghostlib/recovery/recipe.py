"""The recipe: which repair, how much ridge and, if asked, which layers, from calibration tokens.

A few calibration windows are kept out of every fit. Their moments choose the ridge of each
candidate, and the loss of the repaired model on them chooses among the candidates, of which the
pruned model is one. What was chosen is then solved once more from all windows. Test text plays no
part. Loss on text does not show what else was lost: ``keep`` names an ability that counts as well.
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
from ghostlib.selection.criteria import needed, select_layers
from ghostlib.selection.evidence import WEIGHT, Layers, check_weight, to_keep
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import Calibration, calibrate, suited
from ghostlib.statistics.features import Regressor
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.cut import install
from ghostlib.surgery.installers import check_place, projection_before

Ridge = float | tuple[float, ...]

BUDGETS: Registry[tuple[str, ...]] = Registry("budget")
"""What each budget lets the recipe choose from: ``"none"``, repairs of the stock checkpoint, which
add no parameter and no operation; ``"matrix"``, at most what ghost costs; ``"any"``, up to two
matrices a boundary. All are repairs without a state."""
BUDGETS["none"] = ("replaceme", "refit")
BUDGETS["matrix"] = ("refit", "ghost", "ghost-relative", "ghost-refit", "ghost-refit-relative")
BUDGETS["any"] = (*BUDGETS["matrix"], "two-branch", "two-branch-relative")

_SAFE = (PRUNED, "ghost")
_MARGIN = 0.01
"""Nats by which a repair may be worse than the better of the safe ones on a held-out window."""
_WORTH = 0.05
"""Nats that a repair of several matrices must gain over all others: what a few windows show of
less does not carry over to other text."""

SHORTLIST = ("residual", "cosine", "block-influence")
"""Criteria that choose layers from one pass; the loss then decides between their choices."""

TOO_FEW = "the recipe fits some windows and judges by others: give at least 2"

HELD_OUT = 4096
"""Tokens kept out of the fit, or one window where that is longer."""

TRIES = 9
"""Layers that a search for layers tries after its first step."""
_SEARCHED = 1024  # tokens held out that it scores


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
        keep: the probe that counted beside them, or None.
        kept: its scores, by layers and repair.
    """

    layers: Layers
    repair: str
    operators: dict[Boundary, Operator]
    ridges: dict[Boundary, Ridge]
    losses: dict[tuple[Layers, str], float]
    tokens: int
    keep: str | None = None
    kept: dict[tuple[Layers, str], float] = field(default_factory=dict)

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
        """The losses of all repairs for the layers chosen."""
        return {name: loss for (ls, name), loss in self.losses.items() if ls == self.layers}

    @property
    def summary(self) -> dict[str, Any]:
        """The choice in what JSON can hold: repair, losses for its layers, held-out tokens."""
        losses = {k: loss if math.isfinite(loss) else None for k, loss in self.rivals.items()}
        kept = {self.keep: self.kept[self.layers, self.repair]} if self.keep else {}
        return {"repair": self.repair, "losses": losses, "tokens": self.tokens} | kept

    def __str__(self) -> str:
        """The choice explained in one line."""
        spelt = ", ".join(
            f"{spell(gap.removed)} (ridge {spelt_ridge(ridge)})"
            for gap, ridge in self.ridges.items()
        )
        sets = len({layers for layers, _ in self.losses})
        return (
            f"{AUTO}: {self.repair} for layers {spelt or spell(self.layers)}"
            + (f", best of {sets} choices of layers" if sets > 1 else "")
            + f"; loss on {self.tokens:,} held-out calibration tokens: "
            + ", ".join(
                f"{k} {loss:.3f}" for k, loss in sorted(self.rivals.items(), key=itemgetter(1))
            )
            + (f"; {self.keep} {self.kept[self.layers, self.repair]:.2f}" if self.keep else "")
        )


class Recipe:
    """Chooses repairs of ``model`` by the tokens of ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids without padding, at least two; of these, evenly spread,
            as many as make `HELD_OUT` tokens are kept out of the fits, but never more than half.
        budget: what the repair may cost, a name in `BUDGETS`; of its families those are tried that
            this architecture has a place for.
        candidates: families that take a relative ridge, instead of those of the budget.
        batch_size: windows per forward pass.
        keep: a probe of random tokens, such as ``"copying"``, whose score counts beside the loss,
            and by which a search for layers is added to the shortlist. That search scores one model
            for every layer it considers: minutes for the embedded model.
        weight: nats of text that one of the probe's is worth.

    Raises:
        ValueError: fewer than two windows, no candidate, or one that is unknown, of another kind or
            without ground in this architecture; a probe that cannot be asked.
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
        within = BUDGETS[budget]
        if candidates is not None and not candidates:
            raise ValueError(f"no candidate to choose from: name one, such as {within[-1]!r}")
        names = affordable(model, budget) if candidates is None else candidates
        self.families = {str(name): Family.of(name) for name in names}
        for name, family in self.families.items():
            if "relative_ridge" not in family.options or family.name == "low-rank":
                raise ValueError(
                    f"the recipe cannot choose {name}, which takes no ridge alone: its candidates "
                    f"are such as {', '.join(within)}"
                )
            check_ground(model, family)
        at_least(1, batch_size=batch_size)
        self.model, self.batch_size, self.total = model, batch_size, num_layers(model)
        check_weight(weight)
        self.keep, self.weight = keep, weight
        self._probes = None if keep is None else to_keep(model, keep)
        count = min(max(HELD_OUT // windows.shape[1], 1), len(windows) // 2)
        kept_out = torch.zeros(len(windows), dtype=torch.bool)
        kept_out[[(2 * i + 1) * len(windows) // (2 * count) for i in range(count)]] = True
        self.fitted, self.judges = windows[~kept_out], windows[kept_out]
        self._statistics: dict[Boundary, tuple[Calibration, Calibration]] = {}
        self._chosen: dict[tuple[Layers, str], dict[Boundary, Ridge]] = {}
        self._tried: dict[tuple[Layers, str], tuple[Tensor, float]] = {}
        self._solved: dict[tuple[Layers, str], dict[Boundary, Operator]] = {}

    @cached_property
    def _trials(self) -> Trials:
        return Trials(self.model, self.judges, batch_size=self.batch_size, probes=self._probes)

    @checked
    def shortlist(self, n: int) -> list[Layers]:
        """What each of `SHORTLIST` would remove, from one pass over the fitted windows."""
        criteria = shortlisted(self.keep)
        wanted = {gap for name in criteria for gap in needed(name, n, self.total)}
        known = calibrate(self.model, self.fitted, sorted(wanted), batch_size=self.batch_size)
        search: dict[str, Any] = {"windows": self.judges[:1, :_SEARCHED]}
        if self.keep is not None:
            search |= {"keep": self.keep, "weight": self.weight, "tries": TRIES}
        chosen = [select_layers(self.model, known, n, name, **search) for name in criteria]
        return list(dict.fromkeys(map(tuple, chosen)))

    @checked
    def collect(self, choices: Iterable[Layers]) -> None:
        """Collect what all of ``choices`` will be solved from, in one pass where it can be."""
        gaps = {gap for layers in choices for gap in runs(layers, self.total)}
        passes: dict[frozenset[Regressor], list[Boundary]] = {}  # one, where layers are alike
        for gap in sorted(gaps - set(self._statistics)):
            # Before layer 0 there is no MLP to read, which the pass knows.
            known = (f for f in self.families.values() if has_place(self.model, f, gap.start or 1))
            passes.setdefault(frozenset(f.regressor for f in known), []).append(gap)
        for regressors, missing in passes.items():
            how: dict[str, Any] = {"batch_size": self.batch_size, "regressors": regressors}
            fit = calibrate(self.model, self.fitted, missing, **how)
            held_out = calibrate(self.model, self.judges, missing, **how)
            self._statistics |= dict.fromkeys(missing, (fit, held_out))

    @checked
    def choose(self, layers: Iterable[int] | int, *, among: Iterable[str] | None = None) -> Choice:
        """The best candidate for ``layers``, or for the best on the `shortlist` of so many.

        Args:
            layers: to remove, or how many.
            among: some of the candidates; all by default. What was tried is not tried again.

        Raises:
            ValueError: layers that cannot be removed, a name that is none of the candidates, or NaN
                whatever the repair, and without one.
        """
        names = [self._candidate(name) for name in (self.families if among is None else among)]
        asked = [tuple(sorted(layers))] if isinstance(layers, Iterable) else self.shortlist(layers)
        self.collect(asked)
        todo = [(ls, repair) for ls in asked for repair in (PRUNED, *self._placed(ls, names))]
        tried = {key: self._try(*key) for key in track(todo, "choosing", unit="repair")}
        by_window = {key: loss for key, (loss, _) in tried.items()}
        kept = {key: score for key, (_, score) in tried.items()} if self.keep else {}
        losses = {key: float(loss.mean()) for key, loss in by_window.items()}
        totals = {key: loss + self.weight * kept.get(key, 0.0) for key, loss in losses.items()}
        admitted = [key for key in losses if _admissible(key, by_window)]
        best = min(admitted, key=lambda key: totals[key])  # ties: the fewest numbers, named first
        plain = [key for key in admitted if not self._has_several_matrices(key[1])]
        other = min(plain, key=lambda key: totals[key])
        if totals[best] > totals[other] - _WORTH:
            best = other
        if math.isinf(losses[best]):
            raise ValueError(
                "the pruned model and every repair of the recipe give NaN or an infinite loss: "
                "try a wider dtype (bfloat16 or float32), or other windows"
            )
        layers, repair = best
        ridges, tokens = self._ridges(layers, repair), self.judges.numel()
        final = self._final(layers, repair)
        return Choice(layers, repair, final, ridges, losses, tokens, self.keep, kept)

    @checked
    def fit(self, layers: Iterable[int], repair: str) -> dict[Boundary, Operator]:
        """One candidate for ``layers``, with the ridges that serve the held-out windows best.

        Solved from all windows, as what `choose` returns.

        Raises:
            ValueError: layers that cannot be removed, not one of the candidates, or one that has no
                place before one of the gaps.
        """
        family, removed = self.families[self._candidate(repair)], tuple(sorted(layers))
        check_place(self.model, runs(removed, self.total), family)
        self.collect([removed])
        fitted = {gap: fit for gap, (fit, _) in self._moments(removed, repair).items()}
        warn_of_massive_activations(fitted, family)
        return self._final(removed, repair)

    def _candidate(self, name: str) -> str:
        if name not in self.families:
            raise ValueError(f"{name} is none of the candidates: {', '.join(self.families)}")
        return name

    def _ridges(self, layers: Layers, repair: str) -> dict[Boundary, Ridge]:
        """The ridge of each gap that serves the held-out windows best."""
        if (layers, repair) not in self._chosen:
            parts = self._moments(layers, repair)
            chosen = {gap: _choose(*part) for gap, part in track(parts.items(), "choosing ridges")}
            self._chosen[layers, repair] = chosen
        return self._chosen[layers, repair]

    def _try(self, layers: Layers, repair: str) -> tuple[Tensor, float]:
        """Losses on the held-out windows of a repair solved without them, and the probe's score."""
        if (layers, repair) not in self._tried:
            fits = {gap: fit for gap, (fit, _) in self._moments(layers, repair).items()}
            operators = self._solve(fits, repair, self._ridges(layers, repair))
            losses, score = self._trials.losses(layers, operators).nan_to_num(math.inf), math.nan
            if self.keep is not None:
                score = float(self._trials.abilities(layers, operators)[self.keep].mean())
                score = score if math.isfinite(score) else math.inf
            self._tried[layers, repair] = losses, score
        return self._tried[layers, repair]

    def _final(self, layers: Layers, repair: str) -> dict[Boundary, Operator]:
        """Solved from all windows; once, for as long as the same layers are asked for."""
        self._solved = {key: known for key, known in self._solved.items() if key[0] == layers}
        if (layers, repair) not in self._solved:
            parts = self._moments(layers, repair)
            whole = {gap: fit + judge for gap, (fit, judge) in parts.items()}
            self._solved[layers, repair] = self._solve(whole, repair, self._ridges(layers, repair))
        return self._solved[layers, repair]

    def _has_several_matrices(self, repair: str) -> bool:
        """Whether it multiplies more than the stream itself at the boundary."""
        features = () if repair == PRUNED else self.families[repair].regressor.features
        return sum(feature.source == "stream" for feature in features) > 1

    def _placed(self, layers: Layers, names: Iterable[str]) -> list[str]:
        """Those that there is a place for at every gap: some need a layer before it."""
        starts = [gap.start for gap in runs(layers, self.total)]
        families = {name: self.families[name] for name in names}
        return [n for n, f in families.items() if all(has_place(self.model, f, s) for s in starts)]

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
        self,
        moments: Mapping[Boundary, Moments],
        repair: str,
        ridges: Mapping[Boundary, Ridge],
    ) -> dict[Boundary, Operator]:
        return {
            gap: solve(m, self.families[repair], relative_ridge=ridges[gap])
            for gap, m in moments.items()
        }


def _choose(fit: Moments, held_out: Moments) -> Ridge:
    """A ridge for all features; for those of the stream and of the MLP, one for each."""
    if len(fit.regressor.sources) > 1:
        return choose_ridges(fit, held_out)
    return choose_ridge(fit, held_out=held_out)


def _admissible(key: tuple[Layers, str], by_window: Mapping[tuple[Layers, str], Tensor]) -> bool:
    """Whether a repair harms no held-out window, compared with the better of the safe ones.

    The mean over windows alone would let a gain on one kind of text pay for a loss on another.
    """
    layers, repair = key
    safe = [loss for (ls, name), loss in by_window.items() if ls == layers and name in _SAFE]
    return repair in _SAFE or bool((by_window[key] <= torch.stack(safe).amin(0) + _MARGIN).all())


def shortlisted(keep: str | None) -> tuple[str, ...]:
    """`SHORTLIST`, with a search by the ability to ``keep``, if there is one."""
    return SHORTLIST if keep is None else (*SHORTLIST, "abilities")


def spelt_ridge(ridge: Ridge) -> str:
    """A ridge, or one for each feature, as text."""
    return "/".join(f"{r:.0e}" for r in (ridge if isinstance(ridge, tuple) else (ridge,)))


def check_ground(model: PreTrainedModel, family: Family) -> None:
    """Refuse, before any pass, a family that this architecture has no ground or place for.

    Raises:
        ValueError: normalised features where layers read the stream without a norm, or a repair of
            the MLP where every layer normalises its output or has weights that cannot be changed;
            the message says what works instead.
    """
    try:
        suited(model, family.regressor)
        starts = range(1, num_layers(model) + 1)
        if not any(has_place(model, family, start) for start in starts):
            projection_before(model, 1, family.name)  # says why
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
    """The families of a budget that this architecture has ground and place for.

    Raises:
        ValueError: an unknown budget.
    """
    names = []
    for name in BUDGETS[budget]:
        with suppress(ValueError):
            check_ground(model, Family.of(name))
            names.append(name)
    return names
