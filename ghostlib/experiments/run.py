"""The runner: computes the cells of a specification that its results file lacks.

    specification = Specification(n=(5, 7, 9), operators=("pruned", "ghost"), tasks=("arc_easy",))
    results = run_experiment(specification, "results.jsonl")
    print(report(results))  # of ghostlib.experiments.tables

A cell is one model (layers removed, operator in their place) on one corpus or task. Cells depend on
nothing but the specification, so they may be computed in any order, by any number of processes,
and a run that was stopped resumes with the first that is missing.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import track
from ghostlib.evaluation.perplexity import ScoredText, window_losses
from ghostlib.evaluation.tasks import check_tasks, zero_shot
from ghostlib.experiments.results import Results
from ghostlib.experiments.spec import (
    AUTO,
    DENSE,
    PRUNED,
    SEQUENTIAL,
    Specification,
    count,
    family_of,
    reads_layer,
    shown,
)
from ghostlib.experiments.tables import accuracy_interval, mean_interval
from ghostlib.models.architectures import hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, contiguous, gaps_without, runs, spell
from ghostlib.operators.solve import Operator, solve
from ghostlib.recovery.recipe import Recipe
from ghostlib.recovery.sequential import dense_streams, fit_sequential
from ghostlib.selection.criteria import CRITERIA, Layers, needed, searched, select_several
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import Calibration, calibrate
from ghostlib.surgery.cut import operate

_STREAMS = 2**31  # bytes of the dense model's streams of a corpus that are kept at most
PERPLEXITY, ACCURACY = "perplexity", "accuracy"

Chosen = tuple[str, int]  # criterion, n
Cell = tuple[Layers | Chosen, str, str, str]  # what is removed, operator, measure, corpus or task


def run_experiment(
    specification: Specification,
    output: str | os.PathLike[str],
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: str = "1/1",
) -> Results:
    """Compute the cells of ``specification`` that the file ``output`` lacks, and return all.

    Layers are chosen in one pass and all operators solved from another. Operators that read a layer
    before the gap are left out where layer 0 is removed, and cells whose loss is not finite have no
    score: lines of kind ``"skipped"`` say so.

    Args:
        output: a results file, made or resumed; several processes may append to one file.
        model, tokenizer: what ``specification.load()`` gives, where it is at hand; not changed.
        shard: ``"3/8"`` computes the third eighth of the cells, as their content decides, the same
            in every process; the files of all shards are joined by ``cat``.

    Raises:
        ValueError: a file of another specification (the message names the difference), layers that
            the model does not have, a shard that is none, and what the steps refuse.
        OSError: the file cannot be written.
        ConnectionError: a hub corpus or task that cannot be reached.
    """
    part = read_shard(shard)
    results = Results(output)
    try:
        results.expect(specification.identity())
        check_tasks(specification.tasks)  # not after hours
        if model is None or tokenizer is None:
            model, tokenizer = specification.load()
        results.begin(specification.identity(model))
        _Run(specification, results, model, tokenizer, part).run()
    finally:
        results.close()
    return results


def read_shard(text: str) -> tuple[int, int]:
    """(3, 8) of ``"3/8"``.

    Raises:
        ValueError: anything that is not the n-th of so many.
    """
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total)):
        raise ValueError(f"shard {text!r} is not of the form 3/8, the third of eight")
    return int(index), int(total)


class _Run:
    """The cells still to be computed, and what they share."""

    def __init__(
        self,
        specification: Specification,
        results: Results,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shard: tuple[int, int],
    ) -> None:
        self.specification, self.results, self.shard = specification, results, shard
        self.model, self.tokenizer, self.total = model, tokenizer, num_layers(model)
        self.removed: list[Layers | Chosen] = [
            *specification.layers,
            *(tuple(gap.removed) for gap in contiguous(specification.starts, self.total)),
            *product(specification.criteria, specification.n),
        ]
        for layers in specification.layers:
            runs(layers, self.total)
        for n in specification.n:
            contiguous(n, self.total)  # refuses what the model does not have
        self.todo: dict[tuple[Layers, str], list[tuple[str, str]]] = {}

    def run(self) -> None:
        """Choose, plan, and compute cell by cell."""
        cells = [cell for cell in self._cells() if self._is_of_shard(cell)]
        self._plan(cells, self._choose(cells))
        if any(operator == AUTO for _, operator in self.todo):
            self._recipe  # refuses models without a norm to read  # noqa: B018
        for (layers, operator), measures in track(self.todo.items(), "scoring", unit="model"):
            self.results.refresh()
            if missing := [m for m in measures if not self._is_known(layers, operator, *m)]:
                self._score(layers, operator, missing)

    def _cells(self) -> Iterator[Cell]:
        """Every cell that is asked for, the dense model's first."""
        specification = self.specification
        models = [((), DENSE), *product(self.removed, specification.operators)]
        measures = [
            *((PERPLEXITY, corpus) for corpus in specification.perplexity),
            *((ACCURACY, task) for task in specification.tasks),
        ]
        for (removed, operator), measure in product(models, measures):
            yield removed, operator, *measure

    def _is_of_shard(self, cell: Cell) -> bool:
        index, total = self.shard
        digest = hashlib.sha256(repr((*cell[:3], shown(cell[3]))).encode()).digest()
        return int.from_bytes(digest[:8], "big") % total == index - 1

    def _choose(self, cells: list[Cell]) -> dict[Chosen, Layers]:
        """What each criterion removes; one pass serves all that is not in the file."""
        asked = [c for c in self.removed if _is_choice(c)]
        if self.specification.perplexity or self.specification.tasks:
            asked = [c for c in asked if c in {cell[0] for cell in cells}]
        missing: dict[str, list[int]] = {}
        for criterion, n in asked:
            if not self.results.get("selection", criterion, n):
                missing.setdefault(criterion, []).append(n)
        known: Tensor | Calibration = self._windows if missing else torch.empty(0)
        if wanted := {b for c, ns in missing.items() for b in needed(c, ns, self.total)}:
            moments = any("moments" in CRITERIA[c].needs for c in missing)
            known = calibrate(self.model, self._windows, sorted(wanted), moments=moments)
        for criterion, ns in track(missing.items(), "selecting", unit="criterion"):
            begin = time.perf_counter()
            scored = self._selection if "windows" in CRITERIA[criterion].needs else None
            found = select_several(self.model, known, ns, criterion, windows=scored)
            each = (time.perf_counter() - begin) / len(searched(criterion, ns))
            for n, layers in found.items():
                self.results.append(
                    "selection", criterion=criterion, n=n, layers=spell(layers), seconds=each
                )
        return {c: read_layers(self.results.get("selection", *c)["layers"]) for c in asked}

    def _plan(self, cells: list[Cell], chosen: Mapping[Chosen, Layers]) -> None:
        """Sort what is missing by model, and say what is left out."""
        for removed, operator, measure, on in cells:
            layers = chosen[removed] if _is_choice(removed) else removed
            if 0 in layers and operator not in (PRUNED, AUTO) and reads_layer(family_of(operator)[1]):
                reason = f"{operator} repairs the layer before a gap, and layer 0 is removed"
                self._skip(layers, operator, "", reason)
            elif not self._is_known(layers, operator, measure, on):
                measures = self.todo.setdefault((layers, operator), [])
                if (measure, on) not in measures:
                    measures.append((measure, on))
