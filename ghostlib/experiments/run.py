"""A whole evaluation, as the paper's tables are made: every repair, every corpus, every task.

    settings = Settings(n=(5, 7, 9), operators=("pruned", "linearpatch-d", "ghost"), limit=100)
    model, tokenizer = settings.load()
    results = evaluate(model, tokenizer, settings, "evaluation.json")
    print(report(results.cells))  # of ghostlib.tables

Every number is a cell of a `Results` file: a run that was stopped goes on, and a finished one can
be asked for more repairs, depths, corpora or tasks.
"""

import os
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import track
from ghostlib.evaluation.perplexity import PUBLISHED, corpus_perplexity
from ghostlib.evaluation.tasks import check_tasks, zero_shot
from ghostlib.experiments.results import Results
from ghostlib.experiments.spec import DENSE, PRUNED, SEQUENTIAL, Settings, named
from ghostlib.models.architectures import num_layers
from ghostlib.models.boundaries import contiguous, runs
from ghostlib.operators.families import FAMILIES
from ghostlib.recovery.recipe import AUTO, Recipe
from ghostlib.recovery.recover import recover
from ghostlib.selection.criteria import CRITERIA, Layers, needed, select_several
from ghostlib.statistics.calibration import Calibration, calibrate
from ghostlib.surgery.cut import prune

_FEW = 8  # windows of a corpus for which nothing is published


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    output: str | os.PathLike[str],
) -> Results:
    """Compute the cells that ``output`` lacks, the dense model's first, and return all.

    Layers are chosen in one pass and all repairs computed from another; of the repaired models,
    which share the dense one's weights, one exists at a time.

    Args:
        model: the dense model, such as `Settings.load` gives; it is not changed.
        tokenizer: its tokenizer.
        output: a results file, made or gone on with.

    Returns:
        Its `Results`. Cells hold the ``layers`` removed for an n, or an ``operator``, its ``n`` (0
        for the dense model) and either a ``perplexity`` or the ``scores`` of a task's parts. What
        ``"auto"`` chose for an n is printed, and kept under ``"choice n=…"``.

    Raises:
        ValueError: a file of other settings, unknown tasks, and what the steps refuse.
        ModuleNotFoundError: tasks are asked for and lm-eval is not installed.
        ConnectionError: a hub corpus or task that cannot be reached.
    """
    results = Results.open(output, settings.identity(model))
    _Evaluation(model, tokenizer, settings, results).run()
    return results


class _Evaluation:
    """The cells still to be computed, and what they share."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        results: Results,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.results = results
        for n in settings.n:
            contiguous(n, num_layers(model))  # checks n
        self.measures: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
            **{
                f"perplexity of {named(c)}": partial(self._perplexity, c)
                for c in settings.perplexity
            },
            **{f"accuracy on {named(t)}": partial(self._accuracy, t) for t in settings.tasks},
        }
        repaired = [(name, n) for n in settings.n for name in settings.operators]
        self.todo = [variant for variant in [(DENSE, 0), *repaired] if self._missing(*variant)]

    def run(self) -> None:
        if not self.todo:
            return
        check_tasks(self.settings.tasks)  # not after hours
        if any(name == AUTO for name, _ in self.todo):
            _ = self._recipe  # refuses models without a norm to read
        for operator, n in track(self.todo, "evaluating", unit="model"):
            if operator == DENSE:
                self._measure(self.model, operator, n)
            else:
                self._measure(self._build(operator, n), operator, n)

    def _missing(self, operator: str, n: int) -> list[str]:
        return [m for m in self.measures if _key(operator, n, m) not in self.results.cells]

    def _measure(self, variant: PreTrainedModel, operator: str, n: int) -> None:
        def value(measure: str) -> dict[str, Any]:
            return {"operator": operator, "n": n} | self.measures[measure](variant)

        for measure in self._missing(operator, n):
            self.results.cell(_key(operator, n, measure), partial(value, measure))

    def _perplexity(self, corpus: str, variant: PreTrainedModel) -> dict[str, Any]:
        count = self.settings.test_windows or (None if corpus in PUBLISHED else _FEW)
        length, seed = self.settings.test_length, self.settings.seed
        how: dict[str, Any] = {"length": length, "count": count, "seed": seed}
        return {"perplexity": corpus_perplexity(variant, self.tokenizer, corpus, **how)}

    def _accuracy(self, task: str, variant: PreTrainedModel) -> dict[str, Any]:
        limit, batch_size = self.settings.limit, self.settings.batch_size
        scores = zero_shot(variant, self.tokenizer, task, limit=limit, batch_size=batch_size)
        return {"scores": list(scores.values())}

    def _build(self, operator: str, n: int) -> PreTrainedModel:
        layers = self._layers[n]
        if operator == PRUNED:
            return prune(self.model, layers)
        if operator == AUTO:
            self._recipe.collect(self._layers[n] for name, n in self.todo if name == AUTO)
            choice = self._recipe.choose(layers)
            print(f"n = {n}, {choice}")
            self.results.cell(f"choice n={n}", lambda: choice.summary)
            return choice.apply(self.model)
        name = operator.removesuffix(SEQUENTIAL)
        if name != operator:
            return recover(self.model, self._windows, layers, name, fit="sequential")
        return recover(self.model, self._statistics, layers, name)

    @cached_property
    def _windows(self) -> Tensor:
        return self.settings.calibration_windows(self.tokenizer)

    @cached_property
    def _recipe(self) -> Recipe:
        return Recipe(self.model, self._windows)

    @cached_property
    def _statistics(self) -> Calibration:
        """What all repairs that are to be built are computed from."""
        fitted = [(name, n) for name, n in self.todo if name in FAMILIES]
        total = num_layers(self.model)
        gaps = {gap for _, n in fitted for gap in runs(self._layers[n], total)}
        regressors = {FAMILIES[name].regressor for name, _ in fitted}
        return calibrate(self.model, self._windows, sorted(gaps), regressors=regressors)

    @cached_property
    def _layers(self) -> dict[int, Layers]:
        """What is removed for each n that is to be built, chosen in one pass."""
        criterion = self.settings.criterion
        ns = sorted({n for _, n in self.todo if n})
        lacking = [n for n in ns if _chosen(n) not in self.results.cells]
        if lacking:
            count = self.settings.selection_windows or len(self._windows)
            windows = self._windows[[i * len(self._windows) // count for i in range(count)]]
            known: Tensor | Calibration = windows
            if wanted := needed(criterion, lacking, num_layers(self.model)):
                moments = "moments" in CRITERIA[criterion].needs
                known = calibrate(self.model, windows, wanted, moments=moments)
            found = select_several(self.model, known, lacking, criterion, windows=windows)
            for n, layers in found.items():
                self.results.cell(_chosen(n), partial(dict, layers=list(layers)))
        return {n: tuple(self.results.cells[_chosen(n)]["layers"]) for n in ns}


def _key(operator: str, n: int, measure: str) -> str:
    return f"{operator} n={n} / {measure}" if n else f"{operator} / {measure}"


def _chosen(n: int) -> str:
    return f"layers n={n}"
