"""Criteria: choose the layers to remove by the lowest score."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import Registry, at_least, checked, short_repr, track
from ghostlib.evaluation.abilities import COPYING
from ghostlib.models.architectures import check_origin, num_layers
from ghostlib.models.boundaries import Boundary, contiguous
from ghostlib.models.streams import refusal
from ghostlib.operators.families import Family
from ghostlib.selection.evidence import WEIGHT, Evidence, Layers, check_weight
from ghostlib.statistics.calibration import Calibration, calibrate


class Selection(tuple[int, ...]):
    """The layers to remove, in ascending order, with the scores they were chosen by.

    Attributes:
        criterion: name of the criterion.
        n: number of layers.
        scores: ``{layers: score}`` of every candidate, the layers it removes: a block, a single
            layer, or a set tried at any step of a greedy search. The lowest is removed.
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
        return tuple(self), self.criterion, self.scores  # for copy and pickle

    @checked
    def first(self, n: int) -> "Selection":
        """The best set of ``n`` layers that was scored: step ``n`` of a greedy search.

        Raises:
            ValueError: no set of that size was scored.
        """
        scored = [(score, layers) for layers, score in self.scores.items() if len(layers) == n]
        if not scored:
            raise ValueError(f"no set of {n} layers was scored: choose n <= {self.n}")
        return Selection(min(scored)[1], self.criterion, self.scores)


class Criterion(NamedTuple):
    """A search over candidates and their score; low is removed first.

    Attributes:
        search: ``"block"``: the best run of n layers; ``"each"``: the n best single layers;
            ``"greedy"``: one layer after another, each the best together with those before.
        needs: inputs of the score: ``"similarity"``, ``"moments"``, ``"windows"``, ``"probes"``.
        score: function of `Evidence` and the layers that a candidate removes.
    """

    search: str
    needs: tuple[str, ...]
    score: Callable[[Evidence, Layers], float]


CRITERIA: Registry[Criterion] = Registry("criterion")
# The block whose input and output are most alike in direction (LLM-Streamline, arXiv 2403.19135).
CRITERIA["cosine"] = Criterion("block", ("similarity",), lambda e, ls: -e.similarity(ls).cosine)
# The same by mean angle (Gromov et al., arXiv 2403.17887).
CRITERIA["angular"] = Criterion("block", ("similarity",), lambda e, ls: e.similarity(ls).angular)
# The single layers that turn the stream least (ShortGPT, arXiv 2403.03853).
CRITERIA["block-influence"] = Criterion(
    "each", ("similarity",), lambda e, ls: 1 - e.similarity(ls).cosine
)
# The single layers with the least first-order importance (Shortened LLaMA, arXiv 2402.02834).
CRITERIA["taylor"] = Criterion("each", ("windows",), Evidence.importance)
# One layer at a time, by the loss of the pruned model (SLEB, arXiv 2402.09025).
CRITERIA["perplexity"] = Criterion("greedy", ("windows",), Evidence.loss)
# The block whose repair leaves the least error; and one layer at a time, with every gap repaired.
CRITERIA["residual"] = Criterion("block", ("moments",), Evidence.residual)
CRITERIA["greedy-recovered"] = Criterion("greedy", ("moments", "windows"), Evidence.recovered_loss)
# The same, by the loss on text and on a probe.
CRITERIA["abilities"] = Criterion("greedy", ("moments", "windows", "probes"), Evidence.balance)


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
        calibration: (windows, length) token ids, for one streaming pass; or a `Calibration` with
            the statistics that the criterion needs.
        n: number of layers to remove.
        criterion: a name from `CRITERIA`. Every candidate is considered, first and last layers
            included; ties go to the lower index.
        windows: (windows, length) ids that ``taylor``, ``perplexity``, ``greedy-recovered`` and
            ``abilities`` score, without padding; the calibration windows by default. Never test
            text.
        operator: the repair of candidates under ``residual``, ``greedy-recovered`` and
            ``abilities``.
        tries: number of layers that a greedy search considers after its first step, those with the
            lowest scores alone; all of them by default.
        keep: the probe of random tokens that ``abilities`` scores in addition to the windows.
        weight: weight of the probe's loss relative to the loss on the windows.
        attention_mask, skip_leading: as in `calibrate`, for a pass over windows.
        batch_size: windows per forward pass; 1 by default.

    Returns:
        `Selection`: a tuple of layer indices with ``.scores``.

    Raises:
        ValueError: unknown criterion, ``n`` out of range, a calibration of another model or without
            the statistics that the criterion needs, windows that do not fit the model, an argument
            without effect, a score of NaN, or no ``n`` layers that can be removed together.
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
    boundaries = needed_boundaries(criterion, n, total)
    family = Family.of(operator)
    options: dict[str, Any] = {"attention_mask": attention_mask, "skip_leading": skip_leading}
    if "windows" not in rule.needs:
        options["batch_size"] = batch_size
    options = {name: value for name, value in options.items() if value is not None}
    if options and not (boundaries and isinstance(calibration, Tensor)):
        name, value = next(iter(options.items()))
        raise ValueError(
            f"{name} = {short_repr(value)} belongs to a pass that collects statistics, and "
            f"criterion {criterion!r} makes none here: leave it out"
        )
    batch_size = 1 if batch_size is None else batch_size
    if not boundaries:
        calibration = Calibration("")  # unused
    elif isinstance(calibration, Tensor):
        with_moments = "moments" in rule.needs
        regressors = [family.regressor, family.regressor.stream] if with_moments else []
        options |= {"batch_size": batch_size, "moments": with_moments, "regressors": regressors}
        calibration = calibrate(model, calibration, boundaries, **options)
    else:
        check_origin("the calibration was", calibration.model, model)
    _check_stats(criterion, n, calibration, boundaries)
    probe = keep if "probes" in rule.needs else None
    evidence = Evidence(model, calibration, windows, family, batch_size, probe, weight)
    return _search(criterion, evidence, n, tries)


def select_several(
    model: PreTrainedModel,
    calibration: Tensor | Calibration,
    ns: Iterable[int],
    criterion: str = "cosine",
    **options: Any,
) -> dict[int, Selection]:
    """Selection of `select_layers` for each of ``ns``, by the fewest searches.

    Pass a `Calibration` of the `needed_boundaries` of all ``ns``: from windows, every search makes
    its own pass. Selections of a greedy criterion share the scores of one search.
    """
    ns = list(ns)
    searches = {
        n: select_layers(model, calibration, n, criterion, **options)
        for n in sizes_to_search(criterion, ns)
    }
    return {n: searches[n] if n in searches else searches[max(ns)].first(n) for n in ns}


def sizes_to_search(criterion: str, ns: Iterable[int]) -> list[int]:
    """Sizes among ``ns`` to search for: a greedy search for the largest finds all others.

    >>> [sizes_to_search(c, (3, 5, 7)) for c in ("residual", "greedy-recovered")]
    [[3, 5, 7], [7]]
    """
    sizes = sorted(set(ns))
    return sizes[-1:] if CRITERIA[criterion].search == "greedy" else sizes


def needed_boundaries(criterion: str, ns: int | Iterable[int], total: int) -> list[Boundary]:
    """Boundaries to calibrate for ``criterion`` to choose ``ns`` (one or more) of ``total`` layers.

    >>> [len(needed_boundaries(c, 7, 30)) for c in ("residual", "greedy-recovered", "taylor")]
    [24, 189, 0]
    """
    rule = CRITERIA[criterion]
    if rule.needs == ("windows",):
        return []
    sizes = sizes_to_search(criterion, ns if isinstance(ns, Iterable) else [ns])
    lengths = {"block": sizes, "each": [1], "greedy": range(1, max(sizes) + 1)}[rule.search]
    return [boundary for length in lengths for boundary in contiguous(length, total)]


def _check_stats(criterion: str, n: int, stats: Calibration, boundaries: list[Boundary]) -> None:
    if missing := [b for b in boundaries if b not in stats.similarities]:
        raise ValueError(
            f"criterion {criterion!r} with n = {n} needs boundaries the calibration lacks, "
            f"such as {missing[0]}: calibrate with boundaries=… all {len(boundaries)} of them"
        )
    if "moments" in CRITERIA[criterion].needs and (lacking := set(boundaries) - set(stats)):
        raise ValueError(
            f"criterion {criterion!r} needs second moments, which this calibration lacks for "
            f"{min(lacking)}: calibrate with moments=True"
        )


def _search(criterion: str, evidence: Evidence, n: int, tries: int | None) -> Selection:
    rule, total = CRITERIA[criterion], evidence.total
    scores: dict[Layers, float] = {}

    def ranked(candidates: list[Layers]) -> list[Layers]:
        for layers in candidates:
            refused = refusal(evidence.model, layers)
            scores[layers] = math.inf if refused else rule.score(evidence, layers)
            if math.isnan(scores[layers]):
                raise ValueError(
                    f"criterion {criterion!r} scores NaN without layers {layers}: try a wider "
                    "dtype (bfloat16 or float32), or other windows"
                )
        finite = [layers for layers in candidates if scores[layers] < math.inf]
        if not finite:
            raise ValueError(
                f"criterion {criterion!r} finds nothing that can be removed: "
                f"{refusal(evidence.model, candidates[0]) or 'no candidate has a finite score'}"
            )
        return sorted(finite, key=lambda layers: (scores[layers], layers))

    removed: Layers = ()
    if rule.search == "block":
        removed = ranked([tuple(b.removed) for b in contiguous(n, total)])[0]
    elif rule.search == "each":
        for layer in ranked([(layer,) for layer in range(total)]):
            more = tuple(sorted(removed + layer))
            if len(removed) < n and not refusal(evidence.model, more):
                removed = more
        if len(removed) < n:
            raise ValueError(f"criterion {criterion!r} finds no {n} layers that can go together")
    else:
        for _ in track(range(n), "removing", unit="layer"):
            evidence.grow_from(removed, repaired="moments" in rule.needs)
            others = [layer for layer in range(total) if layer not in removed]
            if removed:
                others = sorted(others, key=lambda layer: scores[layer,])[:tries]
            removed = ranked([tuple(sorted((*removed, layer))) for layer in others])[0]
    return Selection(removed, criterion, scores)
