"""The grid: every criterion with every repair at every depth, from one set of statistics.

What is computed is kept in a `Results` file cell by cell, so that a run that was stopped goes on,
and nothing of other settings is mixed in. `table` turns such a file into rows.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import track
from ghostlib.experiments.results import Results
from ghostlib.experiments.spec import SEQUENTIAL, named
from ghostlib.models.architectures import fingerprint, num_layers
from ghostlib.models.boundaries import Boundary, contiguous, runs, spell
from ghostlib.operators.families import Family
from ghostlib.operators.solve import Operator, solve
from ghostlib.recovery.recipe import AUTO, Recipe
from ghostlib.recovery.sequential import dense_streams, fit_sequential
from ghostlib.selection.criteria import Layers, needed, searched, select_several
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import Calibration, calibrate
from ghostlib.text.corpora import token_windows

NONE = "none"
REPAIRS = (
    NONE,
    "magnitude",
    "linearpatch-d",
    "linearpatch-r",
    "replaceme",
    "ghost",
    "ghost sequential",
    AUTO,
)
_WITHOUT_FAMILY = (NONE, AUTO)


@dataclass(frozen=True)
class Plan:
    """Which windows a grid is computed from; `settings` says it all to a `Results` file.

    Calibration and selection windows are consecutive windows of the train split of ``corpora``,
    test windows are of the test split of these or of ``test_corpora``; ``count`` windows of each.
    """

    corpora: tuple[str, ...] = ("wiki", "pydoc")
    test_corpora: tuple[str, ...] | None = None
    calibration_count: int = 8
    calibration_length: int = 2048
    selection_count: int = 1
    selection_length: int = 1024
    test_count: int = 3
    test_length: int = 1024
    seed: int = 0

    def settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """Everything that decides the numbers."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        known["corpora"] = [named(corpus) for corpus in self.corpora]
        if self.test_corpora:
            known["test_corpora"] = [named(corpus) for corpus in self.test_corpora]
        return {"model": fingerprint(model), "dtype": str(model.dtype), **known}

    @property
    def scored(self) -> tuple[str, ...]:
        """The corpora that are scored."""
        return self.test_corpora or self.corpora

    def train(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """(calibration windows, selection windows), which share no token."""
        length, count = self.calibration_length, self.calibration_count
        tokens = self.selection_count * self.selection_length
        more = math.ceil(tokens / length)
        calibration, selection = [], []
        for corpus in self.corpora:
            windows = token_windows(
                corpus, tokenizer, length=length, count=count + more, seed=self.seed
            )
            calibration.append(windows[:count])
            rest = windows[count:].flatten()[:tokens]
            selection.append(rest.view(self.selection_count, self.selection_length))
        return torch.cat(calibration), torch.cat(selection)

    def test(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """(scored corpora x test_count, test_length) held-out windows."""
        how: dict[str, Any] = {"length": self.test_length, "count": self.test_count}
        return torch.cat(
            [
                token_windows(corpus, tokenizer, split="test", seed=self.seed, **how)
                for corpus in self.scored
            ]
        )


class Grid:
    """One model's grid, as far as it is computed.

    Args:
        model: the dense model; it is not changed. tokenizer: its tokenizer.
        results: an open file with ``plan.settings(model)``.
        plan: the windows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        results: Results,
        plan: Plan,
    ) -> None:
        self.model, self.tokenizer, self.results, self.plan = model, tokenizer, results, plan
        self.total = num_layers(model)
        self._pass: Calibration | None = None
        self._streams: dict[int, Tensor] = {}

    @cached_property
    def _recipe(self) -> Recipe:
        return Recipe(self.model, self._train[0])

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        return self.plan.train(self.tokenizer)

    @cached_property
    def _trials(self) -> Trials:
        return Trials(self.model, self.plan.test(self.tokenizer))

    def select(self, criteria: Sequence[str], ns: Sequence[int]) -> dict[tuple[str, int], Layers]:
        """What each criterion removes for each n; one pass serves all that are missing."""
        missing = [c for c in criteria if any(_chosen(c, n) not in self.results.cells for n in ns)]
        boundaries = {b for c in missing for b in needed(c, ns, self.total)}
        windows, scored = self._train
        stats = calibrate(self.model, windows, sorted(boundaries)) if boundaries else windows
        for criterion in track(missing, "selecting", unit="criterion"):
            begin = time.perf_counter()
            found = select_several(self.model, stats, ns, criterion, windows=scored)
            each = (time.perf_counter() - begin) / len(searched(criterion, ns))
            for n, layers in found.items():
                value = {"layers": list(layers), "seconds": round(each, 1)}
                self.results.cell(_chosen(criterion, n), partial(dict, value))
        return {
            (c, n): tuple(self.results.cells[_chosen(c, n)]["layers"]) for c in criteria for n in ns
        }

    def score(self, choices: Iterable[Layers], repairs: Sequence[str] = REPAIRS) -> None:
        """Losses of every test window for every choice of layers with every repair."""
        # An unknown name is refused here, before the long passes.
        known = {r: _family(r) for r in repairs if r not in _WITHOUT_FAMILY}
        self.results.cell("dense", lambda: self._by_corpus(self._trials.losses(())))
        todo = [
            (layers, repair)
            for layers in dict.fromkeys(choices)
            for repair in repairs
            if _scored(layers, repair) not in self.results.cells
            # Without layer 0 no MLP is left before the first gap to repair it with.
            and not (repair in known and known[repair].regressor.reads_mlp and 0 in layers)
        ]
        self._prepare(todo)
        for layers, repair in track(todo, "scoring", unit="cell"):
            self.results.cell(_scored(layers, repair), partial(self._score, layers, repair))

    def _prepare(self, todo: Sequence[tuple[Layers, str]]) -> None:
        """One pass for the statistics, one for the streams, of all that is to be scored."""
        fitted = [(layers, repair) for layers, repair in todo if repair not in _WITHOUT_FAMILY]
        if gaps := {gap for layers, _ in fitted for gap in self._gaps(layers)}:
            # A sequential fit of one gap is the teacher's, from the same moments.
            regressors = {_family(repair).regressor for _, repair in fitted}
            self._pass = calibrate(self.model, self._train[0], sorted(gaps), regressors=regressors)
        if chosen := [layers for layers, repair in todo if repair == AUTO]:
            self._recipe.collect(chosen)
        indices = {
            index
            for layers, repair in todo
            if repair.endswith(SEQUENTIAL) and len(self._gaps(layers)) > 1
            for index in (layers[0], *(gap.stop for gap in self._gaps(layers)))
        }
        if indices:
            self._streams = dense_streams(self.model, self._train[0], indices)

    def _score(self, layers: Layers, repair: str) -> dict[str, list[float]]:
        return self._by_corpus(self._trials.losses(layers, self._operators(layers, repair)))

    def _operators(self, layers: Layers, repair: str) -> Mapping[Boundary, Operator]:
        if repair == NONE:
            return {}
        if repair == AUTO:
            choice = self._recipe.choose(layers)
            self.results.cell(f"choice for {spell(layers)}", lambda: choice.summary)
            return choice.operators
        assert self._pass is not None  # made by _prepare
        family, gaps = _family(repair), self._gaps(layers)
        if repair.endswith(SEQUENTIAL) and len(gaps) > 1:
            how: dict[str, Any] = {"streams": self._streams}
            return fit_sequential(self.model, self._train[0], gaps, family, **how)
        moments = self._pass.of(family.regressor)
        return {gap: solve(moments[gap], family) for gap in gaps}

    def _by_corpus(self, losses: Tensor) -> dict[str, list[float]]:
        corpora = [named(corpus) for corpus in self.plan.scored]
        parts = losses.view(len(corpora), -1)
        return {corpus: part.tolist() for corpus, part in zip(corpora, parts, strict=True)}

    def _gaps(self, layers: Layers) -> list[Boundary]:
        return runs(layers, self.total)


def _family(repair: str) -> Family:
    """The family of a repair, which may be a regressor such as ``"x, n(x); 1/|y|"``."""
    name = repair.removesuffix(SEQUENTIAL)
    return Family.of(repair if name == AUTO else name)


def blocks(n: int, total: int) -> list[Layers]:
    """Every contiguous choice of ``n`` layers."""
    return [tuple(gap.removed) for gap in contiguous(n, total)]


def _chosen(criterion: str, n: int) -> str:
    return f"select {criterion} {n}"


def _scored(layers: Layers, repair: str) -> str:
    return f"{repair} without {spell(layers)}"
