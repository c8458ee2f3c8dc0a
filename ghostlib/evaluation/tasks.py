"""Zero-shot accuracy through lm-evaluation-harness, on a model in memory.

Tasks are the harness' own, by name, with the paper's nine (`PAPER_TASKS`); local files of
multiple-choice questions; and two made from the embedded corpus (`EMBEDDED`), which need no hub.
"""

import contextlib
import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import Registry, at_least, checked, quiet, without_retries
from ghostlib.evaluation.items import Item, descriptions, read_items, topics
from ghostlib.evaluation.perplexity import NOT_FINITE
from ghostlib.models.architectures import check_model
from ghostlib.models.streams import evaluating


@dataclass(frozen=True)
class Score:
    """Score of a model on one task.

    Attributes:
        task: name of the task.
        acc: share of items whose right choice has the highest log-likelihood (0 to 1).
        acc_se: its standard error, as the harness computes it; None for a single item.
        acc_norm: as ``acc``, with log-likelihoods divided by the choices' lengths in characters;
            None for tasks that the harness scores without it.
        acc_norm_se: its standard error.
        correct: 1 or 0 for each item, in the task's order.
        correct_norm: the same for ``acc_norm``.
        items: digest of the items.
    """

    task: str
    acc: float
    acc_se: float | None
    acc_norm: float | None
    acc_norm_se: float | None
    correct: Sequence[int]
    correct_norm: Sequence[int] | None
    items: str


@dataclass(frozen=True)
class Difference:
    """Paired difference between the accuracies of two models.

    Attributes:
        difference: accuracy of the first minus accuracy of the second; between -1 and 1.
        low: lower end of its confidence interval.
        high: upper end.
        p_value: p-value of McNemar's exact test that neither is better.
        first_only: number of items that only the first answers right.
        second_only: number of items that only the second answers right.
        n: number of items.
    """

    difference: float
    low: float
    high: float
    p_value: float
    first_only: int
    second_only: int
    n: int


@checked
def paired(
    first: Score, second: Score, *, normed: bool = False, confidence: float = 0.95
) -> Difference:
    """Compare two models on the same items of one task.

    Items that both answer alike do not widen the interval, which is narrower than for two separate
    accuracies. It is the normal approximation with half an item added to each of the four cells of
    the paired table (Agresti and Min, 2005), which keeps its coverage for few items and for models
    that never disagree.

    Args:
        first: `Score` of one model, from `zero_shot`.
        second: `Score` of another, on the same task with the same ``limit``.
        normed: compare ``acc_norm`` instead of ``acc``.
        confidence: confidence level of the interval.

    Raises:
        ValueError: scores of different items, a task without ``acc_norm``, or a confidence that is
            not between 0 and 1.

    >>> answers = [1, 1, 1, 0], [1, 0, 0, 0]
    >>> dense, pruned = (Score("quiz", sum(a) / 4, None, None, None, a, None, "") for a in answers)
    >>> result = paired(dense, pruned)
    >>> result.difference, result.first_only, result.p_value
    (0.5, 2, 0.5)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if first.items != second.items:
        raise ValueError(
            f"scores of different items ({first.task}: {len(first.correct)}, {second.task}: "
            f"{len(second.correct)}): compare one task with one limit"
        )
    a, b = (score.correct_norm if normed else score.correct for score in (first, second))
    if a is None or b is None:
        raise ValueError(f"task {first.task!r} is scored without acc_norm: use normed=False")
    gained = int(np.sum(np.greater(a, b)))
    lost = int(np.sum(np.less(a, b)))
    n = len(a) + 2  # Agresti and Min: two items more, half of one in each cell
    centre = (gained - lost) / n
    variance = (gained + lost + 1) / n - centre**2
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt(variance) / np.sqrt(n)
    return Difference(
        difference=(gained - lost) / len(a),
        low=max(float(centre - half), -1.0),
        high=min(float(centre + half), 1.0),
        p_value=float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        first_only=gained,
        second_only=lost,
        n=len(a),
    )


PAPER_TASKS = (
    *("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq"),
    *("openbookqa", "rte", "copa", "race"),
)
EMBEDDED: Registry[Callable[[], list[Item]]] = Registry("embedded task")
EMBEDDED["wiki-description"] = descriptions
EMBEDDED["wiki-topic"] = topics

_INSTEAD = f"use {' or '.join(EMBEDDED)}, or the path of a .jsonl of {{query, choices, gold}}"


@checked
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Path | Sequence[str | Path] = tuple(EMBEDDED),
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Score]:
    """Accuracy of a model on multiple-choice tasks, without examples in the prompt.

    A choice is scored by the log-likelihood of a space and the choice, after the query. The harness
    drops the beginning of a query that is longer than the model's context.

    Args:
        model: any causal LM, dense or recovered; it is scored in evaluation mode, and its own mode
            is restored.
        tokenizer: its tokenizer.
        tasks: names of `EMBEDDED` tasks or of the harness' own, or paths of ``.jsonl`` files (see
            `read_items`), each named by the stem of its file.
        limit: number of items of each task, from the first; None for all.
        batch_size: sequences per forward pass; an item has one for each choice.

    Returns:
        ``{task: Score}``, with the members of a group of tasks.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: an unknown task, an invalid file (the message names the line), a task without
            accuracy, two of one name, no task, a ``limit`` or ``batch_size`` below 1, or a
            log-likelihood that is infinite or not a number.
        FileNotFoundError: no such file.
        ConnectionError: a task's data cannot be read from the hub.
        ghostlib.text.assets.AssetError: an embedded task without its corpus.
    """
    check_model(model)
    at_least(1, limit=limit, batch_size=batch_size)
    sources = [tasks] if isinstance(tasks, str | Path) else list(tasks)
    if not sources:
        raise ValueError(f"no task to score: {_INSTEAD}")
    lm_eval, huggingface = _harness()
    with _silence(), evaluating(model):
        loaded = [task for source in sources for task in _load(source)]
        names = [task.task_name for task in loaded]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"two tasks are called {min(twice)!r}: name each once, by its own name"
            )
        lm = huggingface.HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # the harness sets its padding token
            backend="causal",  # the harness does not know the type of a recovered model
            batch_size=batch_size,
        )
        results = lm_eval.simple_evaluate(
            lm,
            tasks=loaded,
            task_manager=_manager(False),
            limit=limit,
            # nothing is random: the harness must not set the caller's random state
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed")),
        )
    return {task: _score(task, results) for task in results["samples"]}


def check_tasks(tasks: Sequence[str | Path]) -> None:
    """Raise the error of `zero_shot` for tasks it cannot load, before hours of other work."""
    if tasks:
        _harness()
    with _silence():
        for task in tasks:
            _load(task)


def check_names(tasks: Sequence[str | Path]) -> None:
    """Refuse unknown tasks, without reading any data from the hub.

    Raises:
        ModuleNotFoundError: a task of the harness, while lm-eval is not installed.
        ValueError: an unknown task, or an invalid file (the message names the line).
        FileNotFoundError: no such file.
    """
    for task in map(str, tasks):
        if task.endswith(".jsonl"):
            read_items(task)
        elif task not in EMBEDDED:
            _harness()
            _check_known(task)


def _harness() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models import huggingface
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"zero-shot tasks need lm-eval ({error}): pip install 'ghostlib[eval]'"
        ) from error
    return lm_eval, huggingface


@cache
def _manager(everything: bool) -> Any:
    """The harness' index, without its tasks or with all fourteen thousand, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)


def _load(task: str | Path) -> list[Any]:
    """The harness' task objects for a name or a path."""
    name = str(task)
    if name in EMBEDDED:
        return [_task_of(name, EMBEDDED[name]())]
    if isinstance(task, Path) or name.endswith(".jsonl"):
        return [_task_of(Path(name).stem, read_items(name))]
    _check_known(name)
    # datasets raises a dozen kinds of errors for unreachable, missing and unreadable data.
    trouble = ""
    try:
        with without_retries() as trouble:
            return list(_manager(True).load([name])["tasks"].values())
    except Exception as error:
        first = (str(trouble or error).splitlines() or [""])[0]
        raise ConnectionError(
            f"task {name!r} could not be read from the Hugging Face hub "
            f"({type(error).__name__}: {first}): without network {_INSTEAD}"
        ) from error


def _check_known(name: str) -> None:
    tasks = _manager(True).all_tasks
    if name not in tasks:
        names = list(dict.fromkeys([*EMBEDDED, *PAPER_TASKS, *tasks]))
        close = get_close_matches(name, names, n=3) or [*EMBEDDED, *PAPER_TASKS]
        raise ValueError(f"unknown task {name!r}; near are {', '.join(close)}; or {_INSTEAD}")


def _task_of(name: str, items: list[Item]) -> Any:
    """A task of the harness, made from items."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in ("acc", "acc_norm")
            ],
        }
    )


def _score(task: str, results: Any) -> Score:
    """The `Score` of one task from the results of the harness."""
    totals = results["results"][task]
    if "acc,none" not in totals:
        raise ValueError(f"task {task!r} has no accuracy: zero_shot is for multiple-choice tasks")
    items = sorted(results["samples"][task], key=lambda item: item["doc_id"])
    for item in items:
        # (log-likelihood, whether it is the most likely continuation) of each choice
        if not all(math.isfinite(likelihood) for likelihood, _ in item["filtered_resps"]):
            where = f"task {task!r}, item {item['doc_id']}"
            raise ValueError(f"{where}: a log-likelihood is not finite; {NOT_FINITE}")

    def total(name: str) -> float | None:
        value = totals.get(f"{name},none")
        return float(value) if isinstance(value, float) else None  # "N/A": one item's error

    normed = "acc_norm,none" in totals
    return Score(
        task=task,
        acc=float(totals["acc,none"]),
        acc_se=total("acc_stderr"),
        acc_norm=total("acc_norm"),
        acc_norm_se=total("acc_norm_stderr"),
        correct=[int(item["acc"]) for item in items],
        correct_norm=[int(item["acc_norm"]) for item in items] if normed else None,
        items=hashlib.sha256("".join(item["doc_hash"] for item in items).encode()).hexdigest(),
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No log of the harness; its progress bars only where ghostlib may draw its own.

    The harness must not describe the machine either: a part of its results that nobody reads, and
    one second per task.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), patch("torch.utils.collect_env.get_pretty_env_info", str):
            yield
    finally:
        logger.setLevel(level)
