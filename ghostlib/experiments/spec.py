"""The settings of an evaluation: which model, which repairs, on which corpora and tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.evaluation.tasks import EMBEDDED
from ghostlib.models.architectures import fingerprint
from ghostlib.models.loading import load_model
from ghostlib.operators.families import Family
from ghostlib.recovery.recipe import AUTO, TOO_FEW
from ghostlib.selection.criteria import CRITERIA
from ghostlib.text.corpora import find, token_windows

DENSE, PRUNED, SEQUENTIAL = "dense", "pruned", " sequential"


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and on what. A single value serves for a list of one.

    Attributes:
        model: ``"smollm2"``, a local folder, or a hub id. dtype: such as ``"bfloat16"``; by default
            as the model was saved. device_map: as for transformers; by default ``"auto"`` where
            there is a GPU.
        criterion: how layers are chosen, from `CRITERIA`. n: how many, one or several.
        operators: from `FAMILIES`; ``"pruned"`` is no repair, ``"ghost sequential"`` is fitted to
            what the earlier repairs let through, and ``"auto"`` is what a `Recipe` chooses.
        calibration: corpora; their train splits share the windows evenly.
        windows, length: how many calibration windows in all, of how many tokens.
        selection_windows: how many of these choose the layers, from all corpora; None for all.
        perplexity: corpora that are scored. test_windows, test_length: how many windows of each, of
            how many tokens; by default as published (`PUBLISHED`), and 8 of other corpora.
        tasks: for `zero_shot`. limit: the first so many items of each; None for all.
        batch_size: sequences in a forward pass of a task.
        seed: which windows are drawn.

    Raises:
        ValueError: an unknown dtype, criterion, operator or corpus, nothing to do, or counts that
            cannot be; the message names the value.
        FileNotFoundError: a corpus file that is not there.
    """

    model: str = "smollm2"
    dtype: str | None = None
    device_map: str | None = None
    criterion: str = "cosine"
    n: Sequence[int] = (7,)
    operators: Sequence[str] = (PRUNED, "linearpatch-d", "linearpatch-r", "replaceme", "ghost")
    calibration: Sequence[str] = ("wiki", "pydoc")
    windows: int = 32
    length: int = 2048
    selection_windows: int | None = None
    perplexity: Sequence[str] = ("wiki", "pydoc")
    test_windows: int | None = None
    test_length: int = 2048
    tasks: Sequence[str] = tuple(EMBEDDED)
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "operators", "calibration", "perplexity", "tasks"):
            value: Any = getattr(self, name)
            several = tuple([value] if isinstance(value, str | int) else value)
            object.__setattr__(self, name, several)
            names = [named(str(entry)) for entry in several]
            if twice := [entry for entry in names if names.count(entry) > 1]:
                raise ValueError(f"{name} has {twice[0]!r} twice: name each once")
        if self.dtype and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"unknown dtype {self.dtype!r}: use float32, bfloat16 or float16")
        CRITERIA[self.criterion]
        for operator in self.operators:
            if operator not in (PRUNED, AUTO):
                name = operator.removesuffix(SEQUENTIAL)
                Family.of(operator if name == AUTO else name)
        for corpus in (*self.calibration, *self.perplexity):
            find(corpus)
        if not self.calibration or not (self.perplexity or self.tasks):
            raise ValueError("name at least one calibration corpus, and a corpus or task to score")
        least = len(self.calibration)
        for name in ("windows", "selection_windows"):
            count = getattr(self, name)
            if count is not None and not least <= count <= self.windows:
                raise ValueError(
                    f"{name} = {count} must lie between {least} (a window of each corpus) and "
                    f"{max(self.windows, least)}"
                )
        if AUTO in self.operators and self.windows < 2:
            raise ValueError(f"windows = {self.windows}: {TOO_FEW}")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, in its dtype and place, and its tokenizer; see `load_model`."""
        placed = self.device_map or ("auto" if torch.cuda.is_available() else None)
        return load_model(self.model, dtype=self.dtype, device_map=placed)

    def identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """Everything that decides the number in a cell, and no path of this machine.

        Lists of what is computed are not among it, nor is the place of the weights.
        """
        same = ("criterion", "windows", "length", "selection_windows", "test_windows")
        return {
            "model": named(self.model),
            "fingerprint": fingerprint(model),
            "dtype": str(model.dtype),
            "calibration": [named(corpus) for corpus in self.calibration],
            **{name: getattr(self, name) for name in (*same, "test_length", "limit", "seed")},
        }

    def calibration_windows(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """(windows, length) token ids, corpus after corpus; the first ones take what is over."""
        each, over = divmod(self.windows, len(self.calibration))
        return torch.cat(
            [
                token_windows(
                    corpus,
                    tokenizer,
                    length=self.length,
                    count=each + (place < over),
                    seed=self.seed,
                )
                for place, corpus in enumerate(self.calibration)
            ]
        )


def named(name: str) -> str:
    """A local path by its last part, any other name as it is."""
    return Path(name).name if Path(name).expanduser().exists() else name
