"""The runner: computes the cells of a specification that its results file lacks.

    specification = Specification(n=(5, 7, 9), operators=("pruned", "ghost"), tasks=("arc_easy",))
    print(report(run_experiment(specification, "results.jsonl")))

A cell is one model (removed layers, an operator in their place) on one corpus, task or probe. Cells
depend on the specification alone, so that any number of processes may compute them in any order,
and a stopped run resumes with the first missing cell.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby, product
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import DENSE, PRUNED, SEQUENTIAL, checked, track, warn
from ghostlib.evaluation.abilities import PROBES, Ability, ProbeSet
from ghostlib.evaluation.perplexity import ScoredText
from ghostlib.evaluation.tasks import check_tasks, zero_shot
from ghostlib.experiments.results import Results
from ghostlib.experiments.spec import Specification, base_name, budget_of, family_of
from ghostlib.experiments.tables import ABILITY, ACCURACY, PERPLEXITY, mean_interval
from ghostlib.models.architectures import check_model, num_layers, text_config
from ghostlib.models.boundaries import Boundary, contiguous, gaps_without, read_layers, runs, spell
from ghostlib.models.streams import check_windows
from ghostlib.operators.solve import Operators, solve
from ghostlib.recovery.recipe import Choice, Recipe, affordable
from ghostlib.recovery.sequential import dense_streams, fit_sequential
from ghostlib.selection.criteria import CRITERIA, needed_boundaries, select_several, sizes_to_search
from ghostlib.selection.evidence import Layers
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import (
    Calibration,
    available_bytes,
    calibrate,
    calibration_bytes,
)
from ghostlib.statistics.features import Regressor
from ghostlib.surgery.cut import install


@checked
def run_experiment(
    specification: Specification,
    output: str | os.PathLike[str],
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: str = "1/1",
) -> Results:
    """Compute the cells of ``specification`` that the file ``output`` lacks, and return all.

    Layers are chosen in one pass and all operators solved from another, or from several where
    memory has no room for all moments. Operators that read the layer before a gap are left out
    where layer 0 is removed, and a cell whose loss is not finite has no score: records of kind
    ``"skipped"`` have the reasons.

    Args:
        output: a results file, new or resumed; several processes may append to one file.
        model: the dense model, as from ``specification.load()``, if it is already loaded.
        tokenizer: its tokenizer; required with the model.
        shard: ``"3/8"`` computes the third eighth of the cells, the same in every process; the
            files of all shards are joined by ``cat``.

    Raises:
        ValueError: a file of another specification (the message names the difference), or of other
            text in a local file of that name; a model without its tokenizer; layers that the model
            does not have; an invalid shard; and errors of the steps.
        OSError: the file cannot be written.
        ConnectionError: a hub corpus or task that cannot be reached.

    Warns:
        UserWarning: a loss that is not finite, or a damaged line of the file.
    """
    part = read_shard(shard)
    if model is not None:
        check_model(model)
    if (model is None) != (tokenizer is None):
        raise ValueError(
            "give model and tokenizer together, or neither to load the specification's"
        )
    results = Results(output)
    try:
        results.expect(specification.identity())
        check_tasks(specification.tasks)  # before hours of work
        if model is None or tokenizer is None:
            model, tokenizer = specification.load()
        results.begin(specification.identity(model), specification.files())
        _Run(specification, results, model, tokenizer).run(*part)
    finally:
        results.close()
    return results


@checked
def read_shard(text: str) -> tuple[int, int]:
    """``(3, 8)`` from ``"3/8"``; `ValueError` unless it is the n-th of that number."""
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total)):
        raise ValueError(f"shard {text!r} is not of the form 3/8, the third of eight")
    return int(index), int(total)


_UNFITTED = (DENSE, PRUNED)


@dataclass
class _Run:
    """The missing cells, by model and measure, and the computations they share."""

    specification: Specification
    results: Results
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing: dict[tuple[Layers, str], list[tuple[str, str]]] = field(default_factory=dict)
    probes: dict[str, ProbeSet] = field(default_factory=dict)
    cached: list[tuple[str, Layers, Operators, Tensor]] = field(default_factory=list)

    def run(self, index: int, total: int) -> None:
        """Choose layers, plan, and compute cell by cell."""
        spec = self.specification
        options: dict[str, Any] = {"seed": spec.seed, "count": spec.probe_items, "strict": True}
        for name in spec.probes:  # one that cannot be run is refused before anything is scored
            self.probes[name] = ProbeSet(self.model, self.tokenizer, [name], **options)
        measures = [
            *product([PERPLEXITY], spec.perplexity),
            *product([ACCURACY], spec.tasks),
            *product([ABILITY], spec.probes),
        ]
        models = [((), DENSE), *product(self._layer_sets(), spec.operators)]
        for (layers, operator), (measure, dataset) in product(models, measures):
            name = json.dumps([spell(layers), operator, measure, base_name(dataset)])
            digest = hashlib.sha256(name.encode()).digest()
            if int.from_bytes(digest[:8], "big") % total == index - 1:
                self._plan(layers, operator, measure, dataset)
        for fits in self._portions():
            for model in track(fits.models, "scoring", unit="model"):
                self.results.refresh()
                if measures := [m for m in self.missing[model] if not self._is_done(*model, *m)]:
                    self._score(*model, measures, fits)

    def _portions(self) -> Iterator["_Fits"]:
        """The models with missing cells, as many sets of layers at a time as memory allows."""
        windows = torch.empty(0, 0)
        if any(operator not in _UNFITTED for _, operator in self.missing):
            windows = self._windows
            check_windows(self.model, windows)  # before the first cell is written
        portion = _Fits(self.model, windows, [])
        for _, group in groupby(self.missing, itemgetter(0)):
            models = list(group)
            wider = _Fits(self.model, windows, [*portion.models, *models])
            if portion.models and wider.bytes > available_bytes() // 2:
                yield portion
                wider = _Fits(self.model, windows, models)
            portion = wider
        yield portion

    def _layer_sets(self) -> list[Layers]:
        """Every set of layers to remove: of the specification, and chosen by criteria."""
        spec, total = self.specification, num_layers(self.model)
        starts = contiguous(spec.starts, total) if spec.starts else []
        explicit = [*spec.layers, *(tuple(gap.removed) for gap in starts)]
        for layers in explicit:
            runs(layers, total)  # refuses layers that the model does not have
        missing: dict[str, list[int]] = {}
        for criterion, n in product(spec.criteria, spec.n):
            contiguous(n, total)
            if not self.results.get("selection", criterion, n):
                missing.setdefault(criterion, []).append(n)
        self._select(missing)
        records = [self.results.get("selection", *pair) for pair in product(spec.criteria, spec.n)]
        chosen = [read_layers(record["layers"]) for record in records if record]
        return list(dict.fromkeys([*explicit, *chosen]))

    def _select(self, missing: Mapping[str, list[int]]) -> None:
        """Choose layers by each criterion, for its numbers of layers, from one pass."""
        total = num_layers(self.model)
        calibration: Tensor | Calibration | None = None
        if boundaries := {b for c, ns in missing.items() for b in needed_boundaries(c, ns, total)}:
            moments = any("moments" in CRITERIA[c].needs for c in missing)
            calibration = calibrate(self.model, self._windows, sorted(boundaries), moments=moments)
        for criterion, ns in track(missing.items(), "selecting", unit="criterion"):
            begin = time.perf_counter()
            windows = self._selection_windows if "windows" in CRITERIA[criterion].needs else None
            source = self._windows if calibration is None else calibration
            selected = select_several(self.model, source, ns, criterion, windows=windows)
            seconds = (time.perf_counter() - begin) / len(sizes_to_search(criterion, ns))
            for n, layers in selected.items():
                content = {"criterion": criterion, "n": n, "layers": spell(layers)}
                self.results.append("selection", **content, seconds=round(seconds, 2))

    def _plan(self, layers: Layers, operator: str, measure: str, dataset: str) -> None:
        """Note a missing cell, or record why it is left out."""
        fitted = operator not in _UNFITTED and not budget_of(operator)
        if 0 in layers and fitted and family_of(operator).regressor.reads_mlp:
            names = {"layers": spell(layers), "operator": operator, "dataset": ""}
            reason = f"{operator} reads the layer before a gap, and layer 0 is removed"
            self.results.append("skipped", **names, reason=reason)
        elif not self._is_done(layers, operator, measure, dataset):
            self.missing.setdefault((layers, operator), []).append((measure, dataset))

    def _is_done(self, layers: Layers, operator: str, measure: str, dataset: str) -> bool:
        key, name = (spell(layers), operator), base_name(dataset)
        score = self.results.get("score", *key, measure, name)
        return bool(score or self.results.get("skipped", *key, name))

    def _score(
        self, layers: Layers, operator: str, measures: list[tuple[str, str]], fits: "_Fits"
    ) -> None:
        """Solve the operators of one model, and append a record for each of its measures."""
        begin = time.perf_counter()
        operators, choice = fits.of(layers, operator)
        if choice is not None:
            names = {"layers": spell(layers), "recipe": operator, "operator": choice.repair}
            self.results.append("choice", **names, losses=choice.summary["losses"])
        score = {PERPLEXITY: self._perplexity, ACCURACY: self._accuracy, ABILITY: self._ability}
        for measure, dataset in measures:
            content = score[measure](dataset, layers, operators)
            names = {"layers": spell(layers), "operator": operator, "dataset": base_name(dataset)}
            seconds, begin = time.perf_counter() - begin, time.perf_counter()
            if math.isfinite(content["value"]):
                content |= names | {"measure": measure, "seconds": round(seconds, 2)}
                self.results.append("score", **content)
            else:
                reason = f"{operator} without layers {names['layers']} has no finite loss on "
                reason += f"{names['dataset']}: try a wider dtype (bfloat16 or float32)"
                warn(reason)
                self.results.append("skipped", **names, reason=reason)

    def _perplexity(self, corpus: str, layers: Layers, operators: Operators) -> dict[str, Any]:
        text = self._texts[corpus]
        losses = self._losses(corpus, layers, operators)
        value, *interval = mean_interval(losses.numpy())
        low, high = interval if len(losses) > 1 else (None, None)
        count, length = text.windows.shape
        sizes = {"windows": count, "length": length, "tokens": count * (length - 1)}
        content = {"split": text.split, **sizes, "bytes": text.bytes, "losses": losses}
        if text.bos is not None:
            content["bos"] = text.bos
        return {"value": value, "low": low, "high": high, **content}

    def _losses(self, corpus: str, layers: Layers, operators: Operators) -> Tensor:
        """Losses on a corpus; cached, as the recipe often chooses the same on several budgets."""
        self.cached = [entry for entry in self.cached if entry[1] == layers]
        for name, _, others, losses in self.cached:
            if name == corpus and others is operators:
                return losses
        losses = self._trials[corpus].losses(layers, operators)
        self.cached.append((corpus, layers, operators, losses))
        return losses

    def _accuracy(self, task: str, layers: Layers, operators: Operators) -> dict[str, Any]:
        gaps = gaps_without(layers, num_layers(self.model))
        variant = install(self.model, {g: operators.get(g) for g in gaps}) if gaps else self.model
        limit, batch_size = self.specification.limit, self.specification.batch_size
        parts = zero_shot(variant, self.tokenizer, task, limit=limit, batch_size=batch_size)
        scores = [asdict(part) for part in parts.values()]
        return {"value": fmean(score["acc"] for score in scores), "scores": scores}

    def _ability(self, probe: str, layers: Layers, operators: Operators) -> dict[str, Any]:
        values = self._probe_trials[probe].abilities(layers, operators)[probe]
        if not np.isfinite(values).all():
            return {"value": math.nan}
        chance = PROBES[probe].chance(text_config(self.model).vocab_size)
        ability = Ability.of(PROBES[probe], values, chance)
        bounds = {k: v for k, v in (("low", ability.low), ("high", ability.high)) if v == v}
        return {"value": ability.score, "chance": chance, "items": values, **bounds}

    @cached_property
    def _windows(self) -> Tensor:
        return self.specification.draw_calibration(self.tokenizer)

    @cached_property
    def _selection_windows(self) -> Tensor:
        return self.specification.draw_selection(self.tokenizer)

    @cached_property
    def _texts(self) -> dict[str, ScoredText]:
        corpora = self.specification.perplexity
        return {c: self.specification.draw_test(self.tokenizer, c) for c in corpora}

    @cached_property
    def _trials(self) -> dict[str, Trials]:
        """Shared computations of all models on each corpus."""
        return {c: Trials(self.model, text.windows) for c, text in self._texts.items()}

    @cached_property
    def _probe_trials(self) -> dict[str, Trials]:
        """Shared computations of all models on each probe."""
        return {name: Trials(self.model, None, probes=p) for name, p in self.probes.items()}


@dataclass
class _Fits:
    """The operators of some models, solved from statistics that are collected once for all."""

    model: PreTrainedModel
    windows: Tensor
    models: list[tuple[Layers, str]]

    def of(self, layers: Layers, operator: str) -> tuple[Operators, Choice | None]:
        """The operators of one model, and the choice of the recipe, if it chose them."""
        if operator in _UNFITTED:
            return {}, None
        if budget := budget_of(operator):
            choice = self._recipe.choose(layers, among=affordable(self.model, budget))
            return choice.operators, choice
        family, gaps = family_of(operator), self._gaps(layers)
        if operator.endswith(SEQUENTIAL) and len(gaps) > 1:
            streams = self._streams
            return fit_sequential(self.model, self.windows, gaps, family, streams=streams), None
        if self._needs_recipe(operator):
            return self._recipe.fit(layers, operator), None
        moments = self._statistics.of(family.regressor)
        return {gap: solve(moments[gap], family) for gap in gaps}, None

    @property
    def bytes(self) -> int:
        """Size of all moments, of which the recipe has two: fitted and held out."""
        total = 0
        for recipe, copies in ((True, 2), (False, 1)):
            if gaps := self._boundaries(recipe):
                regressors = self._regressors(recipe)
                size = calibration_bytes(self.model, gaps, regressors=regressors)
                total += copies * size.moments
        return total

    def _gaps(self, layers: Layers) -> list[Boundary]:
        return runs(layers, num_layers(self.model))

    def _needs_recipe(self, operator: str) -> bool:
        """Whether held-out windows choose the operator or its ridge, as in `recover`."""
        return bool(budget_of(operator)) or (
            bool(family_of(operator).default) and len(self.windows) > 1
        )

    def _fitted(self, recipe: bool) -> list[tuple[Layers, str]]:
        fitted = [(layers, op) for layers, op in self.models if op not in _UNFITTED]
        return [(layers, op) for layers, op in fitted if self._needs_recipe(op) == recipe]

    def _boundaries(self, recipe: bool) -> list[Boundary]:
        # Also of sequential fits: with one gap they equal the teacher's.
        return sorted({gap for layers, _ in self._fitted(recipe) for gap in self._gaps(layers)})

    def _families(self, recipe: bool) -> list[str]:
        names: dict[str, None] = {}
        for operator in dict.fromkeys(operator for _, operator in self._fitted(recipe)):
            budget = budget_of(operator)
            names |= dict.fromkeys(affordable(self.model, budget) if budget else [operator])
        return list(names)

    def _regressors(self, recipe: bool) -> set[Regressor]:
        return {family_of(name).regressor for name in self._families(recipe)}

    @cached_property
    def _recipe(self) -> Recipe:
        """The recipe for all operators that need it, from the same statistics."""
        recipe = Recipe(self.model, self.windows, candidates=self._families(recipe=True))
        recipe.collect([layers for layers, _ in self._fitted(recipe=True)])
        return recipe

    @cached_property
    def _statistics(self) -> Calibration:
        """Moments that all other operators are solved from, of one pass."""
        gaps, regressors = self._boundaries(recipe=False), self._regressors(recipe=False)
        return calibrate(self.model, self.windows, gaps, regressors=regressors)

    @cached_property
    def _streams(self) -> dict[int, Tensor]:
        """The dense model's streams that all sequential fits need, from one pass."""
        sequential = [layers for layers, op in self.models if op.endswith(SEQUENTIAL)]
        indices = {layers[0] for layers in sequential}
        indices |= {gap.stop for layers in sequential for gap in self._gaps(layers)}
        return dense_streams(self.model, self.windows, indices)
