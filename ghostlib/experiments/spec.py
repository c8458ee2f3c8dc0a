"""The specification of an experiment: model, layers, operators and text.

Its fields are options of the command line, which starts fast: neither torch nor transformers is
imported here.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlib.common import AUTO, PRUNED, SEQUENTIAL, is_integer, is_kind

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ghostlib.evaluation.perplexity import ScoredText
    from ghostlib.operators.families import Family

_TEST_WINDOWS = 8  # of a corpus without a published protocol


@dataclass(frozen=True)
class Specification:
    """The models that are compared and the texts they are scored on.

    A single value is a list of one.

    Attributes:
        model: smollm2 (embedded), a local folder, or a hub id.
        dtype: float32, bfloat16, float16; by default as the model was saved.
        device_map: as for transformers; by default auto where there is a GPU.
        criteria: criteria that choose layers; by default cosine.
        n: numbers of layers to remove; by default 7.
        layers: remove these instead of choosing, such as 12-18 or 12-15,17.
        starts: remove every block of this many layers instead.
        operators: families, regressors such as ``"x, n(x); 1/|y|"``, either with " sequential"
            appended; pruned (no repair); auto (the recipe), "auto none" and "auto matrix" (on a
            budget).
        calibration: corpora that operators are fitted on.
        split: split of the calibration corpora.
        windows: calibration windows of each corpus.
        length: tokens per calibration window.
        selection_windows: windows of each corpus that searches score, after those of calibration.
        selection_length: tokens of these windows, from the first; by default 1024, or all.
        perplexity: corpora that are scored.
        test_split: split of the scored corpora; by default as published, or test.
        test_windows: scored windows of each corpus; by default as published, or 8.
        test_length: tokens per scored window.
        tasks: zero-shot tasks that are scored: embedded, of lm-eval, or .jsonl files.
        probes: abilities that are scored, such as copying.
        probe_items: largest number of items of each probe.
        bos: whether every window of a corpus begins with BOS, yes or no; by default as the
            tokenizer does it. Published protocols have none.
        limit: items of each task, from the first; by default all.
        batch_size: sequences in a forward pass of a task.
        seed: seed of the windows and the probes.

    Raises:
        ValueError: an unknown name, an invalid number, contradicting arguments, or nothing to do;
            the message names the value.
        FileNotFoundError: a model folder, corpus or task file that does not exist.
        ModuleNotFoundError: tasks of lm-eval while it is not installed.
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
                single = isinstance(value, str) or not isinstance(value, Iterable)
                values = [value] if single else value
                self._set(field.name, [_READ.get(field.name, str)(each) for each in values])
            elif "int" in str(field.type) and not (value is None and field.default is None):
                whole_number(value, field.name, _LEAST.get(field.name, 1))
            elif not is_kind(value, field.type):
                raise ValueError(f"{field.name} = {value!r}: give text, as the name of one")
        if not (self.layers or self.starts):
            self._set("criteria", self.criteria or ["cosine"])
            self._set("n", self.n or [7])
        elif self.criteria or self.n:
            raise ValueError("give criteria and n, or the layers (layers, starts), and not both")
        length = self.selection_length or min(1024, self.length)
        object.__setattr__(self, "selection_length", length)
        if length > self.length:
            raise ValueError(f"selection_length = {length}: at most length = {self.length}")
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
            raise ValueError(f"windows = {self.windows}: the recipe needs at least 2 in total")

    def _set(self, name: str, values: Sequence[Any]) -> None:
        names = [base_name(value) if isinstance(value, str) else value for value in values]
        if copies := [value for value in names if names.count(value) > 1]:
            raise ValueError(
                f"{name} has {copies[0]!r} twice: name each once, and files by different last names"
            )
        object.__setattr__(self, name, tuple(values))

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, in its dtype and place, and its tokenizer; see `ghostlib.load_model`."""
        import torch

        from ghostlib.models.loading import load_model

        device_map = self.device_map or ("auto" if torch.cuda.is_available() else None)
        return load_model(self.model, dtype=self.dtype, device_map=device_map)

    def identity(self, model: "PreTrainedModel | None" = None) -> dict[str, Any]:
        """Everything that determines the score of a cell, without paths of this machine.

        It leaves out which cells are computed and where the weights are; without the model, also
        its dtype and fingerprint.
        """
        omitted = {"device_map", "dtype", "criteria", "n", "layers", "starts", "operators"}
        omitted |= {"perplexity", "tasks", "probes", "batch_size"}
        # files that are older than these fields resume
        omitted |= {name for name in ("probe_items", "bos") if getattr(self, name) is None}
        identity = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in omitted}
        identity |= {"model": base_name(self.model)}
        identity |= {"calibration": [*map(base_name, self.calibration)]}
        if model is not None:
            from ghostlib.models.architectures import fingerprint

            dtype = str(model.dtype).removeprefix("torch.")
            identity |= {"fingerprint": fingerprint(model), "dtype": dtype}
        return identity

    def files(self) -> list[dict[str, str]]:
        """The local files that are read: field, last part of the path, and digest."""
        from ghostlib.text.corpora import CORPORA
        from ghostlib.text.documents import text_files

        names = [("calibration", name) for name in self.calibration if name not in CORPORA]
        names += [("perplexity", name) for name in self.perplexity if name not in CORPORA]
        names += [("tasks", name) for name in self.tasks if name.endswith(".jsonl")]
        files = []
        for field, name in names:
            if parts := text_files(Path(name).expanduser()):
                digest = hashlib.sha256(b"".join(map(_digest, parts))).hexdigest()[:12]
                files.append({"field": field, "name": base_name(name), "digest": digest})
        return files

    def draw_calibration(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """(corpora x windows, length) token ids, corpus after corpus."""
        import torch

        return torch.cat([self._draw(c, tokenizer, self.windows) for c in self.calibration])

    def draw_selection(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """(corpora x selection_windows, selection_length) ids, of the windows after those."""
        import torch

        count = self.windows + self.selection_windows
        windows = [self._draw(c, tokenizer, count)[self.windows :] for c in self.calibration]
        return torch.cat(windows)[:, : self.selection_length]

    def _draw(self, corpus: str, tokenizer: "PreTrainedTokenizerBase", count: int) -> "Tensor":
        from ghostlib.text.corpora import token_windows

        options: dict[str, Any] = {"split": self.split, "length": self.length}
        options |= {"count": count, "seed": self.seed, "bos": self.bos}
        return token_windows(corpus, tokenizer, **options)

    def draw_test(self, tokenizer: "PreTrainedTokenizerBase", corpus: str) -> "ScoredText":
        """The held-out windows of a corpus."""
        from ghostlib.evaluation.perplexity import PUBLISHED, scored_text

        count = self.test_windows or (None if corpus in PUBLISHED else _TEST_WINDOWS)
        options: dict[str, Any] = {"split": self.test_split, "length": self.test_length}
        options |= {"count": count, "seed": self.seed, "bos": self.bos}
        return scored_text(tokenizer, corpus, **options)


def base_name(name: str) -> str:
    """The last part of a local path, any other name unchanged."""
    return Path(name).name if os.path.exists(os.path.expanduser(name)) else name


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def whole_number(value: Any, name: str = "n", least: int = 1) -> int:
    """``value`` as an int; `ValueError` unless it is a whole number of at least ``least``."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} = {value!r}: give a whole number of at least {least}")
    return int(value)


def budget_of(operator: str) -> str | None:
    """The budget in ``"auto matrix"``; None for operators other than the recipe.

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
    """The family of an operator, also of a sequential one; `ValueError` if it is unknown."""
    from ghostlib.operators.families import Family

    name = operator.removesuffix(SEQUENTIAL)
    return Family.of(operator if name in (PRUNED, AUTO) else name)


def canonical(operator: str) -> str:
    """The name of an operator in results, with one spelling for each regressor.

    Raises:
        ValueError: an unknown operator, one that needs an option, or a sequential fit of one that
            reads more than the stream.
    """
    from ghostlib.operators.families import FAMILIES
    from ghostlib.operators.solve import check_options

    if budget := budget_of(operator):
        return AUTO if budget == "any" else operator
    if operator == PRUNED:
        return operator
    family, name = family_of(operator), operator.removesuffix(SEQUENTIAL)
    if name != operator and family.regressor.reads_mlp:
        raise ValueError(
            f"{operator!r}: {name} reads more than the stream, leave out {SEQUENTIAL!r}"
        )
    check_options(family, {})
    spelling = name if name in FAMILIES else str(family.regressor)
    return spelling + operator.removeprefix(name)


def _layers(layers: Any) -> tuple[int, ...]:
    from ghostlib.models.boundaries import read_layers, runs

    if not isinstance(layers, Iterable):
        raise ValueError(f"layers = {layers}: give sets of layers, such as '12-18' or [(12, 13)]")
    indices = read_layers(layers) if isinstance(layers, str) else layers
    indices = tuple(sorted(whole_number(index, "layer", 0) for index in indices))
    runs(indices, max(indices, default=0) + 2)  # refuses an empty set and repeated layers
    return indices


def _check_name(module: str, registry: str, name: str) -> str:
    """``name``, if a registry has it; the module is imported at the first call."""
    getattr(import_module(module), registry)[name]
    return name


_READ: dict[str, Callable[[Any], Any]] = {
    "n": whole_number,
    "layers": _layers,
    "criteria": partial(_check_name, "ghostlib.selection.criteria", "CRITERIA"),
    "operators": lambda name: canonical(str(name)),
    "probes": partial(_check_name, "ghostlib.evaluation.abilities", "PROBES"),
}
_LEAST = {"test_length": 2, "selection_length": 2, "seed": 0}
