"""The specification of an experiment: which model, which layers, which operators, on which text.

Neither torch nor transformers is imported here: the command line, whose options are its
fields, answers at once.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlib.common import AUTO, PRUNED, SEQUENTIAL, fits, whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ghostlib.evaluation.perplexity import ScoredText
    from ghostlib.operators.families import Family

_FEW = 8  # windows of a corpus for which nothing is published


@dataclass(frozen=True)
class Specification:
    """What is compared, and on what; a single value serves for a list of one.

    Attributes:
        model: smollm2 (embedded), a local folder, or a hub id.
        dtype: float32, bfloat16, float16; by default as the model was saved.
        device_map: as for transformers; by default auto where there is a GPU.
        criteria: ways of choosing layers; by default cosine.
        n: how many layers to remove, each in turn; by default 7.
        layers: remove these instead of choosing, such as 12-18 or 12-15,17.
        starts: remove every block of this many layers instead.
        operators: families, regressors such as ``"x, n(x); 1/|y|"``, these with " sequential"
            behind them; pruned (no repair); auto (the recipe), "auto none" and "auto matrix" (on a
            budget).
        calibration: corpora that operators are fitted on.
        split: part of the calibration corpora.
        windows: calibration windows of each corpus.
        length: tokens of a calibration window.
        selection_windows: windows of each corpus, behind those, that searches score.
        selection_length: the first so many tokens of these; by default 1024, or all.
        perplexity: corpora that are scored.
        test_split: part of the scored corpora; by default as published, or test.
        test_windows: scored windows of each corpus; by default as published, or 8.
        test_length: tokens of a scored window.
        tasks: zero-shot tasks that are scored: embedded, of lm-eval, or .jsonl files.
        probes: abilities that are scored, such as copying.
        probe_items: items of each probe at most.
        bos: whether every window of a corpus begins with BOS, yes or no; by default as the
            tokenizer does it. Published protocols have none.
        limit: the first so many items of each task; by default all.
        batch_size: sequences in a forward pass of a task.
        seed: which windows are drawn.

    Raises:
        ValueError: an unknown name, a count that cannot be, arguments that contradict each other,
            or nothing to do; the message names the value.
        FileNotFoundError: a model folder, corpus or task file that is not there.
        ModuleNotFoundError: tasks of lm-eval, which is not installed.
    """

    model: str = "smollm2"
    dtype: str | None = None
    device_map: str | None = None
    criteria: Sequence[str] = ()
    n: Sequence[int] = ()
    layers: Sequence[Any] = ()
    starts: int | None = None
    operators: Sequence[str] = (PRUNED, "linearpatch-d", "linearpatch-r", "replaceme", "ghost")
    calibration: Sequence[str] = ("wiki", "pydoc")
    split: str = "train"
    windows: int = 8
    length: int = 2048
    selection_windows: int = 1
    selection_length: int | None = None
    perplexity: Sequence[str] = ("wiki", "pydoc")
    test_split: str | None = None
    test_windows: int | None = None
    test_length: int = 2048
    tasks: Sequence[str] = ()
    probes: Sequence[str] = ()
    probe_items: int | None = None
    bos: bool | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        from ghostlib.evaluation.tasks import check_names
        from ghostlib.models.loading import check_source
        from ghostlib.text.corpora import documents

        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                several = isinstance(value, Iterable) and not isinstance(value, str)
                listed = value if several else [value]
                self._set(field.name, [_READ.get(field.name, str)(each) for each in listed])
            elif "int" in str(field.type) and not (value is None and field.default is None):
                whole_number(value, field.name, _LEAST.get(field.name, 1))
            elif not fits(value, field.type):
                raise ValueError(f"{field.name} = {value!r}: give text, as the name of one")
        if not (self.layers or self.starts):
            self._set("criteria", self.criteria or ["cosine"])
            self._set("n", self.n or [7])
        elif self.criteria or self.n:
            raise ValueError("give criteria and n, or the layers (layers, starts), and not both")
        part = self.selection_length or min(1024, self.length)
        object.__setattr__(self, "selection_length", part)
        if part > self.length:
            raise ValueError(f"selection_length = {part}: at most length = {self.length}")
        if not isinstance(self.bos, bool | None):
            raise ValueError(f"bos = {self.bos!r}: give True, False, or None for the tokenizer's")
        check_source(self.model, self.dtype, self.device_map)
        for corpus in self.calibration:
            documents(corpus, split=self.split)
        for corpus in self.perplexity:
            documents(corpus, split=self.test_split or "test")
        check_names(self.tasks)
        if not self.calibration:
            raise ValueError("name at least one calibration corpus, such as 'wiki'")
        if not (self.perplexity or self.tasks or self.probes or self.criteria):
            raise ValueError("nothing to do: name a corpus, task or probe, or a criterion")
        if any(map(budget_of, self.operators)) and self.windows * len(self.calibration) < 2:
            raise ValueError(f"windows = {self.windows}: the recipe needs at least 2 in all")

    def _set(self, name: str, values: Sequence[Any]) -> None:
        known = [base_name(value) if isinstance(value, str) else value for value in values]
        if twice := [value for value in known if known.count(value) > 1]:
            raise ValueError(
                f"{name} has {twice[0]!r} twice: name each once, and files by different last names"
            )
        object.__setattr__(self, name, tuple(values))

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, in its dtype and place, and its tokenizer; see `ghostlib.load_model`."""
        import torch

        from ghostlib.models.loading import load_model

        placed = self.device_map or ("auto" if torch.cuda.is_available() else None)
        return load_model(self.model, dtype=self.dtype, device_map=placed)

    def identity(self, model: "PreTrainedModel | None" = None) -> dict[str, Any]:
        """Everything that decides the number in a cell, and no path of this machine.

        Neither what is computed is among it nor the place of the weights. Without the model it is
        what is known before that is loaded.
        """
        apart = {"device_map", "dtype", "criteria", "n", "layers", "starts", "operators"}
        apart |= {"perplexity", "tasks", "probes", "batch_size"}
        # files from before there were these resume
        apart |= {name for name in ("probe_items", "bos") if getattr(self, name) is None}
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        known |= {
            "model": base_name(self.model),
            "calibration": [*map(base_name, self.calibration)],
        }
        if model is not None:
            from ghostlib.models.architectures import fingerprint

            dtype = str(model.dtype).removeprefix("torch.")
            known |= {"fingerprint": fingerprint(model), "dtype": dtype}
        return known

    def files(self) -> list[dict[str, str]]:
        """The local files that are read, by their last names, and digests of what they hold."""
        from ghostlib.text.corpora import CORPORA
        from ghostlib.text.documents import text_files

        read = [("calibration", name) for name in self.calibration if name not in CORPORA]
        read += [("perplexity", name) for name in self.perplexity if name not in CORPORA]
        read += [("tasks", name) for name in self.tasks if name.endswith(".jsonl")]
        found = []
        for field, name in read:
            if parts := text_files(Path(name).expanduser()):
                digest = hashlib.sha256(b"".join(map(_digest, parts))).hexdigest()[:12]
                found.append({"field": field, "name": base_name(name), "digest": digest})
        return found

    def draw_calibration(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """(corpora x windows, length) token ids, corpus after corpus."""
        import torch

        return torch.cat([self._draw(c, tokenizer, self.windows) for c in self.calibration])

    def draw_selection(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """(corpora x selection_windows, selection_length) ids, of windows behind those."""
        import torch

        count = self.windows + self.selection_windows
        drawn = [self._draw(c, tokenizer, count)[self.windows :] for c in self.calibration]
        return torch.cat(drawn)[:, : self.selection_length]

    def _draw(self, corpus: str, tokenizer: "PreTrainedTokenizerBase", count: int) -> "Tensor":
        from ghostlib.text.corpora import token_windows

        drawn: dict[str, Any] = {"split": self.split, "length": self.length, **self._alike}
        return token_windows(corpus, tokenizer, count=count, **drawn)

    def draw_test(self, tokenizer: "PreTrainedTokenizerBase", corpus: str) -> "ScoredText":
        """The held-out windows of a corpus."""
        from ghostlib.evaluation.perplexity import PUBLISHED, scored_text

        count = self.test_windows or (None if corpus in PUBLISHED else _FEW)
        drawn: dict[str, Any] = {"split": self.test_split, "length": self.test_length}
        return scored_text(tokenizer, corpus, count=count, **drawn, **self._alike)

    @property
    def _alike(self) -> dict[str, Any]:
        """What all windows are drawn with."""
        return {"seed": self.seed, "bos": self.bos}


def base_name(name: str) -> str:
    """A local path by its last part, any other name as it is."""
    return Path(name).name if os.path.exists(os.path.expanduser(name)) else name


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def whole_number(value: Any, name: str = "n", least: int = 1) -> int:
    """``value``, if it is a whole number of at least ``least``.

    Raises:
        ValueError: it is not; the message names both.
    """
    if not whole(value) or value < least:
        raise ValueError(f"{name} = {value!r}: give a whole number of at least {least}")
    return int(value)


def budget_of(operator: str) -> str | None:
    """The budget of the recipe under an operator's name, ``"auto matrix"``; None of any other.

    Raises:
        ValueError: an unknown budget.
    """
    name, _, budget = operator.partition(" ")
    if name != AUTO or f" {budget}" == SEQUENTIAL:
        return None
    from ghostlib.recovery.recipe import BUDGETS

    if budget:
        BUDGETS[budget]
    return budget or "any"


def family_of(operator: str) -> "Family":
    """The family behind an operator's name, however it is fitted; `ValueError` if there is none."""
    from ghostlib.operators.families import Family

    name = operator.removesuffix(SEQUENTIAL)
    return Family.of(operator if name in (PRUNED, AUTO) else name)


def canonical(operator: str) -> str:
    """An operator as results name it, a regressor in its one spelling.

    Raises:
        ValueError: an unknown one, one that needs an option, or a sequential fit of one that reads
            more than the stream.
    """
    import torch

    from ghostlib.operators.families import FAMILIES
    from ghostlib.operators.solve import solve
    from ghostlib.statistics.features import STREAM
    from ghostlib.statistics.moments import Moments

    if budget := budget_of(operator):
        return AUTO if budget == "any" else operator
    if operator == PRUNED:
        return operator
    family, name = family_of(operator), operator.removesuffix(SEQUENTIAL)
    if name != operator and family.regressor.reads_mlp:
        raise ValueError(
            f"{operator!r}: {name} reads more than the stream, leave out {SEQUENTIAL!r}"
        )
    if family.regressor == STREAM:
        eye = torch.eye(4, dtype=torch.float64)  # one that needs an option says so of any moments
        solve(Moments(4).update(eye, eye), family)
    known = name if name in FAMILIES else str(family.regressor)
    return known + operator.removeprefix(name)


def _layers(layers: Any) -> tuple[int, ...]:
    from ghostlib.models.boundaries import read_layers, runs

    if not isinstance(layers, Iterable):
        raise ValueError(f"layers = {layers}: give sets of layers, such as '12-18' or [(12, 13)]")
    listed = read_layers(layers) if isinstance(layers, str) else layers
    whole = tuple(sorted(whole_number(layer, "layer", 0) for layer in listed))
    runs(whole, max(whole, default=0) + 2)  # refuses none, and one named twice
    return whole


def _known(module: str, registry: str, name: str) -> str:
    """``name``, if a registry has it; its module is imported when it is first asked."""
    getattr(import_module(module), registry)[name]
    return name


_READ: dict[str, Callable[[Any], Any]] = {
    "n": whole_number,
    "layers": _layers,
    "criteria": partial(_known, "ghostlib.selection.criteria", "CRITERIA"),
    "operators": lambda name: canonical(str(name)),
    "probes": partial(_known, "ghostlib.evaluation.abilities", "PROBES"),
}
_LEAST = {"test_length": 2, "selection_length": 2, "seed": 0}
