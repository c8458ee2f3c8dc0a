"""Selection: which layers to remove, and the scores that say why."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import Registry, at_least, checked, told, track
from ghostlib.evaluation.abilities import COPYING
from ghostlib.models.architectures import check_origin, num_layers
from ghostlib.models.boundaries import Boundary, contiguous
from ghostlib.models.streams import refusal
from ghostlib.operators.families import Family
from ghostlib.selection.evidence import WEIGHT, Evidence, Layers, check_weight
from ghostlib.statistics.calibration import Calibration, calibrate


class Selection(tuple[int, ...]):
    """The layers to remove, in ascending order, with the scores that decided.

    Attributes:
        criterion: name of the criterion.
        n: how many layers were asked for.
        scores: ``{layers: score}`` of every candidate, named by the layers it removes: a block, a
            single layer, or what a greedy search tried at any of its steps. Lowest removed.
    """

    criterion: str
    n: int
    scores: dict[Layers, float]

    def __new__(cls, layers: Layers, criterion: str, scores: Mapping[Layers, float]) -> "Selection":
        selection = super().__new__(cls, sorted(layers))
        selection.criterion = criterion
        selection.n = len(selection)
        selection.scores = dict(scores)
        return selection

    def __getnewargs__(self) -> tuple[Layers, str, dict[Layers, float]]:
        return tuple(self), self.criterion, self.scores  # to be copied and pickled

    @checked
    def first(self, n: int) -> "Selection":
        """The best set of ``n`` layers that was scored: where a greedy search stood at step ``n``.

        Raises:
            ValueError: none of that size was scored.
        """
        scored = [(score, layers) for layers, score in self.scores.items() if len(layers) == n]
        if not scored:
            raise ValueError(f"no set of {n} layers was scored: choose n <= {self.n}")
        return Selection(min(scored)[1], self.criterion, self.scores)


class Criterion(NamedTuple):
    """How candidates are searched, what must be known of them, and the score; low is removed first.

    Attributes:
        search: ``"block"``: the best run of n layers; ``"each"``: the n best single layers;
            ``"greedy"``: one layer after another, each the best beside those chosen before.
        needs: what the score is computed from: ``"similarity"``, ``"moments"``, ``"windows"``,
            ``"probes"``.
        score: from `Evidence` and the layers a candidate removes to a number.
    """

    search: str
    needs: tuple[str, ...]
    score: Callable[[Evidence, Layers], float]


CRITERIA: Registry[Criterion] = Registry("criterion")
# The block whose ends point the same way does least (LLM-Streamline, arXiv 2403.19135).
CRITERIA["cosine"] = Criterion("block", ("similarity",), lambda e, ls: -e.similarity(ls).cosine)
# The same by mean angle (Gromov et al., arXiv 2403.17887).
CRITERIA["angular"] = Criterion("block", ("similarity",), lambda e, ls: e.similarity(ls).angular)
# Single layers anywhere, by how little each turns the stream (ShortGPT, arXiv 2403.03853).
CRITERIA["block-influence"] = Criterion(
    "each", ("similarity",), lambda e, ls: 1 - e.similarity(ls).cosine
)
# Single layers by first-order weight importance (Shortened LLaMA, arXiv 2402.02834).
CRITERIA["taylor"] = Criterion("each", ("windows",), lambda e, ls: e.importance(ls))
# One layer at a time, by the loss of the pruned model (SLEB, arXiv 2402.09025).
CRITERIA["perplexity"] = Criterion("greedy", ("windows",), lambda e, ls: e.loss(ls))
# The block whose repair leaves least behind; and one layer at a time, with every repair in place.
CRITERIA["residual"] = Criterion("block", ("moments",), lambda e, ls: e.residual(ls))
CRITERIA["greedy-recovered"] = Criterion(
    "greedy", ("moments", "windows"), lambda e, ls: e.recovered_loss(ls)
)
# The same by text and by an ability that text does not show.
CRITERIA["abilities"] = Criterion(
    "greedy", ("moments", "windows", "probes"), lambda e, ls: e.balance(ls)
)


@checked
def select_layers(
    model: PreTrainedModel,
    calibration: Tensor | Calibration,
    n: int,
    criterion: str = "cosine",
    *,
    windows: Tensor | None = None,
    operator: str | Family = "ghost",
    tries: int | None = None,
    keep: str = COPYING,
    weight: float = WEIGHT,
    attention_mask: Tensor | None = None,
    skip_leading: int | None = None,
    batch_size: int | None = None,
) -> Selection:
    """Choose ``n`` decoder layers of ``model`` to remove.

    Args:
        model: the dense model.
        calibration: (windows, length) token ids, for one streaming pass; or a `Calibration` that
            holds what the criterion needs.
        n: number of layers to remove.
        criterion: a name from `CRITERIA`. Every candidate is considered, first and last layers
            included; ties go to the lower index.
        windows: (windows, length) ids that ``taylor``, ``perplexity``, ``greedy-recovered`` and
            ``abilities`` score, without padding; the calibration windows by default. Never test
            text.
        operator: the repair in place while ``residual``, ``greedy-recovered`` and ``abilities``
            score.
        tries: layers that a greedy search considers after its first step, those that cost least
            alone; all of them by default.
        keep: the probe of random tokens that ``abilities`` asks beside the windows.
        weight: nats of the windows' loss that one of the probe's is worth.
        attention_mask, skip_leading: as in `calibrate`, for a pass over windows.
        batch_size: windows per forward pass; 1 by default.

    Returns:
        `Selection`: a tuple of layer indices with ``.scores``.

    Raises:
        ValueError: unknown criterion, ``n`` out of range, a calibration without the statistics the
            criterion needs or of another model, windows that do not fit the model, an argument that
            would have no effect, a score that is not a number, or no ``n`` layers that this model
            can do without.
    """
    rule, total = CRITERIA[criterion], num_layers(model)
    contiguous(n, total)  # checks n
    at_least(1, tries=tries, batch_size=batch_size)
    check_weight(weight)
    if windows is None and isinstance(calibration, Tensor):
        if "windows" in rule.needs and attention_mask is not None and not attention_mask.all():
            raise ValueError(
                f"criterion {criterion!r} would score the padding of these windows: "
                "pass windows=… without any"
            )
        windows = calibration
    if "windows" in rule.needs and windows is None:
        raise ValueError(f"criterion {criterion!r} scores token windows: pass windows=…")
    boundaries = needed(criterion, n, total)
    family = Family.of(operator)
    passes: dict[str, Any] = {"attention_mask": attention_mask, "skip_leading": skip_leading}
    if "windows" not in rule.needs:
        passes["batch_size"] = batch_size
    passes = {name: value for name, value in passes.items() if value is not None}
    if passes and not (boundaries and isinstance(calibration, Tensor)):
        name, value = next(iter(passes.items()))
        raise ValueError(
            f"{name} = {told(value)} belongs to a pass that collects statistics, and criterion "
            f"{criterion!r} makes none here: leave it out"
        )
    batch_size = 1 if batch_size is None else batch_size
    if not boundaries:
        calibration = Calibration("")  # of which nothing is asked
    elif isinstance(calibration, Tensor):
        with_moments = "moments" in rule.needs
        regressors = [family.regressor, family.regressor.stream] if with_moments else []
        passes |= {"batch_size": batch_size, "moments": with_moments, "regressors": regressors}
        calibration = calibrate(model, calibration, boundaries, **passes)
    else:
        check_origin("the calibration was", calibration.model, model)
    _check(criterion, n, calibration, boundaries)
    probe = keep if "probes" in rule.needs else None
    evidence = Evidence(model, calibration, windows, family, batch_size, probe, weight)
    chosen, scores = _search(rule, evidence, n, total, tries, criterion)
    return Selection(chosen, criterion, scores)


def select_several(
    model: PreTrainedModel,
    calibration: Tensor | Calibration,
    ns: Iterable[int],
    criterion: str = "cosine",
    **options: Any,
) -> dict[int, Selection]:
    """What `select_layers` chooses for each of ``ns``, by the fewest searches.

    Give a `Calibration` of what is `needed` for all of ``ns``: from windows every search makes a
    pass of its own. Selections of a greedy criterion have the scores of the one search.
    """
    ns = list(ns)
    searches = {
        n: select_layers(model, calibration, n, criterion, **options)
        for n in searched(criterion, ns)
    }
    return {n: searches[n] if n in searches else searches[max(ns)].first(n) for n in ns}


def searched(criterion: str, ns: Iterable[int]) -> list[int]:
    """Those of ``ns`` that take a search: a greedy one for the most layers passes by all others.

    >>> [searched(c, (3, 5, 7)) for c in ("residual", "greedy-recovered")]
    [[3, 5, 7], [7]]
    """
    sizes = sorted(set(ns))
    return sizes[-1:] if CRITERIA[criterion].search == "greedy" else sizes


def needed(criterion: str, ns: int | Iterable[int], total: int) -> list[Boundary]:
    """What a calibration must hold for ``criterion`` to choose ``ns`` (one or more) of ``total``.

    >>> [len(needed(c, 7, 30)) for c in ("residual", "greedy-recovered", "taylor")]
    [24, 189, 0]
    """
    rule = CRITERIA[criterion]
    if rule.needs == ("windows",):
        return []
    sizes = searched(criterion, ns if isinstance(ns, Iterable) else [ns])
    lengths = {"block": sizes, "each": [1], "greedy": range(1, max(sizes) + 1)}[rule.search]
    return [boundary for length in lengths for boundary in contiguous(length, total)]


def _check(criterion: str, n: int, known: Calibration, boundaries: list[Boundary]) -> None:
    if missing := [b for b in boundaries if b not in known.similarities]:
        raise ValueError(
            f"criterion {criterion!r} with n = {n} needs boundaries the calibration lacks, "
            f"such as {missing[0]}: calibrate with boundaries=… all {len(boundaries)} of them"
        )
    if "moments" in CRITERIA[criterion].needs and (unsolved := set(boundaries) - set(known)):
        raise ValueError(
            f"criterion {criterion!r} needs second moments, which this calibration lacks for "
            f"{min(unsolved)}: calibrate with moments=True"
        )


def _search(
    rule: Criterion,
    evidence: Evidence,
    n: int,
    total: int,
    tries: int | None,
    criterion: str,
) -> tuple[Layers, dict[Layers, float]]:
    scores: dict[Layers, float] = {}

    def ranked(candidates: list[Layers]) -> list[Layers]:
        for layers in candidates:
            # What cannot be removed is left out; what it would have scored is not asked.
            refused = refusal(evidence.model, layers)
            scores[layers] = math.inf if refused else rule.score(evidence, layers)
            if math.isnan(scores[layers]):
                raise ValueError(
                    f"criterion {criterion!r} scores NaN without layers {layers}: try a wider "
                    "dtype (bfloat16 or float32), or other windows"
                )
        possible = [layers for layers in candidates if scores[layers] < math.inf]
        if not possible:
            raise ValueError(
                f"criterion {criterion!r} finds nothing that can be removed: "
                f"{refusal(evidence.model, candidates[0]) or 'no candidate has a finite score'}"
            )
        return sorted(possible, key=lambda layers: (scores[layers], layers))

    if rule.search == "block":
        return ranked([tuple(b.removed) for b in contiguous(n, total)])[0], scores
    if rule.search == "each":
        chosen: Layers = ()
        for (layer,) in ranked([(layer,) for layer in range(total)]):
            more = tuple(sorted((*chosen, layer)))
            if len(chosen) < n and not refusal(evidence.model, more):
                chosen = more
        if len(chosen) < n:
            raise ValueError(f"criterion {criterion!r} finds no {n} layers that can go together")
        return chosen, scores
    removed: Layers = ()
    for _ in track(range(n), "removing", unit="layer"):
        evidence.grow_from(removed, repaired="moments" in rule.needs)
        others = [layer for layer in range(total) if layer not in removed]
        if removed:
            others = sorted(others, key=lambda layer: scores[layer,])[:tries]
        removed = ranked([tuple(sorted((*removed, layer))) for layer in others])[0]
    return removed, scores
