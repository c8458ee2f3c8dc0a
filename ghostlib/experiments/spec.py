"""The specification of an experiment: which model, which layers, which operators, on which text.

Importing this module imports neither torch nor transformers: the command line reads its options.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ghostlib.evaluation.perplexity import ScoredText

DENSE, PRUNED, AUTO, SEQUENTIAL = "dense", "pruned", "auto", " sequential"
DTYPES = ("float32", "bfloat16", "float16", "float64")
_FEW = 8  # windows of a corpus for which nothing is published


@dataclass(frozen=True)
class Specification:
    """What is compared, and on what; a single value serves for a list of one.

    Attributes:
        model: smollm2 (embedded), a local folder, or a hub id.
        dtype: float32, bfloat16 or float16; by default as the model was saved.
        device_map: as for transformers; by default auto where there is a GPU.
        criteria: ways of choosing layers; by default cosine.
        n: how many layers to remove, each in turn; by default 7.
        layers: sets to remove instead of choosing, such as 12-18 or 12-15,17.
        starts: remove every block of this many layers instead.
        operators: families, regressors such as "x, n(x); 1/|y|", either with " sequential" behind
            it; pruned (no repair) and auto (the recipe).
        calibration: corpora the operators are fitted on.
        split: of these corpora, for calibration and selection.
        windows: calibration windows of each corpus.
        length: tokens of a calibration window.
        selection_windows: windows of each corpus that searches score; they follow the others.
        selection_length: tokens of such a window.
        perplexity: corpora that are scored.
        test_split: of these; by default as published, and test.
        test_windows: windows of each; by default as published, and 8 of other corpora.
        test_length: tokens of a test window.
        tasks: zero-shot tasks that are scored: embedded, of lm-eval, or .jsonl files.
        limit: the first so many items of each task; by default all.
        batch_size: sequences in a forward pass of a task.
        seed: which windows are drawn.

    Raises:
        ValueError: an unknown name, a count that cannot be, options that contradict each other, or
            nothing to do; the message names the value.
        FileNotFoundError: a model folder, corpus or task file that is not there.
        ModuleNotFoundError: tasks are asked for and lm-eval is not installed.
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
    selection_length: int = 1024
    perplexity: Sequence[str] = ("wiki", "pydoc")
    test_split: str | None = None
    test_windows: int | None = None
    test_length: int = 2048
    tasks: Sequence[str] = ()
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                listed = [value] if isinstance(value, str | int | Path) else value
                self._set(field.name, [_READ.get(field.name, str)(each) for each in listed])
            elif "int" in str(field.type) and not (value is None and field.default is None):
                count(value, field.name, _LEAST.get(field.name, 1))
        if not (self.layers or self.starts):
            self._set("criteria", self.criteria or ["cosine"])
            self._set("n", self.n or [7])
        elif self.criteria or self.n:
            raise ValueError(
                "layers are given and would be chosen too: leave out criteria and n, or layers and "
                "starts"
            )
        self._check_names()

    def _set(self, name: str, values: list[Any]) -> None:
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{name} has {twice[0]!r} twice: name each once")
        object.__setattr__(self, name, tuple(values))

    def _check_names(self) -> None:
        from ghostlib.evaluation.tasks import check_names
        from ghostlib.models.loading import check_source
        from ghostlib.text.corpora import documents

        check_source(self.model)
        check_dtype(self.dtype)
        check_device(self.device_map)
        for corpus in self.calibration:
            documents(corpus, split=self.split)
        for corpus in self.perplexity:
            documents(corpus, split=self.test_split or "test")
        check_names(self.tasks)
        if not self.calibration:
            raise ValueError("name at least one calibration corpus, such as 'wiki'")
        if not (self.perplexity or self.tasks or self.criteria):
            raise ValueError("nothing to do: name a corpus or task to score, or a criterion")
        if AUTO in self.operators and self.windows * len(self.calibration) < 2:
            raise ValueError(f"windows = {self.windows}: the recipe needs at least 2 in all")

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, in its dtype and place, and its tokenizer; see `ghostlib.load_model`."""
        import torch

        from ghostlib.models.loading import load_model

        placed = self.device_map or ("auto" if torch.cuda.is_available() else None)
        return load_model(self.model, dtype=self.dtype, device_map=placed)

    def identity(self, model: "PreTrainedModel | None" = None) -> dict[str, Any]:
        """Everything that decides the number in a cell, and no path of this machine.

        What is computed is not among it, nor the place of the weights. Without the model, what is
        known before it is loaded.
        """
        listed = ("layers", "starts", "criteria", "n", "operators", "perplexity", "tasks")
        place = ("device_map", "batch_size", "dtype")
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {name: value for name, value in known.items() if name not in (*listed, *place)}
        known |= {"model": shown(self.model), "calibration": [*map(shown, self.calibration)]}
        if model is not None:
            from ghostlib.models.architectures import fingerprint

            dtype = str(model.dtype).removeprefix("torch.")
            known |= {"fingerprint": fingerprint(model), "dtype": dtype}
        return known

    def draw_calibration(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """(corpora x windows, length) token ids, corpus after corpus."""
        return self._draw(tokenizer, 0)[0]

    def draw_selection(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """(corpora x selection_windows, selection_length) ids, which follow those of calibration."""
        return self._draw(tokenizer, self.selection_windows * self.selection_length)[1]

    def draw_test(self, tokenizer: "PreTrainedTokenizerBase", corpus: str) -> "ScoredText":
        """The held-out windows of a corpus."""
        from ghostlib.evaluation.perplexity import PUBLISHED, scored_text

        usual = None if corpus in PUBLISHED else _FEW
        return scored_text(
            tokenizer,
            corpus,
            split=self.test_split,
            length=self.test_length,
            count=self.test_windows or usual,
            seed=self.seed,
        )

    def _draw(self, tokenizer: "PreTrainedTokenizerBase", more: int) -> "tuple[Tensor, Tensor]":
        """Calibration windows, and windows of the ``more`` tokens of each corpus after them."""
        import torch

        from ghostlib.text.corpora import token_windows

        calibration, rest = [], []
        for corpus in self.calibration:
            windows = token_windows(
                corpus,
                tokenizer,
                split=self.split,
                length=self.length,
                count=self.windows + -(-more // self.length),
                seed=self.seed,
            )
            calibration.append(windows[: self.windows])
            rest.append(windows[self.windows :].flatten()[:more].view(-1, self.selection_length))
        return torch.cat(calibration), torch.cat(rest)


def shown(name: str) -> str:
    """A local path by its last part, any other name as it is."""
    return Path(name).name if Path(name).expanduser().exists() else name


def count(value: Any, name: str = "n", least: int = 1) -> int:
    """``value``, if it is a whole number of at least ``least``.

    Raises:
        ValueError: it is not; the message names both.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} = {value!r}: give a whole number of at least {least}")
    return int(value)


def check_dtype(dtype: str | None) -> None:
    """Refuse what is no name of a data type that weights come in."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")


def check_device(device: str | None) -> None:
    """Refuse a device that is not there; ``device_map`` strategies of transformers are known."""
    import torch

    if device in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}): leave it out") from None


def _criterion(name: str) -> str:
    from ghostlib.selection.criteria import CRITERIA

    CRITERIA[name]
    return name


def _set_of_layers(layers: Any) -> tuple[int, ...]:
    from ghostlib.models.boundaries import read_layers, runs

    if isinstance(layers, int):
        raise ValueError(f"layers = {layers}: give sets of layers, such as '12-18' or [(12, 13)]")
    if isinstance(layers, str):
        layers = read_layers(layers)
    listed = tuple(sorted(count(layer, "layer", 0) for layer in layers))
    runs(listed, max(listed, default=0) + 2)  # refuses none, and one named twice
    return listed


def canonical(operator: str) -> str:
    """An operator as results name it, its regressor in the one spelling.

    Raises:
        ValueError: an unknown operator, one that needs an option to be solved, or a sequential fit
            of one that does not act on the stream.
    """
    if operator in (PRUNED, AUTO):
        return operator
    import torch

    from ghostlib.operators.solve import OPERATORS, solve
    from ghostlib.statistics.moments import Moments

    name = operator.removesuffix(SEQUENTIAL)
    suffix = operator.removeprefix(name)
    family, regressor = family_of(operator)
    if suffix and reads_layer(regressor):
        raise ValueError(f"{family} does not act on the stream: leave out {suffix!r}")
    if regressor == "stream":
        eye = torch.eye(4, dtype=torch.float64)  # a family that needs an option says so of any
        solve(Moments(4).update(eye, eye), family)
    return (name if name in OPERATORS else regressor) + suffix


def family_of(operator: str) -> tuple[str, str]:
    """(family, regressor) of an operator: a family's name, or a regressor's spelling.

    Raises:
        ValueError: it is neither; the message lists the families.
    """
    from ghostlib.operators.solve import OPERATORS, REGRESSORS
    from ghostlib.statistics.features import Regressor

    name = operator.removesuffix(SEQUENTIAL)
    if name in OPERATORS:
        return name, REGRESSORS.get(name, "stream")
    try:
        return "branches", str(Regressor.parse(name))
    except ValueError:
        OPERATORS[operator if name == AUTO else name]  # says what there is
        raise


def reads_layer(regressor: str) -> bool:
    """Whether a regressor is of the layer before the gap, and not of the stream alone."""
    return regressor == "mlp"


_READ = {"n": count, "layers": _set_of_layers, "criteria": _criterion, "operators": canonical}
_LEAST = {"test_length": 2, "selection_length": 2, "seed": 0}
